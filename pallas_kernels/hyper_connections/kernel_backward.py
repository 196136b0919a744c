"""Backward kernels of mHC (report 2.2): every stream and every gradient is read once, every result written once.

    collapse          x, dz, sheet, dl -> dx                    reads (N + 1) D, writes N D per token
    expand            x, y, dx'        -> dx, dy, dc            reads (2 N + 1) D, writes (N + 1) D
    expand_collapse   x, y, x', dx', dz' -> dx, dy, dc          reads (3 N + 2) D, writes (N + 1) D

dl [T, 128] are the gradients of the logits of post and comb, which need no stream (kernel_sinkhorn); those of pre arise
here. With v = x fn, u = r v and r = (mean x^2 + eps)^(-1/2):

    dv = r du        dx = pre dz + dv fn^T - (r^2 / (N D)) (sum du u) x        d fn = x^T dv, summed over tokens

Axis letters: as in kernel_blocks
Dtypes: x, y, g, dz and with them dx, dy in the streams' (float32 or bfloat16); sheets, dl, affine, coefficients, their
        gradients and the partial sums float32; fn as `gradient_operand` gives it.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu
from pallas_kernels.hyper_connections import kernel_blocks as blocks
from pallas_kernels.hyper_connections.kernel_blocks import GROUP, Call, Sizes, each_chunk, each_group, spread, wide
from pallas_kernels.hyper_connections.kernel_mix import all_dots, own_dots, pull_mix

# Lanes per step of a loop: enough work in one straight line for the units to overlap.
_DOT_LANES, _GRADIENT_LANES = 7168, 1024
_PULL_LANES = {False: 256, True: 1024}  # without and with a wide matrix unit


# ---- pieces of the bodies ---------------------------------------------------------------------------------------------
def _start_sums(*sums):
  @pl.when(pl.program_id(1) == 0)
  def _():
    for x in sums:
      x[...] = jnp.zeros_like(x)


def _through_coefficients(d_pre, sheet, dl, affine, sums, coefficients, for_x, for_fn, sizes: Sizes):
  """From the gradients of pre [C, 128] and of the other logits to what multiplies the streams.

  Writes coefficients [N + 1, C, 128] (pre_j, then the factor of x, in all lanes) and the parts of dv as operands, and adds
  to sums [1, 8, 128]: row 0 the gradients of the logits, row 1 those times u.
  """
  n, rows = sizes.streams, sheet.shape[0]
  lane = lax.broadcasted_iota(jnp.int32, (rows, tpu.LANES), 1)
  u, factor = jnp.where(lane < sizes.columns, sheet[...], 0.0), spread(sheet[...], sizes.columns)
  pre = jax.nn.sigmoid(u * affine[0:1] + affine[1:2])
  d_logits = jnp.where(lane < n, d_pre * pre * (1 - pre), dl[...])
  du = d_logits * affine[0:1]
  sums[0, 0:1] += d_logits.sum(0, keepdims=True)
  sums[0, 1:2] += (d_logits * u).sum(0, keepdims=True)
  for j in range(n):
    coefficients[j] = spread(pre, j) + sizes.eps
  along = (du * u).sum(-1, keepdims=True)
  coefficients[n] = factor * factor * along * (-1 / (n * sizes.width))
  parts = blocks.in_parts_in_kernel(du * factor, sizes.parts, sizes.dtype)
  against = [parts[0], parts[1], parts[0]] if len(parts) > 1 else parts  # see gradient_operand
  for_fn[...] = blocks.side_by_side(parts, sizes.columns, sizes.dtype)
  for_x[...] = blocks.side_by_side(against, sizes.columns, sizes.dtype)


def _through_projection(x, dz, fn, coefficients, for_x, for_fn, d_fn, sizes: Sizes, store):
  """store(j, lanes, gradient of x_j float32 [C, lanes]) from the collapse of x; adds to d_fn [1, N, U, D]."""
  n, stacked = sizes.streams, sizes.parts * sizes.columns
  factor = lambda j, lanes: tpu.widen(coefficients[j], lanes.size)

  def chunk(lanes, nothing):
    z = wide(dz[:, lanes])
    for j in range(n):
      stream = x[j, :, lanes]
      d_parts = tpu.t_matmul(for_fn[:, :stacked], stream)
      d_fn[0, j, :, lanes] += sum(d_parts[p:p + sizes.columns] for p in range(0, stacked, sizes.columns))
      gradient = tpu.matmul(for_x[:, :fn.shape[1]], fn[j, :, lanes])
      store(j, lanes, gradient + factor(j, lanes) * z + factor(n, lanes) * wide(stream))
    return nothing

  each_chunk(x.shape[2], _GRADIENT_LANES, chunk)


def _pull(x, y, mix, pattern, g, dx, dy, dc, operand, sizes: Sizes):
  """Expand backwards; g [N, C, D] are the gradients of the new streams, and may be dx itself."""
  n, pull = sizes.streams, pull_mix(sizes)
  pull.prepare(mix[...], pattern, operand)

  def group(i, rows):
    mixed = pull.of_group(operand[i])

    def chunk(lanes, dots):
      gradients = [g[k, rows, lanes] for k in range(n)]
      dots += all_dots(gradients, [x[j, rows, lanes] for j in range(n)] + [y[rows, lanes]])
      *d_streams, d_update = mixed(gradients)
      for j, value in enumerate(d_streams):
        dx[j, rows, lanes] = value.astype(dx.dtype)
      dy[rows, lanes] = d_update.astype(dy.dtype)
      return dots

    zeros = jnp.zeros((n * GROUP, (n + 1) * GROUP), jnp.float32)
    own = own_dots(each_chunk(y.shape[1], _PULL_LANES[sizes.wide_unit], chunk, zeros))
    d_post = {k: own[k][n] for k in range(n)}
    d_comb = {n + j * n + k: own[k][j] for j in range(n) for k in range(n)}
    dc[rows] = blocks.gather_lanes(d_post | d_comb, GROUP)

  each_group(y.shape[0], group)


def _through_collapse(x, dz, sheet, dl, affine, fn, d_fn, sums, d_pre, coefficients, for_x, for_fn, sizes: Sizes, store):
  """Collapse backwards; see `_through_projection` for store."""
  n = sizes.streams
  _start_sums(d_fn, sums)

  def group(i, rows):
    del i
    def chunk(lanes, dots):
      return dots + all_dots([dz[rows, lanes]], [x[j, rows, lanes] for j in range(n)])
    dots = each_chunk(x.shape[2], _DOT_LANES, chunk, jnp.zeros((GROUP, n * GROUP), jnp.float32))
    d_pre[rows] = blocks.gather_lanes(dict(enumerate(own_dots(dots)[0])), GROUP)

  each_group(x.shape[1], group)
  _through_coefficients(d_pre[...], sheet, dl, affine, sums, coefficients, for_x, for_fn, sizes)
  _through_projection(x, dz, fn, coefficients, for_x, for_fn, d_fn, sizes, store)


# ---- bodies -----------------------------------------------------------------------------------------------------------
def _collapse(x, dz, sheet, dl, affine, fn, dx, d_fn, sums, *scratch, sizes):
  def store(j, lanes, gradient):
    dx[j, :, lanes] = gradient.astype(dx.dtype)
  _through_collapse(x, dz, sheet, dl, affine, fn, d_fn, sums, *scratch, sizes, store)


def _expand(x, y, mix, pattern, g, dx, dy, dc, operand, *, sizes):
  _pull(x, y, mix, pattern, g, dx, dy, dc, operand, sizes)


def _expand_collapse(x, y, mix, pattern, g, new, dz, sheet, dl, affine, fn, dx, dy, dc, d_fn, sums, operand, *scratch,
                     sizes):
  """dx holds first the whole gradient of the new streams, then what it is named for."""
  def store(j, lanes, gradient):
    dx[j, :, lanes] = (gradient + wide(g[j, :, lanes])).astype(dx.dtype)
  _through_collapse(new, dz, sheet, dl, affine, fn, d_fn, sums, *scratch, sizes, store)
  _pull(x, y, mix, pattern, dx, dx, dy, dc, operand, sizes)


# ---- calls ------------------------------------------------------------------------------------------------------------
def _collapse_scratch(sizes: Sizes, rows: int) -> list:
  """Gradients of pre; what multiplies the streams; two operands made of dv."""
  operand = pltpu.VMEM((rows, tpu.LANES), sizes.dtype)
  return [pltpu.VMEM((rows, tpu.LANES), jnp.float32), pltpu.VMEM((sizes.streams + 1, rows, tpu.LANES), jnp.float32),
          operand, operand]


def _sum_shapes(sizes: Sizes) -> tuple:
  return (sizes.streams, sizes.columns, sizes.padded), (tpu.SUBLANES, tpu.LANES)


def _collapse_flops(sizes: Sizes) -> int:
  return 4 * sizes.streams * sizes.padded * (sizes.columns + 2)


def _expand_flops(sizes: Sizes) -> int:
  return 4 * sizes.streams * sizes.padded * (sizes.streams + 1)


_COLLAPSE_INPUTS = ("update", "sheet", "sheet", "whole", "whole")
_EXPAND_INPUTS = ("streams", "update", "sheet", "whole", "streams")


def collapse(x_NTD: jax.Array, dz_TD: jax.Array, sheet: jax.Array, dl: jax.Array, affine: jax.Array, fn: jax.Array,
             sizes: Sizes, interpret: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
  """-> dx [N, T, D], partial sums of d fn [cores, N, U, D] and of the logits' gradients [cores, 8, 128]."""
  call = Call("hyper_collapse_backward", _collapse, ("streams", *_COLLAPSE_INPUTS), ("streams", *_sum_shapes(sizes)),
              functools.partial(_collapse_scratch, sizes), _collapse_flops(sizes))
  return call.run(sizes, interpret, x_NTD, dz_TD, sheet, dl, affine, fn)


