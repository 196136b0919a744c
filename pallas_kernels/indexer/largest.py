"""The largest numbers of long rows and their places, exactly, in plain XLA: by counting and not by sorting.

`jax.lax.top_k` keeps a heap of k numbers on a CPU, which for k = 512 takes longer than making the scores. Here
  1. neighbours form groups, and the k groups with the largest maxima hold the k largest numbers: only these are read;
  2. of what is left, a threshold is found that exactly k numbers reach, by halving the range of their bit patterns;
  3. places are read off a row of bits.

Axis letters: C rows   T numbers of a row   G groups of a row   g numbers of a group   K numbers wanted   W words of 32 bits
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

GROUP = 8  # numbers that form a group
_DIRECT = 8  # a row of up to 8 K numbers is not grouped: the groups that are read would be most of it
_WORD = 32


def group_maxima(x_CT: jax.Array) -> jax.Array:
  """[C, T / GROUP], dtype kept: the largest number of each group; T must be a multiple of GROUP."""
  return x_CT.reshape(x_CT.shape[0], -1, GROUP).max(-1)


def largest(x_CT: jax.Array, k: int, maxima_CG: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
  """The k largest numbers of each row, as `jax.lax.top_k` but in the order of their places; of equal ones the first.

  Args:
    x_CT: float32 or float64, at least k numbers a row, and no NaN.
    k: how many.
    maxima_CG: `group_maxima(x_CT)` if that is known. Where it is -inf the numbers of the group count as -inf, too.

  Returns:
    Numbers [C, k] and places int32 [C, k].
  """
  rows, length = x_CT.shape
  if length <= _DIRECT * k or length % GROUP:
    if maxima_CG is not None:
      x_CT = jnp.where(jnp.repeat(maxima_CG, GROUP, axis=1) > -jnp.inf, x_CT, -jnp.inf)
    return _by_threshold(x_CT, k)
  best_CK, groups_CK = largest(group_maxima(x_CT) if maxima_CG is None else maxima_CG, k)
  numbers_CKg = jnp.take_along_axis(x_CT.reshape(rows, -1, GROUP), groups_CK[..., None], 1)
  numbers_CKg = jnp.where(best_CK[..., None] != -jnp.inf, numbers_CKg, -jnp.inf)
  found_CK, places_CK = _by_threshold(numbers_CKg.reshape(rows, k * GROUP), k)
  return found_CK, jnp.take_along_axis(groups_CK, places_CK // GROUP, 1) * GROUP + places_CK % GROUP


def _by_threshold(x_CT: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
  rank_CT = _ranks(x_CT)
  threshold_C1 = _threshold(rank_CT, k)[:, None]
  above, tied = rank_CT > threshold_C1, rank_CT == threshold_C1
  room_C1 = k - above.sum(-1, keepdims=True, dtype=jnp.int32)
  all_fit = (tied.sum(-1, keepdims=True, dtype=jnp.int32) <= room_C1).all()
  chosen = lax.cond(all_fit, lambda: above | tied,
                    lambda: above | (tied & (jnp.cumsum(tied, -1, dtype=jnp.int32) <= room_C1)))
  places_CK = _places(chosen, k)
  return jnp.take_along_axis(x_CT, places_CK, 1), places_CK


def _ranks(x: jax.Array) -> jax.Array:
  """Integers in the order of the numbers; -0 comes before +0."""
  kind = jnp.int32 if x.dtype.itemsize == 4 else jnp.int64
  bits = lax.bitcast_convert_type(x, kind)
  return jnp.where(bits < 0, bits ^ jnp.iinfo(kind).max, bits)


def _threshold(rank_CT: jax.Array, k: int) -> jax.Array:
  """[C]: a rank that exactly k numbers of the row reach or, where ties allow none, the largest that more than k reach."""
  def halve(bounds):
    low_C, high_C = bounds  # at least k numbers reach `low`; the threshold wanted is at most `high`
    middle_C = (low_C >> 1) + (high_C >> 1) + ((low_C | high_C) & 1)  # rounded up, without overflow
    count_C = (rank_CT >= middle_C[:, None]).sum(-1, dtype=jnp.int32)
    low_C = jnp.where(count_C >= k, middle_C, low_C)
    return low_C, jnp.where(count_C == k, low_C, jnp.where(count_C > k, high_C, middle_C - 1))

  return lax.while_loop(lambda bounds: (bounds[0] < bounds[1]).any(), halve, (rank_CT.min(-1), rank_CT.max(-1)))[0]


def _places(chosen_CT: jax.Array, k: int) -> jax.Array:
  """Places int32 [C, k] of the k true values of each row, in rising order."""
  rows, length = chosen_CT.shape
  words = -(-length // _WORD)
  fields = jnp.pad(chosen_CT, ((0, 0), (0, words * _WORD - length))).reshape(rows, words, _WORD).astype(jnp.uint32)
  words_CW = (fields << jnp.arange(_WORD, dtype=jnp.uint32)).sum(-1, dtype=jnp.uint32)
  end_CW = jnp.cumsum(_ones(words_CW), -1)
  number_K = jnp.arange(k, dtype=jnp.int32)
  word_CK = jax.vmap(lambda end_W: jnp.searchsorted(end_W, number_K, side="right", method="scan"))(end_CW)
  left_CK = number_K - jnp.take_along_axis(end_CW - _ones(words_CW), word_CK, 1)  # ones of the word in front of this one
  rest_CK, bit_CK = jnp.take_along_axis(words_CW, word_CK, 1), jnp.zeros_like(left_CK)
  for half in (16, 8, 4, 2, 1):
    low_CK = _ones(rest_CK & jnp.uint32(2**half - 1))
    above = left_CK >= low_CK
    bit_CK, left_CK = bit_CK + jnp.where(above, half, 0), left_CK - jnp.where(above, low_CK, 0)
    rest_CK = jnp.where(above, rest_CK >> half, rest_CK)
  return word_CK.astype(jnp.int32) * _WORD + bit_CK


def _ones(words: jax.Array) -> jax.Array:
  return lax.population_count(words).astype(jnp.int32)
