"""One optimizer step of a distillation: passes of one teacher each, their gradients added up, then one update.

What differs from `training/step.py`: the loss is the KL to the teacher whose sample it is, and passes are programs of
their own, since between them another teacher's head takes the place of the one before. The balance loss, the indexer's loss
and the router's bias are as in training, on the tokens of prompts and replies. The prediction block rests: its loss on the
student's own words would pull the student to what it says already, so it keeps its weights, without decay, to be trained
again afterwards.

Axis letters: B rows   S sequence   D, E hidden sizes of student and teacher   V vocabulary
"""

from __future__ import annotations

from typing import Any, Callable, Mapping

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deepseek_v4 import optim, sharding
from deepseek_v4.config import CSA, RunConfig
from deepseek_v4.model.compression import sees_an_entry
from deepseek_v4.model.losses import next_token_targets
from deepseek_v4.model.transformer import DeepseekV4
from deepseek_v4.posttraining.distillation import reverse_kl_sum
from deepseek_v4.training.state import TrainState, abstract_state, optimizer_of
from deepseek_v4.training.step import compiler_options, update_router

LOSSES = ("distillation", "balance", "indexer")
ROWS = ("tokens", "segment_ids", "positions", "loss_mask")


@flax.struct.dataclass
class Sums:
  """What the passes of a step add up to.

  Attributes:
    grads: of the weighted loss, by the parameters.
    losses: mean of each loss over the step's counts; "distillation" with the teachers' weights.
    load: int32 [L, E], tokens of each expert.
    tokens: int32 [], places that hold a token.
  """

  grads: Any
  losses: dict[str, jax.Array]
  load: jax.Array
  tokens: jax.Array


@flax.struct.dataclass
class Pass:
  """One pass's rows and what their teacher says of them.

  Attributes:
    rows: int32 [B, S] each: "tokens", "segment_ids", "positions", "loss_mask" (1 on tokens that the student drew).
    hidden: [B, S, E], the teacher's, what its head multiplies.
    head: [E, V] of the teacher, with as many columns as the student's.
    weight: float32 [], of this teacher in the loss.
    vocabulary: ids that both have, the first of them.
  """

  rows: dict[str, jax.Array]
  hidden: jax.Array
  head: jax.Array
  weight: jax.Array
  vocabulary: int = flax.struct.field(pytree_node=False)


