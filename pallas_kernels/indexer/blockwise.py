"""Selection and KL loss (report eqs. 13-17; V3.2 2.1.1) one block of queries at a time: scores of a block live only while
the block is worked on.

Axis letters: B batch   S queries   T entries   h index heads   c index width   H heads   d head width   K picks
              C queries of a block   G groups of entries
"""

from __future__ import annotations

import functools
from typing import Any, Callable

import jax
import jax.numpy as jnp

from pallas_kernels import blocks
from pallas_kernels.blocks import MASKED, positive_zero
from pallas_kernels.indexer.largest import GROUP, group_maxima, largest
from pallas_kernels.selection import Selection

_LARGEST_TILE, _SMALLEST_TILE = 8192, 512
_BYTES_PER_TILE = 16 * 2**20  # of dot products
_FEW_ROWS = 8


def _block_scores(q_Chc, w_Ch, keys):
  """Scores [C, T] (keys [T, c]) or [C, K] (keys gathered per query [C, K, c]), at least float32.

  The sum over heads is written out head by head: on a CPU an einsum over so short an axis is half as fast.
  """
  exact = jnp.promote_types(q_Chc.dtype, jnp.float32)
  total = 0.0
  if keys.ndim == 3:
    dots_ChK = jax.nn.relu(jnp.einsum("Chc,CKc->ChK", q_Chc, keys, preferred_element_type=exact))
    total = sum(dots_ChK[:, h] * w_Ch[:, h, None].astype(exact) for h in range(q_Chc.shape[1]))
  else:
    size, heads, width = q_Chc.shape
    rows = q_Chc.transpose(1, 0, 2).reshape(heads * size, width)
    dots_hCT = jnp.einsum("Rc,Tc->RT", rows, keys, preferred_element_type=exact).reshape(heads, size, -1)
    total = sum(jax.nn.relu(dots_hCT[h]) * w_Ch[:, h, None].astype(exact) for h in range(heads))
  return total


def select(queries_BShc: jax.Array, weights_BSh: jax.Array, keys_BTc: jax.Array, *, top_k: int, positions: jax.Array,
           segment_ids: jax.Array, entry_last: jax.Array, entry_segment: jax.Array,
           unpack: Callable[[Any], jax.Array] | None = None) -> jax.Array:
  """See `pallas_kernels.indexer.select`, for dtypes too; returns picks, int32 [B, S, K].

  A block scores the entries tile by tile, from the first tile to the last in which one of its queries may see something.
  How many these are is known at run time only: a cache costs what is in it, not what it has room for. Of packed keys no
  more than a tile is unpacked.
  """
  (batch, length), num_entries = positions.shape, entry_last.shape[1]
  size, tile = sizes_of(length, num_entries, queries_BShc.shape[2])
  room = num_entries + -num_entries % tile
  fill = lambda x: jnp.pad(x, ((0, 0), (0, room - num_entries), *((0, 0),) * (x.ndim - 2)))
  keys, last_BT, own_BT = jax.tree.map(fill, (keys_BTc, entry_last, entry_segment))

  def scores_of(item, j):
    """[C, tile], -inf where the entry is not visible. Unused memory needs no zeros: whatever its scores are, they are
    masked."""
    row, q_Chc, w_Ch, position_C, segment_C = item
    cut = lambda x: jax.lax.dynamic_slice_in_dim(x[row], j * tile, tile)
    part = jax.tree.map(cut, keys)
    scores_Ct = _block_scores(q_Chc, w_Ch, part if unpack is None else unpack(part))
    visible = blocks.sees_entry(position_C, segment_C, cut(last_BT), cut(own_BT))
    return jnp.where(visible, positive_zero(scores_Ct), -jnp.inf)

  def one(scores_CT, item):
    if tile == room:
      best, picks = _best(scores_of(item, 0), top_k)
    else:
      tiles = _tiles_seen(*item[3:], last_BT[item[0]], own_BT[item[0]], tile)
      scores_CT, maxima_CG = _scores_and_maxima(functools.partial(scores_of, item), *tiles, scores_CT)
      best, picks = largest(scores_CT, top_k, maxima_CG)
    return scores_CT, jnp.where(best > -jnp.inf, picks, -1)

  row_N, _ = blocks.block_numbers(batch, length, size)
  items = (row_N, *(blocks.cut(x, size) for x in (queries_BShc, weights_BSh, positions, segment_ids)))
  # One array for the scores of all blocks, since a fresh one would have to be filled each time.
  scores_CT = jnp.zeros((size, 0 if tile == room else room), jnp.promote_types(queries_BShc.dtype, jnp.float32))
  return blocks.join(jax.lax.scan(one, scores_CT, items)[1], batch, length)


def sizes_of(length: int, num_entries: int, heads: int) -> tuple[int, int]:
  """(queries of a block, entries whose scores are made at once: all, or a power of two)."""
  size, tile = blocks.block_size(length, 4 * num_entries), _LARGEST_TILE
  while tile > _SMALLEST_TILE and 4 * size * heads * tile > _BYTES_PER_TILE:
    tile //= 2
  return size, min(tile, num_entries)


