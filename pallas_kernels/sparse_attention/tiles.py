"""How the masked attention kernels cut their work: blocks of queries, tiles of entries, and who sees what inside them.

A block is `queries` neighbouring queries with all heads: its rows are (query, head) pairs. It meets the window keys around
it and those tiles of entries that any of its queries selected. Row statistics travel as rows of 128 (query, head) pairs, so
that the number of heads need not be 128.

Axis letters: B batch   S queries   H heads   T entries   d head width   W words   N blocks of a batch row
              X window keys of a row: P past ones and the queries' own S   V blocks of the latter
              C queries of a block   U keys of a tile   R rows of a block, C * H
Dtypes: a layout keeps its array's; logits and statistics of rows float32; words, documents and numbers of tiles int32.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import bits, tpu
from pallas_kernels.tpu import LANES

HIDDEN = -2.0**127  # logit of a hidden key
LOWEST = -2.0**126  # lowest logit of a sink: far above HIDDEN, so that exp2(HIDDEN - max) is 0 even if nothing is visible
_MOST_QUERIES = 128
_LARGEST_REACH = 512
_LIST_BYTES = 2**19  # of the 1 MiB of SMEM


@dataclasses.dataclass(frozen=True)
class Options:
  """What a caller fixes: keys of the window, scale of q . k, the chip, and whether to interpret."""

  window: int
  scale: float
  chip: tpu.Chip
  interpret: bool


@dataclasses.dataclass(frozen=True)
class Plan:
  """The static shape of one kernel call.

  Attributes:
    batch, heads, width: B, H and d with their padding.
    queries: C.
    blocks: N.
    entries: U, entries of a tile.
    tiles: tiles of all entries.
    merged: all entries are one tile, which is done together with the window.
    reach: window keys are read in blocks of this size, the one around the queries and the one before.
    parts: each batch row is dealt to this many parts of the grid's parallel axis, one per core.
    run: neighbouring blocks that are dealt together.
    shared: neighbouring blocks that share one list of tiles.
  """

  batch: int
  heads: int
  width: int
  queries: int
  blocks: int
  entries: int
  tiles: int
  merged: bool
  reach: int
  parts: int
  run: int
  shared: int

  @property
  def rows(self) -> int:
    """R."""
    return self.queries * self.heads

  @property
  def windows(self) -> int:
    """V, blocks of window keys."""
    return math.ceil(self.blocks * self.queries / self.reach)

  @property
  def id_bits(self) -> int:
    """Bits of a tile's number in a list."""
    return 8 if self.tiles <= 256 else 16

  @property
  def list_words(self) -> int:
    """Words of one list."""
    return math.ceil(self.tiles * self.id_bits / 32)

  def block(self, part: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Batch row and block of a part's step, int32 scalars. Runs are dealt in turn: later queries see more, and cores
    end together."""
    row, turn = _divide(part, self.parts)
    number, place = _divide(step, self.run)
    return row, (number * self.parts + turn) * self.run + place

  def list_of(self, row: jax.Array, block: jax.Array) -> jax.Array:
    """Number of a block's list of tiles, an int32 scalar."""
    return _divide(row * self.blocks + block, self.shared)[0]


def _divide(number, divisor: int):
  """Quotient and rest of a number that is not negative."""
  return (number, 0) if divisor == 1 else (lax.div(number, divisor), lax.rem(number, divisor))


def _power_below(number: int) -> int:
  return 2 ** int(math.log2(number))


def window_reach(window: int, length: int) -> int:
  """Window keys of a block, with which any query sees its window in two blocks.

  Raises:
    ValueError: a window beyond what a block of queries can read at once.
  """
  reach = tpu.round_up(max(min(window, length), 1), LANES)
  if reach > _LARGEST_REACH:
    raise ValueError(f"window = {window}: the attention kernel reads at most {_LARGEST_REACH} window keys")
  return reach


def make_plan(q_shape: tuple[int, ...], num_entries: int, itemsize: int, options: Options, rows: int, entries: int,
              whole_windows: bool, past: int = 0) -> Plan:
  """The plan for tiles of at most `rows` x `entries`.

  Args:
    q_shape: [B, S, H, d].
    itemsize: bytes of an operand's number; tiles of float32 hold half as many entries.
    whole_windows: deal the blocks of one window block together.
    past: window keys of earlier tokens.

  Raises:
    ValueError: a window beyond what a block of queries can read at once.
  """
  batch, length, heads, width = q_shape
  reach = window_reach(options.window, length + past)
  heads = tpu.round_up(heads, 8 if heads <= 64 else 16)  # a block's rows fill whole rows of statistics
  queries = min(max(_power_below(rows / heads), 8), _MOST_QUERIES)
  while queries * heads % LANES:
    queries *= 2
  entries = min(entries, max(512, _power_below(max(num_entries, 1) / 16)))  # half a tile at the causal edge is wasted
  entries = max(min(entries * 2 // itemsize, 2 * _power_below(max(num_entries - 1, 64))), LANES)
  tiles = max(math.ceil(num_entries / entries), 1)
  parts = 1 if batch % options.chip.cores == 0 else options.chip.cores
  run = reach // queries if whole_windows else 1
  blocks = tpu.round_up(math.ceil(length / queries), run * parts)
  merged = tiles == 1 and num_entries > 0
  result = Plan(batch, heads, tpu.round_up(width, LANES), queries, blocks, entries, tiles, merged, reach, parts, run, 1)
  while result.list_words * 4 * math.ceil(batch * blocks / result.shared) > _LIST_BYTES:
    result = dataclasses.replace(result, shared=2 * result.shared)
  return result


# ---- arrays as the kernels read them -----------------------------------------------------------------------------------
def as_rows(x_BSHd: jax.Array, plan: Plan) -> jax.Array:
  """-> [B, N * R, d], zeros in the padding."""
  x_BSHd = _padded(x_BSHd, plan.blocks * plan.queries, plan.heads, plan.width)
  return x_BSHd.reshape(plan.batch, plan.blocks * plan.rows, plan.width)


def from_rows(x_BRd: jax.Array, shape: tuple[int, ...], plan: Plan) -> jax.Array:
  """The inverse of `as_rows`, without the padding."""
  x_BSHd = x_BRd.reshape(plan.batch, plan.blocks * plan.queries, plan.heads, plan.width)
  return x_BSHd[:, :shape[1], :shape[2], :shape[3]]


def as_statistics(x_BSH: jax.Array, plan: Plan) -> jax.Array:
  """-> [B, N, R / 128, 128]."""
  x_BSH = _padded(x_BSH, plan.blocks * plan.queries, plan.heads)
  return x_BSH.reshape(plan.batch, plan.blocks, plan.rows // LANES, LANES)


def from_statistics(x_BNRL: jax.Array, shape: tuple[int, ...], plan: Plan) -> jax.Array:
  """The inverse of `as_statistics`, without the padding."""
  return x_BNRL.reshape(plan.batch, plan.blocks * plan.queries, plan.heads)[:, :shape[1], :shape[2]]


def _padded(x, *sizes: int):
  """x with zeros behind its axes 1, 2, ... up to these sizes."""
  for axis, size in enumerate(sizes, 1):
    x = tpu.pad_axis(x, axis, size)
  return x


def operands(q: jax.Array, window_kv: jax.Array, entries: Any, sink: jax.Array, words: Any,
             segments: tuple[jax.Array, jax.Array], window: int, plan: Plan) -> tuple[jax.Array, ...]:
  """What forward and backward read, in the order of `specs`, two lists of tiles before it.

  Args:
    window_kv: [B, P + S, d], the keys of P earlier tokens before the queries' own; P is at most `plan.reach`.
    segments: documents of the queries [B, S] and of the window's keys [B, P + S].
  """
  words = _padded(words, plan.blocks * plan.queries, bits.num_words(plan.tiles * plan.entries))
  logit_H = jnp.maximum(tpu.pad_axis(sink.astype(jnp.float32), 0, plan.heads) * tpu.LOG2E, LOWEST)
  return (*tile_lists(words, plan), as_rows(q, plan), words, _padded(entries, plan.tiles * plan.entries, plan.width),
          near_words(*segments, window, plan), near_keys(window_kv, q.shape[1], plan),
          jnp.broadcast_to(logit_H[:, None], (plan.heads, LANES)))


def near_keys(window_kv_BXd: jax.Array, queries: int, plan: Plan) -> jax.Array:
  """Each block of the queries' own window keys behind the one before it, the first behind the past keys:
  [B, V, 2 * reach, d], zeros before the first key."""
  past = window_kv_BXd.shape[1] - queries
  here = _padded(window_kv_BXd[:, past:], plan.windows * plan.reach, plan.width)
  here = here.reshape(plan.batch, plan.windows, plan.reach, plan.width)
  return jnp.concatenate([_behind(_padded(window_kv_BXd[:, :past], past, plan.width), here, plan.reach), here], 2)


def _behind(past, here, reach, value=0):
  """Blocks [B, V, reach, ...] -> those before them: `past` [B, P, ...] with `value` in front, then all but the last."""
  front = jnp.pad(past, ((0, 0), (reach - past.shape[1], 0)) + ((0, 0),) * (past.ndim - 2), constant_values=value)
  return jnp.concatenate([front[:, None], here[:, :-1]], 1)


def from_near_keys(x_BVUd: jax.Array, past: int) -> jax.Array:
  """The transpose of `near_keys`: a key's sum over the two places where it stands, [B, P + V * reach, d]."""
  before, here = jnp.split(x_BVUd, 2, axis=2)
  whole = here + jnp.pad(before[:, 1:], ((0, 0), (0, 1), (0, 0), (0, 0)))
  whole = whole.reshape(whole.shape[0], -1, whole.shape[3])
  return jnp.concatenate([before[:, 0, before.shape[2] - past:], whole], 1) if past else whole


def near_words(segment_ids: jax.Array, key_segment: jax.Array, window: int, plan: Plan) -> jax.Array:
  """Which of its near keys each query sees: int32 [B, V * reach, 128], in the layout of `bits`."""
  past = key_segment.shape[1] - segment_ids.shape[1]
  in_blocks = lambda x: tpu.pad_axis(x, 1, plan.windows * plan.reach).reshape(plan.batch, plan.windows, plan.reach)
  nobodys = lambda x: jnp.where(x > 0, x, -1)  # no query's
  segment, here = in_blocks(segment_ids), nobodys(in_blocks(key_segment[:, past:]))
  before = _behind(nobodys(key_segment[:, :past]), here, plan.reach, -1)
  owner = jnp.concatenate([before, here], 2)
  apart = plan.reach + jnp.arange(plan.reach)[:, None] - jnp.arange(2 * plan.reach)
  seen = (apart >= 0) & (apart < window) & (segment[..., None] == owner[:, :, None])
  chunks = [seen[..., start:start + LANES] for start in range(0, 2 * plan.reach, LANES)]
  words = sum(chunk.astype(jnp.int32) << number for number, chunk in enumerate(chunks))
  return words.reshape(plan.batch, plan.windows * plan.reach, LANES)


def specs(plan: Plan) -> tuple[pl.BlockSpec, list[pl.BlockSpec], pl.BlockSpec]:
  """Blocks over the grid (part, step, tile): of rows, of all operands behind the two lists, of near keys."""
  def words(part, step, tile, counts, ids):
    row, block = plan.block(part, step)
    number = tile_id(counts, ids, plan.list_of(row, block), tile, plan)
    return row, block, _divide(number, bits.GROUP // plan.entries)[0]

  def entries(part, step, tile, counts, ids):
    row, block = plan.block(part, step)
    return row, tile_id(counts, ids, plan.list_of(row, block), tile, plan), 0

  def window(part, step, *_):
    row, block = plan.block(part, step)
    return row, _divide(block, plan.reach // plan.queries)[0], 0, 0

  queries = lambda part, step, *_: (*plan.block(part, step), 0)
  rows = pl.BlockSpec((None, plan.rows, plan.width), queries)
  near = pl.BlockSpec((None, None, 2 * plan.reach, plan.width), window)
  return rows, [rows, pl.BlockSpec((None, plan.queries, LANES), words),
                pl.BlockSpec((None, plan.entries, plan.width), entries), pl.BlockSpec((None, plan.queries, LANES), queries),
                near, pl.BlockSpec((plan.heads, LANES), lambda *_: (0, 0))], near


# ---- lists of tiles ----------------------------------------------------------------------------------------------------
def tile_lists(words_BSW: jax.Array, plan: Plan) -> tuple[jax.Array, jax.Array]:
  """Tiles with an entry that any query of the blocks of a list selected: how many, and their numbers in rising order.

  Returns:
    counts int32 [lists]; numbers int32 [lists * list_words], `id_bits` each.
  """
  groups = words_BSW.shape[2] // LANES
  chunks = lax.reduce(words_BSW.reshape(plan.batch * plan.blocks, plan.queries, groups, LANES), jnp.int32(0),
                      lax.bitwise_or, (1, 3))  # a bit per 128 entries
  chunks = tpu.pad_axis(chunks, 0, tpu.round_up(chunks.shape[0], plan.shared))
  chunks = lax.reduce(chunks.reshape(-1, plan.shared, groups), jnp.int32(0), lax.bitwise_or, (1,))
  per_tile = plan.entries // LANES
  fields = chunks[..., None] >> jnp.arange(0, 32, per_tile, dtype=jnp.int32)
  used = ((fields & (2**per_tile - 1) if per_tile < 32 else fields) != 0).reshape(len(chunks), -1)[:, :plan.tiles]
  numbers = jnp.argsort(~used, axis=1, stable=True).astype(jnp.int32)
  per_word = 32 // plan.id_bits
  numbers = tpu.pad_axis(numbers, 1, plan.list_words * per_word).reshape(len(chunks), plan.list_words, per_word)
  shifts = jnp.arange(0, 32, plan.id_bits, dtype=jnp.int32)
  return used.sum(1, dtype=jnp.int32), (numbers << shifts).sum(-1, dtype=jnp.int32).reshape(-1)


def tile_id(counts: Any, ids: Any, number: Any, j: Any, plan: Plan) -> Any:
  """The j-th tile of a list; past its end the last one, so that nothing new is fetched."""
  j = jnp.minimum(j, jnp.maximum(counts[number] - 1, 0))
  word, place = _divide(j, 32 // plan.id_bits)
  return (ids[number * plan.list_words + word] >> (place * plan.id_bits)) & (2**plan.id_bits - 1)


# ---- inside a kernel ---------------------------------------------------------------------------------------------------
def key_mask(words_CL: jax.Array, tile: int | jax.Array, keys: int) -> jax.Array:
  """Words [C, 128] of the group that holds tile number `tile` of this many keys -> bool [C, U]: who sees which."""
  chunks = keys // LANES
  first = lax.rem(tile * chunks, 32)
  return jnp.concatenate([words_CL << (31 - c - first) for c in range(chunks)], -1) < 0  # the sign bit


def first_keys(words: Any, entries: Any, near_words: Any, near_keys: Any, window: int, plan: Plan
               ) -> tuple[jax.Array, jax.Array] | None:
  """Keys [U, d] and their mask, bool [C, U], of a block's first step: its window, and the entries behind it if they are
  merged."""
  pairs = [(near_keys[...], key_mask(near_words[...], 0, 2 * plan.reach))] if window else []
  if plan.merged:
    pairs.append((entries[...], key_mask(words[...], 0, plan.entries)))
  if not pairs:
    return None
  return jnp.concatenate([keys for keys, _ in pairs], 0), jnp.concatenate([seen for _, seen in pairs], 1)


def hide(logits_RU: jax.Array, seen_CU: jax.Array) -> jax.Array:
  """Logits [R, U] of the keys that a query does not see (bool [C, U]) -> HIDDEN, for all its heads."""
  queries, keys = seen_CU.shape
  return jnp.where(seen_CU[:, None], logits_RU.reshape(queries, -1, keys), HIDDEN).reshape(logits_RU.shape)


def scaled(q_Rd: jax.Array, scale: float) -> jax.Array:
  """Queries [R, d], dtype kept, whose product with a key is the logit in base 2."""
  return (q_Rd.astype(jnp.float32) * (scale * tpu.LOG2E)).astype(q_Rd.dtype)


def per_row(x_HL: jax.Array, plan: Plan) -> jax.Array:
  """[H, 128] -> [R, 128], the same for every query."""
  return jnp.broadcast_to(x_HL[None], (plan.queries, plan.heads, LANES)).reshape(plan.rows, LANES)


def column(x_1L: jax.Array) -> jax.Array:
  """[1, 128] -> [128, 128] whose row r holds x[r] in all lanes."""
  return jnp.transpose(jnp.broadcast_to(x_1L, (LANES, LANES)))
