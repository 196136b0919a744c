"""Grouped matmuls over tiles of rows with one expert each: the tile -> expert map is prefetched, the grid ends with the last
tile in use, and one block of an expert's weights stays in VMEM for all of that expert's tiles.

    rows_call      rows [M, K] times weights -> [M, n]: grid (blocks of columns, tiles). All of K lies in VMEM, so nothing is
                   accumulated across steps.
    weights_call   rows^T times rows -> [E, m, n]: grid (blocks of m, blocks of n, tiles), a float32 sum per expert in VMEM.

Weights are read once, rows once per block of columns: the blocks are as wide as VMEM allows.

Axis letters: M rows   K contracted   E experts   C rows of a tile
"""

from __future__ import annotations

import functools
from typing import Any, Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu

_INNER = 256  # columns per step of a kernel's loop: one weight tile of the widest matrix unit


def _owner(ends: jax.Array, count: int) -> jax.Array:
  """int32 [count]: how many of the rising `ends` each place has passed, at most the last expert."""
  place = jnp.arange(count, dtype=jnp.int32)
  owner = jnp.searchsorted(ends, place, side="right", method="compare_all")
  return jnp.minimum(owner, ends.shape[0] - 1).astype(jnp.int32)


def row_map(group_sizes: jax.Array, rows: int, tile: int) -> tuple[jax.Array, jax.Array]:
  """(number of tiles in use, int32 [M / C] expert of each tile)."""
  ends = jnp.cumsum(-(-group_sizes // tile)).astype(jnp.int32)
  return ends[-1], _owner(ends, rows // tile)


def weight_map(group_sizes: jax.Array, rows: int, tile: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """int32 (number of steps; of each step, [rows / tile + E], its expert, its tile, 1 if it has one), from the rows of each
  expert [E]: an expert without rows has one empty step."""
  tiles = (-(-group_sizes // tile)).astype(jnp.int32)
  steps = jnp.maximum(tiles, 1)
  ends = jnp.cumsum(steps)
  expert = _owner(ends, rows // tile + group_sizes.shape[0])
  step = jnp.arange(expert.shape[0], dtype=jnp.int32)
  place = step - (ends - steps)[expert] + (jnp.cumsum(tiles) - tiles)[expert]
  used = (tiles[expert] > 0).astype(jnp.int32)
  return ends[-1], expert, jnp.clip(place, 0, rows // tile - 1).astype(jnp.int32), used


def _widths(total: int) -> list[int]:
  """Multiples of 128 that divide `total`, widest first."""
  return [width for width in range(total, 0, -tpu.LANES) if total % width == 0]


def block_columns(chip: tpu.Chip, total: int, bytes_per_column: int, fixed: int, largest: int = 2048) -> int:
  """The widest block that fits; if possible with an equal number of blocks for each core."""
  room = (0.92 * chip.vmem * 2**20 - fixed) / max(bytes_per_column, 1)
  fits = [width for width in _widths(total) if width <= min(largest, room)]
  even = [width for width in fits if total // width % chip.cores == 0]
  return (even or fits or [tpu.LANES])[0]


def each_inner(width: int, step: Callable[[Any], None], largest: int = _INNER) -> None:
  """step(slice) over `width` columns, so that the code of a large block stays short."""
  inner = next(size for size in _widths(width) if size <= largest)
  def body(i, nothing):
    step(pl.ds(pl.multiple_of(i * inner, inner), inner))
    return nothing
  lax.fori_loop(0, width // inner, body, 0)


def rows_call(body: Callable[..., None], name: str, interpret: bool, plan: Any, tile: int, columns: int,
              inputs: tuple[tuple[str, jax.Array], ...], outputs: int, zeros: bool = False) -> list[jax.Array]:
  """body(*inputs, *outputs) for every block of columns and every tile of rows in use.

  Args:
    plan: of `row_map`.
    columns: n, of the results.
    inputs: (kind, array): "rows" [M, K] a tile with all K; "cut" [M, n] a tile with a block of columns; "columns" [E, K, n]
      and "rows_of" [E, n, K] a block of the tile's expert.
    outputs: how many results [M, n] in the dtype of the first input.
    zeros: tiles that are not in use hold 0 instead of whatever was there.
  """
  chip, (count, expert) = tpu.current_chip(interpret), plan
  dtype, rows = inputs[0][1].dtype, inputs[0][1].shape[0]
  item = dtype.itemsize
  cut = sum(kind == "cut" for kind, _ in inputs) + outputs
  contracted = sum(x.shape[1] if kind == "columns" else x.shape[2] for kind, x in inputs if kind in ("columns", "rows_of"))
  fixed = sum(2 * tile * x.shape[1] * item for kind, x in inputs if kind == "rows")
  block = block_columns(chip, columns, 2 * contracted * item + 2 * cut * tile * item + 8 * tile, fixed)

  def spec(kind, x):
    if kind == "rows":
      return pl.BlockSpec((tile, x.shape[1]), lambda n, i, expert: (i, 0))
    if kind == "cut":
      return pl.BlockSpec((tile, block), lambda n, i, expert: (i, n))
    if kind == "columns":
      return pl.BlockSpec((None, x.shape[1], block), lambda n, i, expert: (expert[i], 0, n))
    return pl.BlockSpec((None, block, x.shape[2]), lambda n, i, expert: (expert[i], n, 0))

  result = jax.ShapeDtypeStruct((rows, columns), dtype)
  blanks = [jnp.zeros(result.shape, dtype)] * outputs if zeros else []

  def run(expert, *refs):
    del expert
    body(*refs[:len(inputs)], *refs[len(inputs) + len(blanks):])

  grid = pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1, grid=(columns // block, count),
      in_specs=[spec(*item) for item in inputs] + [pl.BlockSpec(memory_space=pl.ANY)] * len(blanks),
      out_specs=[spec("cut", None)] * outputs)
  weights = sum(x.nbytes for kind, x in inputs if kind in ("columns", "rows_of"))
  read = sum(x.shape[1] for kind, x in inputs if kind == "rows") * (columns // block)
  moved = weights + rows * item * (cut * columns + read)
  return pl.pallas_call(
      run, grid_spec=grid, out_shape=[result] * outputs, name=name, interpret=interpret,
      input_output_aliases={1 + len(inputs) + i: i for i in range(len(blanks))},
      compiler_params=tpu.compiler_params(chip, "parallel", "arbitrary"),
      cost_estimate=pl.CostEstimate(flops=2 * rows * contracted * columns, transcendentals=0, bytes_accessed=moved),
  )(expert, *(x for _, x in inputs), *blanks)


def _weights_body(expert, place, used, x, *refs, count):
  step, last = pl.program_id(2), pl.num_programs(2) - 1
  gradients, outputs, sums = refs[:count], refs[count:2 * count], refs[2 * count:]
  own = expert[step]

  first = (step == 0) | (own != expert[jnp.maximum(step - 1, 0)])

  @pl.when(used[step] != 0)
  def _():
    def add(rows):
      x_T = x[:, rows].T  # once for all gradients
      for gradient, total in zip(gradients, sums):
        total[rows, :] = jnp.where(first, 0.0, total[rows, :]) + tpu.matmul(x_T, gradient[...])
    each_inner(x.shape[1], add, 2 * _INNER)

  @pl.when(used[step] == 0)
  def _():
    for total in sums:
      total[...] = jnp.zeros_like(total)

  @pl.when((step == last) | (own != expert[jnp.minimum(step + 1, last)]))
  def _():
    for output, total in zip(outputs, sums):
      output[...] = total[...].astype(output.dtype)


def weights_call(name: str, interpret: bool, plan: Any, tile: int, x_MK: jax.Array, gradients: tuple[jax.Array, ...],
                 experts: int) -> list[jax.Array]:
  """x^T times each gradient [M, n], per expert: [E, K, n] each, in x's dtype, summed in float32.

  Args:
    plan: of `weight_map`.

  Raises:
    NotImplementedError: a tile of rows that VMEM has no room for.
  """
  chip, (count, expert, place, used) = tpu.current_chip(interpret), plan
  k, n, dtype = x_MK.shape[1], gradients[0].shape[1], x_MK.dtype
  item, many = dtype.itemsize, len(gradients)
  height = block_columns(chip, k, 0, 0, 1024)
  fixed = 2 * tile * height * item
  fits = [w for w in _widths(n) if w <= 1024 and fixed + many * w * (height * (4 + 2 * item) + 2 * tile * item)
          < 0.8 * chip.vmem * 2**20]
  if not fits:
    raise NotImplementedError(f"{name}: tile = {tile}, rows of {k} and {n} numbers of {item} bytes: no block of {tpu.LANES} "
                              f"columns fits the {chip.vmem} MiB of VMEM that a kernel may use on {chip.name}")
  width = fits[0]
  block = pl.BlockSpec((None, height, width), lambda i, j, s, expert, place, used: (expert[s], i, j))
  grid = pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=3, grid=(k // height, n // width, count),
      in_specs=[pl.BlockSpec((tile, height), lambda i, j, s, expert, place, used: (place[s], i))]
      + [pl.BlockSpec((tile, width), lambda i, j, s, expert, place, used: (place[s], j))] * many,
      out_specs=[block] * many, scratch_shapes=[pltpu.VMEM((height, width), jnp.float32)] * many)
  rows = x_MK.shape[0]
  moved = rows * item * (k * (n // width) + many * n * (k // height)) + many * experts * k * n * item
  return pl.pallas_call(
      functools.partial(_weights_body, count=many), grid_spec=grid, name=name, interpret=interpret,
      out_shape=[jax.ShapeDtypeStruct((experts, k, n), dtype)] * many,
      compiler_params=tpu.compiler_params(chip, "parallel", "parallel", "arbitrary"),
      cost_estimate=pl.CostEstimate(flops=2 * rows * k * n * many, transcendentals=0, bytes_accessed=moved),
  )(expert, place, used, x_MK, *gradients)
