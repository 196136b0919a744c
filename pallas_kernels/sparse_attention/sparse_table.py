"""The entries as rows of 32-bit numbers, which the SparseCore and single copies move: two bfloat16 numbers to a word.

For the forward pass the same rows lie in HBM twice. The SparseCore reads and writes [T, w] in the usual tiles of 8 rows, as
the attention wants its staged rows. The attention's own copies read [T, w / 128, 128], where a row is one piece. One kernel
reads the entries once and writes both; left to XLA that is three passes.

Axis letters: B batch   T entries   d head width   R rows of all batch rows   w words of a row
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import tpu
from pallas_kernels.tpu import LANES

_BLOCK = 1024


def make_tables(entries_BTd: jax.Array, seen_BT: jax.Array, options: Any, pieces: bool) -> list[jax.Array]:
  """The rows of all entries, zeros where nobody may see one: [R, w], and with `pieces` also [R, w / 128, 128].

  Args:
    entries_BTd: bfloat16 with d a multiple of 256, or float32 with one of 128.
    seen_BT: bool.

  Returns:
    int32, numbers i and i + d / 2 in a word, or float32 as it is; R >= B T, the rows of a batch row behind each other.
  """
  batch, length, width = entries_BTd.shape
  rows = tpu.round_up(batch * length, LANES)
  entries_Rd = tpu.pad_axis(entries_BTd.reshape(-1, width), 0, rows)
  seen = tpu.pad_axis(seen_BT.reshape(-1).astype(jnp.int32), 0, rows).reshape(-1, LANES)
  packed = entries_BTd.dtype == jnp.bfloat16
  words, dtype = (width // 2, jnp.int32) if packed else (width, jnp.float32)
  block = min(_BLOCK, rows)
  outs = [(pl.BlockSpec((block, words), lambda i: (i, 0)), (rows, words)),
          (pl.BlockSpec((block, words // LANES, LANES), lambda i: (i, 0, 0)), (rows, words // LANES, LANES))][:1 + pieces]
  return pl.pallas_call(
      functools.partial(_body, packed=packed), grid=(-(-rows // block),),
      in_specs=[pl.BlockSpec((block, width), lambda i: (i, 0)), pl.BlockSpec((block // LANES, LANES), lambda i: (i, 0))],
      out_specs=[spec for spec, _ in outs], out_shape=[jax.ShapeDtypeStruct(shape, dtype) for _, shape in outs],
      compiler_params=tpu.compiler_params(options.chip, "parallel"), interpret=options.interpret, name="entry_tables",
  )(entries_Rd, seen)


def _body(entries, seen, table, *pieces, packed):
  for group in range(seen.shape[0]):
    rows = pl.ds(group * LANES, LANES)
    visible = jnp.transpose(jnp.broadcast_to(seen[pl.ds(group, 1)], (LANES, LANES))) > 0  # of each row in all lanes
    for column in range(table.shape[1] // LANES):
      lanes = pl.ds(column * LANES, LANES)
      words = entries[rows, lanes]
      if packed:
        low, high = words, entries[rows, pl.ds(table.shape[1] + column * LANES, LANES)]
        bits = [lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32) for x in (low, high)]
        words = lax.shift_right_logical(bits[0], jnp.full_like(bits[0], 16)) | bits[1]
      words = jnp.where(visible, words, jnp.zeros_like(words))
      table[rows, lanes] = words
      for out in pieces:
        out[rows, column] = words


def unpack(x_Kw: jax.Array) -> jax.Array:
  """Rows of a table [K, w] -> the numbers [K, d], inside a kernel: int32 words -> bfloat16, float32 as it is."""
  if x_Kw.dtype == jnp.float32:
    return x_Kw
  halves = (x_Kw << 16, x_Kw & jnp.int32(-65536))
  return jnp.concatenate([lax.bitcast_convert_type(half, jnp.float32).astype(jnp.bfloat16) for half in halves], -1)
