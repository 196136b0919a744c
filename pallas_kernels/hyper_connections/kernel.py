"""mHC (report 2.2, eqs. 1-8) as TPU kernels: layouts around the kernels, the coefficients' few numbers per token, and who
differentiates what.

Axis letters: B batch   S sequence   N streams   D hidden size   T = B S tokens   U columns of fn
Dtypes: streams float32 or bfloat16, which collapsed and new ones keep, and updates are cast to it; coefficients, their sums
        and all arithmetic float32; a gradient has the dtype of what it belongs to.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import tpu
from pallas_kernels.hyper_connections import kernel_backward as backward
from pallas_kernels.hyper_connections import kernel_blocks as blocks
from pallas_kernels.hyper_connections import kernel_forward as forward
from pallas_kernels.hyper_connections.kernel_blocks import Sizes
from pallas_kernels.hyper_connections.kernel_sinkhorn import from_columns, sinkhorn, sinkhorn_backward, to_columns


def collapse(streams_BSND: jax.Array, fn: jax.Array, base: jax.Array, scale: jax.Array, *, norm_eps: float, eps: float,
             iterations: int, interpret: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
  """See `pallas_kernels.hyper_connections.collapse`."""
  return _collapse(streams_BSND, fn, base, scale, (norm_eps, eps, iterations, interpret))


def expand(streams_BSND: jax.Array, update_BSD: jax.Array, post_BSN: jax.Array, comb_BSNN: jax.Array, *, interpret: bool
           ) -> jax.Array:
  """See `pallas_kernels.hyper_connections.expand`."""
  return _expand(streams_BSND, update_BSD, post_BSN, comb_BSNN, interpret)


def expand_collapse(streams_BSND: jax.Array, update_BSD: jax.Array, post_BSN: jax.Array, comb_BSNN: jax.Array,
                    fn: jax.Array, base: jax.Array, scale: jax.Array, *, norm_eps: float, eps: float, iterations: int,
                    interpret: bool) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """See `pallas_kernels.hyper_connections.expand_collapse`."""
  static = (norm_eps, eps, iterations, interpret)
  return _expand_collapse(streams_BSND, update_BSD, post_BSN, comb_BSNN, fn, base, scale, static)


# ---- layouts ----------------------------------------------------------------------------------------------------------
def _sizes(streams_BSND, interpret, norm_eps=0.0, eps=0.0) -> Sizes:
  wide_unit = blocks.WIDE_UNIT[tpu.current_chip(interpret).name]
  sizes = Sizes(streams_BSND.shape[2], streams_BSND.shape[3], streams_BSND.dtype, wide_unit, norm_eps, eps)
  blocks.check(sizes)
  return sizes


def _by_stream(x_BSND, sizes: Sizes):
  """-> [N, T, D], D padded to 128."""
  x_NBSD = tpu.pad_axis(x_BSND, 3, sizes.padded).transpose(2, 0, 1, 3)
  return x_NBSD.reshape(sizes.streams, -1, sizes.padded)


def _by_token(x_NTD, shape):
  """The inverse of `_by_stream`."""
  b, s, n, d = shape
  return x_NTD.reshape(n, b, s, -1).transpose(1, 2, 0, 3)[..., :d]


def _rows(y_BSD, sizes: Sizes):
  return tpu.pad_axis(y_BSD.astype(sizes.dtype), 2, sizes.padded).reshape(-1, sizes.padded)


def _coefficients(post_BSN, comb_BSNN):
  """-> float32 [T, 128]: post, then comb row by row, zeros behind."""
  n = post_BSN.shape[-1]
  both = jnp.concatenate([post_BSN.reshape(-1, n), comb_BSNN.reshape(-1, n * n)], 1)
  return tpu.pad_axis(both.astype(jnp.float32), 1, tpu.LANES)


def _apart(dc, post_BSN, comb_BSNN):
  """The inverse of `_coefficients` for its gradient [T, 128]."""
  n = post_BSN.shape[-1]
  d_post, d_comb = dc[:, :n], dc[:, n:n + n * n]
  return d_post.reshape(post_BSN.shape).astype(post_BSN.dtype), d_comb.reshape(comb_BSNN.shape).astype(comb_BSNN.dtype)


# ---- coefficients: a few numbers per token ----------------------------------------------------------------------------
def _logits(sheet, base, scale, n):
  """Logits of (post [T, N], comb [N, N, R, 128])."""
  u = sheet[:, n:(2 + n) * n]
  post = u[:, :n] * scale[1] + base[n:2 * n]
  comb = to_columns(u[:, n:] * scale[2] + base[2 * n:])
  return post, comb.reshape(n, n, *comb.shape[1:])


def _post_and_comb(sheet, base, scale, shape, static):
  """-> post [B, S, N], comb [B, S, N, N]."""
  b, s, n, _ = shape
  post, logits = _logits(sheet, base, scale, n)
  comb_NNR = sinkhorn(logits, iterations=static[2], eps=static[1], interpret=static[3])
  comb = from_columns(comb_NNR.reshape(n * n, *comb_NNR.shape[2:]), sheet.shape[0])
  return (2 * jax.nn.sigmoid(post)).reshape(b, s, n), comb.reshape(b, s, n, n)


def _d_logits(sheet, base, scale, d_post_BSN, d_comb_BSNN, static):
  """Gradients of the logits of post and comb in lanes N .. (2 + N) N - 1 of [T, 128]."""
  n = d_post_BSN.shape[-1]
  post, logits = _logits(sheet, base, scale, n)
  sigmoid = jax.nn.sigmoid(post)
  d_post = d_post_BSN.reshape(-1, n) * 2 * sigmoid * (1 - sigmoid)
  d_comb = to_columns(d_comb_BSNN.reshape(-1, n * n)).reshape(logits.shape)
  d_NNR = sinkhorn_backward(logits, d_comb, iterations=static[2], eps=static[1], interpret=static[3])
  d_comb = from_columns(d_NNR.reshape(n * n, *d_NNR.shape[2:]), sheet.shape[0])
  return tpu.pad_axis(jnp.pad(jnp.concatenate([d_post, d_comb], 1), ((0, 0), (n, 0))), 1, tpu.LANES)


def _weight_gradients(d_fn, sums, fn, base, scale, sizes: Sizes):
  """Partial sums of the cores -> gradients of fn, base, scale."""
  n, u = sizes.streams, base.shape[0]
  d_fn = d_fn.sum(0)[:, :u, :sizes.width].transpose(0, 2, 1).reshape(fn.shape)
  d_base, d_scales = sums.sum(0)[0, :u], sums.sum(0)[1, :u]
  d_scale = jnp.stack([d_scales[:n].sum(), d_scales[n:2 * n].sum(), d_scales[2 * n:].sum()])
  return d_fn.astype(fn.dtype), d_base.astype(base.dtype), d_scale.astype(scale.dtype)


# ---- collapse ---------------------------------------------------------------------------------------------------------
@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _collapse(streams_BSND, fn, base, scale, static):
  return _collapse_forward(streams_BSND, fn, base, scale, static)[0]


def _collapse_forward(streams_BSND, fn, base, scale, static):
  sizes = _sizes(streams_BSND, static[3], *static[:2])
  x_NTD = _by_stream(streams_BSND, sizes)
  z, sheet = forward.collapse(x_NTD, blocks.projection_operand(fn, sizes, x_NTD.shape[1]), blocks.affine(base, scale, sizes),
                              sizes, static[3])
  post, comb = _post_and_comb(sheet, base, scale, streams_BSND.shape, static)
  z_BSD = z[:, :sizes.width].reshape(*streams_BSND.shape[:2], -1)
  return (z_BSD, post, comb), (streams_BSND, fn, base, scale, sheet)


def _collapse_backward(static, saved, gradients):
  streams_BSND, fn, base, scale, sheet = saved
  dz_BSD, d_post, d_comb = gradients
  sizes = _sizes(streams_BSND, static[3], *static[:2])
  dl = _d_logits(sheet, base, scale, d_post, d_comb, static)
  dx, d_fn, sums = backward.collapse(
      _by_stream(streams_BSND, sizes), _rows(dz_BSD, sizes), sheet, dl, blocks.affine(base, scale, sizes),
      blocks.gradient_operand(fn, sizes), sizes, static[3])
  return _by_token(dx, streams_BSND.shape), *_weight_gradients(d_fn, sums, fn, base, scale, sizes)


_collapse.defvjp(_collapse_forward, _collapse_backward)


# ---- expand -----------------------------------------------------------------------------------------------------------
@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _expand(streams_BSND, update_BSD, post_BSN, comb_BSNN, interpret):
  sizes = _sizes(streams_BSND, interpret)
  new = forward.expand(_by_stream(streams_BSND, sizes), _rows(update_BSD, sizes), _coefficients(post_BSN, comb_BSNN), sizes,
                       interpret)
  return _by_token(new, streams_BSND.shape)


def _expand_backward(interpret, saved, g_BSND):
  streams_BSND, update_BSD, post_BSN, comb_BSNN = saved
  sizes = _sizes(streams_BSND, interpret)
  dx, dy, dc = backward.expand(
      _by_stream(streams_BSND, sizes), _rows(update_BSD, sizes), _coefficients(post_BSN, comb_BSNN),
      _by_stream(g_BSND, sizes), sizes, interpret)
  d_update = dy[:, :sizes.width].reshape(update_BSD.shape).astype(update_BSD.dtype)
  return _by_token(dx, streams_BSND.shape), d_update, *_apart(dc, post_BSN, comb_BSNN)


_expand.defvjp(lambda *args: (_expand(*args), args[:4]), _expand_backward)


# ---- both in one pass -------------------------------------------------------------------------------------------------
@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def _expand_collapse(streams_BSND, update_BSD, post_BSN, comb_BSNN, fn, base, scale, static):
  return _expand_collapse_forward(streams_BSND, update_BSD, post_BSN, comb_BSNN, fn, base, scale, static)[0]


def _expand_collapse_forward(streams_BSND, update_BSD, post_BSN, comb_BSNN, fn, base, scale, static):
  sizes = _sizes(streams_BSND, static[3], *static[:2])
  x_NTD = _by_stream(streams_BSND, sizes)
  new, z, sheet = forward.expand_collapse(
      x_NTD, _rows(update_BSD, sizes), _coefficients(post_BSN, comb_BSNN),
      blocks.projection_operand(fn, sizes, x_NTD.shape[1]), blocks.affine(base, scale, sizes), sizes, static[3])
  post, comb = _post_and_comb(sheet, base, scale, streams_BSND.shape, static)
  results = _by_token(new, streams_BSND.shape), z[:, :sizes.width].reshape(update_BSD.shape), post, comb
  return results, (streams_BSND, update_BSD, post_BSN, comb_BSNN, results[0], fn, base, scale, sheet)


def _expand_collapse_backward(static, saved, gradients):
  streams_BSND, update_BSD, post_BSN, comb_BSNN, new_BSND, fn, base, scale, sheet = saved
  g_BSND, dz_BSD, d_post, d_comb = gradients
  sizes = _sizes(streams_BSND, static[3], *static[:2])
  dl = _d_logits(sheet, base, scale, d_post, d_comb, static)
  dx, dy, dc, d_fn, sums = backward.expand_collapse(
      _by_stream(streams_BSND, sizes), _rows(update_BSD, sizes), _coefficients(post_BSN, comb_BSNN),
      _by_stream(new_BSND, sizes), _by_stream(g_BSND, sizes), _rows(dz_BSD, sizes), sheet, dl,
      blocks.affine(base, scale, sizes), blocks.gradient_operand(fn, sizes), sizes, static[3])
  d_update = dy[:, :sizes.width].reshape(update_BSD.shape).astype(update_BSD.dtype)
  return (_by_token(dx, streams_BSND.shape), d_update, *_apart(dc, post_BSN, comb_BSNN),
          *_weight_gradients(d_fn, sums, fn, base, scale, sizes))


_expand_collapse.defvjp(_expand_collapse_forward, _expand_collapse_backward)
