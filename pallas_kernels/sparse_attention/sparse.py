"""The sparse form of the attention: each query reads its selected entries and no others, however long the context is.

The entries become a table of packed rows (`sparse_table`). Queries go by chunks, two in a turn of a loop. Of a chunk there
are lists of its queries' entries (`sparse_lists`), their rows gathered by the SparseCore (`sparse_rows`), and attention over
these rows and those that the kernel copies by itself (`sparse_forward`, `sparse_copies`). The backward pass gathers
again, makes a gradient per gathered row (`sparse_backward`), and the SparseCore sums them by entry. Nothing held grows with
queries x entries but the selection itself (formulas: report 2.3, eqs. 19 and 27).

The rows of a chunk are gathered while the chunk before is attended to. With one chunk a turn XLA would keep the rows of all
turns in the same memory, which it can only do by ending the attention before the gather starts; two chunks a turn have two.

Axis letters: B batch   S queries   X window keys, past ones and S   H heads   T entries   d head width   W words
              C queries of a chunk   K places of a list   R rows of a step   N all steps
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import bits, blocks, tpu
from pallas_kernels.names import ATTENTION, named
from pallas_kernels.selection import Selection
from pallas_kernels.sparse_attention import (
  sparse_backward,
  sparse_forward,
  sparse_lists,
  sparse_plan,
  sparse_rows,
  sparse_table,
  tiles,
)

ROWS = 2**18  # gathered together: with 1,024 of a query enough that each core of a chip has whole runs of a chunk
FORWARD_STEP = {"v5p": (8, 1024), "v6e": (8, 1024), "tpu7x": (8, 1024)}  # queries, places of a tile
DIRECT = {"v5p": 384, "v6e": 384, "tpu7x": 224}  # rows that the forward kernel copies by itself, per query of 128 heads
BACKWARD_STEP = {"v5p": (4, 1024), "v6e": (8, 1024), "tpu7x": (4, 1024)}


def attend(q_BSHd: jax.Array, window_kv_BXd: jax.Array, entries_BTd: jax.Array, selection: Selection, sink_H: jax.Array,
           *, positions: jax.Array, segment_ids: jax.Array, entry_last: jax.Array, entry_segment: jax.Array,
           window: int, scale: float, interpret: bool, key_segment: jax.Array | None = None
           ) -> tuple[jax.Array, jax.Array]:
  """See `pallas_kernels.sparse_attention.attend`, and `kernel.attend` for the window keys. Meant for selections of few
  entries: kind "all" reads every one.

  The SparseCore has no interpreter: with `interpret` its copies and sums of rows are plain JAX, all else is the same.

  Raises:
    ValueError: a window that is too long, or operands of another type than bfloat16 and float32.
  """
  if entries_BTd.dtype not in (jnp.bfloat16, jnp.float32):
    raise ValueError(f"entries of {entries_BTd.dtype}: the sparse form of attention gathers bfloat16 or float32")
  places = dict(positions=positions, segment_ids=segment_ids, entry_last=entry_last, entry_segment=entry_segment)
  options = tiles.Options(window, scale, tpu.current_chip(interpret), interpret)
  chosen, top_k = _chosen(selection, entries_BTd.shape[1], places)
  chosen = (chosen, entry_segment > 0)
  segments = (segment_ids, segment_ids if key_segment is None else key_segment)
  return _attend(q_BSHd, window_kv_BXd, entries_BTd, sink_H, chosen, segments, (options, selection.kind, top_k))


def _chosen(selection, num_entries, places):
  """What lists are made of, hidden entries left out: rows of bits, or numbers with -1 anywhere; and the most of a query."""
  if selection.kind != "indices" or not num_entries:
    return bits.words_of(selection, num_entries, places), min(selection.top_k or num_entries, num_entries)
  seen = jax.vmap(blocks.picked_sees)(selection.picks, places["positions"], places["segment_ids"], places["entry_last"],
                                      places["entry_segment"])
  seen &= selection.picks < num_entries
  return jnp.where(seen, selection.picks, -1), selection.picks.shape[2]


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attend(q, window_kv, entries, sink, chosen, segments, static):
  return forward(q, window_kv, entries, sink, chosen, segments, static)


def _attend_forward(*args):
  out, lse = named(ATTENTION, *forward(*args))
  return (out, lse), (*args[:-1], out, lse)


def _attend_backward(static, saved, gradients):
  return (*backward(*saved, *gradients, static), None, None)


_attend.defvjp(_attend_forward, _attend_backward)


def _plan(q, entries, static, steps, rows, direct=0, past=0):
  options, _, top_k = static
  return sparse_plan.make_plan(q.shape, entries.shape[1], top_k, q.dtype.itemsize, options.window,
                               *steps[options.chip.name], rows, options.chip.cores, direct, past)


def _backward_rows(num_entries):
  """Rows of a chunk: every one reads and writes the sums of all entries once: the more there are, the larger it must be."""
  return ROWS * min(max(num_entries // 2**15, 1), 2)


def _readers(entries, chosen, plan, static):
  """What reads the selection and the entries. `chosen`: see `_chosen`, and which entries anyone may see, bool [B, T].

  Returns:
    lists: numbers of some chunks, those past the end meaning the last one -> for each, int32 [C, K]: numbers of the entries
      in the table of all batch rows, -1 in empty places.
    fetch: one of them -> the rows of the staged places, packed [C / queries, queries, K, w], anything in empty places. With
      sums of entries and a part to add to them (see `backward`) it does that as well and returns both.
    direct: one of them -> the table in pieces, and row numbers of the places that the kernel reads from it by itself, int32
      [runs of a chunk, queries of a run, places].
  """
  (options, kind, _), (chosen, seen) = static, chosen
  rows_of_each = max(plan.entries, 1)
  entries = tpu.pad_axis(tpu.pad_axis(entries, 1, rows_of_each), 2, plan.width)
  table, *pieces = sparse_table.make_tables(entries, tpu.pad_axis(seen, 1, rows_of_each), options, plan.direct > 0)
  chosen = sparse_plan.by_query(chosen, plan, -1 if kind == "indices" else 0)
  all_words = sparse_lists.as_table(chosen.reshape(-1, chosen.shape[2])) if kind != "indices" and plan.entries else None

  def lists(*chunks):
    chunks = [jnp.minimum(chunk, plan.chunks - 1) for chunk in chunks]
    if not plan.entries:
      return [jnp.full((plan.chunk_queries, plan.places), -1, jnp.int32) for _ in chunks]
    parts = [lax.dynamic_index_in_dim(chosen, chunk, keepdims=False) for chunk in chunks]
    if kind == "indices":
      index = tpu.pad_axis(jnp.concatenate(parts), 1, plan.places, -1)
    else:
      query = jnp.arange(plan.chunk_queries, dtype=jnp.int32)
      row = jnp.concatenate([chunk * plan.chunk_queries + query for chunk in chunks])
      index = sparse_lists.from_words(parts, plan.places, options, (all_words, row))
    return [jnp.where(x_CK < 0, -1, x_CK + sparse_plan.row_offsets(chunk, plan))
            for x_CK, chunk in zip(jnp.split(index, len(chunks)), chunks)]

  def safe(index_CK):
    """Rows of the table. An empty place reads one, too, and each another: thousands of copies of one row would queue up."""
    query, place = (lax.broadcasted_iota(jnp.int32, index_CK.shape, axis) for axis in (0, 1))
    return jnp.where((index_CK < 0) | (index_CK >= table.shape[0]), lax.rem(query * 61 + place, table.shape[0]), index_CK)

  def fetch(index_CK, sums=None, part=None):
    safe_CK = safe(index_CK[:, :plan.staged])
    if part is None:
      rows = sparse_rows.gather(table, safe_CK.reshape(-1), options.interpret)
    else:
      sums, rows = sparse_rows.add_rows_and_gather(sums, *part, table, safe_CK.reshape(-1), options.chip, options.interpret)
    rows = rows.reshape(-1, plan.queries, plan.staged, table.shape[1])
    return rows if part is None else (sums, rows)

  def direct(index_CK):
    return *pieces, safe(index_CK[:, plan.staged:]).reshape(plan.chunk, -1, plan.direct)

  return lists, fetch, direct


def _words(index_CK, plan):
  """Bits of the places that hold an entry, int32 [C / queries, queries, ...]."""
  words_CW = bits.pack(index_CK >= 0)
  return words_CW.reshape(-1, plan.queries, words_CW.shape[1])


def _operands(q, window_kv, sink, segments, window, plan):
  return sparse_plan.as_steps(q, plan), *sparse_plan.near(window_kv, segments, window, plan), sparse_plan.sink_logits(
      sink, plan)


def forward(q: jax.Array, window_kv: jax.Array, entries: Any, sink: jax.Array, chosen: Any,
            segments: tuple[jax.Array, jax.Array], static: Any) -> Any:
  """-> out [B, S, H, d] in q's dtype, lse [B, S, H] float32."""
  options = static[0]
  plan = _plan(q, entries, static, FORWARD_STEP, ROWS, DIRECT[options.chip.name], window_kv.shape[1] - q.shape[1])
  operands = _operands(q, window_kv, sink, segments, options.window, plan)
  lists, fetch, direct = _readers(entries, chosen, plan, static)
  results = (lax.empty(operands[0].shape, q.dtype),
             lax.empty((plan.steps, plan.rows // tpu.LANES, tpu.LANES), jnp.float32))

  def attend_chunk(chunk, index, rows, results):
    alone = direct(index) if plan.direct else ()
    return tuple(sparse_forward.attend_rows(chunk, rows, _words(index, plan), operands, alone, results, plan, options))

  def two_chunks(turn, carry):
    """Chunks 2 * turn, of which the carry holds list and rows, and 2 * turn + 1; leaves those of the chunk behind them."""
    index, rows, results = carry
    next_index, index_after = lists(2 * turn + 1, 2 * turn + 2)
    next_rows = fetch(next_index)
    results = attend_chunk(2 * turn, index, rows, results)
    rows_after = fetch(index_after)
    return index_after, rows_after, attend_chunk(jnp.minimum(2 * turn + 1, plan.chunks - 1), next_index, next_rows, results)

  index, = lists(jnp.int32(0))
  if plan.chunks == 1:
    out, lse = attend_chunk(jnp.int32(0), index, fetch(index), results)
  else:
    _, _, (out, lse) = lax.fori_loop(0, math.ceil(plan.chunks / 2), two_chunks, (index, fetch(index), results))
  return sparse_plan.from_steps(out, q.shape, plan), tiles.from_statistics(lse, q.shape, plan)


def backward(q: jax.Array, window_kv: jax.Array, entries: Any, sink: jax.Array, chosen: Any,
             segments: tuple[jax.Array, jax.Array], out: jax.Array, lse: jax.Array, d_out: jax.Array, d_lse: jax.Array,
             static: Any) -> Any:
  """-> gradients of q, window_kv, entries and sink, in the shapes and dtypes of `attend`'s arguments."""
  options, past = static[0], window_kv.shape[1] - q.shape[1]
  plan = _plan(q, entries, static, BACKWARD_STEP, _backward_rows(entries.shape[1]), past=past)
  statistics = jnp.stack([tiles.as_statistics(x, plan) for x in (lse, d_lse)])
  operands = (*_operands(q, window_kv, sink, segments, options.window, plan),
              *(sparse_plan.as_steps(x, plan) for x in (out, d_out)),
              statistics.reshape(2, plan.steps, *statistics.shape[3:]))
  lists, fetch, _ = _readers(entries, chosen, plan, static)
  num_rows = plan.batch * max(plan.entries, 1)
  units = sparse_rows.Units.of(num_rows, plan.width, options.chip)

  def chunk_gradients(chunk, index, rows, gradients):
    """Gradients with a chunk's part in them, and the rows of its part to add to the entries'; past the end: nothing new."""
    *gradients, d_sink = gradients
    *gradients, d_rows, d_logit = sparse_backward.gradients(
        jnp.minimum(chunk, plan.chunks - 1), rows, _words(index, plan), operands, gradients, plan, options)
    new = chunk < plan.chunks
    d_sink += jnp.where(new, d_logit[..., 0].sum(0), 0)
    return (*gradients, d_sink), (jnp.where(new, index, -1).reshape(-1), d_rows.reshape(-1, plan.width))

  def two_chunks(turn, carry):
    """As forward; `to_add` are the rows of the chunk before, which the entries' sums still lack."""
    index, rows, to_add, sums, gradients = carry
    next_index, index_after = lists(2 * turn + 1, 2 * turn + 2)
    sums, next_rows = fetch(next_index, sums, to_add)
    gradients, to_add = chunk_gradients(2 * turn, index, rows, gradients)
    sums, rows_after = fetch(index_after, sums, to_add)
    gradients, to_add = chunk_gradients(2 * turn + 1, next_index, next_rows, gradients)
    return index_after, rows_after, to_add, sums, gradients

  gradients = (lax.empty(operands[0].shape, q.dtype),
               lax.empty((plan.batch, plan.windows, 2 * plan.reach, plan.width), jnp.float32),
               jnp.zeros((plan.heads,), jnp.float32))
  (index,), sums = lists(jnp.int32(0)), units.zeros(plan.width)
  if plan.chunks == 1:
    gradients, to_add = chunk_gradients(jnp.int32(0), index, fetch(index), gradients)
  else:
    places = plan.chunk_queries * plan.places
    nothing = jnp.full((places,), -1, jnp.int32), lax.empty((places, plan.width), jnp.float32)
    start = index, fetch(index), nothing, sums, gradients
    _, _, to_add, sums, gradients = lax.fori_loop(0, math.ceil(plan.chunks / 2), two_chunks, start)
  dq, d_near, d_sink = gradients
  sums = sparse_rows.add_rows(sums, *to_add, options.chip, options.interpret)
  d_entries = units.table(sums, num_rows).reshape(plan.batch, -1, plan.width)
  d_entries = jnp.where(tpu.pad_axis(chosen[1], 1, max(plan.entries, 1))[..., None], d_entries, 0)
  cut = lambda gradient, x: gradient[:, :x.shape[1], :x.shape[2]].astype(x.dtype)
  return (sparse_plan.from_steps(dq, q.shape, plan), cut(tiles.from_near_keys(d_near, past), window_kv),
          cut(d_entries, entries), (-tpu.LOG2E * d_sink[:sink.shape[0]]).astype(sink.dtype))