def expand(x_NTD: jax.Array, y_TD: jax.Array, coefficients: jax.Array, g_NTD: jax.Array, sizes: Sizes, interpret: bool
           ) -> jax.Array:
  """-> dx [N, T, D], dy [T, D], gradients of the coefficients in lanes 0 .. N + N N - 1 of [T, 128]."""
  pull = pull_mix(sizes)
  call = Call("hyper_expand_backward", _expand, _EXPAND_INPUTS, ("streams", "update", "sheet"),
              lambda rows: [pull.scratch(rows, sizes.dtype)], _expand_flops(sizes))
  return call.run(sizes, interpret, x_NTD, y_TD, coefficients, pull.pattern(sizes.dtype), g_NTD)


def expand_collapse(x_NTD: jax.Array, y_TD: jax.Array, coefficients: jax.Array, new_NTD: jax.Array, g_NTD: jax.Array,
                    dz_TD: jax.Array, sheet: jax.Array, dl: jax.Array, affine: jax.Array, fn: jax.Array, sizes: Sizes,
                    interpret: bool) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """-> what `expand` and `collapse` return, in their shapes: dx, dy, d coefficients, d fn, sums."""
  pull = pull_mix(sizes)
  call = Call("hyper_expand_collapse_backward", _expand_collapse, (*_EXPAND_INPUTS, "streams", *_COLLAPSE_INPUTS),
              ("streams", "update", "sheet", *_sum_shapes(sizes)),
              lambda rows: [pull.scratch(rows, sizes.dtype), *_collapse_scratch(sizes, rows)],
              _collapse_flops(sizes) + _expand_flops(sizes))
  return call.run(sizes, interpret, x_NTD, y_TD, coefficients, pull.pattern(sizes.dtype), g_NTD, new_NTD, dz_TD, sheet, dl,
                  affine, fn)
