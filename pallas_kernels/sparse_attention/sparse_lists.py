"""From rows of bits to lists of entries, without a scatter: items walk to their places by powers of two.

The words of 128 queries lie in the lanes, word after word down the rows. Words that are not empty move up over the empty
ones, each by the number of empty words above it, one bit of that number at a time: bits from low to high never bring two
items to one place. Then each moves down, bits from high to low, until the entries of all words before it have room; a word
is copied into the rows behind it that its other entries need; and each row takes its own bit of its word.

Words beyond a few hundred are listed in two levels: first the words that are not empty, as bits of a word per 32 words; the
SparseCore fetches these words alone. So the cost hardly grows with the context.

Axis letters: C queries   W words of a query   K places of a list   J words that are not empty   L 128 queries
"""

from __future__ import annotations

import functools
from typing import Any, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import bits, tpu
from pallas_kernels.sparse_attention import sparse_rows
from pallas_kernels.tpu import LANES, SUBLANES

DIRECT_WORDS = 1024  # of a query, that are listed in one level
_BLOCK = 64  # rows at a time


def from_words(parts: Sequence[jax.Array], places: int, options: Any, source: Any = (None, None)) -> jax.Array:
  """Rows of bits with at most `places` bits each -> entries int32 [C, places], -1 in the places behind them.

  The order of a query's entries is that of words, and of bits inside a word; in two levels the words' order is that of their
  own words and bits.

  Args:
    parts: int32 [some of C, W], behind each other; where they are listed in two levels, with `source` each is read where it
      lies.
    source: a table (see `as_table`) in which these rows are those with the numbers int32 [C]; without it they are copied
      into one.
  """
  words = parts[0].shape[1]
  parts = [tpu.pad_axis(part, 1, max(words, LANES)) for part in parts]
  if words <= DIRECT_WORDS:
    return _list(_joined(parts), None, places, options)
  number_CJ = from_words([_joined([bits.pack(part != 0) for part in parts])], places, options)
  place = lax.broadcasted_iota(jnp.int32, number_CJ.shape, 1)
  safe_CJ = jnp.where(number_CJ < 0, place % words, number_CJ)
  table, row_C = source
  if table is None:
    table, row_C = as_table(_joined(parts)), jnp.arange(number_CJ.shape[0], dtype=jnp.int32)
  at_CJ = _place(row_C[:, None], safe_CJ, words)
  value_CJ = sparse_rows.gather(table, at_CJ.reshape(-1), options.interpret).reshape(number_CJ.shape)
  return _list(jnp.where(number_CJ < 0, 0, value_CJ), safe_CJ, places, options)


def _joined(parts):
  return jnp.concatenate(parts) if len(parts) > 1 else parts[0]


