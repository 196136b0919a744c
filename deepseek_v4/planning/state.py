"""Bytes of a run's state on one device, by what they are for: exact, from shapes and shardings, without compiling."""

from __future__ import annotations

import math
from typing import Any

import jax

from deepseek_v4.training.state import TrainState, state_shardings


def placed(shapes: TrainState, mesh: jax.sharding.Mesh) -> TrainState:
  """A state's shapes, `abstract_state(run_config)`, with their shardings on a mesh."""
  return jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes,
                      state_shardings(shapes, mesh))


def device_bytes(tree: Any) -> int:
  """Bytes of one device's part of a tree of arrays or shapes with shardings; of one without, all of it."""
  def size(leaf):
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize
  return sum(map(size, jax.tree.leaves(tree)))


def by_kind(state: TrainState) -> dict[str, int]:
  """Bytes of one device's part: "parameters", "optimizer" (momentum, moments), "router" (biases, hash tables), "other"
  (step, key). The compiler pads small and oddly shaped arrays, so its arguments may be a little larger."""
  return {"parameters": device_bytes(state.params), "optimizer": device_bytes(state.opt_state),
          "router": device_bytes(state.router), "other": device_bytes((state.step, state.key))}
