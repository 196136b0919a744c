"""Partial rotary embedding on the last channels of a head, its inverse, and the two frequency tables (report 2.3.3).

Sliding layers rotate with base 10000; layers with compressed entries with base 160000 stretched by YaRN (Peng et al. 2023).
Pairs are the interleaved channels (2i, 2i+1) of the trailing `qk_rope_head_dim`.

Axis letters: r rotary channels (the last ones of a head)
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_v4.config import SLIDING, ModelConfig


def frequencies(config: ModelConfig, attention: str) -> np.ndarray:
  """Angle per position of each channel pair, float64 [r / 2], for a layer of this attention kind.

  YaRN (no change of amplitude): f' = f / factor * ramp + f * (1 - ramp), the ramp over the pair number between the two
  correction indices.
  """
  r = config.qk_rope_head_dim
  base = config.rope_theta if attention == SLIDING else config.compress_rope_theta
  f = float(base) ** (-np.arange(0, r, 2) / r)
  yarn = config.rope_scaling
  if attention == SLIDING or yarn is None:
    return f

  def correction(rotations: float) -> float:
    return r * math.log(yarn.original_max_position_embeddings / (2 * math.pi * rotations)) / (2 * math.log(base))

  low, high = max(math.floor(correction(yarn.beta_fast)), 0), min(math.ceil(correction(yarn.beta_slow)), r - 1)
  ramp = np.clip((np.arange(r // 2) - low) / max(high - low, 0.001), 0, 1)
  return f / yarn.factor * ramp + f * (1 - ramp)


def angles(config: ModelConfig, attention: str, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(cos, sin) of shape [*positions.shape, r / 2], at least float32, at integer positions of any shape."""
  exact = jnp.promote_types(config.compute_dtype, jnp.float32)
  # Frequencies are rounded to float32 first: the angle at position 10^6 depends on that rounding, and releases use it.
  table = jnp.asarray(frequencies(config, attention).astype(np.float32), exact)
  phase = positions[..., None].astype(exact) * table
  return jnp.cos(phase), jnp.sin(phase)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array, *, inverse: bool = False) -> jax.Array:
  """Rotates the trailing channels: (e, o) -> (e cos - o sin, o cos + e sin); `inverse` turns back.

  Args:
    x: [..., d], floating, its dtype kept; leading axes that broadcast with those of cos and sin.
    cos, sin: [..., r / 2] of `angles`, at least float32, the precision of the rotation.
  """
  sin = -sin if inverse else sin
  r = 2 * cos.shape[-1]
  plain, turned = x[..., :-r], x[..., -r:].astype(cos.dtype)
  # A pair's channels change places by an exact product with a permutation. Taken apart, or shifted, they would be arrays of
  # one or two channels, which a TPU pads to 128 each.
  swap = jnp.asarray(np.eye(r)[np.arange(r) ^ 1], cos.dtype)
  other = jnp.matmul(turned, swap, precision="highest")
  both = lambda x: jnp.repeat(x, 2, -1)
  turned = turned * both(cos) + other * (both(sin) * jnp.asarray(np.resize([-1, 1], r), cos.dtype))
  return jnp.concatenate([plain, turned.astype(x.dtype)], -1)
