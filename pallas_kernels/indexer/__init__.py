"""The lightning indexer's exact selection and its KL loss (report 2.3.1, eqs. 13-17)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import pick
from pallas_kernels.indexer import blockwise, reference
from pallas_kernels.selection import Selection


def select(queries: jax.Array, weights: jax.Array, keys: jax.Array, *, top_k: int, positions: jax.Array,
           segment_ids: jax.Array, entry_last: jax.Array, entry_segment: jax.Array, implementation: str = "auto",
           axis_name: str | None = None) -> Selection:
  """The `top_k` visible entries with the highest score `sum_h weights_h * relu(queries_h . keys)`, exactly.

  Ties go to the lowest entry; +0 equals -0. Where a query sees fewer than `top_k` entries the rest of its picks is -1.
  With `top_k` >= T nothing is dropped and the selection is of kind "all". No gradient passes.

  Args:
    queries: [B, S, h, c]; weights: [B, S, h], all scale factors included; keys: [B, T, c].
    top_k: picks per query.
    positions, segment_ids: int32 [B, S]; entry_last, entry_segment: int32 [B, T]; as in `sparse_attention.attend`.
    implementation: auto, reference, blockwise.
    axis_name: mesh axis over which the index heads are split, inside shard_map; scores are summed over it.

  Returns:
    Selection of int32 [B, S, top_k].

  Raises:
    NotImplementedError: a named implementation that does not exist.
  """
  if top_k >= keys.shape[1]:
    return Selection.all(*positions.shape)
  run = pick("indexer.select", implementation, {"reference": reference.select, "blockwise": blockwise.select})
  places = dict(positions=positions, segment_ids=segment_ids, entry_last=entry_last, entry_segment=entry_segment)
  picks = run(*map(jax.lax.stop_gradient, (queries, weights, keys)), top_k=top_k, axis_name=axis_name,
              **{name: jnp.asarray(x) for name, x in places.items()})
  return Selection.from_indices(picks)


def kl_loss(queries: jax.Array, weights: jax.Array, keys: jax.Array, attention_queries: jax.Array, entries: jax.Array,
            lse: jax.Array, selection: Selection, *, positions: jax.Array, segment_ids: jax.Array, entry_last: jax.Array,
            entry_segment: jax.Array, scale: float, implementation: str = "auto",
            axis_name: str | None = None) -> jax.Array:
  """KL(p || q) per query: how far the index scores are from the attention they should predict.

  p is the attention's own mass on each selected entry, summed over heads with the joint denominator (window, entries and
  sink: `lse`) and normalised once; q is the softmax of the index scores over the same entries. Gradients reach queries,
  weights and keys of the indexer only.

  Args:
    queries, weights, keys: as in `select`, differentiable.
    attention_queries: [B, S, H, d]; entries: [B, T, d]; lse: [B, S, H] of `sparse_attention.attend`.
    selection: the entries of each query (the sparse form), or kind "all" (the dense form).
    scale: of the attention's logits.
    axis_name: mesh axis over which heads of both kinds are split; sums over heads run over it, before normalising.

  Returns:
    [B, S], at least float32, nats; 0 where the query sees no entry.
  """
  run = pick("indexer.kl_loss", implementation, {"reference": reference.kl_loss, "blockwise": blockwise.kl_loss})
  teacher = jax.lax.stop_gradient((attention_queries, entries, lse))
  places = dict(positions=positions, segment_ids=segment_ids, entry_last=entry_last, entry_segment=entry_segment)
  return run(queries, weights, keys, *teacher, selection, scale=scale, axis_name=axis_name,
             **{name: jnp.asarray(x) for name, x in places.items()})
