"""Index scores, selection and KL loss as the formulas stand (report eqs. 13-17; V3.2 2.1.1): dense, quadratic memory.

Axis letters: B batch   S queries   T entries   h index heads   c index width   H heads   d head width   K picks
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.blocks import positive_zero, sees_entry
from pallas_kernels.selection import Selection


def scores(queries_BShc: jax.Array, weights_BSh: jax.Array, keys_BTc: jax.Array) -> jax.Array:
  """[B, S, T], at least float32: sum_h w_h relu(q_h . k)."""
  exact = jnp.promote_types(queries_BShc.dtype, jnp.float32)
  q, w, k = (x.astype(exact) for x in (queries_BShc, weights_BSh, keys_BTc))
  dots_BSTh = jax.nn.relu(jnp.einsum("BShc,BTc->BSTh", q, k))
  return (dots_BSTh * w[:, :, None]).sum(-1)


def select(queries: jax.Array, weights: jax.Array, keys: jax.Array, *, top_k: int, positions: jax.Array,
           segment_ids: jax.Array, entry_last: jax.Array, entry_segment: jax.Array) -> jax.Array:
  """See `pallas_kernels.indexer.select`, for dtypes too; returns picks, int32 [B, S, K]."""
  keys = jnp.where((entry_segment > 0)[..., None], keys, 0)
  visible = sees_entry(positions, segment_ids, entry_last, entry_segment)
  masked = jnp.where(visible, positive_zero(scores(queries, weights, keys)), -jnp.inf)
  best, picks = jax.lax.top_k(masked, top_k)
  return jnp.where(best > -jnp.inf, picks, -1)


def kl_loss(queries: jax.Array, weights: jax.Array, keys: jax.Array, attention_queries: jax.Array, entries: Any,
            lse: jax.Array, selection: Selection, *, positions: jax.Array, segment_ids: jax.Array,
            entry_last: jax.Array, entry_segment: jax.Array, scale: float) -> jax.Array:
  """See `pallas_kernels.indexer.kl_loss`; dtypes as there."""
  used = (entry_segment > 0)[..., None]
  keys, entries = jnp.where(used, keys, 0), jnp.where(used, entries, 0)
  chosen_BST = sees_entry(positions, segment_ids, entry_last, entry_segment) & selection.mask(keys.shape[1])
  exact = jnp.promote_types(lse.dtype, jnp.float32)
  logits_BSHT = jnp.einsum("BSHd,BTd->BSHT", attention_queries.astype(exact), entries.astype(exact)) * scale
  mass_BST = jnp.where(chosen_BST, jnp.exp(logits_BSHT - lse[..., None]).sum(2), 0)
  total = mass_BST.sum(-1, keepdims=True)
  p_BST = mass_BST / jnp.where(total > 0, total, 1)
  index = jnp.where(chosen_BST, scores(queries, weights, keys), -1e30)
  log_q = index - jax.nn.logsumexp(index, -1, keepdims=True)
  terms = p_BST * (jnp.log(jnp.where(p_BST > 0, p_BST, 1)) - log_q)
  return jnp.where(p_BST > 0, terms, 0).sum(-1)
