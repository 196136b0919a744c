"""Cases of `collapse`, `expand` and `expand_collapse`.

Axis letters: B batch   S sequence   N streams   D hidden size
"""

from __future__ import annotations

import functools

import jax

from pallas_kernels.cases import Case, normals
from pallas_kernels.hyper_connections import collapse, expand, expand_collapse


def _collapse(key: jax.Array, *, streams, hidden, batch=2, length=5, strength=1.0):
  """Random streams and coefficients; `strength` multiplies the mixing logits' share."""
  outputs = (2 + streams) * streams
  arrays = normals(key, streams=(batch, length, streams, hidden), fn=(streams * hidden, outputs), base=(outputs,),
                   scale=(3,))
  arrays["fn"] = arrays["fn"] * (streams * hidden) ** -0.5
  arrays["scale"] = arrays["scale"].at[2].mul(strength)
  return {**arrays, "streams": 3 * arrays["streams"]}


def _expand(key: jax.Array, *, streams, hidden, batch=2, length=5):
  return normals(key, streams=(batch, length, streams, hidden), update=(batch, length, hidden),
                 post=(batch, length, streams), comb=(batch, length, streams, streams))


def _expand_collapse(key: jax.Array, *, streams, hidden, batch=2, length=5):
  one, two = jax.random.split(key)
  weights = _collapse(one, streams=streams, hidden=hidden, batch=1, length=1)
  return {**_expand(two, streams=streams, hidden=hidden, batch=batch, length=length),
          **{name: weights[name] for name in ("fn", "base", "scale")}}


_COLLAPSE = dict(options=dict(norm_eps=1e-6, eps=1e-6, iterations=20), differentiable=("streams", "fn", "base", "scale"),
                 wide=("fn", "base", "scale"))
_EXPAND = dict(differentiable=("streams", "update", "post", "comb"), wide=("post", "comb"))
_BOTH = dict(options=_COLLAPSE["options"], differentiable=_EXPAND["differentiable"] + ("fn", "base", "scale"),
             wide=_EXPAND["wide"] + _COLLAPSE["wide"])
_TOLERANCES = {"float64": 1e-9, "bfloat16": 3e-2}

CASES = (
    Case(collapse, "four streams, several blocks", functools.partial(_collapse, streams=4, hidden=6, length=150),
         **_COLLAPSE, tolerances=_TOLERANCES),
    Case(collapse, "two streams, strong mixing", functools.partial(_collapse, streams=2, hidden=5, strength=10.0),
         **_COLLAPSE, tolerances={"float64": 1e-9}),
    Case(expand, "four streams, several blocks", functools.partial(_expand, streams=4, hidden=6, length=150), **_EXPAND,
         tolerances=_TOLERANCES),
    Case(expand_collapse, "four streams", functools.partial(_expand_collapse, streams=4, hidden=6, length=70), **_BOTH,
         tolerances=_TOLERANCES),
    Case(expand_collapse, "two streams", functools.partial(_expand_collapse, streams=2, hidden=5), **_BOTH,
         tolerances={"float64": 1e-9}),
)
