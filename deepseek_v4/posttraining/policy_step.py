"""One optimizer step of reinforcement learning: passes over packed samples, their gradients added up, then one update.

What differs from `training/step.py`: the loss is -J of `grpo.py` and passes are programs of their own, so that a minibatch
of any number of rows compiles nothing. The balance loss, the indexer's loss and the router's bias are as in training. The
prediction block rests: its loss on the model's own words would teach it nothing but them, so it keeps its weights, without
decay, to be trained again afterwards.

Axis letters: B rows   S sequence   V vocabulary   L layers   E experts   k experts per token
"""

from __future__ import annotations

from typing import Any, Mapping

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deepseek_v4 import optim, sharding
from deepseek_v4.config import CSA, ReinforcementConfig, RunConfig
from deepseek_v4.model.compression import sees_an_entry
from deepseek_v4.model.replay import Replay
from deepseek_v4.model.transformer import DeepseekV4
from deepseek_v4.posttraining import grpo
from deepseek_v4.posttraining.logprobs import token_logprobs
from deepseek_v4.training.state import TrainState, abstract_state, optimizer_of
from deepseek_v4.training.step import compiler_options, update_router

LAYER_LOSSES = ("balance", "indexer")
Rows = Mapping[str, jax.Array]


@flax.struct.dataclass
class PolicyState(TrainState):
  """A TrainState with the weights that the KL is measured from: {"params", "router"}; None without a KL."""

  reference: Any = None


@flax.struct.dataclass
class Sums:
  """What the passes of a step add up to.

  Attributes:
    grads: of the weighted loss, by the parameters.
    values: "policy" = -J, the mean of each loss of the layers, and the metrics of `grpo.objective`.
    load: int32 [L, E], tokens of each expert.
    tokens: int32 [], places that hold a token.
  """

  grads: Any
  values: dict[str, jax.Array]
  load: jax.Array
  tokens: jax.Array


def abstract_policy(run_config: RunConfig, mesh: Mesh | None = None) -> PolicyState:
  """Shapes, dtypes and shardings of a run's state.

  Raises:
    ValueError: sizes that the mesh does not divide.
  """
  state = abstract_state(run_config, mesh)
  return _with_reference(run_config.reinforcement, state)


def _with_reference(config: ReinforcementConfig, state: TrainState) -> PolicyState:
  reference = {"params": state.params, "router": state.router} if config.kl_weight else None
  return PolicyState(state.step, state.params, state.router, state.opt_state, state.key, reference)


def as_policy(run_config: RunConfig, state: TrainState) -> PolicyState:
  """The state with its own weights, copied, as the reference."""
  new = _with_reference(run_config.reinforcement, state)
  return new.replace(reference=jax.tree.map(jnp.copy, new.reference))


# ---- pure functions ------------------------------------------------------------------------------------------------------
def policy_logprobs(run_config: RunConfig, params: Any, router: Any, rows: Rows, *, replay: bool) -> tuple[jax.Array, Any]:
  """Nats [B, S] of the rows' targets under the distribution that they were drawn from, and the model's output.

  Args:
    replay: take the rows' experts, if they have any, instead of the router's own choice.
  """
  model, config = DeepseekV4(run_config.model, run_config.training.kernels), run_config.reinforcement
  given = Replay(jnp.moveaxis(rows["experts"].astype(jnp.int32), 2, 0)) if replay and "experts" in rows else None
  # Targets ask for the layers' losses; nobody reads the next-token loss, so it is not computed.
  out = model.apply({"params": params, "router": router}, rows["tokens"], rows["positions"], rows["segment_ids"],
                    targets=rows["targets"], mtp=False, replay=given, attention_mode=run_config.training.attention_mode)
  kernel = params["lm_head"]["kernel"].astype(run_config.model.compute_dtype)
  return token_logprobs(out.hidden, sharding.gathered(kernel, ("lm_head", "kernel")), rows["targets"],
                        chunk=run_config.model.loss_chunk_size, temperature=config.temperature, kept=rows.get("kept")), out


def loss_weights(run_config: RunConfig) -> dict[str, float]:
  """Weight of each loss."""
  return {"policy": 1.0, "balance": run_config.loss.balance_weight, "indexer": run_config.loss.indexer_weight}


def count_losses(run_config: RunConfig, rows: Rows) -> dict[str, jax.Array]:
  """How many terms each loss of the layers has in rows [B, S]; counts of the passes of a step add up."""
  places = {"balance": rows["segment_ids"] > 0,
            "indexer": sees_an_entry(rows["positions"], rows["segment_ids"], run_config.model.compress_rate(CSA))}
  return {name: x.sum().astype(jnp.float32) for name, x in places.items()}


def _add_pass(run_config: RunConfig, places: Any, state: PolicyState, sums: Sums, rows: Rows,
              counts: Mapping[str, jax.Array]) -> Sums:
  weights = loss_weights(run_config)

  def objective(params):
    logprobs, out = policy_logprobs(run_config, params, state.router, rows, replay=True)
    gain, found = grpo.objective(logprobs, rows, run_config.reinforcement)
    losses = {"policy": -gain, **{name: out.losses[name][0] / jnp.maximum(counts[name], 1) for name in LAYER_LOSSES}}
    return sum(weights[name] * value for name, value in losses.items()), (losses | found, out.routing["load"])

  (_, (values, load)), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
  grads = grads if places is None else jax.lax.with_sharding_constraint(grads, places.params)
  return jax.tree.map(jnp.add, sums, Sums(grads, values, load, (rows["segment_ids"] > 0).sum()))


