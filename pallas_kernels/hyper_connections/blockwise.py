"""mHC in the forms that are fast without a kernel: sums over the few streams written out, the sequence on the last axis of
the Sinkhorn iteration, gradients of the sums as one einsum.

Axis letters: B batch   S sequence   N, j, k streams   D hidden size
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def _sinkhorn(logits_NNX, *, iterations, eps):
  """[N, N, ...] logits, tokens last: every step is one wide vector operation. Axis 1 is the row sum's, axis 0 the column's."""
  comb = jax.nn.softmax(logits_NNX, 1) + eps
  comb = comb / (comb.sum(0, keepdims=True) + eps)

  def round_(comb, _):
    comb = comb / (comb.sum(1, keepdims=True) + eps)
    return comb / (comb.sum(0, keepdims=True) + eps), None

  return jax.lax.scan(round_, comb, length=iterations - 1)[0]


@jax.custom_vjp
def _weighted_sum(x_BSND, weight_BSN):
  return sum(weight_BSN[:, :, j, None] * x_BSND[:, :, j] for j in range(x_BSND.shape[2]))


def _weighted_sum_backward(saved, g_BSD):
  x_BSND, weight_BSN = saved
  return weight_BSN[..., None] * g_BSD[:, :, None], jnp.einsum("BSND,BSD->BSN", x_BSND, g_BSD)


_weighted_sum.defvjp(lambda *args: (_weighted_sum(*args), args), _weighted_sum_backward)


def collapse(streams_BSND, fn, base, scale, *, norm_eps, eps, iterations):
  """See `pallas_kernels.hyper_connections.collapse`."""
  exact = jnp.promote_types(streams_BSND.dtype, jnp.float32)
  x_BSND = streams_BSND.astype(exact)
  batch, length, n, _ = x_BSND.shape
  flat = x_BSND.reshape(batch, length, -1)
  # The norm's factor is one number per token, so it may follow the matmul: the streams are read once, not twice.
  u = (flat @ fn.astype(exact)) * jax.lax.rsqrt((flat * flat).mean(-1, keepdims=True) + norm_eps)
  pre_BSN = jax.nn.sigmoid(u[..., :n] * scale[0] + base[:n]) + eps
  post_BSN = 2 * jax.nn.sigmoid(u[..., n:2 * n] * scale[1] + base[n:2 * n])
  logits = u[..., 2 * n:] * scale[2] + base[2 * n:]
  comb_NNX = _sinkhorn(logits.reshape(batch * length, n * n).T.reshape(n, n, -1), iterations=iterations, eps=eps)
  comb_BSNN = comb_NNX.reshape(n * n, -1).T.reshape(batch, length, n, n)
  return _weighted_sum(x_BSND, pre_BSN).astype(streams_BSND.dtype), post_BSN, comb_BSNN


@jax.custom_vjp
def expand(streams_BSND, update_BSD, post_BSN, comb_BSNN):
  """See `pallas_kernels.hyper_connections.expand`."""
  exact, n = comb_BSNN.dtype, streams_BSND.shape[2]
  x, y = streams_BSND.astype(exact), update_BSD.astype(exact)
  new = [post_BSN[..., k, None] * y + sum(comb_BSNN[..., j, k, None] * x[:, :, j] for j in range(n)) for k in range(n)]
  return jnp.stack(new, 2).astype(streams_BSND.dtype)


def _expand_backward(saved, g_BSND):
  streams_BSND, update_BSD, post_BSN, comb_BSNN = saved
  exact, n = comb_BSNN.dtype, streams_BSND.shape[2]
  g = g_BSND.astype(exact)
  d_streams = jnp.stack([sum(comb_BSNN[..., j, k, None] * g[:, :, k] for k in range(n)) for j in range(n)], 2)
  d_update = sum(post_BSN[..., k, None] * g[:, :, k] for k in range(n))
  # All dot products over D at once: rows are the streams and the update, columns the new streams.
  rows = jnp.concatenate([streams_BSND.astype(exact), update_BSD[:, :, None].astype(exact)], 2)
  d_BSjk = jnp.einsum("BSjD,BSkD->BSjk", rows, g)
  return d_streams.astype(streams_BSND.dtype), d_update.astype(update_BSD.dtype), d_BSjk[:, :, n], d_BSjk[:, :, :n]


expand.defvjp(lambda *args: (expand(*args), args), _expand_backward)
