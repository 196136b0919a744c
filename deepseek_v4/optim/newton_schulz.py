"""Newton-Schulz: the nearest orthogonal matrix by matrix products alone (DeepSeek-V4 report 2.4, algorithm 1).

R rows and C columns of a matrix that is at least as wide as tall; S the rows again.
"""

from __future__ import annotations

from typing import Any, Sequence

import jax
import jax.numpy as jnp

# One step maps every singular value s to a s + b s^3 + c s^5. Eight steps that lift small values fast, then two that settle
# at 1. The order matters: swapped, or the first kind alone, the values stay spread over 0.68 to 1.18.
COEFFICIENTS = ((3.4445, -4.7750, 2.0315),) * 8 + ((2.0, -1.5, 0.5),) * 2


def normalize(x: jax.Array) -> jax.Array:
  """Each matrix of x [..., n, m] over its Frobenius norm; a zero matrix stays zero, a non-finite one becomes NaN.

  The largest entry is divided out first: the squares of gradients below 1e-19 vanish in float32.
  """
  largest = jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True)
  x = x / jnp.where(largest == 0, 1, largest)
  norm = jnp.sqrt(jnp.sum(jnp.square(x), axis=(-2, -1), keepdims=True))
  return x / jnp.maximum(norm, 1)  # an entry is 1 now, so only a zero matrix has a norm below 1


def flops(rows: int, columns: int, steps: int = len(COEFFICIENTS)) -> int:
  """Of `newton_schulz` on one matrix: three products a step, a multiplication and an addition for each term."""
  short, long = sorted((rows, columns))
  return steps * (4 * short * short * long + 2 * short**3)


def newton_schulz(x: jax.Array, *, dtype: jax.typing.DTypeLike = jnp.float32,
                  coefficients: Sequence[tuple[float, float, float]] = COEFFICIENTS) -> jax.Array:
  """Replaces every matrix U diag(s) V^T of a batch by U V^T, up to the iteration's accuracy.

  Args:
    x: [..., n, m], floating; the leading axes are a batch.
    dtype: of the operands of the matrix products: float32 (precision "highest"; float64 for float64 input) or bfloat16.
      Sums, the iterate and the coefficients are float32 or wider either way.
    coefficients: (a, b, c) of each step.

  Returns:
    Like x. Singular values are 1 within 0.002 (float32) or 0.02 (bfloat16) where s / frobenius(x) is above about 1e-4;
    smaller ones grow by at most the product of the a's (8e4), so that noise stays below 1.

  Raises:
    ValueError: x has fewer than two axes or no floating dtype.
  """
  if x.ndim < 2 or not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(f"x = {x.dtype}{list(x.shape)}: expected floating [..., n, m]")
  wide = jnp.promote_types(x.dtype, jnp.float32)
  operand = wide if jnp.dtype(dtype) == jnp.float32 else jnp.dtype(dtype)

  precision = "highest" if operand == wide else None

  def product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(equation, a.astype(operand), b.astype(operand), precision=precision, preferred_element_type=wide)

  def step(y: jax.Array, abc: jax.Array) -> Any:
    a, b, c = abc
    gram = product("...RC,...SC->...RS", y, y)
    polynomial = b * gram + c * product("...RS,...ST->...RT", gram, gram)
    return a * y + product("...RS,...SC->...RC", polynomial, y), None

  tall = x.shape[-2] > x.shape[-1]
  y = normalize(x.astype(wide))
  y = y.swapaxes(-2, -1) if tall else y  # the Gram matrix is that of the smaller side
  y, _ = jax.lax.scan(step, y, jnp.asarray(coefficients, wide))
  return (y.swapaxes(-2, -1) if tall else y).astype(x.dtype)
