"""Bytes of a run's state, from its shapes."""

import functools
import math

import jax
import numpy as np
import pytest

from deepseek_v4 import sharding
from deepseek_v4.config import MeshConfig
from deepseek_v4.planning import state
from deepseek_v4.training.state import abstract_state
from tests.training.small import RUN


@functools.cache
def shapes_of(mesh=None):
  return abstract_state(RUN, mesh)


def kinds(mesh_config, devices):
  mesh = sharding.make_mesh(mesh_config, jax.devices()[:devices])
  return state.by_kind(state.placed(shapes_of(), mesh)), state.by_kind(shapes_of(mesh))


def test_one_device_holds_every_number_once():
  found, of_run = kinds(MeshConfig(data=1), 1)
  shapes = shapes_of()
  numbers = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes.params))
  assert found == of_run and found["parameters"] == 4 * numbers
  # Muon keeps a momentum of each of its numbers, AdamW two moments of the others; and counters.
  assert 4 * numbers < found["optimizer"] < 8 * numbers
  assert found["router"] == 4 * sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes.router))


@pytest.mark.parametrize("axes", [{"fsdp": 2}, {"expert": 2, "fsdp": 2}, {"tensor": 2, "context": 2}], ids=str)
def test_a_device_holds_its_part(axes):
  """What an array on the devices really takes is `shard_shape`'s, so this compares with the arrays' own shards."""
  devices = math.prod(axes.values())
  mesh = sharding.make_mesh(MeshConfig(**({"data": 1} | axes)), jax.devices()[:devices])
  found = state.by_kind(state.placed(shapes_of(), mesh))
  shapes = shapes_of(mesh)
  shards = [jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding).addressable_shards[0].data.nbytes
            for leaf in jax.tree.leaves(shapes.params)]
  assert found["parameters"] == sum(shards) and found == state.by_kind(shapes)


def test_copies_hold_the_same():
  assert kinds(MeshConfig(data=4), 4) == kinds(MeshConfig(data=1), 1)
