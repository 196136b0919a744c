"""Cases of `attend`.

Axis letters: B batch   S queries   H heads   T entries   K picks   d head width
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.cases import Case, normals, packed, scattered_picks, unused_to_nan
from pallas_kernels.selection import Selection
from pallas_kernels.sparse_attention import attend

_COMMON = dict(differentiable=("q", "window_kv", "entries", "sink"), wide=("sink",))


def _inputs(key: jax.Array, *, rows, length, rate, entries, picks=None, heads=4, width=16):
  """Queries, keys and places of packed rows; unused entries and keys of the padding hold NaN. picks=None: every entry."""
  batch = len(rows)
  places = packed(rows, length, rate, entries)
  arrays = normals(key, q=(batch, length, heads, width), window_kv=(batch, length, width), entries=(batch, entries, width),
                   sink=(heads,), order=(batch, length, entries), hole=(batch, length, picks or 0))
  arrays["entries"] = unused_to_nan(arrays["entries"], places["entry_segment"])
  arrays["window_kv"] = unused_to_nan(arrays["window_kv"], places["segment_ids"])
  chosen = scattered_picks(arrays.pop("order"), arrays.pop("hole"))
  selection = Selection.all(batch, length) if picks is None else Selection.from_indices(chosen)
  return {**arrays, "selection": selection, **places}


def _case(name, *, window, tolerances=None, **inputs):
  options = dict(window=window, scale=inputs.get("width", 16) ** -0.5)
  more = {} if tolerances is None else dict(tolerances=tolerances)
  return Case(attend, name, functools.partial(_inputs, **inputs), options, **_COMMON, **more)


def _extreme(key: jax.Array):
  """Logits of several hundred, sinks far above and below: exponentials that are not taken from the maximum overflow."""
  arrays = _inputs(key, rows=((20,),), length=20, rate=2, entries=10, picks=4)
  return {**arrays, "q": 100 * arrays["q"], "sink": jnp.array([-500.0, 0.0, 500.0, 90.0])}


def _continued(key: jax.Array, *, past: int):
  """Rows that go on: with keys of earlier tokens of their first document, without any, with fewer than the window."""
  arrays = _inputs(key, rows=((5, 6), (11,), (9,)), length=11, rate=2, entries=5, picks=4)
  segment = jnp.array([[1] * past, [0] * past, [0] * (past - 3) + [1] * 3], jnp.int32)
  past_kv = jnp.where(segment[..., None] > 0, jnp.sin(jnp.arange(3.0 * past * 16)).reshape(3, past, 16), jnp.nan)
  return {**arrays, "past_kv": past_kv, "past_segment": segment}


CASES = (
    _case("picks scattered, two packed rows", rows=((5, 19, 1), (13, 8)), length=27, rate=2, entries=13, picks=6, window=8,
          tolerances={"float64": 1e-10, "bfloat16": 4e-2}),
    _case("every entry, several blocks", rows=((150, 139),), length=290, rate=8, entries=36, window=20,
          tolerances={"float64": 1e-10, "float32": 5e-5}),
    _case("no entries", rows=((9, 4),), length=16, rate=32, entries=0, window=300),
    _case("no window", rows=((3, 30),), length=33, rate=4, entries=8, picks=3, window=0),
    Case(attend, "extreme logits", _extreme, dict(window=3, scale=0.25), **_COMMON,
         tolerances={"float64": 1e-9, "float32": 2e-4}),
    Case(attend, "earlier keys, fewer than the window", functools.partial(_continued, past=5), dict(window=8, scale=0.25),
         **{**_COMMON, "differentiable": (*_COMMON["differentiable"], "past_kv")}),
    Case(attend, "earlier keys, more than the window", functools.partial(_continued, past=9), dict(window=4, scale=0.25),
         **_COMMON),
)
