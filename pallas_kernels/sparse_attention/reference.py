"""Attention over window, entries and sink as the formula stands (report 2.3.1 to 2.3.3, eqs. 19, 26, 27): dense,
quadratic memory.

Axis letters: B batch   S queries   H heads   T entries   d head width   X window keys   U all keys
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.blocks import sees_entry
from pallas_kernels.selection import Selection


def attend(q_BSHd: jax.Array, window_kv_BXd: jax.Array, entries_BTd: jax.Array, selection: Selection, sink_H: jax.Array,
           *, positions: jax.Array, segment_ids: jax.Array, key_segment: jax.Array, entry_last: jax.Array,
           entry_segment: jax.Array, window: int, scale: float) -> tuple[jax.Array, jax.Array]:
  """See `pallas_kernels.sparse_attention.attend`, for dtypes too; of the window keys the last S are the queries' own."""
  exact = jnp.promote_types(q_BSHd.dtype, jnp.float32)
  q, kv, entries, sink = (x.astype(exact) for x in (q_BSHd, window_kv_BXd, entries_BTd, sink_H))
  length, keys = q.shape[1], kv.shape[1]
  apart_SX = jnp.arange(keys - length, keys)[:, None] - jnp.arange(keys)[None, :]
  near_BSX = (apart_SX >= 0) & (apart_SX < window)
  near_BSX = near_BSX & (segment_ids[:, :, None] == key_segment[:, None, :]) & (segment_ids > 0)[:, :, None]
  chosen_BST = selection.mask(entries.shape[1]) & sees_entry(positions, segment_ids, entry_last, entry_segment)
  entries = jnp.where((entry_segment > 0)[..., None], entries, 0)

  keys_BUd = jnp.concatenate([kv, entries], 1)
  visible_BSU = jnp.concatenate([near_BSX, chosen_BST], 2)
  scores_BSHU = jnp.einsum("BSHd,BUd->BSHU", q, keys_BUd) * scale
  scores_BSHU = jnp.where(visible_BSU[:, :, None], scores_BSHU, -jnp.inf)
  sink_BSH1 = jnp.broadcast_to(sink[None, None, :, None], (*q.shape[:3], 1))
  logits = jnp.concatenate([scores_BSHU, sink_BSH1], -1)
  out = jnp.einsum("BSHU,BUd->BSHd", jax.nn.softmax(logits, -1)[..., :-1], keys_BUd)
  return out.astype(q_BSHd.dtype), jax.nn.logsumexp(logits, -1)
