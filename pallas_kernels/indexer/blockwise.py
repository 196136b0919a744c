"""Selection and KL loss one block of queries at a time: scores of a block live only while the block is worked on.

Axis letters: B batch   S queries   T entries   h index heads   c index width   H heads   d head width   K picks
              C queries of a block
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import blocks
from pallas_kernels.blocks import MASKED, positive_zero

_TILE_BYTES = 2**20  # of unpacked keys at a time

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


def _packed_scores(q_Chc, w_Ch, packed, row, unpack):
  """Scores [C, T] of packed keys, a tile of them unpacked at a time: of floating-point keys no more than a tile exists."""
  num_entries = jax.tree.leaves(packed)[0].shape[1]
  tile = min(num_entries, max(_TILE_BYTES // (4 * q_Chc.shape[-1]), 1))
  exact = jnp.promote_types(q_Chc.dtype, jnp.float32)

  def one(i, scores_CT):
    start = jnp.minimum(i * tile, num_entries - tile)  # the last tile begins early: what it repeats stays the same
    part = lambda x: jax.lax.dynamic_slice(x, (row, start, *(0,) * (x.ndim - 2)), (1, tile, *x.shape[2:]))[0]
    new_Ct = _block_scores(q_Chc, w_Ch, unpack(jax.tree.map(part, packed)))
    return jax.lax.dynamic_update_slice(scores_CT, new_Ct, (0, start))

  return jax.lax.fori_loop(0, -(-num_entries // tile), one, jnp.zeros((q_Chc.shape[0], num_entries), exact))


def select(queries_BShc, weights_BSh, keys_BTc, *, top_k, positions, segment_ids, entry_last, entry_segment, unpack=None):
  """See `pallas_kernels.indexer.select`; returns picks [B, S, K]."""
  batch, length = positions.shape
  size = blocks.block_size(length, 4 * entry_last.shape[1] * (queries_BShc.shape[2] + 2))
  row_N, _ = blocks.block_numbers(batch, length, size)

  def one(item):
    row, q_Chc, w_Ch, position_C, segment_C = item
    if unpack is None:
      scores_CT = _block_scores(q_Chc, w_Ch, keys_BTc[row])
    else:
      scores_CT = _packed_scores(q_Chc, w_Ch, keys_BTc, row, unpack)
    # Unused memory needs no zeros here: whatever its scores are, they are masked.
    visible = blocks.sees_entry(position_C, segment_C, entry_last[row], entry_segment[row])
    best, picks = jax.lax.top_k(jnp.where(visible, positive_zero(scores_CT), -jnp.inf), top_k)
    return jnp.where(best > -jnp.inf, picks, -1)

  items = (row_N, *(blocks.cut(x, size) for x in (queries_BShc, weights_BSh, positions, segment_ids)))
  return blocks.join(jax.lax.map(one, items), batch, length)


def kl_loss(queries_BShc, weights_BSh, keys_BTc, attention_BSHd, entries_BTd, lse_BSH, selection, *, positions, segment_ids,
            entry_last, entry_segment, scale):
  """See `pallas_kernels.indexer.kl_loss`. Each block is recomputed in the backward pass."""
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