def count_losses(run_config: RunConfig, rows: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
  """How many terms each loss has in rows [B, S]; counts of the passes of a step add up."""
  places = {"distillation": _targets(rows) >= 0, "balance": rows["segment_ids"] > 0,
            "indexer": sees_an_entry(rows["positions"], rows["segment_ids"], run_config.model.compress_rate(CSA))}
  return {name: x.sum().astype(jnp.float32) for name, x in places.items()}


def _targets(rows: Mapping[str, jax.Array]) -> jax.Array:
  return next_token_targets(rows["tokens"], rows["segment_ids"], rows["loss_mask"])


def loss_weights(run_config: RunConfig) -> dict[str, float]:
  """Weight of each loss; the teachers' own weights come on top."""
  return {"distillation": 1.0, "balance": run_config.loss.balance_weight, "indexer": run_config.loss.indexer_weight}


def pass_losses(run_config: RunConfig, params: Any, router: Any, part: Pass) -> tuple[dict[str, jax.Array], jax.Array]:
  """({loss: sum over the pass, without weights}, experts' load [L, E])."""
  model, rows = DeepseekV4(run_config.model, run_config.training.kernels), part.rows
  targets = _targets(rows)
  # Targets ask for the layers' losses; nobody reads the next-token loss, so it is not computed.
  out = model.apply({"params": params, "router": router}, rows["tokens"], rows["positions"], rows["segment_ids"],
                    targets=targets, mtp=False, attention_mode=run_config.training.attention_mode)
  path = ("lm_head", "kernel")
  head = sharding.gathered(params["lm_head"]["kernel"].astype(run_config.model.compute_dtype), path)
  kl, _ = reverse_kl_sum(out.hidden, head, part.hidden, part.head, targets >= 0, chunk=run_config.model.loss_chunk_size,
                         vocabulary=part.vocabulary)
  return {"distillation": kl, **{name: out.losses[name][0] for name in ("balance", "indexer")}}, out.routing["load"]


def _add_pass(run_config: RunConfig, places: Any, state: TrainState, sums: Sums, part: Pass,
              counts: Mapping[str, jax.Array]) -> tuple[Sums, jax.Array]:
  weights = loss_weights(run_config)

  def objective(params):
    found, load = pass_losses(run_config, params, state.router, part)
    means = {name: total / jnp.maximum(counts[name], 1) for name, total in found.items()}
    means["distillation"] *= part.weight
    return sum(weights[name] * mean for name, mean in means.items()), (means, load, found["distillation"])

  (_, (means, load, kl)), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
  grads = grads if places is None else jax.lax.with_sharding_constraint(grads, places.params)
  new = Sums(grads, means, load, (part.rows["segment_ids"] > 0).sum())
  return jax.tree.map(jnp.add, sums, new), kl


def _update(run_config: RunConfig, mesh: Mesh | None, state: TrainState, sums: Sums) -> tuple[TrainState, dict[str, Any]]:
  loss = sum(weight * sums.losses[name] for name, weight in loss_weights(run_config).items())
  optimizer = optimizer_of(run_config, state.params, mesh)
  updates, opt_state = optimizer.update(sums.grads, state.opt_state, state.params)
  resting = lambda tree: {name: tree[name] for name in ("mtp",) if name in tree}
  params = optax.apply_updates(state.params, updates) | resting(state.params)
  router = {name: tree for name, tree in state.router.items() if name != "mtp"}
  router = update_router(run_config.model, router, {"layers": sums.load}, run_config.loss.bias_update_speed)
  new = TrainState(state.step + 1, params, router | resting(state.router), opt_state, state.key)
  grad_norm = optax.tree.norm(sums.grads)
  finite = jnp.stack([jnp.isfinite(x).all() for x in (loss, grad_norm, *jax.tree.leaves(new.params))]).all()
  kept = jax.tree.map(lambda a, b: jax.lax.select(finite, a, b), new.replace(key=None), state.replace(key=None))
  rate = optim.make_schedule(run_config.optimizer, run_config.training.steps)(state.step)
  return kept.replace(key=state.key), {"loss": loss, **sums.losses, "grad_norm": grad_norm, "learning_rate": rate,
                                       "finite": finite, "tokens": sums.tokens}


# ---- programs ------------------------------------------------------------------------------------------------------------
class Steps:
  """The jitted programs of a run's steps.

  Args:
    run_config: the run.
    mesh: devices; None = the default device alone.

  Raises:
    ValueError: sizes that the mesh does not divide.
  """

  def __init__(self, run_config: RunConfig, mesh: Mesh | None = None) -> None:
    self._mesh = mesh
    self._places = None if mesh is None else jax.tree.map(lambda leaf: leaf.sharding, abstract_state(run_config, mesh))
    shapes = abstract_state(run_config)
    load = jax.ShapeDtypeStruct((run_config.model.num_hidden_layers, run_config.model.n_routed_experts), jnp.int32)
    zero = jax.ShapeDtypeStruct((), jnp.float32)
    empty = Sums(shapes.params, dict.fromkeys(LOSSES, zero), load, jax.ShapeDtypeStruct((), jnp.int32))
    zeros = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), empty)
    options = lambda out: {"compiler_options": compiler_options(mesh)} | ({} if mesh is None else {"out_shardings": out})
    jit = lambda fn, out, donate=(): sharding.OnMesh(jax.jit(fn, donate_argnums=donate, **options(out)), mesh)
    places, everywhere = self._places, None if mesh is None else NamedSharding(mesh, PartitionSpec())
    sums = None if mesh is None else Sums(places.params, everywhere, everywhere, everywhere)
    self.start: Callable[[], Sums] = jit(zeros, sums)
    self.count = jit(lambda rows: count_losses(run_config, rows), everywhere)
    self._add = jit(lambda *args: _add_pass(run_config, places, *args), (sums, everywhere), donate=(1,))
    self._update = jit(lambda state, sums: _update(run_config, mesh, state, sums), (places, everywhere), donate=(0,))

  def add(self, state: TrainState, sums: Sums, part: Pass, counts: Mapping[str, Any]) -> tuple[Sums, jax.Array]:
    """(the sums, which are given up, with a pass added; the KL sum of the pass in nats, without weight).

    Args:
      counts: of each loss over all passes of the step, see `count_losses`.
    """
    return self._add(state, sums, part, counts)

  def update(self, state: TrainState, sums: Sums) -> tuple[TrainState, dict[str, jax.Array]]:
    """(the state after the step, metrics); the state that came in is given up. The OLD state comes back, and
    metrics["finite"] is False, if loss, gradient norm or a new parameter is not finite."""
    return self._update(state, sums)

  # ---- arrays of a pass, where they belong ---------------------------------------------------------------------------
  def put_rows(self, rows: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Rows [B, S] on the devices."""
    return {name: self._put(rows[name], ("batch", "sequence")) for name in ROWS}

  def put_hidden(self, hidden: Any) -> jax.Array:
    """Hidden states [B, S, E] on the devices."""
    return self._put(hidden, ("batch", "sequence", None))

  def put_head(self, head: Any) -> jax.Array:
    """A teacher's head [E, V] on the devices, split along V."""
    return self._put(head, (None, "vocab"))

  def _put(self, x: Any, axes: tuple[str | None, ...]) -> jax.Array:
    return jax.device_put(x, None if self._mesh is None else NamedSharding(self._mesh, sharding.spec(axes)))
