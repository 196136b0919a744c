"""Optimizer steps whose passes are programs of their own: gradients and numbers of passes add up, then one update.

The frame of `distillation_step.py` and `policy_step.py`, which bring the loss of a pass. What differs from
`training/step.py`, where all passes of a step are one program: between passes the host can put something else on the
devices, another teacher's head for instance, and a step of any number of passes compiles nothing. The balance loss, the
indexer's loss and the router's bias are as in training. The prediction block rests: its loss on the model's own words would
pull the model to what it says already, so it keeps its weights, without decay, to be trained again afterwards.

Axis letters: B rows   S sequence   L layers   E experts
"""

from __future__ import annotations

from typing import Any, Callable, Mapping, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deepseek_v4 import optim, sharding
from deepseek_v4.config import CSA, RunConfig
from deepseek_v4.model.compression import sees_an_entry
from deepseek_v4.training import trainable
from deepseek_v4.training.state import TrainState
from deepseek_v4.training.step import compiler_options, update_router

LAYER_LOSSES = ("balance", "indexer")
RESTING = ("mtp",)  # parts of the model that no pass runs
Rows = Mapping[str, jax.Array]


@flax.struct.dataclass
class Sums:
  """What the passes of a step add up to.

  Attributes:
    grads: of the weighted loss, by the parameters.
    values: each loss and each metric of the step, as far as its passes went; of those named "..._max" the largest.
    load: int32 [L, E], tokens of each expert.
    tokens: int32 [], places that hold a token.
  """

  grads: Any
  values: dict[str, jax.Array]
  load: jax.Array
  tokens: jax.Array


def loss_weights(run_config: RunConfig, own: str) -> dict[str, float]:
  """Weight of each loss: of the stage's `own` and of those of the layers."""
  return {own: 1.0, "balance": run_config.loss.balance_weight, "indexer": run_config.loss.indexer_weight}


def count_layer_losses(run_config: RunConfig, rows: Rows) -> dict[str, jax.Array]:
  """How many terms each loss of the layers has in rows, int32 [B, S], as float32 scalars; counts of the passes of a step add
  up."""
  places = {"balance": rows["segment_ids"] > 0,
            "indexer": sees_an_entry(rows["positions"], rows["segment_ids"], run_config.model.compress_rate(CSA))}
  return {name: x.sum().astype(jnp.float32) for name, x in places.items()}


