"""One optimizer step as a pure function: losses over the whole global batch, accumulation, Muon, router bias, finiteness.

Axis letters: A accumulation   B rows   S sequence   L layers   E experts   k experts per token
"""

from __future__ import annotations

import functools
from typing import Any, Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deepseek_v4 import optim, sharding
from deepseek_v4.config import CSA, LossConfig, ModelConfig, RunConfig
from deepseek_v4.model.compression import sees_an_entry
from deepseek_v4.model.context import check_documents
from deepseek_v4.model.groups import group_layers, split_layers
from deepseek_v4.model.losses import mtp_targets, next_token_targets
from deepseek_v4.model.replay import Replay
from deepseek_v4.model.transformer import DeepseekV4
from deepseek_v4.training import copies, stages, trainable
from deepseek_v4.training.state import TrainState, abstract_state

Batch = Mapping[str, jax.Array]
ARRAYS = ("tokens", "segment_ids", "positions", "loss_mask")  # what every batch holds

# XLA's CPU scheduler otherwise starts recomputation at once, and remat then saves no memory. On a TPU rows of routed experts
# travel beside other work, and SparseCores gather weights and add up gradients beside the matmuls, as a TPU7x's do anyway.
# (The TensorCores of a v5p would make sums of all numbers of both over a whole slice, twice as many bytes, and wait. They
# could gather inside of fusions, but newer compilers refuse that there: it may hang, or give other numbers.)
COMPILER_OPTIONS: dict[str, dict[str, Any]] = {
  "cpu": {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"},
  "tpu": dict.fromkeys(("xla_tpu_enable_async_ragged_all_to_all", "xla_tpu_prefer_async_allgather_to_allreduce",
                        "xla_tpu_enable_sparse_core_collective_offload_all_gather",
                        "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter",
                        "xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter"), True)}


def compiler_options(mesh: Mesh | None) -> dict[str, Any]:
  """What the mesh's devices (None: the default ones) want for programs with recomputation."""
  return COMPILER_OPTIONS.get(sharding.platform_of(mesh), {})


def check_batch(batch: Mapping[str, jax.Array | np.ndarray]) -> None:
  """Refuses a batch that is not as `make_train_step` says. Of its numbers the documents' are looked at, where they are
  NumPy's: to look at a device's would mean to wait for it.

  Raises:
    ValueError: arrays that are missing, or have another shape or dtype; documents whose ids decrease or are none.
  """
  if missing := [name for name in ARRAYS if name not in batch]:
    raise ValueError(f"batch: {', '.join(missing)} not there: expected {', '.join(ARRAYS)}")
  shape = batch["tokens"].shape
  for name in ARRAYS:
    x = batch[name]
    if len(shape) != 3 or x.shape != shape or not jnp.issubdtype(x.dtype, jnp.integer):
      wanted = f" = {tuple(shape)}, as tokens have" if len(shape) == 3 else ""
      raise ValueError(f"batch: {name} = {x.dtype}{tuple(x.shape)}: expected integers [accumulation, batch, sequence]"
                       f"{wanted}")
  if isinstance(batch["segment_ids"], np.ndarray):
    check_documents("batch: segment_ids", batch["segment_ids"])


# ---- losses -----------------------------------------------------------------------------------------------------------
def loss_counts(config: ModelConfig, batch: Batch) -> dict[str, jax.Array]:
  """How many terms each loss has in the whole batch, int32 [A, B, S], as float32 scalars, at least 1; known before any pass,
  so accumulation changes no mean."""
  def of_pass(rows: Batch) -> dict[str, jax.Array]:
    segment_ids, targets = rows["segment_ids"], next_token_targets(rows["tokens"], rows["segment_ids"], rows["loss_mask"])
    counted = {"next_token": targets >= 0, "mtp": mtp_targets(targets, segment_ids) >= 0, "balance": segment_ids > 0,
               "indexer": sees_an_entry(rows["positions"], segment_ids, config.compress_rate(CSA))}
    return {name: x.sum() for name, x in counted.items()}
  counts = jax.lax.map(of_pass, {name: batch[name] for name in ARRAYS})  # one pass at a time: merged, rows would travel
  return {name: jnp.maximum(x.sum(), 1).astype(jnp.float32) for name, x in counts.items()}


def loss_weights(loss: LossConfig, decaying: jax.Array | bool, trains: str = "all") -> dict[str, Any]:
  """Weight of each loss that counts, a number or a float32 scalar; the MTP weight drops where the learning rate starts to
  decay, which `decaying`, a bool scalar, says (report 4.2.2).

  Where the indexer trains alone, its own loss is all that counts, and where it does not train, all but that.
  """
  if trains == "indexer":
    return {"indexer": 1.0}
  weights = {"next_token": 1.0, "mtp": jnp.where(decaying, loss.mtp_weight_final, loss.mtp_weight),
             "balance": loss.balance_weight, "indexer": loss.indexer_weight}
  return weights if trains == "all" else {name: w for name, w in weights.items() if name != "indexer"}


def runs_mtp(run_config: RunConfig) -> bool:
  """Whether a pass runs the prediction block: if there is one and it trains."""
  return run_config.model.num_nextn_predict_layers == 1 and run_config.training.trainable != "indexer"


def _micro_losses(run_config: RunConfig, params: Any, router: Any, rows: Batch):
  """Loss sums of one pass over rows [B, S], and the routing."""
  model = DeepseekV4(run_config.model, run_config.training.kernels)
  targets = next_token_targets(rows["tokens"], rows["segment_ids"], rows["loss_mask"])
  experts_BSLk = rows.get("experts")
  replay = Replay(None if experts_BSLk is None else jnp.moveaxis(experts_BSLk, 2, 0), mtp_experts=rows.get("mtp_experts"))
  out = model.apply({"params": params, "router": router}, rows["tokens"], rows["positions"], rows["segment_ids"],
                    targets=targets, replay=replay, mtp=runs_mtp(run_config),
                    attention_mode=run_config.training.attention_mode)
  load = {"layers": out.routing["load"], **({"mtp": out.routing["mtp_load"]} if "mtp_load" in out.routing else {})}
  return {name: total for name, (total, _) in out.losses.items()}, load


def _accumulate(run_config: RunConfig, state: TrainState, batch: Batch, places: Any):
  """Gradients (None for frozen leaves), mean losses and expert loads of the whole batch, one pass after another over A.

  `places`: PartitionSpecs of the gradients; None without a mesh.
  """
  counts = loss_counts(run_config.model, batch)
  decaying = state.step >= optim.decay_start(run_config.optimizer, run_config.training.steps)
  what = run_config.training.trainable
  weights = loss_weights(run_config.loss, decaying, what)
  shown = {"next_token", *weights}  # what a frozen model says stays in the log

  def total_of(means, weights):
    return sum(weights[name] * mean for name, mean in means.items() if name in weights)

  def objective(trained, given, rows):
    params = trainable.with_frozen(trained, given["params"])
    sums, load = _micro_losses(run_config, params, given["router"], rows)
    means = {name: total / given["counts"][name] for name, total in sums.items() if name in shown}
    return total_of(means, given["weights"]), (means, load)

  def one(given, rows):
    trained = trainable.trained_part(what, given["params"])
    (_, (means, load)), grads = jax.value_and_grad(objective, has_aux=True)(trained, given, rows)
    grads = grads if places is None else jax.lax.with_sharding_constraint(grads, places)
    return grads, (means, load)

  def passes(given, batch):
    if batch["tokens"].shape[0] == 1:
      return one(given, {name: x[0] for name, x in batch.items()})
    shapes = jax.eval_shape(one, given, {name: x[0] for name, x in batch.items()})
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def add(total, rows):
      # Else what is made of the weights alone, casts and whole matrices, would be made before the loop and stay through it.
      of_pass = jax.lax.optimization_barrier((given, rows))
      return jax.tree.map(jnp.add, total, one(*of_pass)), None
    return jax.lax.scan(add, zeros, batch)[0]

  given = {"params": state.params, "router": state.router, "counts": counts,
           "weights": jax.tree.map(jnp.asarray, weights)}
  grads, (means, load) = copies.over_copies(passes, given, dict(batch), places, run_config.training.gradient_reduction,
                                            jax.random.fold_in(state.key, state.step))
  return grads, means, total_of(means, weights), load


# ---- the router's bias ------------------------------------------------------------------------------------------------
def update_router(config: ModelConfig, router: Any, load: Mapping[str, jax.Array], speed: float) -> Any:
  """Moves each learned router's bias by `speed` towards balance: b_e += speed * sign(mean load - load_e) (V3 2.1.2).

  Args:
    router: the collection's tree; biases are float32.
    load: tokens of each expert, int32 {"layers": [L, E], "mtp": [E] where there is one}.
  """
  groups = group_layers(config)

  def moved(tree, load_E):
    if "bias" not in tree["moe"]["router"]:
      return tree
    load_E = load_E.astype(jnp.float32)
    bias = tree["moe"]["router"]["bias"]
    return {"moe": {"router": {"bias": bias + speed * jnp.sign(load_E.mean(-1, keepdims=True) - load_E)}}}

  layers = {}
  for key, tree in router["layers"].items():
    numbers = groups.layers_of(key)
    layers[key] = moved(tree, load["layers"][jnp.array(numbers)] if groups.scanned(key) else load["layers"][numbers[0]])
  new = {"layers": layers}
  if "mtp" in router:
    new["mtp"] = {"block": moved(router["mtp"]["block"], load["mtp"])}
  return new


def _max_violation(load: Mapping[str, jax.Array]) -> jax.Array:
  """Largest over layers of (most loaded expert / mean - 1); 0 = balanced."""
  load_LE = load["layers"].astype(jnp.float32)
  return (load_LE.max(-1) / jnp.maximum(load_LE.mean(-1), 1) - 1).max()


# ---- steps ------------------------------------------------------------------------------------------------------------
def _updated(run_config: RunConfig, mesh: Mesh | None, state: TrainState, grads: Any, load: Any, norm: jax.Array,
             keep: Callable[[jax.Array, jax.Array], jax.Array]) -> TrainState:
  """The state after an update, each number by `keep` of it and the old one."""
  what, router = run_config.training.trainable, state.router
  trained = trainable.trained_part(what, state.params)
  shardings = None if mesh is None else sharding.parameter_shardings(trained, mesh)
  trained, opt_state = optim.update_in_place(run_config.optimizer, grads, state.opt_state, trained, norm=norm, keep=keep,
                                             steps=run_config.training.steps, shardings=shardings)
  if what != "indexer":
    new = update_router(run_config.model, router, load, run_config.loss.bias_update_speed)
    router = jax.tree.map(keep, new, router)
  return TrainState(keep(state.step + 1, state.step), trainable.with_frozen(trained, state.params), router, opt_state,
                    state.key)


def train_step(run_config: RunConfig, mesh: Mesh | None, places: Any, state: TrainState,
               batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
  """The step as a pure function of a state and int32 arrays [A, B, S]; see `make_train_step`, also for the metrics' dtypes.

  Args:
    places: PartitionSpecs of the gradients; None without a mesh.
  """
  check_batch(batch)
  grads, means, loss, load = _accumulate(run_config, state, batch, places)
  grad_norm = optax.tree.norm(grads)
  trained = trainable.trained_part(run_config.training.trainable, state.params)
  finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & optim.stays_finite(
    run_config.optimizer, grads, state.opt_state, trained, norm=grad_norm, steps=run_config.training.steps)
  # Behind a barrier, so that the update, which may begin now, shares no array of the parameters' size with the question.
  norm, decided = jax.lax.optimization_barrier((grad_norm, finite))
  kept = _updated(run_config, mesh, state, grads, load, norm, lambda a, b: jax.lax.select(decided, a, b))
  rate = optim.make_schedule(run_config.optimizer, run_config.training.steps)(state.step)
  metrics = {"loss": loss, **means, "grad_norm": grad_norm, "learning_rate": rate, "finite": finite,
             "tokens": (batch["segment_ids"] > 0).sum(), "max_load_violation": _max_violation(load)}
  return kept, metrics | (trainable.norms(grads) if run_config.training.watch_gradients else {})


def _places_of(run_config: RunConfig, mesh: Mesh | None) -> Any:
  """The shardings of the state on a mesh, as a TrainState; None without one."""
  return None if mesh is None else jax.tree.map(lambda leaf: leaf.sharding, abstract_state(run_config, mesh))


def _gradient_places(run_config: RunConfig, places: Any) -> Any:
  """The PartitionSpecs of the gradients, from `_places_of`; None without a mesh."""
  if places is None:
    return None
  return jax.tree.map(lambda place: place.spec, trainable.trained_part(run_config.training.trainable, places.params))


def _jit_on(mesh: Mesh | None, places: Any, fn: Callable, *, is_step: bool = False) -> sharding.OnMesh:
  """Jits fn(state, batch) with the state's and the batch's shardings in; a step consumes the state and returns one alike."""
  options: dict[str, Any] = {"compiler_options": compiler_options(mesh), "donate_argnums": (0,) if is_step else ()}
  if mesh is not None:
    everywhere = NamedSharding(mesh, PartitionSpec())
    options["in_shardings"] = (places, sharding.batch_sharding(mesh))
    options["out_shardings"] = (places, everywhere) if is_step else everywhere
  return sharding.OnMesh(jax.jit(fn, **options), mesh, lambda state, batch: check_batch(batch))


def make_train_step(run_config: RunConfig, mesh: Mesh | None = None) -> sharding.OnMesh:
  """The jitted, donated step (state, batch) -> (state, metrics) of a run.

  The batch holds int32 [A, B, S] arrays "tokens", "segment_ids", "positions", "loss_mask"; A passes are accumulated. With
  "experts" int32 [A, B, S, L, k] of the layers and "mtp_experts" [A, B, S, k] of the prediction block, or either of them,
  these are taken instead of the routers' own choices (see `model/replay.py`).

  If loss, gradient norm or a new parameter is not finite, the OLD state comes back and metrics["finite"] is False.

  Args:
    run_config: the run. Of one with stages it is the step of the first, with the batch that it ends with; those of the
      others are made of `stages.of_stage` or, while a batch grows, of `stages.at(...).run_config`.
    mesh: devices; None = the default device alone.

  Returns:
    A callable, also with `.lower(state, batch)`. Metrics are scalars: "loss" (the weighted sum), the mean of each loss by
    name (nats), "grad_norm" before clipping, "learning_rate" and "max_load_violation" in float32, "tokens" int32, "finite",
    and with `training.watch_gradients` (so in every stage) the norm of each group of parameters, "grad_norm/<group>".

  Raises:
    ValueError: sizes that the mesh does not divide. The callable: a batch that `check_batch` refuses.
  """
  run_config = stages.of_stage(run_config)
  places = _places_of(run_config, mesh)
  step = functools.partial(train_step, run_config, mesh, _gradient_places(run_config, places))
  return _jit_on(mesh, places, step, is_step=True)


def make_eval_step(run_config: RunConfig, mesh: Mesh | None = None) -> sharding.OnMesh:
  """The jitted (state, batch) -> {"next_token_sum", "next_token_count"}, nats, over all rows of the batch.

  Of a run with stages it scores as the first of them attends; see `make_train_step`.
  """
  run_config = stages.of_stage(run_config)
  model = DeepseekV4(run_config.model, run_config.training.kernels)

  def score(state: TrainState, batch: Batch) -> dict[str, jax.Array]:
    def one(rows):
      targets = next_token_targets(rows["tokens"], rows["segment_ids"], rows["loss_mask"])
      out = model.apply({"params": state.params, "router": state.router}, rows["tokens"], rows["positions"],
                        rows["segment_ids"], targets=targets, mtp=False, attention_mode=run_config.training.attention_mode)
      return out.losses["next_token"]
    total, count = jax.lax.map(one, dict(batch))
    return {"next_token_sum": total.sum(), "next_token_count": count.sum()}

  return _jit_on(mesh, _places_of(run_config, mesh), score)


# Parameters in the order in which a forward pass meets them, level by level of the tree; gradients come the other way.
_FORWARD = ("embed", "layers", "embed_norm", "hidden_norm", "embed_proj", "hidden_proj", "block", "attn_hc", "attn_norm",
            "attention", "q_a", "q_a_norm", "q_b", "kv", "kv_norm", "compressor", "indexer", "sink", "o_a", "o_b", "ffn_hc",
            "ffn_norm", "moe", "router", "experts", "shared", "hc_head", "final_norm", "lm_head", "mtp")


def _first_broken(flags: Mapping[str, Any], backward: bool) -> str | None:
  """Name of the first leaf that is False, a layer as layers/NN, in the order of a forward or of a backward pass."""
  broken = [sharding.path_names(path) for path, finite in jax.tree_util.tree_leaves_with_path(flags) if not finite]
  if not broken:
    return None
  place = lambda names: [(_FORWARD.index(n) if n in _FORWARD else 0, int(n) if n.isdigit() else 0) for n in names]
  first = (max if backward else min)(broken, key=place)
  return "/".join(f"{int(n):02d}" if n.isdigit() else n for n in first)


def find_non_finite(run_config: RunConfig, mesh: Mesh | None = None) -> Callable[[TrainState, Batch], str | None]:
  """A second, undonated pass that names the first tensor that is not finite; `run_config` and the batch, with its dtypes,
  as in `make_train_step`.

  Returns:
    (state, batch) -> a name such as "gradient layers/03/attention/q_b", or None. Looked at in this order: parameters,
    losses, gradients (from the loss backwards, since all gradients behind a broken one are broken too), their norm, updated
    parameters.
  """
  run_config = stages.of_stage(run_config)
  groups = group_layers(run_config.model)
  places = _places_of(run_config, mesh)
  of_gradients = _gradient_places(run_config, places)

  def flags(state: TrainState, batch: Batch) -> dict[str, Any]:
    grads, means, _, load = _accumulate(run_config, state, batch, of_gradients)
    new = _updated(run_config, mesh, state, grads, load, optax.tree.norm(grads), lambda new, old: new)
    grads = trainable.with_frozen(grads, jax.tree.map(jnp.zeros_like, state.params))
    ok = lambda tree: jax.tree.map(lambda x: jnp.isfinite(x).all(), {
        **tree, "layers": dict(enumerate(split_layers(tree["layers"], groups)))})
    norm = {"over all parameters": jnp.isfinite(optax.tree.norm(grads))}
    return {"parameter": ok(state.params), "loss": jax.tree.map(jnp.isfinite, means), "gradient": ok(grads),
            "gradient norm": norm, "updated parameter": ok(new.params)}

  jitted = _jit_on(mesh, places, flags)

  def find(state: TrainState, batch: Batch) -> str | None:
    found = jax.device_get(jitted(state, batch))
    for kind in ("parameter", "loss", "gradient", "gradient norm", "updated parameter"):
      name = _first_broken(found[kind], backward=kind == "gradient")
      if name is not None:
        return f"{kind} {name}"
    return None

  return find
