"""Rows in and out by the SparseCore: the gather of selected entries, and the sums of their gradients.

The SparseCore's subcores copy single rows of 32-bit numbers between HBM and their own memory by lists of row numbers. It has
no interpreter: interpreted, the same functions do the same copies and sums in plain JAX, and everything around them, the
lists included, is the code that runs on a TPU.

Axis letters: T rows of a table   n places of all lists   w 32-bit numbers of a row   d head width
              U units   E rows of a unit
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import tpu_sc as plsc

from pallas_kernels import tpu
from pallas_kernels.tpu import LANES

_BUFFER_BYTES = 2**16  # rows in flight of a subcore, one of two buffers
_SECTION = 2048  # row numbers that a subcore reads at once
_UNIT_BYTES = {"v5p": 2**22, "v6e": 2**21, "tpu7x": 2**22}  # sums in the memory that a core's subcores share: about half
_ADD_BUFFER_BYTES = {"v5p": 2**17, "v6e": 2**16, "tpu7x": 2**17}
_PARAMS = dict(compiler_params=pltpu.CompilerParams(needs_layout_passes=False))


# ---- gather ------------------------------------------------------------------------------------------------------------
def gather(table_Tw: jax.Array, index_n: jax.Array, interpret: bool) -> jax.Array:
  """Rows [n, w] of a table [T, w] (or numbers [n] of [T]) of int32 or float32; all of `index_n`, int32, must be rows."""
  if interpret:
    return jnp.take(table_Tw, index_n, axis=0)
  padded, out, body, scratch = _gather_job(table_Tw, index_n, _BUFFER_BYTES)
  found = pl.kernel(body, mesh=_subcores(), out_type=out, scratch_types=scratch, name="gather_rows", **_PARAMS)(
      table_Tw, padded)
  return found[:index_n.shape[0]]


def _gather_job(table_Tw, index_n, buffer_bytes):
  """Row numbers as the subcores share them, the result, a subcore's code (table, numbers, out, *scratch), its scratch."""
  info, row = plsc.get_sparse_core_info(), table_Tw.shape[1:]
  workers = info.num_cores * info.num_subcores
  batch = min(max(buffer_bytes // (4 * (row or (1,))[0]) // 16 * 16, 16), 128)
  section, share = sections(-(-index_n.shape[0] // workers), batch)

  def body(table, numbers, out, index, rows, arrived, left):
    first = (lax.axis_index("core") * info.num_subcores + lax.axis_index("subcore")) * share

    @pl.loop(0, share // section)
    def _(part):
      start = first + part * section
      pltpu.sync_copy(numbers.at[pl.ds(start, section)], index)
      get = lambda g: pltpu.make_async_copy(table.at[index.at[pl.ds(g * batch, batch)]], rows.at[g % 2], arrived.at[g % 2])
      put = lambda g: pltpu.make_async_copy(rows.at[g % 2], out.at[pl.ds(start + g * batch, batch)], left.at[g % 2])
      batches = section // batch
      get(0).start()

      @pl.loop(0, batches)
      def _(g):
        @pl.when(g > 0)
        def _():
          put(g - 1).wait()

        @pl.when(g + 1 < batches)
        def _():
          get(g + 1).start()
        get(g).wait()
        put(g).start()
      put(batches - 1).wait()

  scratch = [pltpu.VMEM((section,), jnp.int32), pltpu.VMEM((2, batch, *row), table_Tw.dtype),
             pltpu.SemaphoreType.DMA((2,)), pltpu.SemaphoreType.DMA((2,))]
  out = jax.ShapeDtypeStruct((share * workers, *row), table_Tw.dtype)
  return tpu.pad_axis(index_n, 0, share * workers), out, body, scratch


def sections(rows: int, batch: int) -> tuple[int, int]:
  """(row numbers that a subcore reads at once, in all), whole batches; in all as few more than `rows` as possible, but not
  three batches or less at once where more could be: each reading waits."""
  batches = -(-rows // batch)
  sizes = range(1, min(max(_SECTION // batch, 1), batches) + 1)
  best = min(sizes, key=lambda size: (-batches % size if size > 3 else batches, -size))
  return best * batch, (batches + -batches % best) * batch


def _subcores() -> plsc.VectorSubcoreMesh:
  return plsc.VectorSubcoreMesh(core_axis_name="core", subcore_axis_name="subcore")


# ---- sums --------------------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Units:
  """How the sums [U, E, d] of a table's rows are dealt: row t is row t // U of unit t % U, U a power of two.

  A core holds one unit after another in its shared memory. Neighbouring rows lie in different units, so that all have
  about as much to do.
  """

  number: int
  rows: int

  @staticmethod
  def of(num_rows: int, width: int, chip: tpu.Chip) -> "Units":
    """The units of a table of float32 rows."""
    number = 4  # no chip has more cores
    while num_rows * width * 4 > number * _UNIT_BYTES[chip.name]:
      number *= 2
    return Units(number, tpu.round_up(-(-num_rows // number), 128))  # every subcore owns whole tiles of 8 rows

  def zeros(self, width: int) -> jax.Array:
    """Sums of nothing, float32 [U, E, width]."""
    return jnp.zeros((self.number, self.rows, width), jnp.float32)

  def table(self, sums_UEd: jax.Array, num_rows: int) -> jax.Array:
    """float32 [U, E, d] -> float32 [T, d]."""
    return sums_UEd.swapaxes(0, 1).reshape(-1, sums_UEd.shape[2])[:num_rows]


def add_rows(sums_UEd: jax.Array, index_n: jax.Array, rows_nd: jax.Array, chip: tpu.Chip, interpret: bool) -> jax.Array:
  """Sums [U, E, d] and float32 rows [n, d] -> the sums with each row added to table row `index_n` (int32), in place; -1 =
  nowhere.

  A core takes its units into shared memory in turn. For each, its subcores pick those places of their share whose row
  belongs to the unit, fetch just these rows and add them there by streams, which are atomic; so every row is read once.
  """
  if interpret:
    units, size, _ = sums_UEd.shape
    row = jnp.where(index_n < 0, units * size, index_n)  # beyond the end: dropped
    return sums_UEd.at[row % units, row // units].add(rows_nd, mode="drop")
  padded, body, scratch = _add_job(sums_UEd, index_n, _ADD_BUFFER_BYTES[chip.name])
  sums = jax.new_ref(sums_UEd)
  pl.kernel(body, mesh=_subcores(), out_type=(), scratch_types=scratch, name="add_rows", **_PARAMS)(sums, padded, rows_nd)
  return jax.freeze(sums)


def add_rows_and_gather(sums_UEd: jax.Array, index_n: jax.Array, rows_nd: jax.Array, table_Tw: jax.Array,
                        wanted_m: jax.Array, chip: tpu.Chip, interpret: bool) -> Any:
  """`add_rows` of the first three and `gather` of the next two in one call, shapes and dtypes as there: two calls would not
  both run beside a kernel."""
  if interpret:
    return add_rows(sums_UEd, index_n, rows_nd, chip, True), gather(table_Tw, wanted_m, True)
  wanted, out, get, get_scratch = _gather_job(table_Tw, wanted_m, _UNIT_BYTES[chip.name] // 128)
  # Rows of float32 take twice the room of packed bfloat16 ones: on v6e too much beside the longest lists of numbers.
  longest = _SECTION if table_Tw.shape[1] * 2 <= sums_UEd.shape[2] else _SECTION // 2
  padded, add, add_scratch = _add_job(sums_UEd, index_n, _ADD_BUFFER_BYTES[chip.name] // 2, longest)

  def body(table, wanted, sums, numbers, rows, out, *scratch):
    get(table, wanted, out, *scratch[:len(get_scratch)])
    add(sums, numbers, rows, *scratch[len(get_scratch):])

  sums = jax.new_ref(sums_UEd)
  found = pl.kernel(body, mesh=_subcores(), out_type=out, scratch_types=get_scratch + add_scratch,
                    name="add_rows_and_gather", **_PARAMS)(table_Tw, wanted, sums, padded, rows_nd)
  return jax.freeze(sums), found[:wanted_m.shape[0]]


def _add_job(sums_UEd, index_n, buffer_bytes, longest=_SECTION):
  """Row numbers as the subcores share them, a subcore's code (sums, numbers, rows, *scratch), and its scratch; `longest`:
  row numbers that it reads at once."""
  units, size, width = sums_UEd.shape
  info = plsc.get_sparse_core_info()
  lanes, batch = info.num_lanes, buffer_bytes // (4 * width) // 16 * 16  # whole vectors of row numbers on every chip
  share = tpu.round_up(-(-index_n.shape[0] // info.num_subcores), lanes * 16)
  section = next(size for size in (2048, 1024, 512, 256, lanes * 16) if size <= longest and share % size == 0)
  own = size // info.num_subcores
  shift, columns = units.bit_length() - 1, width // LANES

  def body(sums, numbers, rows, index, place, target, places, targets, buffer, arrived, shared):
    core, subcore = lax.axis_index("core"), lax.axis_index("subcore")
    mine = pl.ds(subcore * own, own)

    @pl.loop(0, units // info.num_cores)
    def _(turn):
      unit = turn * info.num_cores + core
      for c in range(columns):
        pltpu.sync_copy(sums.at[unit, mine, pl.ds(c * LANES, LANES)], shared.at[c, mine])
      plsc.subcore_barrier()

      @pl.loop(0, share // section)
      def _(part):
        start = subcore * share + part * section
        pltpu.sync_copy(numbers.at[pl.ds(start, section)], index)

        def choose(v, count):
          row = index[pl.ds(v * lanes, lanes)]
          ours = (row >= 0) & ((row & (units - 1)) == unit)
          to = pl.ds(count, lanes)
          plsc.store_compressed(place.at[to], start + v * lanes + lax.iota(jnp.int32, lanes), mask=ours)
          plsc.store_compressed(target.at[to], lax.shift_right_logical(row, jnp.full_like(row, shift)), mask=ours)
          return count + jnp.sum(jnp.where(ours, 1, 0))

        count = lax.fori_loop(0, section // lanes, choose, jnp.int32(0))
        for v in range(batch // lanes):  # behind the last one: any row, added where nobody looks
          to = pl.ds(count + v * lanes, lanes)
          place[to] = jnp.full((lanes,), start, jnp.int32)
          target[to] = jnp.full((lanes,), size, jnp.int32)

        @pl.loop(0, (count + batch - 1) // batch)
        def _(g):
          for v in range(batch // lanes):
            at, to = pl.ds(g * batch + v * lanes, lanes), pl.ds(v * lanes, lanes)
            places[to], targets[to] = place[at], target[at]
          fetches = [pltpu.make_async_copy(rows.at[places, pl.ds(c * LANES, LANES)], buffer.at[c], arrived.at[c])
                     for c in range(columns)]  # streams add rows of one tile's width
          for fetch in fetches:
            fetch.start()
          for c, fetch in enumerate(fetches):
            fetch.wait()
            pltpu.sync_copy(buffer.at[c], shared.at[c].at[targets], add=True)

      plsc.subcore_barrier()
      for c in range(columns):
        pltpu.sync_copy(shared.at[c, mine], sums.at[unit, mine, pl.ds(c * LANES, LANES)])

  numbers = [pltpu.VMEM((count,), jnp.int32) for count in (section, section + batch, section + batch, batch, batch)]
  scratch = [*numbers, pltpu.VMEM((columns, batch, LANES), jnp.float32), pltpu.SemaphoreType.DMA((columns,)),
             pltpu.VMEM_SHARED((columns, size + 8, LANES), jnp.float32)]
  return tpu.pad_axis(index_n, 0, share * info.num_subcores, -1), body, scratch
