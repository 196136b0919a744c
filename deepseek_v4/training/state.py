"""Everything that a training step changes, as one pytree; weights are born sharded."""

from __future__ import annotations

import concurrent.futures
import functools
from typing import Any, Mapping

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deepseek_v4 import optim, sharding
from deepseek_v4.config import ModelConfig, RunConfig
from deepseek_v4.model.transformer import DeepseekV4


@flax.struct.dataclass
class TrainState:
  """State of a run between two steps.

  Attributes:
    step: int32 [], optimizer steps done.
    params: what gradients train.
    router: balancing biases and hash tables; never by gradients.
    opt_state: of the optimizer.
    key: typed PRNG key of the run.
  """

  step: jax.Array
  params: Any
  router: Any
  opt_state: Any
  key: jax.Array


# Numbers are drawn once, by a hundred little loops. XLA's CPU compiler takes half the time where it leaves them as they are.
# Most of a compilation keeps one core busy, so two programs, each of every second leaf, are compiled at the same time.
PROGRAMS = 2
INIT_OPTIONS: dict[str, dict[str, Any]] = {"cpu": {"xla_backend_optimization_level": 0}}


def init_variables(config: ModelConfig, key: jax.Array) -> dict[str, Any]:
  """Fresh variables {"params", "router"} from a typed key, float32 but for the int32 hash tables; no shape depends on the
  tokens they are initialised with. To be traced; `fresh_variables` is what a person calls."""
  parts = sharding.sequence_parts()
  shape = (sharding.batch_shards(), parts * config.local_reach if parts > 1 else 2)
  return dict(DeepseekV4(config, kernels="reference").init(key, jnp.zeros(shape, jnp.int32)))


def fresh_variables(config: ModelConfig, key: jax.Array) -> dict[str, Any]:
  """The variables of a model that nobody has trained, on the default device: {"params", "router"}, float32 but for the int32
  hash tables.

  Args:
    key: a typed PRNG key, a scalar.
  """
  return _drawn(jax.jit(functools.partial(init_variables, config)), None, key)


def _drawn(init: Any, mesh: Mesh | None, key: jax.Array) -> Any:
  """A jitted function of a key, called; where it is not a part of another program, compiled as what runs once, in parts."""
  if isinstance(key, jax.core.Tracer):
    return init(key)
  leaves, tree = jax.tree.flatten(init.eval_shape(key))

  def lowered(number: int) -> Any:
    mine = slice(number, None, PROGRAMS)
    places = None if mesh is None else [leaf.sharding for leaf in leaves[mine]]
    return jax.jit(lambda key: jax.tree.leaves(init(key))[mine], out_shardings=places).lower(key)

  options = INIT_OPTIONS.get(sharding.platform_of(mesh))
  # `map` lowers in this thread: others do not see its ambient mesh.
  with concurrent.futures.ThreadPoolExecutor(PROGRAMS) as pool:
    programs = list(pool.map(lambda program: program.compile(options), map(lowered, range(PROGRAMS))))
  for number, program in enumerate(programs):
    leaves[number::PROGRAMS] = program(key)
  return jax.tree.unflatten(tree, leaves)


def optimizer_of(run_config: RunConfig, params: Any, mesh: Mesh | None) -> optax.GradientTransformation:
  """The run's Optax transformation for a `params` tree (arrays or shapes)."""
  shardings = None if mesh is None else sharding.parameter_shardings(params, mesh)
  return optim.build_optimizer(run_config.optimizer, params, steps=run_config.training.steps, shardings=shardings)


def _new_state(run_config: RunConfig, mesh: Mesh | None, key: jax.Array) -> TrainState:
  init_key, run_key = jax.random.split(key)
  variables = init_variables(run_config.model, init_key)
  opt_state = optimizer_of(run_config, variables["params"], mesh).init(variables["params"])
  return TrainState(jnp.zeros((), jnp.int32), variables["params"], variables["router"], opt_state, run_key)


