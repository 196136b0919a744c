"""Cases of `select` and `kl_loss`.

Axis letters: B batch   S queries   T entries   h index heads   c index width   H heads   d head width   K picks
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.cases import Case, normals, packed, scattered_picks, unused_to_nan
from pallas_kernels.indexer import kl_loss, select
from pallas_kernels.selection import Selection
from pallas_kernels.sparse_attention import attend


def _index(key: jax.Array, *, rows, length, rate, entries, heads=8, width=8, **more):
  """Queries, head weights, keys and places, and normal arrays of `more` shapes; unused keys hold NaN."""
  places = packed(rows, length, rate, entries)
  arrays = normals(key, queries=(len(rows), length, heads, width), weights=(len(rows), length, heads),
                   keys=(len(rows), entries, width), **more)
  arrays["keys"] = unused_to_nan(arrays["keys"], places["entry_segment"])
  return {**arrays, **places}


def _integers(key: jax.Array, **sizes):
  """Small integers: every score is exact in any dtype, many are equal, some are zeros of either sign."""
  arrays = _index(key, **sizes, heads=2, width=4)
  return {**arrays, **{name: jnp.round(arrays[name]) for name in ("queries", "weights", "keys")}}


def _loss(key: jax.Array, *, rows, length, rate, entries, picks=None, heads=8, width=8, attention_heads=4,
          attention_width=16, window=8):
  """The indexer's tensors beside those of the attention that teaches it; its lse comes from the attention's formula."""
  batch, d = len(rows), attention_width
  index = _index(key, rows=rows, length=length, rate=rate, entries=entries, heads=heads, width=width,
                 q=(batch, length, attention_heads, d), window_kv=(batch, length, d), sink=(attention_heads,),
                 vectors=(batch, entries, d), order=(batch, length, entries), hole=(batch, length, picks or 0))
  places = {name: index[name] for name in ("positions", "segment_ids", "entry_last", "entry_segment")}
  chosen = scattered_picks(index.pop("order"), index.pop("hole"))
  teacher = dict(q=index.pop("q"), window_kv=index.pop("window_kv"), sink=index.pop("sink"),
                 entries=unused_to_nan(index.pop("vectors"), places["entry_segment"]),
                 selection=Selection.all(batch, length) if picks is None else Selection.from_indices(chosen))
  _, lse = attend(**teacher, **places, window=window, scale=d**-0.5, implementation="reference")
  return {**index, "attention_queries": teacher["q"], "entries": teacher["entries"], "lse": lse,
          "selection": teacher["selection"]}


_EXACT = {"float64": 0.0, "bfloat16": 0.0}
_KL = dict(options=dict(scale=0.25), differentiable=("queries", "weights", "keys"), wide=("weights", "lse"))

CASES = (
    Case(select, "random scores, several blocks", functools.partial(
        _index, rows=((150, 139), (260,)), length=290, rate=4, entries=72), dict(top_k=5), tolerances={"float64": 0.0}),
    Case(select, "ties and zeros", functools.partial(_integers, rows=((40, 3, 9), (31, 17)), length=53, rate=2, entries=26),
         dict(top_k=6), tolerances=_EXACT),
    Case(kl_loss, "picks scattered, two packed rows", functools.partial(
        _loss, rows=((5, 19, 1), (13, 8)), length=27, rate=2, entries=13, picks=6), **_KL,
         tolerances={"float64": 1e-10, "bfloat16": 3e-2}),
    Case(kl_loss, "every entry, several blocks", functools.partial(
        _loss, rows=((150, 139),), length=290, rate=4, entries=72), **_KL),
)
