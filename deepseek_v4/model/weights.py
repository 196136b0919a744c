"""How modules get their parameters: one initial distribution (V3 4.2), the compute dtype, and the layout that a matmul
wants."""

from __future__ import annotations

from typing import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from deepseek_v4 import sharding
from deepseek_v4.config import ModelConfig


def matrix(module: nn.Module, config: ModelConfig, name: str, shape: tuple[int, ...],
           prepared: Callable[[jax.Array], jax.Array] | None = None) -> jax.Array:
  """A float32 parameter of this shape, normal with `config.init_std`, cast to `config.compute_dtype` and gathered for use.

  `prepared` stands for the cast: what becomes of the parameter, part by part, before it is gathered.
  """
  weight = module.param(name, nn.initializers.normal(config.init_std), shape, jnp.float32)
  weight = cast(weight, config.compute_dtype) if prepared is None else prepared(weight)
  return sharding.gathered(weight, (*module.path, name))


def stored(module: nn.Module, config: ModelConfig, name: str, shape: tuple[int, ...]) -> jax.Array:
  """A parameter as `matrix`, not cast but where the compute dtype is wider than what it is stored in."""
  weight = module.param(name, nn.initializers.normal(config.init_std), shape, jnp.float32)
  weight = jnp.asarray(weight, jnp.promote_types(weight.dtype, config.compute_dtype))
  return sharding.gathered(weight, (*module.path, name))


def cast(weight: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
  """`weight` (any shape) in another dtype, to the nearest, ties to even; the gradient is cast back.

  float32 becomes bfloat16 by its bits. Of a plain cast inside a loop over layers the TPU's compiler makes one in front of it
  (its bfloat16 propagation goes through loops and barriers), and a copy of all layers' weights then stays through the step.
  """
  weight = jnp.asarray(weight)
  by_bits = weight.dtype == jnp.float32 and jnp.dtype(dtype) == jnp.bfloat16
  return _nearest(weight) if by_bits else weight.astype(dtype)


@jax.custom_vjp
def _nearest(x: jax.Array) -> jax.Array:
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  upper = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # a carry makes it the next number, of the largest ones infinity
  upper = jnp.where(bits & 0x7FFFFFFF > 0x7F800000, 0x7FC0, upper)  # NaN
  nearest = jax.lax.bitcast_convert_type(upper.astype(jnp.uint16), jnp.bfloat16)
  # Else the TPU's compiler gathers the integers, which SparseCores do not take, so that the program waits for them.
  return jax.lax.optimization_barrier(nearest) if sharding.splits_weights() else nearest


_nearest.defvjp(lambda x: (_nearest(x), None), lambda _, d: (d.astype(jnp.float32),))


def exact(module: nn.Module, config: ModelConfig, name: str, shape: tuple[int, ...],
          init: Callable | None = None) -> jax.Array:
  """A parameter of this shape that is used in float32 (or wider): norms, sinks, biases, the router's gate, mHC
  coefficients."""
  init = nn.initializers.normal(config.init_std) if init is None else init
  weight = module.param(name, init, shape, jnp.float32)
  return sharding.gathered(jnp.asarray(weight, exact_dtype(config)), (*module.path, name))


def exact_dtype(config: ModelConfig) -> jnp.dtype:
  """At least float32: the precision of norms, scores, statistics and losses."""
  return jnp.promote_types(config.compute_dtype, jnp.float32)


def check_dtype(config: ModelConfig) -> None:
  """Refuses a compute dtype that JAX would silently narrow.

  Raises:
    ValueError: float64 without `jax_enable_x64`.
  """
  if jax.dtypes.canonicalize_dtype(config.compute_dtype) != jnp.dtype(config.compute_dtype):
    raise ValueError(f"compute_dtype = {config.compute_dtype!r}: expected jax_enable_x64 = True beside it, or float32")