def state_of(run_config: RunConfig, variables: dict[str, Any], key: jax.Array, mesh: Mesh | None = None) -> TrainState:
  """A state at step 0 with these weights, which are given up: as `init_state` otherwise.

  Args:
    variables: {"params", "router"} in the layout of the run's model, in any floating type that float32 holds.

  Raises:
    ValueError: sizes that the mesh does not divide, or leaves that are not those of the run's model.
  """
  shapes = abstract_state(run_config, mesh)
  given = {name: variables[name] for name in ("params", "router")}
  by_name = lambda tree: {"/".join(sharding.path_names(path)): x.shape
                          for path, x in jax.tree_util.tree_leaves_with_path(tree)}
  refuse_other_shapes(by_name(given), by_name({name: getattr(shapes, name) for name in given}), "variables")

  def build(variables: Any, key: jax.Array) -> TrainState:
    params, router = (jax.tree.map(lambda x, shape: x.astype(shape.dtype), variables[name], getattr(shapes, name))
                      for name in ("params", "router"))
    _, run_key = jax.random.split(key)
    return TrainState(jnp.zeros((), jnp.int32), params, router, optimizer_of(run_config, params, mesh).init(params), run_key)

  places = None if mesh is None else jax.tree.map(lambda leaf: leaf.sharding, shapes)
  cast = any(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(given))  # memory of another size cannot be handed on
  return jax.jit(build, out_shardings=places, donate_argnums=() if cast else 0)(given, key)


def refuse_other_shapes(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], where: str) -> None:
  """Raises one ValueError that lists every leaf of which name or shape is not the wanted one."""
  lines = [f"{name}: not there, expected shape {shape}" for name, shape in wanted.items() if name not in found]
  lines += [f"{name}: of shape {shape}, expected no such leaf" for name, shape in found.items() if name not in wanted]
  lines += [f"{name}: of shape {shape}, expected {wanted[name]}" for name, shape in found.items()
            if name in wanted and tuple(shape) != tuple(wanted[name])]
  if lines:
    raise ValueError("\n  ".join([f"{where}: expected the leaves of the run's model, by name and shape:", *lines]))


def abstract_state(run_config: RunConfig, mesh: Mesh | None = None) -> TrainState:
  """The state's shapes, dtypes and, on a mesh, shardings; nothing is allocated.

  Raises:
    ValueError: sizes that the mesh does not divide.
  """
  if mesh is not None:
    sharding.check_model_divides(run_config.model, mesh)
    if not run_config.stages:  # else each stage has its own batches, and its own mesh perhaps
      sharding.check_divides(run_config, mesh)
  shapes = jax.eval_shape(lambda: _new_state(run_config, mesh, jax.random.key(0)))
  if mesh is None:
    return shapes
  return jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes,
                      state_shardings(shapes, mesh))


def state_shardings(state: TrainState, mesh: Mesh) -> Any:
  """NamedSharding of every leaf: moments lie like their parameters, scalars and keys everywhere."""
  everywhere = NamedSharding(mesh, PartitionSpec())
  params = sharding.parameter_shardings(state.params, mesh)
  by_path = {sharding.path_names(path): place for path, place in jax.tree_util.tree_leaves_with_path(params)}

  def of_moment(path: Any, _: Any) -> NamedSharding:
    names = sharding.path_names(path)
    return next((by_path[names[i:]] for i in range(len(names)) if names[i:] in by_path), everywhere)

  build: Any = TrainState  # of shardings in the place of arrays
  return build(everywhere, params, sharding.parameter_shardings(state.router, mesh),
                    jax.tree_util.tree_map_with_path(of_moment, state.opt_state), everywhere)


def jit_init(run_config: RunConfig, mesh: Mesh | None = None) -> Any:
  """The jitted function key -> TrainState; on a mesh every leaf is created where it belongs."""
  places = None if mesh is None else jax.tree.map(lambda leaf: leaf.sharding, abstract_state(run_config, mesh))
  return jax.jit(lambda key: _new_state(run_config, mesh, key), out_shardings=places)


def init_state(run_config: RunConfig, key: jax.Array, mesh: Mesh | None = None) -> TrainState:
  """A fresh state from one typed key (a scalar), the same on every mesh: step 0, float32 parameters, the optimizer's
  moments.

  Raises:
    ValueError: sizes that the mesh does not divide, before anything is compiled.
  """
  return _drawn(jit_init(run_config, mesh), mesh, key)