def means(found: Mapping[str, jax.Array], counts: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
  """Sums of a pass, scalars at least float32, as its parts of the step's means; 0 where nothing counts."""
  return {name: total / jnp.maximum(counts[name], 1) for name, total in found.items()}


def add_pass(weights: Mapping[str, float], places: Any, state: TrainState, sums: Sums, segment_ids: jax.Array,
             values_of: Callable[[Any], tuple[dict[str, jax.Array], jax.Array, Any]]) -> tuple[Sums, Any]:
  """(the sums with a pass added, what else `values_of` found).

  Args:
    weights: of the losses.
    places: shardings of the state; None on one device.
    segment_ids: int32 [B, S] of the pass.
    values_of: parameters -> (losses and metrics of the pass, float32 scalars, which add up over passes, or are named
      "..._max"; load int32 [L, E]; anything else).
  """
  def objective(params: Any) -> Any:
    values, load, other = values_of(params)
    return sum(weight * values[name] for name, weight in weights.items()), (values, load, other)

  (_, (values, load, other)), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
  grads = grads if places is None else jax.lax.with_sharding_constraint(grads, places.params)
  new = jax.tree.map(jnp.add, sums, Sums(grads, values, load, (segment_ids > 0).sum()))
  largest = {name: jnp.maximum(sums.values[name], values[name]) for name in values if name.endswith("_max")}
  return new.replace(values=new.values | largest), other


def updated(run_config: RunConfig, mesh: Mesh | None, weights: Mapping[str, float], state: Any,
            sums: Sums) -> tuple[Any, dict[str, Any]]:
  """(the state after a step, or as it was if something is not finite; metrics).

  As in training nothing is made beside the state: whether all new numbers are finite is asked first, and then each one is
  overwritten, or stays. Of the prediction block, which rests, neither weights nor moments change.
  """
  loss, norm = sum(weight * sums.values[name] for name, weight in weights.items()), optax.tree.norm(sums.grads)
  params, grads, shardings = (_without_resting(tree) for tree in (
    state.params, sums.grads, None if mesh is None else sharding.parameter_shardings(state.params, mesh)))
  optimizer, steps = run_config.optimizer, run_config.training.steps
  finite = jnp.isfinite(loss) & jnp.isfinite(norm) & optim.stays_finite(
    optimizer, grads, state.opt_state, params, norm=norm, steps=steps)
  # Behind a barrier, so that the update shares no array of the parameters' size with the question.
  norm, decided = jax.lax.optimization_barrier((norm, finite))
  keep = lambda new, old: jax.lax.select(decided, new, old)
  params, opt_state = optim.update_in_place(optimizer, grads, state.opt_state, params, norm=norm, keep=keep, steps=steps,
                                            shardings=shardings)
  learnt = {name: tree for name, tree in state.router.items() if name not in RESTING}
  router = update_router(run_config.model, learnt, {"layers": sums.load}, run_config.loss.bias_update_speed)
  new = state.replace(step=keep(state.step + 1, state.step), params=trainable.with_frozen(params, state.params),
                      router=state.router | jax.tree.map(keep, router, learnt), opt_state=opt_state)
  rate = optim.make_schedule(optimizer, steps)(state.step)
  return new, {"loss": loss, **sums.values, "grad_norm": norm, "learning_rate": rate, "finite": finite,
               "tokens": sums.tokens}


def _without_resting(tree: Any) -> Any:
  """The tree with None for every leaf that rests."""
  return None if tree is None else {name: jax.tree.map(lambda x: None, part) if name in RESTING else part
                                    for name, part in tree.items()}


def not_finite(what: str, numbers: Mapping[str, Any]) -> str:
  """What is said of a step whose loss, gradients or new parameters are not finite.

  Args:
    what: was not saved.
    numbers: its metrics.
  """
  return (f"loss {numbers['loss']}, gradient norm {numbers['grad_norm']}: not finite. Nothing of this {what} was saved. The "
          f"same command goes on from the newest checkpoint and comes to the same numbers: change what leads to others, "
          f"such as a lower optimizer.learning_rate (now {numbers['learning_rate']:.3g}) or another training.seed")


class Frame:
  """The jitted programs that all such steps have.

  Args:
    run_config: the run.
    mesh: devices; None = the default device alone.
    shapes: of the state, with shardings on a mesh.
    weights: of the losses.
    names: of all that `Sums.values` holds.

  Attributes:
    places: shardings of the state; None on one device.
    everywhere, sums: of what is on all devices, and of `Sums`; None on one device.
    start: () -> Sums of no pass.
  """

  def __init__(self, run_config: RunConfig, mesh: Mesh | None, shapes: Any, weights: Mapping[str, float],
               names: Sequence[str]) -> None:
    self._mesh = mesh
    self.places = None if mesh is None else jax.tree.map(lambda leaf: leaf.sharding, shapes)
    self.everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    self.sums = None if mesh is None else Sums(self.places.params, *3 * (self.everywhere,))
    config = run_config.model

    def zeros() -> Sums:
      grads = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes.params)
      load = jnp.zeros((config.num_hidden_layers, config.n_routed_experts), jnp.int32)
      return Sums(grads, dict.fromkeys(names, jnp.zeros((), jnp.float32)), load, jnp.zeros((), jnp.int32))

    self.start = self.jit(zeros, self.sums)
    self._update = self.jit(lambda state, sums: updated(run_config, mesh, weights, state, sums),
                            (self.places, self.everywhere), donate=(0,))

  def jit(self, fn: Callable[..., Any], out: Any, donate: tuple[int, ...] = ()) -> sharding.OnMesh:
    """A program whose results lie as `out` says, on a mesh."""
    options: dict[str, Any] = {"compiler_options": compiler_options(self._mesh)}
    options |= {} if self._mesh is None else {"out_shardings": out}
    return sharding.OnMesh(jax.jit(fn, donate_argnums=donate, **options), self._mesh)

  def put(self, x: Any, axes: tuple[str | None, ...]) -> jax.Array:
    """An array of any shape and dtype on the devices, split along these axes, one for each of its own."""
    return jax.device_put(x, None if self._mesh is None else NamedSharding(self._mesh, sharding.spec(axes)))

  def update(self, state: Any, sums: Sums) -> tuple[Any, dict[str, jax.Array]]:
    """(the state after the step, metrics); the state that came in is given up. Metrics are float32 scalars, but "tokens" is
    int32 and "finite" bool. The OLD state comes back, and metrics["finite"] is False, if loss, gradient norm or a new
    parameter is not finite."""
    return self._update(state, sums)
