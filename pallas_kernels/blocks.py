"""What the blockwise implementations share: cutting queries into blocks, and who sees which entry.

Axis letters: B batch   S queries   T entries   C queries of one block   N blocks of all rows
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

MASKED = -1e30  # finite, so that a row without any visible key stays free of NaN
_BYTES_PER_BLOCK = 64 * 2**20


def block_size(num_queries: int, bytes_per_query: int) -> int:
  """Queries per block: at most 128, a power of two or all, and few enough that a block's temporaries stay small."""
  size = 128
  while size > 16 and size * bytes_per_query > _BYTES_PER_BLOCK:
    size //= 2
  return min(size, num_queries)


def cut(x_BS: jax.Array, size: int) -> jax.Array:
  """[B, S, ...] -> [N, size, ...], dtype kept: rows padded with zeros to whole blocks, blocks of one row after another."""
  batch, length = x_BS.shape[:2]
  blocks = math.ceil(length / size)
  x_BS = jnp.pad(x_BS, ((0, 0), (0, blocks * size - length)) + ((0, 0),) * (x_BS.ndim - 2))
  return x_BS.reshape(batch * blocks, size, *x_BS.shape[2:])


def join(x_NC: jax.Array, batch: int, length: int) -> jax.Array:
  """The inverse of `cut`: [N, size, ...] -> [B, S, ...], dtype kept."""
  return x_NC.reshape(batch, x_NC.shape[0] * x_NC.shape[1] // batch, *x_NC.shape[2:])[:, :length]


def block_numbers(batch: int, length: int, size: int) -> tuple[jax.Array, jax.Array]:
  """Row and first query of each block, int32 [N] each, in the order of `cut`."""
  blocks = math.ceil(length / size)
  return jnp.repeat(jnp.arange(batch), blocks), jnp.tile(jnp.arange(blocks) * size, batch)


def sees_entry(position_C: jax.Array, segment_C: jax.Array, last_T: jax.Array, entry_segment_T: jax.Array) -> jax.Array:
  """bool [..., C, T], of int32 places and documents: an entry is visible once its last token has passed, and only inside its
  own document."""
  same = (segment_C[..., :, None] == entry_segment_T[..., None, :]) & (segment_C[..., :, None] > 0)
  return same & (last_T[..., None, :] <= position_C[..., :, None])


def picked_sees(picks_CK: jax.Array, position_C: jax.Array, segment_C: jax.Array, last_T: jax.Array,
                entry_segment_T: jax.Array) -> jax.Array:
  """bool [..., C, K], of int32 picks, places and documents: the pick is an entry, not empty, and visible to the query that
  picked it."""
  there_CK = (picks_CK >= 0) & (picks_CK < last_T.shape[0])
  safe_CK = jnp.where(there_CK, picks_CK, 0)
  same_CK = (entry_segment_T[safe_CK] == segment_C[:, None]) & (segment_C[:, None] > 0)
  return there_CK & same_CK & (last_T[safe_CK] <= position_C[:, None])


def positive_zero(scores: jax.Array) -> jax.Array:
  """-0 becomes +0, shape and dtype kept, so that it does not rank below it; only for ranking, since no gradient passes
  at zero."""
  return jnp.where(scores == 0, 0.0, scores)
