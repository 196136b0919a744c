"""RMS normalisation (Zhang and Sennrich 2019; where V4 has it: report 2.2, 2.3.3), with and without a weight; statistics at
least in float32."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from deepseek_v4.config import ModelConfig
from deepseek_v4.model import weights


def rms_norm(x: jax.Array, scale: jax.Array | None, eps: float) -> jax.Array:
  """x * rsqrt(mean(x^2) + eps) * scale over the last axis, in float32 or wider, cast back once.

  Args:
    x: [..., D], floating, its dtype kept.
    scale: [D], at least float32, or None for the weightless norm of query heads and mHC.
    eps: added to the mean square.
  """
  if scale is not None:
    return _scaled_norm(x, scale, eps)
  exact = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  return (exact * _inverse_rms(exact, eps)).astype(x.dtype)


def _inverse_rms(exact: jax.Array, eps: float) -> jax.Array:
  return jax.lax.rsqrt((exact * exact).mean(-1, keepdims=True) + eps)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _scaled_norm(x, scale, eps):
  exact = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  return (exact * _inverse_rms(exact, eps) * scale).astype(x.dtype)


def _scaled_norm_backward(eps, saved, g):
  x, scale = saved
  exact, g = x.astype(scale.dtype), g.astype(scale.dtype)
  inverse = _inverse_rms(exact, eps)
  normed, gs = exact * inverse, g * scale
  d_x = inverse * (gs - normed * (gs * normed).mean(-1, keepdims=True))
  # A matmul with ones sums over tokens: XLA's CPU compiler does column sums ten times slower.
  # Its axes stay apart: a mesh may split each of them, and tokens in one axis would have to be gathered.
  products, axes = g * normed, tuple(range(g.ndim - 1))
  ones = jnp.ones((1, *products.shape[:-1]), products.dtype)
  d_scale = jax.lax.dot_general(ones, products, ((tuple(a + 1 for a in axes), axes), ((), ())), precision="highest")[0]
  return d_x.astype(x.dtype), d_scale


_scaled_norm.defvjp(lambda x, scale, eps: (_scaled_norm(x, scale, eps), (x, scale)), _scaled_norm_backward)


class RMSNorm(nn.Module):
  """RMS norm with a weight, initially 1."""

  config: ModelConfig

  def __call__(self, x: jax.Array) -> jax.Array:
    """x [..., D], floating -> the same shape and dtype, see `rms_norm`."""
    return rms_norm(x, self.weight(x.shape[-1]), self.config.rms_norm_eps)

  @nn.compact
  def weight(self, width: int) -> jax.Array:
    """The weight [width] alone, at least float32, for code that norms where no module can be called."""
    return weights.exact(self, self.config, "scale", (width,), nn.initializers.ones)
