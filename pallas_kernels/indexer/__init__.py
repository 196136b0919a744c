"""The lightning indexer's exact selection and its KL loss (report 2.3.1, eqs. 13-17; V3.2 2.1.1).

What may not live here: projections and compressors, and attention itself, whose mass comes in from outside.
"""

from __future__ import annotations

import functools
from typing import Any, Callable

import jax
import jax.numpy as jnp

from pallas_kernels import arguments, pick, tpu
from pallas_kernels.indexer import blockwise, forms, kernel, kernel_loss, reference
from pallas_kernels.selection import Selection


def select(queries: jax.Array, weights: jax.Array, keys: Any, *, top_k: int, positions: jax.Array,
           segment_ids: jax.Array, entry_last: jax.Array, entry_segment: jax.Array,
           unpack: Callable[[Any], jax.Array] | None = None, implementation: str = "auto") -> Selection:
  """The `top_k` visible entries with the highest score `sum_h weights_h * relu(queries_h . keys)`, exactly.

  Ties go to the lowest entry; +0 equals -0. Where a query sees fewer than `top_k` entries the rest of its picks is -1.
  With `top_k` >= T nothing is dropped and the selection is of kind "all". No gradient passes.

  Args:
    queries: [B, S, h, c]; weights: [B, S, h], all scale factors included; keys: [B, T, c]; floating.
    top_k: picks per query.
    positions, segment_ids: int32 [B, S]; entry_last, entry_segment: int32 [B, T]; as in `sparse_attention.attend`.
    unpack: makes keys [..., c] of slices of `keys`, which are then a pytree of arrays [B, T, ...] in some packed form.
      blockwise unpacks a tile of keys at a time, the others all of them at once.
    implementation: auto, reference, blockwise, pallas, interpret.

  Returns:
    Selection of at most `top_k` entries per query [B, S]: picks, or bits from the kernel.

  Raises:
    NotImplementedError: a named implementation that does not exist, or a kernel on a chip without tile sizes.
    ValueError: arrays that do not fit together.
  """
  arguments.check("select", queries=(queries, "B S h c"), weights=(weights, "B S h"),
                  positions=(positions, "int: B S"), segment_ids=(segment_ids, "int: B S"),
                  entry_last=(entry_last, "int: B T"), entry_segment=(entry_segment, "int: B T"),
                  **({} if unpack else {"keys": (keys, "B T c")}))
  arguments.check_number("select", "top_k", top_k, 1)
  if top_k >= entry_last.shape[1]:
    return Selection.all(*positions.shape)
  whole = lambda run, **fixed: lambda q, w, keys, **options: run(q, w, unpack(keys) if unpack else keys, **options, **fixed)
  run = pick("indexer.select", implementation, {
      "reference": whole(reference.select), "blockwise": functools.partial(blockwise.select, unpack=unpack),
      "pallas": whole(kernel.select, interpret=False), "interpret": whole(kernel.select, interpret=True)})
  places = dict(positions=positions, segment_ids=segment_ids, entry_last=entry_last, entry_segment=entry_segment)
  chosen = run(*jax.lax.stop_gradient((queries, weights, keys)), top_k=top_k,
               **{name: jnp.asarray(x) for name, x in places.items()})
  return chosen if isinstance(chosen, Selection) else Selection.from_indices(chosen)


def kl_loss(queries: jax.Array, weights: jax.Array, keys: jax.Array, attention_queries: jax.Array, entries: jax.Array,
            lse: jax.Array, selection: Selection, *, positions: jax.Array, segment_ids: jax.Array, entry_last: jax.Array,
            entry_segment: jax.Array, scale: float, implementation: str = "auto") -> jax.Array:
  """KL(p || q) per query: how far the index scores are from the attention they should predict.

  p is the attention's own mass on each selected entry, summed over heads with the joint denominator (window, entries and
  sink: `lse`) and normalised once; q is the softmax of the index scores over the same entries. Gradients reach queries,
  weights and keys of the indexer only.

  Args:
    queries, weights, keys: as in `select`, differentiable.
    attention_queries: [B, S, H, d]; entries: [B, T, d]; lse: [B, S, H] of `sparse_attention.attend`; floating.
    positions, segment_ids, entry_last, entry_segment: int32, as in `select`.
    selection: the entries of each query (the sparse form), or kind "all" (the dense form).
    scale: of the attention's logits.
    implementation: auto, reference, blockwise, pallas, interpret.

  Returns:
    [B, S], at least float32, nats; 0 where the query sees no entry.

  Raises:
    NotImplementedError: a named implementation that does not exist, or a kernel on a chip without tile sizes.
    ValueError: arrays that do not fit together.
  """
  arguments.check("kl_loss", queries=(queries, "B S h c"), weights=(weights, "B S h"), keys=(keys, "B T c"),
                  attention_queries=(attention_queries, "B S H d"), entries=(entries, "B T d"), lse=(lse, "B S H"),
                  positions=(positions, "int: B S"), segment_ids=(segment_ids, "int: B S"),
                  entry_last=(entry_last, "int: B T"), entry_segment=(entry_segment, "int: B T"),
                  **{"selection.picks": (selection.picks, "int: B S K")})
  selection.check("kl_loss", *positions.shape, entry_last.shape[1])
  run = pick("indexer.kl_loss", implementation, {
      "reference": reference.kl_loss, "blockwise": blockwise.kl_loss,
      "pallas": _fastest_loss, "interpret": functools.partial(kernel_loss.kl_loss, interpret=True)})
  teacher = jax.lax.stop_gradient((attention_queries, entries, lse))
  places = dict(positions=positions, segment_ids=segment_ids, entry_last=entry_last, entry_segment=entry_segment)
  return run(queries, weights, keys, *teacher, selection, scale=scale,
             **{name: jnp.asarray(x) for name, x in places.items()})


def _fastest_loss(queries, weights, keys, *teacher, **options):
  """The form that `forms.choose_loss` names on the current TPU."""
  form = forms.choose_loss(keys.shape[1], keys.shape[2], tpu.current_chip(interpret=False))
  run = blockwise.kl_loss if form == "blockwise" else functools.partial(kernel_loss.kl_loss, interpret=False)
  return run(queries, weights, keys, *teacher, **options)