def as_table(words_RW: jax.Array) -> jax.Array | None:
  """All words, int32 [R, W], in one row, in the order in which their tiles lie in HBM: nothing moves. None = too
  many to count."""
  words_RW = tpu.pad_axis(tpu.pad_axis(words_RW, 0, tpu.round_up(words_RW.shape[0], SUBLANES)), 1,
                          tpu.round_up(words_RW.shape[1], LANES))
  if words_RW.size >= 2**31:
    return None
  tiles = words_RW.reshape(-1, SUBLANES, words_RW.shape[1] // LANES, LANES).swapaxes(1, 2)
  return tiles.reshape(-1)


def _place(row, word, words):
  """Where `as_table` has this word of this row."""
  tile = row // SUBLANES * tpu.round_up(words, LANES) // LANES + word // LANES
  return (tile * SUBLANES + row % SUBLANES) * LANES + word % LANES


def _list(words_CW, numbers_CW, places, options):
  """The kernel's call. `numbers_CW`: of words that come without empty ones between them; None = all words in order."""
  queries, words = words_CW.shape
  if words.bit_length() + places.bit_length() > 31:
    raise NotImplementedError(f"a list of {places} entries out of {words} words: the kernel packs both numbers in 31 bits")
  inputs = [tpu.pad_axis(x, 0, tpu.round_up(queries, LANES)) for x in (words_CW, numbers_CW) if x is not None]
  rows = max(words, places) + 2 * _margin(words, places)
  lists = pl.pallas_call(
      functools.partial(_body, words=words, places=places), grid=(inputs[0].shape[0] // LANES,),
      in_specs=[pl.BlockSpec((LANES, words), lambda i: (i, 0))] * len(inputs),
      out_specs=pl.BlockSpec((LANES, places), lambda i: (i, 0)),
      out_shape=jax.ShapeDtypeStruct((inputs[0].shape[0], places), jnp.int32),
      scratch_shapes=[pltpu.VMEM((rows, LANES), jnp.int32)] * 2,
      compiler_params=tpu.compiler_params(options.chip, "parallel"), interpret=options.interpret, name="list_entries",
  )(*inputs)
  return lists[:queries]


def _margin(words, places):
  """The longest step: the largest power of two below the number of rows."""
  return 2 ** ((max(words, places) - 1).bit_length() - 1)


def _body(*refs, words, places):
  """Lists of 128 queries. `value`, `tag`: the walking items, with as many empty rows before and behind as a step reaches."""
  given, *numbers, out, value, tag = refs
  base, shift = _margin(words, places), places.bit_length()
  value[...], tag[...] = jnp.zeros_like(value), jnp.zeros_like(tag)

  before = jnp.zeros((1, LANES), jnp.float32)
  for first in range(0, words, LANES):
    v = jnp.transpose(given[:, pl.ds(first, LANES)])
    value[pl.ds(base + first, LANES)] = v
    if numbers:
      tag[pl.ds(base + first, LANES)] = jnp.transpose(numbers[0][:, pl.ds(first, LANES)])
    else:
      used, before = _counts_to(jnp.where(v != 0, 1, 0), before)
      tag[pl.ds(base + first, LANES)] = jnp.where(v != 0, first + 1 + _row_numbers() - used, 0)
  if not numbers:
    for bit in range((words - 1).bit_length()):
      _walk(value, tag, base, words, 2**bit, 2**bit)

  before = jnp.zeros((1, LANES), jnp.float32)
  for first in range(0, min(words, places), LANES):
    at = pl.ds(base + first, LANES)
    v = value[at]
    count = bit_count(v)
    upto, before = _counts_to(count, before)
    row = first + _row_numbers()
    number = tag[at] if numbers else row + tag[at]
    tag[at] = jnp.where(v != 0, (number << shift) | (upto - count - row), 0)
  for bit in reversed(range((places - 1).bit_length())):
    _walk(value, tag, base, places, -2**bit, 2**bit)

  def renumber(block, _):
    at = pl.ds(base + pl.multiple_of(block * _BLOCK, _BLOCK), _BLOCK)
    tag[at] = (tag[at] >> shift) << 5  # the number, and room for the rank of the bit
    return 0
  lax.fori_loop(0, places // _BLOCK, renumber, 0)
  for step in (1, 2, 4, 8, 16):
    _fill(value, tag, base, places, step)

  for first in range(0, places, LANES):
    v, t = value[pl.ds(base + first, LANES)], tag[pl.ds(base + first, LANES)]
    number, rank = t >> 5, t & 31
    entry = (number >> 7) * bits.GROUP + bit_of_rank(v, rank) * LANES + (number & (LANES - 1))
    out[:, pl.ds(first, LANES)] = jnp.transpose(jnp.where(rank < bit_count(v), entry, -1))


def _row_numbers():
  return lax.broadcasted_iota(jnp.int32, (LANES, LANES), 0)


def _counts_to(count, before):
  """int32 counts [128, L] of at most 32 and the sum before them -> sums up to each row, its own included; the sum of all."""
  lower = jnp.where(lax.broadcasted_iota(jnp.int32, (LANES, LANES), 1) <= _row_numbers(), 1.0, 0.0).astype(jnp.bfloat16)
  sums = before + tpu.matmul(lower, count.astype(jnp.float32).astype(jnp.bfloat16))
  return sums.astype(jnp.int32), sums[LANES - 1:]


def _walk(value, tag, base, rows, step, bit):
  """Items whose tag has `bit` move up by `step` rows (down if it is negative)."""
  blocks = rows // _BLOCK

  def one(block, _):
    first = base + pl.multiple_of((block if step > 0 else blocks - 1 - block) * _BLOCK, _BLOCK)
    here, there = pl.ds(first, _BLOCK), pl.ds(first + step, _BLOCK)
    v, t, v_in, t_in = value[here], tag[here], value[there], tag[there]
    goes, comes = t & bit != 0, t_in & bit != 0
    value[here] = jnp.where(goes, 0, v) | jnp.where(comes, v_in, 0)
    tag[here] = jnp.where(goes, 0, t) | jnp.where(comes, t_in, 0)
    return 0
  lax.fori_loop(0, blocks, one, 0)


def _fill(value, tag, base, rows, step):
  """Empty rows take the item `step` rows above, a rank further by as much."""
  blocks = rows // _BLOCK

  def one(block, _):
    first = base + pl.multiple_of((blocks - 1 - block) * _BLOCK, _BLOCK)
    here, there = pl.ds(first, _BLOCK), pl.ds(first - step, _BLOCK)
    v, t, v_in, t_in = value[here], tag[here], value[there], tag[there]
    empty = v == 0
    value[here], tag[here] = jnp.where(empty, v_in, v), jnp.where(empty & (v_in != 0), t_in + step, t)
    return 0
  lax.fori_loop(0, blocks, one, 0)


def _partial_counts(x):
  """Numbers of ones in each 2, 4, 8 and 16 bits of int32 words, in place."""
  right = lambda v, n: lax.shift_right_logical(v, jnp.full_like(v, n))
  two = x - (right(x, 1) & 0x55555555)
  four = (two & 0x33333333) + (right(two, 2) & 0x33333333)
  eight = (four + right(four, 4)) & 0x0F0F0F0F
  return two, four, eight, eight + right(eight, 8) & 0x00FF00FF


def bit_count(x: jax.Array) -> jax.Array:
  """Ones of int32 words of any shape."""
  sixteen = _partial_counts(x)[3]
  return (sixteen + (sixteen >> 16)) & 63


def bit_of_rank(x: jax.Array, rank: jax.Array) -> jax.Array:
  """The bit of each int32 word (any shape, `rank` alike) that is a one with `rank` ones below it; anything where there
  is none."""
  two, four, eight, sixteen = _partial_counts(x)
  place = jnp.zeros_like(x)
  for size, counts in ((16, sixteen), (8, eight), (4, four), (2, two), (1, x)):
    low = lax.shift_right_logical(counts, place) & (2 * size - 1 if size > 1 else 1)
    above = rank >= low
    place, rank = jnp.where(above, place + size, place), jnp.where(above, rank - low, rank)
  return place
