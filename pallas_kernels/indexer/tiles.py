"""What the indexer's TPU kernels share: how a call is cut into tiles, which of them a block visits, scores of a tile
(report eq. 16) and the attention's mass there (V3.2 2.1.1).

Axis letters: B batch   S queries   T entries   h index heads   c index width   H heads   d head width   W words
              N blocks of queries
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import bits, tpu
from pallas_kernels.blocks import MASKED
from pallas_kernels.tpu import LANES


@dataclasses.dataclass(frozen=True)
class Sizes:
  """How a call is cut. The grid is (core, row of the batch, block of queries, tile of entries).

  Attributes:
    queries, entries: of a tile.
    cores, blocks: cores, and blocks of queries that each of them takes from a row. Neighbouring blocks go to different
      cores, since later queries of a document see more.
    steps: tiles of a whole row.
  """

  queries: int
  entries: int
  cores: int
  blocks: int
  steps: int

  @staticmethod
  def of(num_queries: int, num_entries: int, tile: tuple[int, int], cores: int) -> "Sizes":
    """`tile`, or a smaller one where the arrays are smaller."""
    queries = min(tile[0], tpu.round_up(num_queries, tpu.SUBLANES))
    entries = min(tile[1], 1 << max(num_entries - 1, LANES - 1).bit_length())
    return Sizes(queries, entries, cores, pl.cdiv(num_queries, queries * cores), pl.cdiv(num_entries, entries))

  @property
  def all_queries(self) -> int:
    """Queries of a row, padding included."""
    return self.cores * self.blocks * self.queries

  @property
  def all_entries(self) -> int:
    """Entries of a row, padding included."""
    return self.steps * self.entries

  def block(self, core: Any, step: Any) -> Any:
    """Number of the block that a core works on in a step."""
    return step * self.cores + core

  def row_block(self, core: Any, row: Any, step: Any) -> Any:
    """The same among the blocks of all rows."""
    return row * self.cores * self.blocks + self.block(core, step)


# ---- which tiles a block visits --------------------------------------------------------------------------------------
def pack_range(used: jax.Array) -> jax.Array:
  """bool [..., tiles] -> int32 [...]: first used tile in the low 16 bits, tiles up to the last used one above them."""
  first = jnp.argmax(used, -1).astype(jnp.int32)
  end = used.shape[-1] - jnp.argmax(used[..., ::-1], -1).astype(jnp.int32)
  return jnp.where(used.any(-1), first | (end - first) << 16, 0)


def tile_of(packed: Any, step: Any) -> Any:
  """Number of the tile to fetch in a step: past the range's end its last one again, so that nothing is copied."""
  return (packed & 0xffff) + jnp.minimum(step, jnp.maximum((packed >> 16) - 1, 0))


def visible_range(position_BS: jax.Array, segment_BS: jax.Array, last_BT: jax.Array, segment_BT: jax.Array, sizes: Sizes
                  ) -> jax.Array:
  """int32 [B * N] packed ranges of the tiles that any query of a block may see.

  A block's tokens lie in documents low..high. What is strictly between counts as visible; the first and the last
  document are cut at the block's last token in them.
  """
  cut = lambda x: x.reshape(x.shape[0], -1, sizes.queries)
  position, segment = cut(position_BS), cut(segment_BS)
  most = jnp.iinfo(jnp.int32).max
  low = jnp.where(segment > 0, segment, most).min(-1, keepdims=True)
  high = segment.max(-1, keepdims=True)
  reach = lambda own: jnp.where(segment == own, position, -1).max(-1, keepdims=True)
  last_B1T, own_B1T = last_BT[:, None], segment_BT[:, None]
  limit = jnp.where(own_B1T == high, reach(high), jnp.where(own_B1T == low, reach(low), most))
  seen_BNT = (own_B1T >= low) & (own_B1T <= high) & (last_B1T <= limit)
  return pack_range(seen_BNT.reshape(*seen_BNT.shape[:2], sizes.steps, sizes.entries).any(-1)).reshape(-1)


