"""The real train step of a run, optimizer and kernels included, for a named slice of TPUs that need not be there."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import jax
from jax.experimental import topologies

from deepseek_v4 import sharding
from deepseek_v4.config import RunConfig
from deepseek_v4.training.feed import abstract_batch
from deepseek_v4.training.state import abstract_state
from deepseek_v4.training.step import make_train_step

# libtpu looks for TPUs and for other processes that hold one; before it is loaded it must be told that there are none.
ENVIRONMENT = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


def devices_of(topology: str) -> list[Any]:
  """Descriptions of all devices of a slice such as "v5p:4x4x4", for a mesh to compile for.

  Raises:
    ValueError: libtpu is not installed, or knows no such slice.
  """
  if importlib.util.find_spec("libtpu") is None:
    raise ValueError(f"topology = {topology!r}: libtpu is not installed, expected what pip install -e '.[aot]' brings")
  try:
    return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
  except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
    raise ValueError(f"topology = {topology!r}: expected a slice that libtpu knows, such as v5p:4x4x4, v6e:4x4 or "
                     f"TPU7x:2x2x1 ({str(error).splitlines()[0]})") from error


def mesh_on(run_config: RunConfig, topology: str) -> jax.sharding.Mesh:
  """The run's mesh on a slice; a mesh without -1 may be smaller than the slice and takes its first devices.

  Raises:
    ValueError: as `devices_of` and `sharding.make_mesh`; a mesh larger than the slice.
  """
  devices = devices_of(topology)
  sizes = {name: getattr(run_config.mesh, name) for name in sharding.MESH_AXES}
  wanted = math.prod(sizes.values())
  if wanted > len(devices):
    raise ValueError(f"mesh = {sizes}: {wanted} devices, expected at most the {len(devices)} of {topology}")
  return sharding.make_mesh(run_config.mesh, devices[:wanted] if wanted > 0 else devices)


def lower_step(run_config: RunConfig, mesh: jax.sharding.Mesh) -> jax.stages.Lowered:
  """The train step of a run (with stages: of its first, see `make_train_step`) for the devices of a mesh, described or real;
  `.compile()` is the compiler's work.

  Raises:
    ValueError: sizes that the mesh does not divide.
  """
  return make_train_step(run_config, mesh).lower(abstract_state(run_config, mesh), abstract_batch(run_config, mesh))
