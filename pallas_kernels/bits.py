"""Selections as rows of bits, the form in which the TPU kernels hand them to each other.

Bit b of word c * 128 + j stands for entry c * 4096 + b * 128 + j, so 128 neighbouring entries are one shift of 128 lanes.
A row of 4,096 entries takes 512 bytes.

Axis letters: B batch   S queries   T entries   K picks per query   W words   C queries of one block
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import blocks

LANES = 128
GROUP = 32 * LANES  # entries of 128 words


def num_words(num_entries: int) -> int:
  """Words of a row: whole groups of 128."""
  return LANES * math.ceil(num_entries / GROUP)


def pack(mask: jax.Array) -> jax.Array:
  """bool [..., T] -> int32 [..., W]."""
  fields = jnp.pad(mask, [(0, 0)] * (mask.ndim - 1) + [(0, -mask.shape[-1] % LANES)]).astype(jnp.int32)
  # A slice per bit: of a sum over an axis of 32 bits XLA makes all terms first, 32 times the result.
  words = [jnp.zeros((*mask.shape[:-1], 0), jnp.int32)]
  for first in range(0, fields.shape[-1], GROUP):
    places = range(first, min(first + GROUP, fields.shape[-1]), LANES)
    words.append(functools.reduce(jnp.bitwise_or, [fields[..., at:at + LANES] << bit for bit, at in enumerate(places)]))
  return jnp.concatenate(words, -1)


def unpack(words: jax.Array, num_entries: int) -> jax.Array:
  """int32 [..., W] -> bool [..., T]; dense, for tests and for one block of queries at a time."""
  rows, width = words.shape[:-1], words.shape[-1]  # the width may be 0
  fields = words.reshape(*rows, width // LANES, 1, LANES) >> jnp.arange(32, dtype=jnp.int32)[:, None]
  return (fields & 1 != 0).reshape(*rows, width * 32)[..., :num_entries]


def visible_words(positions: jax.Array, segment_ids: jax.Array, entry_last: jax.Array,
                  entry_segment: jax.Array) -> jax.Array:
  """int32 [B, S, W]: what causality and the documents let each query see.

  Args:
    positions, segment_ids: int32 [B, S]; entry_last, entry_segment: int32 [B, T]; as in `sparse_attention.attend`.
  """
  batch, num_entries = entry_last.shape
  groups = num_words(num_entries) // LANES
  pad = ((0, 0), (0, groups * GROUP - num_entries))
  # One pass per bit keeps the largest array that XLA may build at the size of the result; bits that no entry has need none.
  by_bit = [jnp.pad(x, pad).reshape(batch, groups, 32, LANES).transpose(2, 0, 1, 3).reshape(32, batch, groups * LANES)
            for x in (entry_last, entry_segment)]
  words = jnp.zeros((batch, positions.shape[1], groups * LANES), jnp.int32)
  for bit in range(min(math.ceil(num_entries / LANES), 32)):
    last_BW, segment_BW = by_bit[0][bit], by_bit[1][bit]
    words |= blocks.sees_entry(positions, segment_ids, last_BW, segment_BW).astype(jnp.int32) << bit
  return lax.optimization_barrier(words)  # else XLA makes them again in every reader, which takes minutes to compile


def from_picks(picks: jax.Array, num_entries: int) -> jax.Array:
  """Distinct entries int32 [B, S, K], -1 = empty -> int32 [B, S, W]; entries >= T are nobody's."""
  batch, length, _ = picks.shape
  words = num_words(num_entries)
  word = picks // GROUP * LANES + picks % LANES
  value = jnp.int32(1) << (picks % GROUP // LANES)
  word = jnp.where((picks >= 0) & (picks < num_entries), word, words)  # beyond the end: dropped
  rows = jnp.arange(batch * length).reshape(batch, length, 1)
  flat = jnp.zeros((batch * length, words), jnp.int32).at[rows, word].add(value, mode="drop")
  return flat.reshape(batch, length, words)


def to_picks(words: jax.Array, top_k: int) -> jax.Array:
  """int32 [B, S, W] with at most `top_k` bits a row -> entries int32 [B, S, top_k] in the order of words, -1 behind them.

  Without a sort and without a scatter: the k-th entry lies in the word in front of which at most k bits are set.
  """
  batch, length, width = words.shape
  size = blocks.block_size(length, 4 * top_k * LANES)

  def one(words_CW):
    end_CW = jnp.cumsum(lax.population_count(words_CW), -1)
    rank_K = jnp.arange(top_k)
    passed_CKW = end_CW[:, None, :] <= rank_K[:, None]  # XLA reduces this as it makes it
    word_CK = passed_CKW.sum(-1, dtype=jnp.int32)
    left_CK = rank_K - jnp.where(passed_CKW, end_CW[:, None, :], 0).max(-1)  # bits of the word in front of the entry's
    # Reduced, too: a gather of single numbers takes longer.
    value_CK = jnp.where(word_CK[..., None] == jnp.arange(width), words_CW[:, None, :], 0).sum(-1)
    bit_CK = jnp.zeros_like(word_CK)
    for half in (16, 8, 4, 2, 1):
      low_CK = lax.population_count(lax.shift_right_logical(value_CK, bit_CK) & (2**half - 1))
      above_CK = left_CK >= low_CK
      bit_CK, left_CK = bit_CK + jnp.where(above_CK, half, 0), left_CK - jnp.where(above_CK, low_CK, 0)
    entry_CK = word_CK // LANES * GROUP + bit_CK * LANES + word_CK % LANES
    return jnp.where(word_CK < width, entry_CK, -1)

  return blocks.join(lax.map(one, blocks.cut(words, size)), batch, length)


def words_of(selection: Any, num_entries: int, places: dict[str, jax.Array]) -> jax.Array:
  """int32 [B, S, W]: the entries that each query really attends to, whatever the selection's kind.

  Args:
    places: positions, segment_ids, entry_last, entry_segment.
  """
  if selection.kind == "bits":
    return selection.words  # the indexer sets no bit of an entry that is hidden
  visible = visible_words(**places)
  return visible if selection.kind == "all" else visible & from_picks(selection.picks, num_entries)