def _update(run_config: RunConfig, mesh: Mesh | None, state: PolicyState,
            sums: Sums) -> tuple[PolicyState, dict[str, jax.Array]]:
  loss = sum(weight * sums.values[name] for name, weight in loss_weights(run_config).items())
  optimizer = optimizer_of(run_config, state.params, mesh)
  updates, opt_state = optimizer.update(sums.grads, state.opt_state, state.params)
  resting = lambda tree: {name: tree[name] for name in ("mtp",) if name in tree}
  params = optax.apply_updates(state.params, updates) | resting(state.params)
  learnt = {name: tree for name, tree in state.router.items() if name != "mtp"}
  router = update_router(run_config.model, learnt, {"layers": sums.load}, run_config.loss.bias_update_speed)
  new = state.replace(step=state.step + 1, params=params, router=router | resting(state.router), opt_state=opt_state)
  grad_norm = optax.tree.norm(sums.grads)
  finite = jnp.stack([jnp.isfinite(x).all() for x in (loss, grad_norm, *jax.tree.leaves(new.params))]).all()
  plain = lambda x: x.replace(key=None, reference=None)
  kept = jax.tree.map(lambda a, b: jax.lax.select(finite, a, b), plain(new), plain(state))
  rate = optim.make_schedule(run_config.optimizer, run_config.training.steps)(state.step)
  return kept.replace(key=state.key, reference=state.reference), {
    "loss": loss, **sums.values, "grad_norm": grad_norm, "learning_rate": rate, "finite": finite, "tokens": sums.tokens}


# ---- programs ------------------------------------------------------------------------------------------------------------
class Programs:
  """The jitted programs of a run.

  Args:
    run_config: the run.
    mesh: devices; None = the default device alone.

  Raises:
    ValueError: sizes that the mesh does not divide.
  """

  def __init__(self, run_config: RunConfig, mesh: Mesh | None = None) -> None:
    self._mesh = mesh
    shapes = abstract_policy(run_config, mesh)
    places = None if mesh is None else jax.tree.map(lambda leaf: leaf.sharding, shapes)
    everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    tokens = None if mesh is None else NamedSharding(mesh, sharding.spec(("batch", "sequence")))
    config, zero = run_config.model, jnp.zeros((), jnp.float32)
    names = ("policy", *LAYER_LOSSES, *grpo.METRICS)

    def zeros():
      load = jnp.zeros((config.num_hidden_layers, config.n_routed_experts), jnp.int32)
      grads = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes.params)
      return Sums(grads, dict.fromkeys(names, zero), load, jnp.int32(0))

    def jit(fn, out, donate=()):
      options = {"compiler_options": compiler_options(mesh)} | ({} if mesh is None else {"out_shardings": out})
      return sharding.OnMesh(jax.jit(fn, donate_argnums=donate, **options), mesh)

    sums = None if mesh is None else Sums(places.params, everywhere, everywhere, everywhere)
    score = lambda variables, rows, replay: policy_logprobs(run_config, variables["params"], variables["router"], rows,
                                                            replay=replay)[0]
    self.start = jit(zeros, sums)
    self.count = jit(lambda rows: count_losses(run_config, rows), everywhere)
    self._reference = jit(lambda variables, rows: score(variables, rows, False), tokens)
    self._policy = jit(lambda variables, rows: score(variables, rows, True), tokens)
    self._add = jit(lambda *args: _add_pass(run_config, places, *args), sums, donate=(1,))
    self._update = jit(lambda state, sums: _update(run_config, mesh, state, sums), (places, everywhere), donate=(0,))

  def put(self, rows: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Rows [B, S, ...] on the devices."""
    def place(name, x):
      if self._mesh is None:
        return None
      last = ("vocab",) if name == "kept" else (None,) * (x.ndim - 2)
      return NamedSharding(self._mesh, sharding.spec(("batch", "sequence", *last)))
    return {name: jax.device_put(x, place(name, x)) for name, x in rows.items()}

  def reference(self, variables: Any, rows: Rows) -> jax.Array:
    """Log-probabilities [B, S] of the rows' targets under other weights, which choose experts themselves."""
    return self._reference(variables, rows)

  def policy(self, variables: Any, rows: Rows) -> jax.Array:
    """Log-probabilities [B, S] of the rows' targets as training computes them, with the sampler's experts."""
    return self._policy(variables, rows)

  def add(self, state: PolicyState, sums: Sums, rows: Rows, counts: Mapping[str, Any]) -> Sums:
    """The sums, which are given up, with a pass added; `counts` are of all passes of the step, see `count_losses`."""
    return self._add(state, sums, rows, counts)

  def update(self, state: PolicyState, sums: Sums) -> tuple[PolicyState, dict[str, jax.Array]]:
    """(the state after the step, metrics); the state that came in is given up. The OLD state comes back, and
    metrics["finite"] is False, if loss, gradient norm or a new parameter is not finite."""
    return self._update(state, sums)
