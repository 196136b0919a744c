"""Sinkhorn iteration (report 2.2, eq. 8) and its gradient, apart from the streams: 20 dependent rounds on 16 numbers per
token.

A register holds one matrix entry of 1,024 tokens, so sums over rows and columns are plain additions of registers. Inside
the kernels that read the streams a block has too few tokens to hide the latency of the rounds; here all of it costs about a
hundredth of their time, and the logits and their gradients are a few bytes per token beside the streams.

Axis letters: N, j, k streams   R rows of 128 tokens
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu

ROW, COLUMN = 1, 0  # the axis to sum over
_TOKENS = tpu.SUBLANES * tpu.LANES


def _normalised(comb, axis, eps):
  """comb / (sum + eps) and 1 / (sum + eps)."""
  inverse = 1 / (comb.sum(axis, keepdims=True) + eps)
  return comb * inverse, inverse


def _softmax(logits):
  e = jnp.exp(logits - logits.max(ROW, keepdims=True))
  return e / e.sum(ROW, keepdims=True)


def _forward(logits, comb, *, iterations, eps):
  def round_(_, m):
    return _normalised(_normalised(m, ROW, eps)[0], COLUMN, eps)[0]
  start = _normalised(_softmax(logits[...]) + eps, COLUMN, eps)[0]
  comb[...] = lax.fori_loop(0, iterations - 1, round_, start)


def _backward(logits, d_comb, d_logits, matrices, inverses, *, iterations, eps):
  def kept(step, m, axis):
    m, inverse = _normalised(m, axis, eps)
    matrices[step], inverses[step] = m, inverse.reshape(inverses.shape[1:])
    return m

  def pulled(step, g, axis):
    """Through m' = m / (sum m + eps): (g - sum g m') / (sum m + eps)."""
    return (g - (g * matrices[step]).sum(axis, keepdims=True)) * jnp.expand_dims(inverses[step], axis)

  softmax = _softmax(logits[...])
  m = kept(0, softmax + eps, COLUMN)
  lax.fori_loop(0, iterations - 1, lambda i, m: kept(2 * i + 2, kept(2 * i + 1, m, ROW), COLUMN), m)
  last = iterations - 1

  def round_(i, g):
    return pulled(2 * (last - i) - 1, pulled(2 * (last - i), g, COLUMN), ROW)

  g = pulled(0, lax.fori_loop(0, last, round_, d_comb[...]), COLUMN)
  d_logits[...] = softmax * (g - (g * softmax).sum(ROW, keepdims=True))


def _call(body, scratch, interpret, *arrays):
  n, _, rows, lanes = arrays[0].shape
  block = pl.BlockSpec((n, n, tpu.SUBLANES, lanes), lambda i: (0, 0, i, 0))
  return pl.pallas_call(
      body, grid=(rows // tpu.SUBLANES,), in_specs=[block] * len(arrays), out_specs=block,
      out_shape=jax.ShapeDtypeStruct(arrays[0].shape, jnp.float32), scratch_shapes=scratch, interpret=interpret,
      compiler_params=tpu.compiler_params(tpu.current_chip(interpret), "parallel"), name="sinkhorn",
  )(*arrays)


def sinkhorn(logits_NNR: jax.Array, *, iterations: int, eps: float, interpret: bool) -> jax.Array:
  """float32 [N, N, R, 128] -> [N, N, R, 128], R a multiple of 8."""
  return _call(functools.partial(_forward, iterations=iterations, eps=eps), [], interpret, logits_NNR)


def sinkhorn_backward(logits_NNR: jax.Array, d_comb_NNR: jax.Array, *, iterations: int, eps: float,
                      interpret: bool) -> jax.Array:
  """Gradient of the logits, float32 [N, N, R, 128] as both arguments; the matrices of all half rounds are computed
  again and stay in VMEM."""
  n, steps = logits_NNR.shape[0], 2 * iterations - 1
  tile = (tpu.SUBLANES, tpu.LANES)
  scratch = [pltpu.VMEM((steps, n, n, *tile), jnp.float32), pltpu.VMEM((steps, n, *tile), jnp.float32)]
  body = functools.partial(_backward, iterations=iterations, eps=eps)
  return _call(body, scratch, interpret, logits_NNR, d_comb_NNR)


def to_columns(x_TU: jax.Array) -> jax.Array:
  """float32 [T, U] -> [U, R, 128], zeros behind the last token."""
  x_UT = tpu.pad_axis(x_TU.T, 1, tpu.round_up(x_TU.shape[0], _TOKENS))
  return x_UT.reshape(x_UT.shape[0], -1, tpu.LANES)


def from_columns(x_UR: jax.Array, tokens: int) -> jax.Array:
  """The inverse of `to_columns`, float32."""
  return x_UR.reshape(x_UR.shape[0], -1)[:, :tokens].T
