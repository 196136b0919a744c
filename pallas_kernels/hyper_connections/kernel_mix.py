"""Sums over streams with coefficients of each token's own, and dot products of each token with itself, on the matrix unit:
mHC's products of few streams and much width (report 2.2).

Both are small matrices per token, and a matrix unit wants one matrix for many tokens. So 16 tokens share one: block-diagonal
where their coefficients multiply; where they are multiplied with each other, all pairs, of which the diagonal is kept. Most
of it is multiplied for nothing. Bundles for 16 tokens x 1,024 lanes of `expand`, five streams in, four out:

    unit            v5p    v6e    TPU7x
    vector          216    216    216
    matrix          320    135    117

Axis letters: C tokens of a block   P bfloat16 parts of a float32 number
"""

from __future__ import annotations

import dataclasses
from typing import Any, Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu
from pallas_kernels.hyper_connections.kernel_blocks import GROUP, Sizes, in_parts_in_kernel, side_by_side, spread, wide


@dataclasses.dataclass(frozen=True)
class Mix:
  """out_o = sum_i coefficient(o, i) in_i, where every token has coefficients of its own.

  On the matrix unit a group of 16 tokens is one product: the coefficients as [outputs * 16, P * inputs * 16], whose 16 x 16
  blocks are diagonal, times the inputs of the group one below the other, once per part.

  Attributes:
    lanes: of each output, the lanes of its inputs' coefficients in the sheet.
    parts: P, of the coefficients; two hold 16 bits, twice what a bfloat16 result shows.
    on_matrix_unit: or on the vector unit, with all 24 bits.
  """

  lanes: tuple[tuple[int, ...], ...]
  parts: int
  on_matrix_unit: bool

  @property
  def rows(self) -> int:
    """Of the right operand."""
    return self.parts * len(self.lanes[0]) * GROUP

  @property
  def depth(self) -> int:
    """`rows`, rounded up to whole lanes of the left operand."""
    return tpu.round_up(self.rows, tpu.LANES)

  @property
  def stride(self) -> int:
    """Lanes from part to part."""
    return tpu.round_up(1 + max(map(max, self.lanes)), 8)

  def pattern(self, dtype: Any) -> jax.Array:
    """[128, outputs * depth] of `dtype`: a row of parts times this is the coefficient of every column of the left
    operand."""
    rows = [p * self.stride + lane for lanes in self.lanes for p in range(self.parts) for lane in lanes]
    rows = jnp.repeat(jnp.array(rows, jnp.int32), GROUP).reshape(len(self.lanes), self.rows)
    rows = tpu.pad_axis(rows, 1, self.depth, -1)  # no row: columns of zeros
    # Compared and not scattered: XLA's scatter takes ten times as long as a kernel over a few tokens.
    return (lax.broadcasted_iota(jnp.int32, (tpu.LANES, rows.size), 0) == rows.reshape(1, -1)).astype(dtype)

  def scratch(self, rows: int, dtype: Any) -> Any:
    """What `prepare` fills for a block: the left operands of all groups, or the sheet."""
    if self.on_matrix_unit:
      return pltpu.VMEM((rows // GROUP, GROUP * len(self.lanes), self.depth), dtype)
    return pltpu.VMEM((rows // GROUP, GROUP, tpu.LANES), jnp.float32)

  def prepare(self, sheet: jax.Array, pattern: Any, operand: Any) -> None:
    """Fills the scratch from float32 coefficients [C, 128]; for the matrix unit with zeros behind the last one."""
    rows, dtype = sheet.shape[0], operand.dtype
    if not self.on_matrix_unit:
      operand[...] = sheet.reshape(operand.shape)
      return
    parts = side_by_side(in_parts_in_kernel(sheet, self.parts, dtype), self.stride, dtype)
    token, column = (lax.broadcasted_iota(jnp.int32, (rows, self.depth), axis) for axis in (0, 1))
    own = token % GROUP == column % GROUP
    for o in range(len(self.lanes)):
      spread_out = tpu.matmul(parts, pattern[:, o * self.depth:(o + 1) * self.depth])
      block = jnp.where(own, spread_out, 0.0).astype(dtype).reshape(rows // GROUP, GROUP, self.depth)
      operand[:, o * GROUP:(o + 1) * GROUP, :] = block

  def of_group(self, operand: jax.Array) -> Callable[[list[jax.Array]], list[jax.Array]]:
    """One group's part of the scratch -> function from its inputs [16, n] to its float32 outputs [16, n]."""
    if self.on_matrix_unit:
      def product(inputs):
        outputs = tpu.matmul(operand[:, :self.rows], jnp.concatenate(inputs * self.parts, 0))
        return [outputs[o * GROUP:(o + 1) * GROUP] for o in range(len(self.lanes))]
      return product
    factors = [[spread(operand, lane) for lane in lanes] for lanes in self.lanes]
    scaled = lambda factor, x: tpu.widen(factor, x.shape[1]) * wide(x)
    return lambda inputs: [sum(scaled(factor, x) for factor, x in zip(row, inputs)) for row in factors]


# ---- the three that mHC needs -----------------------------------------------------------------------------------------
def expand_mix(sizes: Sizes) -> Mix:
  """New streams from the streams and the update; the sheet holds post, then comb row by row."""
  n = sizes.streams
  return Mix(tuple((*(n + j * n + k for j in range(n)), k) for k in range(n)), min(sizes.parts, 2), sizes.wide_unit)


def pull_mix(sizes: Sizes) -> Mix:
  """Gradients of the streams and of the update from those of the new streams."""
  n = sizes.streams
  lanes = (*(tuple(n + j * n + k for k in range(n)) for j in range(n)), tuple(range(n)))
  return Mix(lanes, min(sizes.parts, 2), True)


def collapse_mix(sizes: Sizes) -> Mix:
  """The collapsed stream; the sheet holds pre."""
  return Mix((tuple(range(sizes.streams)),), 1, False)


def all_dots(left: list[jax.Array], right: list[jax.Array]) -> jax.Array:
  """Dot products over lanes of all rows of a group with all rows: float32 [left * 16, right * 16]."""
  return tpu.matmul_t(jnp.concatenate(left, 0), jnp.concatenate(right, 0))


def own_dots(dots: jax.Array) -> list[list[jax.Array]]:
  """From all of them those of a token with itself: [left][right] arrays [16, 1], float32."""
  row, column = (lax.broadcasted_iota(jnp.int32, dots.shape, axis) for axis in (0, 1))
  own = row % GROUP == column % GROUP
  left, right = (size // GROUP for size in dots.shape)
  sums = [jnp.where(own & (column // GROUP == i), dots, 0.0).sum(-1, keepdims=True) for i in range(right)]
  return [[x[k * GROUP:(k + 1) * GROUP] for x in sums] for k in range(left)]
