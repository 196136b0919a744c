"""Bytes of a run's state on one device, by what they are for: exact, from shapes and shardings, without compiling."""

from __future__ import annotations

import math
from typing import Any

import jax

from deepseek_v4.config import RunConfig
from deepseek_v4.training.state import abstract_state

KINDS = ("parameters", "optimizer", "router", "other")


def device_bytes(tree: Any) -> int:
  """Bytes of one device's part of a tree of arrays or shapes with shardings; of one without, all of it."""
  def size(leaf):
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize
  return sum(map(size, jax.tree.leaves(tree)))


def by_kind(run_config: RunConfig, mesh: jax.sharding.Mesh) -> dict[str, int]:
  """Bytes of one device's part of the state: "parameters", "optimizer" (momentum, moments), "router" (biases, hash tables),
  "other" (step, key). The compiler pads small and oddly shaped arrays, so its arguments may be a little larger.

  Raises:
    ValueError: sizes that the mesh does not divide.
  """
  state = abstract_state(run_config, mesh)
  return {"parameters": device_bytes(state.params), "optimizer": device_bytes(state.opt_state),
          "router": device_bytes(state.router), "other": device_bytes((state.step, state.key))}
