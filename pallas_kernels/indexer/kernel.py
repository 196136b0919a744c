"""The exact selection (report eqs. 16-17) on TPU: scores, threshold and ties of a block of queries without leaving VMEM.

    HBM    queries [bq, h, c] and the chunks of 1,024 keys that a query of the block can see; out: words [bq, T/32]
    VMEM   ranks int32 [slots, bq, 1024]: every score of the block, as integers that are ordered like the scores
    loops  1. one matmul per chunk, relu, weights, sum over heads -> ranks
           2. the threshold per query: passes that count ranks, until exactly top_k are at or above it; about 15 of them
           3. only where scores tie at the threshold: the last place that is taken
           4. one pass that writes a bit per entry

Nothing of size [S, T] exists; a row of bits is 32 times smaller than a row of scores.

Axis letters: B batch   S queries   T entries   h index heads   c index width   N blocks of queries
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import bits, tpu
from pallas_kernels.indexer.tiles import Sizes, pad_heads, tile_of, visible_range
from pallas_kernels.selection import Selection

TILE = {"v5p": (32, 1024), "v6e": (32, 1024), "tpu7x": (32, 1024)}  # (queries, entries): fewest bundles per score
HIDDEN = -2**31  # the rank of an entry that the query may not see; no score has it


def _slots(sizes: Sizes) -> int:
  """Tiles of a group of 4,096 entries, the 128 words that a block writes at once; fewer if a row has fewer."""
  return min(bits.GROUP // sizes.entries, sizes.steps)


def _ranks(turned, lanes, k, query, entry):
  """int32 [bq, bk] with the order of the scores; hidden entries have the rank HIDDEN.

  Args:
    turned: queries [h * bq, c], head by head: so the sum over heads adds whole registers. lanes: [h, bq, 128], weights.
    k: [bk, c], rows of unused memory may hold anything.
    query: int32 [bq, 2], positions and segments (-1: not a token); entry: int32 [2, bk], last positions and segments.
  """
  dots = jnp.maximum(tpu.matmul_t(turned, k), 0).reshape(*lanes.shape[:2], k.shape[0])
  weights = jnp.concatenate([lanes] * (k.shape[0] // tpu.LANES), -1)
  number = lax.bitcast_convert_type((dots * weights).sum(0), jnp.int32)
  rank = jnp.where(number < 0, number ^ 0x7fffffff, number)
  rank = jnp.where(rank == -1, 0, rank)  # minus zero becomes zero
  visible = (entry[0:1] <= query[:, 0:1]) & (entry[1:2] == query[:, 1:2])
  return jnp.where(visible, rank, HIDDEN)


def _over_slots(ranks, groups, sizes: Sizes):
  """fold(step, *starts): step(slot, its ranks, *values) -> values, over all slots; values are int32 [bq, 128]."""
  slots = _slots(sizes)

  def fold(step, *starts):
    def group(g, values):
      for a in range(slots):
        slot = g * slots + a
        values = step(slot, ranks[slot], *values)
      return values
    return lax.fori_loop(0, groups, group, tuple(jnp.full((sizes.queries, tpu.LANES), x, jnp.int32) for x in starts))
  return fold


def _counter(fold):
  """count(test): float32 [bq, 1], for how many entries test(slot, its ranks) holds."""
  def count(test):
    (total,) = fold(lambda slot, x, total: (total + tpu.lane_sums(jnp.where(test(slot, x), 1, 0)),), 0)
    return total.astype(jnp.float32).sum(-1, keepdims=True)
  return count


def _trial(n, low, high, above_low, above_high, top_k: int):
  """A rank between low and high [bq, 1] that parts the entries between them well.

  While many are left, half way between the two scores: integers would spend trials on exponents that no score has. Then
  by linear interpolation of the counts, as few neighbouring scores are spread evenly. After 24 trials half way between
  the two integers, which ends whatever the scores are.
  """
  between = above_low - above_high
  share = jnp.where((between > 512) | (between < 4), 0.5, (above_low - top_k) / jnp.maximum(between, 1))
  as_score = lambda x: lax.bitcast_convert_type(jnp.where(x < 0, x ^ 0x7fffffff, x), jnp.float32)
  number = lax.bitcast_convert_type(as_score(low) * (1 - share) + as_score(high - 1) * share, jnp.int32)
  rank = jnp.where(number < 0, number ^ 0x7fffffff, number)
  half = (low >> 1) + (high >> 1) + (low & high & 1)
  return jnp.clip(jnp.where(n < 24, rank, half), low + 1, jnp.maximum(high - 1, low + 1))


def _threshold(fold, count, top_k: int):
  """(rank, entries at or above it, entries above it), [bq, 1] each.

  The top_k entries are those at or above the rank, or, if that is too many, those above it and some that tie at it.

  A query that sees at most top_k entries gets HIDDEN and top_k.
  """
  def extent(_, ranks, least, most, seen):
    for x in jnp.split(ranks, ranks.shape[1] // tpu.LANES, 1):
      least = jnp.minimum(least, jnp.where(x == HIDDEN, -HIDDEN - 1, x))
      most, seen = jnp.maximum(most, x), seen + jnp.where(x == HIDDEN, 0, 1)
    return least, most, seen

  least, most, seen = fold(extent, -HIDDEN - 1, HIDDEN, 0)
  seen = seen.astype(jnp.float32).sum(-1, keepdims=True)
  all_taken = seen <= top_k
  low = jnp.where(all_taken, HIDDEN, least.min(-1, keepdims=True))
  high = most.max(-1, keepdims=True) + 1
  above_low = jnp.where(all_taken, float(top_k), seen)
  open_rows = lambda low, high, above_low: (above_low != top_k) & (high > low + 1)
  unsure = lambda *state: jnp.max(jnp.where(open_rows(*state), 1.0, 0.0))

  def two_trials(state):
    n, low, high, above_low, above_high, _ = state
    for u in range(2):
      trial = _trial(n + u, low, high, above_low, above_high, top_k)
      got = count(lambda _, x, trial=trial: x >= trial)
      searching = open_rows(low, high, above_low)
      up, down = searching & (got >= top_k), searching & (got < top_k)
      low, above_low = jnp.where(up, trial, low), jnp.where(up, got, above_low)
      high, above_high = jnp.where(down, trial, high), jnp.where(down, got, above_high)
    return n + 2, low, high, above_low, above_high, unsure(low, high, above_low)

  start = (jnp.int32(0), low, high, above_low, jnp.zeros_like(above_low), unsure(low, high, above_low))
  _, low, _, above_low, above_high, _ = lax.while_loop(lambda state: state[-1] > 0, two_trials, start)
  return low, above_low, above_high


def _last_place(count, threshold, need, places, most: int):
  """int32 [bq, 1]: `need` of the entries that tie at the threshold lie below this place of the ranks."""
  size = max(most - 1, 1).bit_length()

  def bit(n, end):
    trial = end + lax.shift_left(jnp.int32(1), size - 1 - n)
    tied = count(lambda slot, x: (x == threshold) & (places(slot) < trial))
    return jnp.where(tied <= need, trial, end)
  return lax.fori_loop(0, size, bit, jnp.zeros_like(threshold))


def _kernel(ranges, q, w, query, k, entry, words, ranks, turned, lanes, *, sizes: Sizes, top_k: int):
  core, row, step, j = (pl.program_id(axis) for axis in range(4))
  packed = ranges[sizes.row_block(core, row, step)]
  first, tiles = packed & 0xffff, packed >> 16
  slots = _slots(sizes)
  group = first // slots  # ranks begin at a whole group of words
  before = first - group * slots
  groups = jnp.where(tiles > 0, pl.cdiv(before + tiles, slots), 0)

  @pl.when(j == 0)
  def _():
    turned[...] = jnp.swapaxes(q[0], 0, 1).reshape(turned.shape)
    lanes[...] = jnp.broadcast_to(jnp.transpose(w[0].astype(jnp.float32))[:, :, None], lanes.shape)

  @pl.when(j < tiles)
  def _():
    ranks[before + j] = _ranks(turned[...], lanes[...], k[0], query[0], entry[0])

  @pl.when(j == sizes.steps - 1)
  def _():
    def hide(slot, _):
      ranks[slot] = jnp.full((sizes.queries, sizes.entries), HIDDEN, jnp.int32)
      return 0
    lax.fori_loop(0, jnp.where(tiles > 0, before, 0), hide, 0)
    lax.fori_loop(before + tiles, groups * slots, hide, 0)
    places = lambda slot: slot * sizes.entries + lax.broadcasted_iota(jnp.int32, (sizes.queries, sizes.entries), 1)
    fold = _over_slots(ranks, groups, sizes)
    count = _counter(fold)
    threshold, reach, above = _threshold(fold, count, top_k)
    behind = ranks.shape[0] * sizes.entries
    end = lax.cond(jnp.max(reach) > top_k, lambda: _last_place(count, threshold, top_k - above, places, behind),
                   lambda: jnp.full((sizes.queries, 1), behind, jnp.int32))
    end = jnp.where(reach > top_k, end, behind)

    def emit(g, _):
      word = jnp.zeros((sizes.queries, tpu.LANES), jnp.int32)
      for a in range(slots):
        slot = g * slots + a
        x = ranks[slot]
        taken = ((x > threshold) | ((x == threshold) & (places(slot) < end))) & (x != HIDDEN)
        taken = jnp.where(taken, 1, 0)
        for b in range(sizes.entries // tpu.LANES):
          word |= taken[:, b * tpu.LANES:(b + 1) * tpu.LANES] << (a * (sizes.entries // tpu.LANES) + b)
      words[0, :, pl.ds(pl.multiple_of((group + g) * tpu.LANES, tpu.LANES), tpu.LANES)] = word
      return 0
    words[...] = jnp.zeros_like(words)
    lax.fori_loop(0, groups, emit, 0)


def _words(queries, weights, keys, positions, segment_ids, entry_last, entry_segment, *, top_k, interpret):
  batch, num_entries, _ = keys.shape
  chip = tpu.current_chip(interpret)
  sizes = Sizes.of(positions.shape[1], num_entries, TILE[chip.name], chip.cores)
  queries = tpu.pad_axis(pad_heads(queries, 2), 1, sizes.all_queries)
  heads, width = queries.shape[2:]
  weights = tpu.pad_axis(tpu.pad_axis(weights, 2, heads), 1, sizes.all_queries)
  keys = tpu.pad_axis(keys, 2, width)
  position_BS = tpu.pad_axis(positions, 1, sizes.all_queries)
  segment_BS = tpu.pad_axis(jnp.where(segment_ids > 0, segment_ids, -1), 1, sizes.all_queries, -1)
  last_BT, segment_BT = (tpu.pad_axis(x, 1, sizes.all_entries) for x in (entry_last, entry_segment))
  ranges = visible_range(position_BS, segment_BS, last_BT, segment_BT, sizes)
  num_words = bits.num_words(num_entries)

  block = lambda core, row, step, j, ranges: (row, sizes.block(core, step), 0)
  chunk = lambda core, row, step, j, ranges: tile_of(ranges[sizes.row_block(core, row, step)], j)
  grid = pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1, grid=(sizes.cores, batch, sizes.blocks, sizes.steps),
      in_specs=[pl.BlockSpec((1, sizes.queries, heads, width), lambda *at: (*block(*at), 0)),
                pl.BlockSpec((1, sizes.queries, heads), block), pl.BlockSpec((1, sizes.queries, 2), block),
                pl.BlockSpec((1, sizes.entries, width), lambda *at: (at[1], chunk(*at), 0)),
                pl.BlockSpec((1, 2, sizes.entries), lambda *at: (at[1], 0, chunk(*at)))],
      out_specs=pl.BlockSpec((1, sizes.queries, num_words), block),
      scratch_shapes=[pltpu.VMEM((tpu.round_up(sizes.steps, _slots(sizes)), sizes.queries, sizes.entries), jnp.int32),
                      pltpu.VMEM((heads * sizes.queries, width), queries.dtype),
                      pltpu.VMEM((heads, sizes.queries, tpu.LANES), jnp.float32)])
  words = pl.pallas_call(
      functools.partial(_kernel, sizes=sizes, top_k=top_k), grid_spec=grid,
      out_shape=jax.ShapeDtypeStruct((batch, sizes.all_queries, num_words), jnp.int32),
      compiler_params=tpu.compiler_params(chip, "parallel", "arbitrary", "arbitrary", "arbitrary"),
      interpret=interpret, name="index_select",
  )(ranges, queries, weights, jnp.stack([position_BS, segment_BS], -1), keys, jnp.stack([last_BT, segment_BT], 1))
  return words[:, :positions.shape[1]]


def select(queries: jax.Array, weights: jax.Array, keys: jax.Array, *, top_k: int, positions: jax.Array,
           segment_ids: jax.Array, entry_last: jax.Array, entry_segment: jax.Array, interpret: bool) -> Selection:
  """See `pallas_kernels.indexer.select`, for dtypes too; the selection is of kind "bits", int32 words."""
  words = _words(queries, weights, keys, positions, segment_ids, entry_last, entry_segment, top_k=top_k,
                 interpret=interpret)
  return Selection.from_words(words, keys.shape[1], top_k)
