"""mHC (report 2.2, eqs. 1-8) over blocks of tokens, with written or recomputed gradients: streams are read block by block,
nothing else is kept.

Blocks are loops on purpose: inside one, XLA's CPU compiler fuses; across its border it cannot, and so does not repeat the
long sums over streams inside every consumer. Sums over the few streams are written out, the tokens stand on the last axis
of the Sinkhorn iteration, and all dot products over D are one einsum: the forms that are fast without a kernel.

Axis letters: B batch   S sequence   N, j, k streams   D hidden size   X blocks   C tokens of a block
Dtypes: streams and updates any floating one, which collapsed streams and new ones keep; fn, base and scale floating;
        post, comb and all sums float32 or wider.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import blocks

_TOKENS_PER_BLOCK = 256


def _cut(x_BS: jax.Array) -> jax.Array:
  """[B, S, ...] -> [X, C, ...], the last block filled with zeros."""
  flat = x_BS.reshape(1, x_BS.shape[0] * x_BS.shape[1], *x_BS.shape[2:])
  return blocks.cut(flat, min(_TOKENS_PER_BLOCK, flat.shape[1]))


def _join(x_XC: jax.Array, batch: int, length: int) -> jax.Array:
  return blocks.join(x_XC, 1, batch * length).reshape(batch, length, *x_XC.shape[2:])


def _sinkhorn(logits_NNC, *, iterations, eps):
  """[N, N, C] logits, tokens last: every step is one wide vector operation. Axis 1 is the row sum's, axis 0 the column's."""
  comb = jax.nn.softmax(logits_NNC, 1) + eps
  comb = comb / (comb.sum(0, keepdims=True) + eps)

  def round_(comb, _):
    comb = comb / (comb.sum(1, keepdims=True) + eps)
    return comb / (comb.sum(0, keepdims=True) + eps), None

  return jax.lax.scan(round_, comb, length=iterations - 1)[0]


@jax.custom_vjp
def _weighted_sum(x_CND, weight_CN):
  return sum(weight_CN[:, j, None] * x_CND[:, j] for j in range(x_CND.shape[1]))


def _weighted_sum_backward(saved, g_CD):
  x_CND, weight_CN = saved
  return weight_CN[..., None] * g_CD[:, None], jnp.einsum("CND,CD->CN", x_CND, g_CD, precision="highest")


_weighted_sum.defvjp(lambda *args: (_weighted_sum(*args), args), _weighted_sum_backward)


def _collapse_block(streams_CND, fn, base, scale, norm_eps, eps, iterations):
  """Collapse of one block: [C, D], [C, N], [C, N, N]."""
  exact = jnp.promote_types(streams_CND.dtype, jnp.float32)
  x_CND = streams_CND.astype(exact)
  size, n, _ = x_CND.shape
  flat = x_CND.reshape(size, -1)
  # The norm's factor is one number per token, so it may follow the matmul.
  u = jnp.matmul(flat, fn.astype(exact), precision="highest")
  u = u * jax.lax.rsqrt((flat * flat).mean(-1, keepdims=True) + norm_eps)
  pre_CN = jax.nn.sigmoid(u[:, :n] * scale[0] + base[:n]) + eps
  post_CN = 2 * jax.nn.sigmoid(u[:, n:2 * n] * scale[1] + base[n:2 * n])
  logits = u[:, 2 * n:] * scale[2] + base[2 * n:]
  comb_NNC = _sinkhorn(logits.T.reshape(n, n, size), iterations=iterations, eps=eps)
  comb_CNN = comb_NNC.reshape(n * n, size).T.reshape(size, n, n)
  return _weighted_sum(x_CND, pre_CN).astype(streams_CND.dtype), post_CN, comb_CNN


def collapse(streams_BSND: jax.Array, fn: jax.Array, base: jax.Array, scale: jax.Array, *, norm_eps: float, eps: float,
             iterations: int) -> tuple[jax.Array, jax.Array, jax.Array]:
  """See `pallas_kernels.hyper_connections.collapse`."""
  return _collapse(streams_BSND, fn, base, scale, (norm_eps, eps, iterations))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _collapse(streams_BSND, fn, base, scale, static):
  results = jax.lax.map(lambda x: _collapse_block(x, fn, base, scale, *static), _cut(streams_BSND))
  return tuple(_join(x, *streams_BSND.shape[:2]) for x in results)


def _collapse_backward(static, saved, gradients):
  streams_BSND, fn, base, scale = saved

  def one(carry, item):
    x_CND, *d_results = item
    _, pull = jax.vjp(lambda *args: _collapse_block(*args, *static), x_CND, fn, base, scale)
    d_x, *d_weights = pull(tuple(d_results))
    return tuple(a + b for a, b in zip(carry, d_weights)), d_x

  zeros = tuple(map(jnp.zeros_like, (fn, base, scale)))
  d_weights, d_streams = jax.lax.scan(one, zeros, (_cut(streams_BSND), *map(_cut, gradients)))
  return _join(d_streams, *streams_BSND.shape[:2]), *d_weights


_collapse.defvjp(lambda *args: (_collapse(*args), args[:4]), _collapse_backward)


def _expand_block(streams_CND, update_CD, post_CN, comb_CNN):
  exact, n = comb_CNN.dtype, streams_CND.shape[1]
  x, y = streams_CND.astype(exact), update_CD.astype(exact)
  new_CND = post_CN[..., None] * y[:, None] + sum(comb_CNN[:, j, :, None] * x[:, j, None] for j in range(n))
  return new_CND.astype(streams_CND.dtype)


@jax.custom_vjp
def expand(streams_BSND: jax.Array, update_BSD: jax.Array, post_BSN: jax.Array, comb_BSNN: jax.Array) -> jax.Array:
  """See `pallas_kernels.hyper_connections.expand`."""
  items = tuple(map(_cut, (streams_BSND, update_BSD, post_BSN, comb_BSNN)))
  return _join(jax.lax.map(lambda item: _expand_block(*item), items), *streams_BSND.shape[:2])


def _expand_backward(saved, g_BSND):
  def one(item):
    streams_CND, update_CD, post_CN, comb_CNN, g_CND = item
    exact, n = comb_CNN.dtype, streams_CND.shape[1]
    g = g_CND.astype(exact)
    d_streams = jnp.stack([sum(comb_CNN[:, j, k, None] * g[:, k] for k in range(n)) for j in range(n)], 1)
    d_update = sum(post_CN[:, k, None] * g[:, k] for k in range(n))
    # All dot products over D at once: rows are the streams and the update, columns the new streams.
    rows = jnp.concatenate([streams_CND, update_CD[:, None]], 1).astype(exact)
    d_Cjk = jnp.einsum("CjD,CkD->Cjk", rows, g, precision="highest")
    return d_streams.astype(streams_CND.dtype), d_update.astype(update_CD.dtype), d_Cjk[:, n], d_Cjk[:, :n]

  results = jax.lax.map(one, tuple(map(_cut, (*saved, g_BSND))))
  return tuple(_join(x, *g_BSND.shape[:2]) for x in results)


expand.defvjp(lambda *args: (expand(*args), args), _expand_backward)


def expand_collapse(streams_BSND: jax.Array, update_BSD: jax.Array, post_BSN: jax.Array, comb_BSNN: jax.Array,
                    fn: jax.Array, base: jax.Array, scale: jax.Array, *, norm_eps: float, eps: float, iterations: int
                    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """See `pallas_kernels.hyper_connections.expand_collapse`."""
  new_BSND = expand(streams_BSND, update_BSD, post_BSN, comb_BSNN)
  return new_BSND, *collapse(new_BSND, fn, base, scale, norm_eps=norm_eps, eps=eps, iterations=iterations)
