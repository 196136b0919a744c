"""Shared-KV attention over a sliding window, compressed entries and a sink (report 2.3, eqs. 19, 26, 27).

What may not live here: projections, rotations, caches: they are `deepseek_v4/model/attention.py`'s.
"""

from __future__ import annotations

import functools
from typing import Any, Callable

import jax
import jax.numpy as jnp

from pallas_kernels import arguments, pick, tpu
from pallas_kernels.selection import Selection
from pallas_kernels.sparse_attention import blockwise, forms, kernel, reference, sparse


def attend(q: jax.Array, window_kv: jax.Array, entries: Any, selection: Selection, sink: jax.Array, *,
           positions: jax.Array, segment_ids: jax.Array, entry_last: jax.Array, entry_segment: jax.Array, window: int,
           scale: float, past_kv: jax.Array | None = None, past_segment: jax.Array | None = None,
           unpack: Callable[[Any], jax.Array] | None = None,
           implementation: str = "auto") -> tuple[jax.Array, jax.Array]:
  """Attention in which one vector per key is key and value of all heads.

  Query i sees window key j of its own document where 0 <= i - j < window, and those selected entries of its document
  whose last token has passed. All of them and the head's sink share one softmax; the sink's value is zero, so a query
  that sees nothing returns exactly 0.

  Args:
    q: [B, S, H, d] queries, floating, like all keys and the sink.
    window_kv: [B, S, d] keys = values of the tokens themselves; unread if window = 0.
    entries: [B, T, d] keys = values of the compressed entries; T may be 0.
    selection: entries of each query; `Selection.all` for every visible one.
    sink: [H] logit per head, unscaled.
    positions: int32 [B, S], position inside the document.
    segment_ids: int32 [B, S], document; 0 = not a token, whose key may be anything.
    entry_last: int32 [B, T], position of the entry's last token.
    entry_segment: int32 [B, T], document of the entry; 0 = unused memory, which may hold anything.
    window: keys of the sliding window, the query's own included; 0 = none.
    scale: multiplies q . k, not the sink.
    past_kv: [B, P, d] keys of the tokens before the queries, in order, the last one next to the first query; of more than
      window - 1 only the last ones are read. Default: none.
    past_segment: int32 [B, P], their documents; 0 = no token.
    unpack: makes entries [..., d] of rows of `entries`, which are then a pytree of arrays [B, T, ...] in some packed form;
      there is no gradient then. Where single entries are gathered (blockwise), only those are unpacked.
    implementation: auto, reference, blockwise, pallas (the form that `forms.choose` names), interpret (the masked kernel).

  Returns:
    out [B, S, H, d] in q's dtype; lse [B, S, H], at least float32, log of the whole denominator, the sink's part included.
    Both are differentiable in q, window_kv, past_kv, entries and sink.

  Raises:
    NotImplementedError: a named implementation that does not exist, or a kernel on a chip or with more entries than it is
      made for.
    ValueError: arrays that do not fit together, a window beyond a kernel's, or past keys without their documents.
  """
  arguments.check("attend", q=(q, "B S H d"), window_kv=(window_kv, "B S d"), sink=(sink, "H"),
                  positions=(positions, "int: B S"), segment_ids=(segment_ids, "int: B S"),
                  entry_last=(entry_last, "int: B T"), entry_segment=(entry_segment, "int: B T"),
                  entries=(entries, "any: B T ..." if unpack else "B T d"),
                  **{"selection.picks": (selection.picks, "int: B S K")})
  arguments.check_number("attend", "window", window, 0)
  run = pick("sparse_attention", implementation, {
      "reference": _unpacking(reference.attend), "blockwise": blockwise.attend,
      "pallas": _fastest, "interpret": form("masked", interpret=True)})
  return attend_with(run, q, window_kv, entries, selection, sink, positions=positions, segment_ids=segment_ids,
                     entry_last=entry_last, entry_segment=entry_segment, window=window, scale=scale, past_kv=past_kv,
                     past_segment=past_segment, unpack=unpack)


def form(name: str, interpret: bool) -> Callable[..., Any]:
  """What `attend_with` takes, of the form that `forms.choose` calls so: "masked", "sparse" or "blockwise"."""
  if name == "blockwise":
    return blockwise.attend
  run = {"masked": kernel, "sparse": sparse}[name].attend
  return _unpacking(functools.partial(run, interpret=interpret))


def attend_with(run: Callable[..., Any], q: jax.Array, window_kv: jax.Array, entries: Any, selection: Selection,
                sink: jax.Array, *, positions: jax.Array, segment_ids: jax.Array, entry_last: jax.Array,
                entry_segment: jax.Array, window: int, scale: float, past_kv: jax.Array | None = None,
                past_segment: jax.Array | None = None,
                unpack: Callable[[Any], jax.Array] | None = None) -> tuple[jax.Array, jax.Array]:
  """`attend` by the form `run` (see `form`), whatever the shape; arrays and dtypes as there.

  Raises:
    ValueError: as `attend`.
  """
  if (past_kv is None) != (past_segment is None) or (past_kv is not None and past_kv.shape[:2] != past_segment.shape):
    shapes = [None if x is None else x.shape for x in (past_kv, past_segment)]
    raise ValueError(f"past_kv, past_segment = {shapes[0]}, {shapes[1]}: expected [batch, past, width], [batch, past]")
  arguments.check("attend", q=(q, "B S H d"), entry_last=(entry_last, "int: B T"), entries=(entries, "any: B T ..."),
                  **({} if past_kv is None else {"past_kv": (past_kv, "B P d"), "past_segment": (past_segment, "int: B P")}))
  selection.check("attend", *q.shape[:2], entry_last.shape[1])
  places = dict(positions=positions, segment_ids=segment_ids, entry_last=entry_last, entry_segment=entry_segment)
  reach = min(max(window - 1, 0), 0 if past_kv is None else past_kv.shape[1])
  key_segment = jnp.asarray(segment_ids)
  if reach:
    window_kv = jnp.concatenate([past_kv[:, -reach:].astype(window_kv.dtype), window_kv], 1)
    key_segment = jnp.concatenate([past_segment[:, -reach:], key_segment], 1)
  # A key of weight zero is still multiplied by it, and NaN times zero is NaN: what is unread must be finite.
  window_kv = jnp.where((key_segment > 0)[..., None], window_kv, 0) if window else jnp.zeros_like(window_kv)
  return run(q, window_kv, entries, selection, sink, window=window, scale=scale, key_segment=key_segment,
             unpack=unpack, **{name: jnp.asarray(x) for name, x in places.items()})


def _unpacking(run):
  """A form that knows no packed entries."""
  def unpacked(q, window_kv, entries, selection, sink, *, unpack, **options):
    return run(q, window_kv, unpack(entries) if unpack else entries, selection, sink, **options)
  return unpacked


def _fastest(q, window_kv, entries, selection, sink, **options):
  """The form that `forms.choose` names on the current TPU."""
  num_entries = options["entry_last"].shape[1]
  run = _form(q, num_entries, selection, tpu.current_chip(interpret=False))
  return run(q, window_kv, entries, selection, sink, **options)


def _form(q, num_entries: int, selection: Selection, chip: tpu.Chip):
  """The function of the form that `forms.choose` names."""
  top_k = {"all": num_entries, "bits": selection.top_k, "indices": selection.picks.shape[2]}[selection.kind]
  name = forms.choose(q.shape[1], num_entries, top_k, chip.name, 2 if q.dtype.itemsize == 2 else 4)
  return form(name, interpret=False)
