"""Rows in and out by the SparseCore: the gather of selected entries, and the sums of their gradients.

The SparseCore's subcores copy single rows of 32-bit numbers between HBM and their own memory by lists of row numbers. It has
no interpreter: interpreted, the same functions do the same copies and sums in plain JAX, and everything around them, the
lists included, is the code that runs on a TPU.

Axis letters: T rows of a table   n places of all lists   w 32-bit numbers of a row   d head width
              U units   E rows of a unit
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import tpu_sc as plsc

from pallas_kernels import tpu

_BUFFER_BYTES = 2**16  # rows in flight of a subcore, one of two buffers
_SECTION = 2048  # row numbers that a subcore reads at once
_UNIT_BYTES = {"v5p": 2**22, "v6e": 2**21, "tpu7x": 2**22}  # sums in the memory that a core's subcores share: about half
_ADD_BUFFER_BYTES = {"v5p": 2**17, "v6e": 2**16, "tpu7x": 2**17}
_PARAMS = dict(compiler_params=pltpu.CompilerParams(needs_layout_passes=False))


# ---- rows as words -----------------------------------------------------------------------------------------------------
def pack(x_Td: jax.Array) -> jax.Array:
  """[T, d] bfloat16 -> int32 [T, d / 2], numbers i and i + d / 2 in a word; float32 as it is."""
  if x_Td.dtype == jnp.float32:
    return x_Td
  low, high = jnp.split(lax.bitcast_convert_type(x_Td, jnp.uint16).astype(jnp.uint32), 2, axis=-1)
  return lax.bitcast_convert_type(low | (high << 16), jnp.int32)


def unpack(x_Tw: jax.Array) -> jax.Array:
  """The inverse of `pack`, inside a kernel."""
  if x_Tw.dtype == jnp.float32:
    return x_Tw
  halves = (x_Tw << 16, x_Tw & jnp.int32(-65536))
  return jnp.concatenate([lax.bitcast_convert_type(half, jnp.float32).astype(jnp.bfloat16) for half in halves], -1)


# ---- gather ------------------------------------------------------------------------------------------------------------
def gather(table_Tw: jax.Array, index_n: jax.Array, interpret: bool) -> jax.Array:
  """Rows [n, w] of a table [T, w] (or numbers [n] of [T]) of 32-bit numbers; all of `index_n` must be rows."""
  if interpret:
    return jnp.take(table_Tw, index_n, axis=0)
  info, row = plsc.get_sparse_core_info(), table_Tw.shape[1:]
  workers = info.num_cores * info.num_subcores
  batch = min(max(_BUFFER_BYTES // (4 * (row or (1,))[0]), 8), 128)
  section = min(_SECTION, tpu.round_up(-(-index_n.shape[0] // workers), batch))
  share = tpu.round_up(-(-index_n.shape[0] // workers), section)
  padded = tpu.pad_axis(index_n, 0, share * workers)

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

  found = pl.kernel(
      body, mesh=_subcores(), out_type=jax.ShapeDtypeStruct((share * workers, *row), table_Tw.dtype), name="gather_rows",
      scratch_types=[pltpu.VMEM((section,), jnp.int32), pltpu.VMEM((2, batch, *row), table_Tw.dtype),
                     pltpu.SemaphoreType.DMA((2,)), pltpu.SemaphoreType.DMA((2,))], **_PARAMS)(table_Tw, padded)
  return found[:index_n.shape[0]]


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
    """Sums of nothing."""
    return jnp.zeros((self.number, self.rows, width), jnp.float32)

  def table(self, sums_UEd: jax.Array, num_rows: int) -> jax.Array:
    """-> [T, d]."""
    return sums_UEd.swapaxes(0, 1).reshape(-1, sums_UEd.shape[2])[:num_rows]
