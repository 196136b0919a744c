"""Forward kernels of mHC (report 2.2): every stream of a block of tokens is read once and stays in VMEM until the block is
done.

    collapse          x -> z, sheet          reads N D, writes D per token
    expand            x, y -> x'             reads (N + 1) D, writes N D
    expand_collapse   x, y -> x', z', sheet' reads (N + 1) D, writes (N + 1) D: x' is collapsed while it is still in VMEM

Axis letters: as in kernel_blocks
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import tpu
from pallas_kernels.hyper_connections.kernel_blocks import Call, Sizes, each_chunk, each_group, projection_rows, wide
from pallas_kernels.hyper_connections.kernel_mix import collapse_mix, expand_mix

# Lanes per step of a loop: enough work in one straight line for the units to overlap.
_SUM_LANES, _PROJECT_LANES = 1024, 512
_MIX_LANES = {False: 256, True: 1024}  # without and with a wide matrix unit


# ---- pieces of the bodies ---------------------------------------------------------------------------------------------
def _project(x, fn, sizes: Sizes):
  """(u [C, 128] before the norm, sum of squares [C, 1]); fn as `projection_operand` gives it."""
  rows, stacked = x.shape[1], sizes.parts * sizes.columns

  def chunk(lanes, carry):
    u, squares = carry
    for j in range(sizes.streams):
      part = x[j, :, lanes]
      u += tpu.matmul_t(projection_rows(fn, j, lanes, sizes), part)  # tokens on lanes: there are fewer rows of fn than of x
      squares += tpu.lane_sums(wide(part) * wide(part))
    return u, squares

  zeros = jnp.zeros((stacked, rows), jnp.float32), jnp.zeros((rows, tpu.LANES), jnp.float32)
  u, squares = each_chunk(x.shape[2], _PROJECT_LANES, chunk, zeros)
  row, column = (lax.broadcasted_iota(jnp.int32, (stacked, tpu.LANES), axis) for axis in (0, 1))
  back = jnp.where(row % sizes.columns == column, 1.0, 0.0)  # adds the parts and turns tokens into rows
  return tpu.t_matmul(u, back), squares.sum(-1, keepdims=True)


def _collapse_block(x, fn, affine, z, sheet, weights, sizes: Sizes):
  """Collapse of the streams in x; weights [C / 16, 16, 128] is scratch."""
  n, mix = sizes.streams, collapse_mix(sizes)
  u, squares = _project(x, fn, sizes)
  factor = lax.rsqrt(squares / (n * sizes.width) + sizes.norm_eps)
  u = u * factor
  lane = lax.broadcasted_iota(jnp.int32, u.shape, 1)
  sheet[...] = jnp.where(lane == sizes.columns, factor, u)
  pre = jax.nn.sigmoid(u * affine[0:1] + affine[1:2]) + sizes.eps
  mix.prepare(pre, None, weights)

  def group(i, rows):
    mixed = mix.of_group(weights[i])
    def chunk(lanes, nothing):
      z[rows, lanes] = mixed([x[j, rows, lanes] for j in range(n)])[0].astype(z.dtype)
      return nothing
    each_chunk(x.shape[2], _SUM_LANES, chunk)

  each_group(x.shape[1], group)


def _expand_block(x, y, coefficients, pattern, new, operand, sizes: Sizes):
  mix = expand_mix(sizes)
  mix.prepare(coefficients[...], pattern, operand)

  def group(i, rows):
    mixed = mix.of_group(operand[i])
    def chunk(lanes, nothing):
      for k, value in enumerate(mixed([x[j, rows, lanes] for j in range(sizes.streams)] + [y[rows, lanes]])):
        new[k, rows, lanes] = value.astype(new.dtype)
      return nothing
    each_chunk(x.shape[2], _MIX_LANES[sizes.wide_unit], chunk)

  each_group(x.shape[1], group)


# ---- bodies -----------------------------------------------------------------------------------------------------------
def _collapse(x, fn, affine, z, sheet, weights, *, sizes):
  _collapse_block(x, fn, affine, z, sheet, weights, sizes)


def _expand(x, y, coefficients, pattern, new, operand, *, sizes):
  _expand_block(x, y, coefficients, pattern, new, operand, sizes)


def _expand_collapse(x, y, coefficients, pattern, fn, affine, new, z, sheet, operand, weights, *, sizes):
  _expand_block(x, y, coefficients, pattern, new, operand, sizes)
  _collapse_block(new, fn, affine, z, sheet, weights, sizes)


# ---- calls ------------------------------------------------------------------------------------------------------------
def _project_flops(sizes: Sizes) -> int:
  return 2 * sizes.streams * sizes.padded * (sizes.columns + 2)


def _mix_flops(sizes: Sizes) -> int:
  return 2 * sizes.streams * sizes.padded * (sizes.streams + 1)


def collapse(x_NTD: jax.Array, fn: jax.Array, affine: jax.Array, sizes: Sizes, interpret: bool
             ) -> tuple[jax.Array, jax.Array, jax.Array]:
  """-> z [T, D], sheet float32 [T, 128]; fn and affine as kernel_blocks makes them."""
  mix = collapse_mix(sizes)
  call = Call("hyper_collapse", _collapse, ("streams", "whole", "whole"), ("update", "sheet"),
              lambda rows: [mix.scratch(rows, sizes.dtype)], _project_flops(sizes))
  return call.run(sizes, interpret, x_NTD, fn, affine)


def expand(x_NTD: jax.Array, y_TD: jax.Array, coefficients: jax.Array, sizes: Sizes, interpret: bool) -> jax.Array:
  """-> new streams [N, T, D]; coefficients float32 [T, 128]: post, comb row by row, zeros."""
  mix = expand_mix(sizes)
  call = Call("hyper_expand", _expand, ("streams", "update", "sheet", "whole"), ("streams",),
              lambda rows: [mix.scratch(rows, sizes.dtype)], _mix_flops(sizes))
  return call.run(sizes, interpret, x_NTD, y_TD, coefficients, mix.pattern(sizes.dtype))[0]


def expand_collapse(x_NTD: jax.Array, y_TD: jax.Array, coefficients: jax.Array, fn: jax.Array, affine: jax.Array,
                    sizes: Sizes, interpret: bool) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """-> new streams [N, T, D], their z [T, D], their sheet float32 [T, 128]."""
  mixes = expand_mix(sizes), collapse_mix(sizes)
  call = Call("hyper_expand_collapse", _expand_collapse, ("streams", "update", "sheet", "whole", "whole", "whole"),
              ("streams", "update", "sheet"), lambda rows: [mix.scratch(rows, sizes.dtype) for mix in mixes],
              _project_flops(sizes) + _mix_flops(sizes))
  return call.run(sizes, interpret, x_NTD, y_TD, coefficients, mixes[0].pattern(sizes.dtype), fn, affine)
