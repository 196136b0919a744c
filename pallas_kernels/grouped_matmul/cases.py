"""Cases of `expert_mlp`.

Axis letters: M rows   D hidden size   F expert width   E experts
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.cases import Case, normals
from pallas_kernels.grouped_matmul import expert_mlp, padded_rows


def _inputs(key: jax.Array, *, sizes, tile, hidden, width):
  """Experts that hold `sizes` rows, each from a tile's start on; the rows between and behind them hold anything."""
  experts, rows = len(sizes), padded_rows(sum(sizes), len(sizes), tile)
  arrays = normals(key, x=(rows, hidden), gate=(experts, hidden, width), up=(experts, hidden, width),
                   down=(experts, width, hidden))
  arrays |= {name: arrays[name] * hidden**-0.5 for name in ("gate", "up")} | {"down": arrays["down"] * width**-0.5}
  return {**arrays, "group_sizes": jnp.array(sizes, jnp.int32)}


def _owned_rows(arrays, result, *, sizes, tile):
  """Rows [M, D] without those that no expert owns."""
  owned, start = [False] * result.shape[0], 0
  for size in sizes:
    owned[start:start + size] = [True] * size
    start += -(-size // tile) * tile
  return jnp.where(jnp.array(owned)[:, None], result, 0)


def _case(name, *, sizes, tile, limit, hidden=6, width=5, **more):
  return Case(expert_mlp, name, functools.partial(_inputs, sizes=sizes, tile=tile, hidden=hidden, width=width),
              dict(tile=tile, limit=limit), differentiable=("x", "gate", "up", "down"),
              meaning=functools.partial(_owned_rows, sizes=sizes, tile=tile), **more)


CASES = (
    _case("uneven groups, clamp bites", sizes=(5, 0, 9, 1), tile=4, limit=0.5,
          tolerances={"float64": 1e-10, "bfloat16": 3e-2}),
    _case("one expert has everything", sizes=(0, 0, 11), tile=8, limit=10.0, tolerances={"float64": 1e-10}),
)