def used_range(words: jax.Array, sizes: Sizes) -> jax.Array:
  """int32 [B * N] packed ranges of the tiles in which any query of a block has an entry; words [B, S, W]."""
  batch, _, width = words.shape
  fields = words.reshape(batch, -1, sizes.queries, width // LANES, LANES)
  used = lax.reduce(fields, jnp.int32(0), lax.bitwise_or, (2, 4))
  per = sizes.entries // LANES  # bits of a word that belong to one tile
  fields = used[..., None] >> jnp.arange(0, 32, per, dtype=jnp.int32)
  return pack_range((fields & (2**per - 1) != 0).reshape(*used.shape[:2], -1)).reshape(-1)


def tile_mask(words: jax.Array, tile: jax.Array, entries: int) -> jax.Array:
  """int32 [bq, 128], the words of the tile's group -> bool [bq, entries]."""
  first = tile * entries % bits.GROUP // LANES
  return jnp.concatenate([(words >> (first + c)) & 1 for c in range(entries // LANES)], -1) != 0


# ---- scores ----------------------------------------------------------------------------------------------------------
def pad_heads(x: jax.Array, axis: int, value: float = 0) -> jax.Array:
  """An array of any shape and dtype: heads along `axis`, and the width behind them if there is one, up to whole
  registers."""
  x = tpu.pad_axis(x, axis, tpu.round_up(x.shape[axis], 16), value)
  return x if axis == x.ndim - 1 else tpu.pad_axis(x, axis + 1, tpu.round_up(x.shape[axis + 1], LANES))


def head_dots(q: jax.Array, k: jax.Array) -> jax.Array:
  """[bq, h, c] x [bk, c] -> float32 [bq, h, bk]."""
  num_queries, heads, width = q.shape
  return tpu.matmul_t(q.reshape(num_queries * heads, width), k).reshape(num_queries, heads, k.shape[0])


def weigh(dots: jax.Array, w: jax.Array) -> jax.Array:
  """Scores, float32 [bq, bk], from float32 dots [bq, h, bk] and head weights [bq, h]."""
  return (jnp.maximum(dots, 0) * w.astype(jnp.float32)[:, :, None]).sum(1)


# ---- the loss, both ways ---------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class LossCall:
  """What the two passes of the loss have in common.

  Attributes:
    chip, sizes: where it runs and how it is cut.
    padded: queries, weights, keys, attention queries, entries, lse, words, as `in_specs` cut them.
    ranges: int32 [B * N], see `used_range`.
  """

  chip: tpu.Chip
  sizes: Sizes
  padded: tuple[jax.Array, ...]
  ranges: jax.Array

  @staticmethod
  def of(arrays: Any, words: jax.Array, tiles: dict[str, tuple[int, int]], interpret: bool) -> 'LossCall':
    """`words`: of the selection, int32 [B, S, W]. `tiles`: by chip ((query, attention head) rows, entries); keys of
    unused memory are finite."""
    queries, weights, keys, attention, entries, lse = arrays
    chip = tpu.current_chip(interpret)
    attention, lse = pad_heads(attention, 2), pad_heads(lse.astype(jnp.float32), 2, -MASKED)  # no mass
    rows, num_entries = tiles[chip.name]
    num_queries = max(rows // lse.shape[2] // tpu.SUBLANES, 1) * tpu.SUBLANES
    sizes = Sizes.of(words.shape[1], keys.shape[1], (num_queries, num_entries), chip.cores)
    queries, weights = pad_heads(queries, 2), pad_heads(weights, 2)
    keys = tpu.pad_axis(tpu.pad_axis(keys, 2, queries.shape[3]), 1, sizes.all_entries)
    entries = tpu.pad_axis(entries, 2, attention.shape[3])  # what a tile reads behind the last entry, nobody chose
    queries, weights, attention, lse, words = (
        tpu.pad_axis(x, 1, sizes.all_queries) for x in (queries, weights, attention, lse, words))
    return LossCall(chip, sizes, (queries, weights, keys, attention, lse, entries, words), used_range(words, sizes))

  @property
  def grid(self) -> tuple[int, ...]:
    """Steps of the Pallas call: cores, rows of the batch, blocks of queries, tiles of entries."""
    return (self.sizes.cores, self.ranges.shape[0] // (self.sizes.cores * self.sizes.blocks), self.sizes.blocks,
            self.sizes.steps)

  def per_query(self, *shape: int) -> pl.BlockSpec:
    """A block of queries of an array [B, S, *shape]."""
    block = lambda core, row, step, j, ranges: (row, self.sizes.block(core, step), *(0 for _ in shape))
    return pl.BlockSpec((1, self.sizes.queries, *shape), block)

  @property
  def in_specs(self) -> list[pl.BlockSpec]:
    """Of `padded`."""
    queries, weights, keys, attention, lse, entries, _ = self.padded
    tile = lambda core, row, step, j, ranges: tile_of(ranges[self.sizes.row_block(core, row, step)], j)
    rows = lambda x: pl.BlockSpec((1, self.sizes.entries, x.shape[2]), lambda *at: (at[1], tile(*at), 0))
    words = pl.BlockSpec((1, self.sizes.queries, LANES), lambda core, row, step, j, ranges: (
        row, self.sizes.block(core, step), tile(core, row, step, j, ranges) * self.sizes.entries // bits.GROUP))
    return [self.per_query(*queries.shape[2:]), self.per_query(weights.shape[2]), rows(keys),
            self.per_query(*attention.shape[2:]), self.per_query(lse.shape[2]), rows(entries), words]


def prepare(attention: Any, lse: jax.Array, teacher: Any, base: jax.Array, scale: float) -> None:
  """Once per block of queries, attention queries and float32 lse to base 2: `teacher` [bq * H, d], in the dtype of the
  scratch, and `base`, float32 [bq * H, 128]."""
  teacher[...] = (attention.astype(jnp.float32) * (scale * tpu.LOG2E)).astype(teacher.dtype).reshape(teacher.shape)
  base[...] = jnp.broadcast_to((lse * tpu.LOG2E)[:, :, None], (*lse.shape, LANES)).reshape(base.shape)


def masses(teacher: Any, base: jax.Array, entries: Any, chosen: Any) -> jax.Array:
  """float32 [bq, bk]: sum over heads of exp(logit - lse), 0 where the entry is not chosen."""
  logits = tpu.matmul_t(teacher, entries)
  mass = jnp.exp2(logits - tpu.widen(base, logits.shape[1])).reshape(chosen.shape[0], -1, logits.shape[1]).sum(1)
  return jnp.where(chosen, mass, 0)
