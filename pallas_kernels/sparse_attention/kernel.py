"""The masked form (report 2.3) as TPU kernels: tiles of entries that somebody selected, the selection as rows of bits.

A grid step is one block of queries against one tile of entries; the first step of a block does its window as well. Softmax
runs in base 2: log2(e) and the scale are folded into q once per block. A tile is one straight line of code over all rows:
the compiler overlaps the softmax of one part with the matmuls of another.

Axis letters: B batch   S queries   X window keys, P past ones and S   H heads   T entries   d head width   W words
              R rows of a block   U keys of a tile
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import bits, tpu
from pallas_kernels.names import ATTENTION, named
from pallas_kernels.selection import Selection
from pallas_kernels.sparse_attention import kernel_backward, tiles
from pallas_kernels.tpu import LANES, matmul, matmul_t, widen

TILE = {"v5p": (1024, 512), "v6e": (4096, 256), "tpu7x": (1024, 1024)}  # rows, entries: fewest bundles


def attend(q_BSHd: jax.Array, window_kv_BXd: jax.Array, entries_BTd: jax.Array, selection: Selection, sink_H: jax.Array,
           *, positions: jax.Array, segment_ids: jax.Array, entry_last: jax.Array, entry_segment: jax.Array,
           window: int, scale: float, interpret: bool, key_segment: jax.Array | None = None
           ) -> tuple[jax.Array, jax.Array]:
  """See `pallas_kernels.sparse_attention.attend`, for dtypes too; of the window keys the last S are the queries' own, which
  are all if there is no `key_segment`, int32 [B, X].

  Raises:
    ValueError: a window that is too long.
    NotImplementedError: in the backward pass, more entries than VMEM holds gradients of.
  """
  entries_BTd = jnp.where((entry_segment > 0)[..., None], entries_BTd, 0)
  places = dict(positions=positions, segment_ids=segment_ids, entry_last=entry_last, entry_segment=entry_segment)
  words_BSW = bits.words_of(selection, entries_BTd.shape[1], places)
  options = tiles.Options(window, scale, tpu.current_chip(interpret), interpret)
  segments = (segment_ids, segment_ids if key_segment is None else key_segment)
  return _attend(q_BSHd, window_kv_BXd, entries_BTd, sink_H, words_BSW, segments, options)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attend(q, window_kv, entries, sink, words, segments, options):
  return forward(q, window_kv, entries, sink, words, segments, options)


def _attend_forward(*args):
  out, lse = named(ATTENTION, *forward(*args))
  return (out, lse), (*args[:-1], out, lse)


def _attend_backward(options, saved, gradients):
  return (*kernel_backward.backward(*saved, *gradients, options), None, None)


_attend.defvjp(_attend_forward, _attend_backward)


def forward(q: jax.Array, window_kv: jax.Array, entries: Any, sink: jax.Array, words: Any,
            segments: tuple[jax.Array, jax.Array], options: Any) -> Any:
  """-> out [B, S, H, d] in q's dtype, lse [B, S, H] float32."""
  plan = tiles.make_plan(q.shape, entries.shape[1], q.dtype.itemsize, options, *TILE[options.chip.name], False,
                         window_kv.shape[1] - q.shape[1])
  counts, *operands = tiles.operands(q, window_kv, entries, sink, words, segments, options.window, plan)
  rows, in_specs, _ = tiles.specs(plan)
  statistics = pl.BlockSpec((None, None, plan.rows // LANES, LANES), lambda part, step, *_: (*plan.block(part, step), 0, 0))
  vector = lambda width, dtype=jnp.float32: pltpu.VMEM((plan.rows, width), dtype)
  grid_spec = pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2, in_specs=in_specs, out_specs=[rows, statistics],
      grid=(plan.batch * plan.parts, plan.blocks // plan.parts, jnp.maximum(counts.max(), 1)),
      scratch_shapes=[vector(plan.width, q.dtype), vector(LANES), vector(LANES), vector(plan.width)])
  out, lse = pl.pallas_call(
      functools.partial(_body, plan=plan, window=options.window, scale=options.scale), grid_spec=grid_spec,
      out_shape=[jax.ShapeDtypeStruct((plan.batch, plan.blocks * plan.rows, plan.width), q.dtype),
                 jax.ShapeDtypeStruct((plan.batch, plan.blocks, plan.rows // LANES, LANES), jnp.float32)],
      compiler_params=tpu.compiler_params(options.chip, "parallel", "arbitrary", "arbitrary"),
      interpret=options.interpret, name="masked_attention",
  )(counts, *operands)
  return tiles.from_rows(out, q.shape, plan), tiles.from_statistics(lse, q.shape, plan)


def _body(counts, ids, q, words, entries, near_words, near_keys, sink, out, lse, qs, top, total, acc, *, plan, window,
          scale):
  """One tile of one block. Kept between its tiles: qs, and of each row the largest logit, the sum and the weighted keys."""
  j = pl.program_id(2)
  number = plan.list_of(*plan.block(pl.program_id(0), pl.program_id(1)))

  @pl.when(j == 0)
  def _():
    qs[...] = tiles.scaled(q[...], scale)
    logit = tiles.per_row(sink[...], plan)
    one_lane = lax.broadcasted_iota(jnp.int32, logit.shape, 1) == 0  # the lanes of `total` are summed in the end
    first = tiles.first_keys(words, entries, near_words, near_keys, window, plan)
    if first is not None:
      keys, seen = first
      s = tiles.hide(matmul_t(qs[...], keys), seen)
      top[...] = jnp.maximum(logit, s.max(-1, keepdims=True))
      p = jnp.exp2(s - widen(top[...], s.shape[1]))
      total[...] = tpu.lane_sums(p) + jnp.where(one_lane, jnp.exp2(logit - top[...]), 0.0)
      acc[...] = matmul(p.astype(keys.dtype), keys)
    else:
      top[...], total[...], acc[...] = logit, jnp.where(one_lane, 1.0, 0.0), jnp.zeros_like(acc)

  if not plan.merged:
    @pl.when(j < counts[number])
    def tile():
      keys = entries[...]
      seen = tiles.key_mask(words[...], tiles.tile_id(counts, ids, number, j, plan), plan.entries)
      s = tiles.hide(matmul_t(qs[...], keys), seen)
      new = jnp.maximum(top[...], s.max(-1, keepdims=True))
      p, keep = jnp.exp2(s - widen(new, s.shape[1])), jnp.exp2(top[...] - new)
      top[...] = new
      total[...] = keep * total[...] + tpu.lane_sums(p)
      acc[...] = acc[...] * widen(keep, plan.width) + matmul(p.astype(keys.dtype), keys)

  @pl.when(j == pl.num_programs(2) - 1)
  def _():
    def finish(chunk, _):
      rows = pl.ds(pl.multiple_of(chunk * LANES, LANES), LANES)
      sums = total[rows].sum(-1, keepdims=True)
      out[rows] = (acc[rows] * (1 / sums)).astype(out.dtype)
      lse[chunk] = jnp.transpose(top[rows] + jnp.log2(sums))[0] * tpu.LN2
      return 0
    lax.fori_loop(0, plan.rows // LANES, finish, 0)
