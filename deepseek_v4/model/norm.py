"""RMS normalisation, with and without a weight; statistics at least in float32."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from deepseek_v4.config import ModelConfig
from deepseek_v4.model import weights


def rms_norm(x: jax.Array, scale: jax.Array | None, eps: float) -> jax.Array:
  """x * rsqrt(mean(x^2) + eps) * scale over the last axis, in float32 or wider, cast back once.

  Args:
    x: [..., D].
    scale: [D], or None for the weightless norm of query heads and mHC.
    eps: added to the mean square.
  """
  exact = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  exact = exact * jax.lax.rsqrt((exact * exact).mean(-1, keepdims=True) + eps)
  return (exact if scale is None else exact * scale).astype(x.dtype)


class RMSNorm(nn.Module):
  """RMS norm with a weight, initially 1."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale = weights.exact(self, self.config, "scale", (x.shape[-1],), nn.initializers.ones)
    return rms_norm(x, scale, self.config.rms_norm_eps)