def _tiles_seen(position_C, segment_C, last_T, own_T, tile):
  """(first tile, the one after the last) that hold an entry which a query of the block may see; at times one too many."""
  low = jnp.where(segment_C > 0, segment_C, jnp.iinfo(jnp.int32).max).min()
  high = segment_C.max()
  reach = jnp.where(segment_C == high, position_C, -1).max()
  seen_T = (own_T >= low) & ((own_T < high) | ((own_T == high) & (last_T <= reach)))
  seen = seen_T.reshape(-1, tile).any(-1)
  return jnp.argmax(seen), jnp.where(seen.any(), len(seen) - jnp.argmax(seen[::-1]), 0)


def _scores_and_maxima(scores_of, first, end, scores_CT):
  """Scores [C, T] and their `group_maxima`. In tiles outside [first, end) the scores are an earlier block's, and maxima of
  -inf say that nothing is there."""
  def step(j, found):
    # Else XLA makes the scores twice, once for each use.
    tile_CT = jax.lax.optimization_barrier(scores_of(j))
    return tuple(jax.lax.dynamic_update_slice_in_dim(x, new, j * new.shape[1], 1)
                 for x, new in zip(found, (tile_CT, group_maxima(tile_CT))))

  maxima_CG = jnp.full((scores_CT.shape[0], scores_CT.shape[1] // GROUP), -jnp.inf, scores_CT.dtype)
  return jax.lax.fori_loop(first, end, step, (scores_CT, maxima_CG))


def _best(scores_CT, k):
  """`jax.lax.top_k`, in any order; few rows are faster sorted than counted."""
  return jax.lax.top_k(scores_CT, k) if scores_CT.shape[0] < _FEW_ROWS else largest(scores_CT, k)


def kl_loss(queries_BShc: jax.Array, weights_BSh: jax.Array, keys_BTc: jax.Array, attention_BSHd: jax.Array,
            entries_BTd: jax.Array, lse_BSH: jax.Array, selection: Selection, *, positions: jax.Array,
            segment_ids: jax.Array, entry_last: jax.Array, entry_segment: jax.Array, scale: float) -> jax.Array:
  """See `pallas_kernels.indexer.kl_loss`; dtypes as there. Each block is recomputed in the backward pass."""
  used = (entry_segment > 0)[..., None]
  keys_BTc, entries_BTd = jnp.where(used, keys_BTc, 0), jnp.where(used, entries_BTd, 0)
  batch, length = positions.shape
  selection = selection.listed()
  gathered = selection.kind == "indices"
  reach = selection.picks.shape[2] if gathered else keys_BTc.shape[1]
  if not reach:
    return jnp.zeros(positions.shape, lse_BSH.dtype)
  heads, width = attention_BSHd.shape[2:]
  per_query = reach * (queries_BShc.shape[2] + heads + (width + keys_BTc.shape[2] if gathered else 2))
  size = blocks.block_size(length, 4 * per_query)
  row_N, _ = blocks.block_numbers(batch, length, size)

  @jax.checkpoint
  def one(item):
    row, q_Chc, w_Ch, a_CHd, lse_CH, picks_CK, position_C, segment_C = item
    keys, entries = keys_BTc[row], entries_BTd[row]
    last_T, own_T = entry_last[row], entry_segment[row]
    if gathered:
      visible = blocks.picked_sees(picks_CK, position_C, segment_C, last_T, own_T)
      keys, entries = keys[jnp.maximum(picks_CK, 0)], entries[jnp.maximum(picks_CK, 0)]
    else:
      visible = blocks.sees_entry(position_C, segment_C, last_T, own_T)
    logits = jnp.einsum("CHd,CKd->CHK" if gathered else "CHd,Kd->CHK", a_CHd, entries, preferred_element_type=lse_CH.dtype)
    mass_CK = jnp.where(visible, jnp.exp(logits * scale - lse_CH[..., None]).sum(1), 0)
    total_C1 = mass_CK.sum(-1, keepdims=True)
    p_CK = jax.lax.stop_gradient(mass_CK / jnp.where(total_C1 > 0, total_C1, 1))
    index_CK = jnp.where(visible, _block_scores(q_Chc, w_Ch, keys), MASKED)
    log_q_CK = index_CK - jax.nn.logsumexp(index_CK, -1, keepdims=True)
    terms_CK = p_CK * (jnp.log(jnp.where(p_CK > 0, p_CK, 1)) - log_q_CK)
    return jnp.where(p_CK > 0, terms_CK, 0).sum(-1)

  cuts = (queries_BShc, weights_BSh, attention_BSHd, lse_BSH, selection.picks, positions, segment_ids)
  return blocks.join(jax.lax.map(one, (row_N, *(blocks.cut(x, size) for x in cuts))), batch, length)
