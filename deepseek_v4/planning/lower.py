"""The real step of a run, optimizer and kernels included, or of serving its model, for a named slice of TPUs that need not
be there.

Axis letters: B rows   S tokens of a chunk   V vocabulary
"""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding

from deepseek_v4 import sharding
from deepseek_v4.config import ModelConfig, RunConfig
from deepseek_v4.config_checks import refuse
from deepseek_v4.generation.decode import advance, reach_of
from deepseek_v4.model.cache import init_cache
from deepseek_v4.model.transformer import DeepseekV4
from deepseek_v4.training.feed import abstract_batch
from deepseek_v4.training.state import abstract_state, init_variables
from deepseek_v4.training.step import make_train_step

# libtpu looks for TPUs and for other processes that hold one; before it is loaded it must be told that there are none.
ENVIRONMENT = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


def devices_of(topology: str, slices: int = 1) -> list[Any]:
  """Descriptions of all devices of a slice such as "v5p:4x4x4", or of several such slices, for a mesh to compile for.

  Raises:
    ValueError: libtpu is not installed, or knows no such slice.
  """
  if importlib.util.find_spec("libtpu") is None:
    raise ValueError(f"topology = {topology!r}: libtpu is not installed, expected what pip install -e '.[aot]' brings")
  sizes = topology.partition(":")[2].split("x")
  if not all(size.isdecimal() and int(size) > 0 for size in sizes):  # some libtpu end the process over it
    raise ValueError(f"topology = {topology!r}: expected a slice that libtpu knows, such as v5p:4x4x4, v6e:4x4 or "
                     f"TPU7x:2x2x1")
  try:
    several = {"num_slices": slices} if slices > 1 else {}
    return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **several).devices)
  except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
    raise ValueError(f"topology = {topology!r}: expected a slice that libtpu knows, such as v5p:4x4x4, v6e:4x4 or "
                     f"TPU7x:2x2x1 ({str(error).splitlines()[0]})") from error


def mesh_on(run_config: RunConfig, topology: str) -> jax.sharding.Mesh:
  """The run's mesh on a slice, or on `mesh.dcn_data` slices of this kind. On one, a mesh without -1 may be smaller than the
  slice and takes its first devices.

  Raises:
    ValueError: as `devices_of` and `sharding.make_mesh`; a mesh larger than the slice, or any number of slices.
  """
  slices = run_config.mesh.dcn_data
  if slices < 1:
    refuse("mesh.dcn_data", slices, f"the number of slices {topology}")
  devices = devices_of(topology, slices)
  sizes = {name: getattr(run_config.mesh, name) for name in sharding.MESH_AXES}
  wanted = math.prod(sizes.values())
  if wanted > len(devices):
    raise ValueError(f"mesh = {sizes}: {wanted} devices, expected at most the {len(devices)} of {topology}")
  return sharding.make_mesh(run_config.mesh, devices[:wanted] if wanted > 0 and slices == 1 else devices)


def trace_step(run_config: RunConfig, mesh: jax.sharding.Mesh) -> jax.stages.Traced:
  """The train step of a run (with stages: of its first, see `make_train_step`) for the devices of a mesh, described or real:
  what `lower` takes, and its jaxpr.

  Raises:
    ValueError: sizes that the mesh does not divide.
  """
  step, operands = make_train_step(run_config, mesh), (abstract_state(run_config, mesh), abstract_batch(run_config, mesh))
  with jax.set_mesh(mesh):
    return step.jitted.trace(*operands)


def lowered(traced: jax.stages.Traced, mesh: jax.sharding.Mesh) -> jax.stages.Lowered:
  """What a trace becomes for the mesh that it was made for; `.compile()` is the compiler's work."""
  with jax.set_mesh(mesh):  # Pallas asks the mesh which TPU it lowers for
    return traced.lower()


def lower_step(run_config: RunConfig, mesh: jax.sharding.Mesh) -> jax.stages.Lowered:
  """`trace_step`, lowered."""
  return lowered(trace_step(run_config, mesh), mesh)


# ---- serving ----------------------------------------------------------------------------------------------------------
def abstract_variables(model: ModelConfig, mesh: jax.sharding.Mesh) -> dict[str, Any]:
  """The variables' shapes and shardings for serving: parameters in the compute dtype, as `load_hf(dtype=...)` gives them."""
  sharding.check_model_divides(model, mesh)
  shapes = jax.eval_shape(lambda: init_variables(model, jax.random.key(0)))
  place = lambda leaf, place, dtype: jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=place)
  return {name: jax.tree.map(lambda leaf, at, dtype=dtype: place(leaf, at, dtype), shapes[name],
                             sharding.parameter_shardings(shapes[name], mesh))
          for name, dtype in (("params", jnp.dtype(model.compute_dtype)), ("router", None))}


def abstract_cache(model: ModelConfig, rows: int, max_length: int, storage: str, mesh: jax.sharding.Mesh) -> Any:
  """The shapes of `init_cache`, rows split like those of a batch; heads share their keys, so nothing else is."""
  def place(axis, leaf):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(
        mesh, sharding.spec([None] * axis + ["batch"])))
  cache = jax.eval_shape(lambda: init_cache(model, rows, max_length, storage=storage))
  of_layers = lambda key: 1 if cache.groups.scanned(key) else 0
  layers = {key: jax.tree.map(lambda leaf, key=key: place(of_layers(key), leaf), layer)
            for key, layer in cache.layers.items()}
  return cache.replace(layers=layers, lengths=place(0, cache.lengths), furthest=place(0, cache.furthest))


def trace_serving(run_config: RunConfig, mesh: jax.sharding.Mesh, tokens: int,
                  storage: str = "compute") -> jax.stages.Traced:
  """The program that `generate` runs again and again: `tokens` more for each of `data.batch_size` rows, with a cache that
  has room for `data.sequence_length` tokens and is nearly full. One token: decoding; more: a chunk of a prompt.

  Raises:
    ValueError: sizes that the mesh does not divide; a mesh that splits the sequence, which a cache does not allow.
  """
  model, rows, length = run_config.model, run_config.data.batch_size, run_config.data.sequence_length
  if mesh.shape["context"] > 1:
    refuse("mesh.context", mesh.shape["context"], "1 for prefill and decode: a row's cache lies on one device")
  shards = mesh.size // mesh.shape["tensor"]
  if rows % shards:
    refuse("data.batch_size", rows, f"a multiple of {sharding.BATCH_SPLIT} = {shards}, the shards of the cache's rows")
  if not 1 <= tokens <= length:
    refuse("tokens", tokens, f"1 to data.sequence_length = {length}")
  chunk = lambda *axes, shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, sharding.spec(axes)))
  tokens_BS = chunk("batch", None, shape=(rows, tokens), dtype=jnp.int32)
  logits_BV = chunk("batch", "vocab", shape=(rows, model.vocab_size), dtype=jnp.float32)
  operands = (abstract_variables(model, mesh), abstract_cache(model, rows, length, storage, mesh), tokens_BS, tokens_BS,
              logits_BV)
  with jax.set_mesh(mesh):
    return advance.trace(DeepseekV4(model, run_config.training.kernels), *operands, reach=reach_of(length, length))
