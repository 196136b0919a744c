"""Cases of `collapse` and `expand`.

Axis letters: B batch   S sequence   N streams   D hidden size
"""

from __future__ import annotations

import functools

import jax

from pallas_kernels.cases import Case, normals
from pallas_kernels.hyper_connections import collapse, expand


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


_COLLAPSE = dict(options=dict(norm_eps=1e-6, eps=1e-6, iterations=20), differentiable=("streams", "fn", "base", "scale"),
                 wide=("fn", "base", "scale"))
_EXPAND = dict(differentiable=("streams", "update", "post", "comb"), wide=("post", "comb"))
_TOLERANCES = {"float64": 1e-9, "bfloat16": 3e-2}

CASES = (
    Case(collapse, "four streams, several blocks", functools.partial(_collapse, streams=4, hidden=6, length=150),
         **_COLLAPSE, tolerances=_TOLERANCES),
    Case(collapse, "two streams, strong mixing", functools.partial(_collapse, streams=2, hidden=5, strength=10.0),
         **_COLLAPSE, tolerances={"float64": 1e-9}),
    Case(expand, "four streams, several blocks", functools.partial(_expand, streams=4, hidden=6, length=150), **_EXPAND,
         tolerances=_TOLERANCES),
    Case(collapse, "a long row", functools.partial(_collapse, streams=4, hidden=512, batch=1, length=4096), **_COLLAPSE,
         bench=True),
    Case(expand, "a long row", functools.partial(_expand, streams=4, hidden=512, batch=1, length=4096), **_EXPAND,
         bench=True),
)
