"""One optimizer step of reinforcement learning: passes over packed samples, their gradients added up, then one update.

The loss is -J of `grpo.py` (V3.2 3.1; report 5.1.1); passes are programs of their own (`passes.py`), so that a minibatch
of any number of rows compiles nothing.

Axis letters: B rows   S sequence   V vocabulary   L layers   E experts   k experts per token
"""

from __future__ import annotations

from typing import Any, Mapping

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from deepseek_v4 import sharding
from deepseek_v4.config import ReinforcementConfig, RunConfig
from deepseek_v4.model.replay import Replay
from deepseek_v4.model.transformer import DeepseekV4
from deepseek_v4.posttraining import grpo
from deepseek_v4.posttraining.logprobs import token_logprobs
from deepseek_v4.posttraining.passes import (
  LAYER_LOSSES,
  Frame,
  Rows,
  Sums,
  add_pass,
  count_layer_losses,
  loss_weights,
  means,
)
from deepseek_v4.training.state import TrainState, abstract_state


@flax.struct.dataclass
class PolicyState(TrainState):
  """A TrainState with the weights that the KL is measured from: {"params", "router"}; None without a KL."""

  reference: Any = None


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
  """Nats [B, S], at least float32, of the rows' targets under the distribution that they were drawn from, and the model's
  output.

  Args:
    rows: of `problems.rows_of`, dtypes as there.
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


def _add_pass(run_config: RunConfig, places: Any, state: PolicyState, sums: Sums, rows: Rows,
              counts: Mapping[str, jax.Array]) -> Sums:
  def values_of(params: Any) -> Any:
    logprobs, out = policy_logprobs(run_config, params, state.router, rows, replay=True)
    gain, found = grpo.objective(logprobs, rows, run_config.reinforcement)
    layers = means({name: out.losses[name][0] for name in LAYER_LOSSES}, counts)
    return {"policy": -gain, **layers, **found}, out.routing["load"], None

  return add_pass(loss_weights(run_config, "policy"), places, state, sums, rows["segment_ids"], values_of)[0]


# ---- programs ------------------------------------------------------------------------------------------------------------
class Programs(Frame):
  """The jitted programs of a run.

  Args:
    run_config: the run.
    mesh: devices; None = the default device alone.

  Raises:
    ValueError: sizes that the mesh does not divide.
  """

  def __init__(self, run_config: RunConfig, mesh: Mesh | None = None) -> None:
    super().__init__(run_config, mesh, abstract_policy(run_config, mesh), loss_weights(run_config, "policy"),
                     ("policy", *LAYER_LOSSES, *grpo.METRICS))
    tokens = None if mesh is None else NamedSharding(mesh, sharding.spec(("batch", "sequence")))
    score = lambda variables, rows, replay: policy_logprobs(run_config, variables["params"], variables["router"], rows,
                                                            replay=replay)[0]
    self.count = self.jit(lambda rows: count_layer_losses(run_config, rows), self.everywhere)
    self._reference = self.jit(lambda variables, rows: score(variables, rows, False), tokens)
    self._policy = self.jit(lambda variables, rows: score(variables, rows, True), tokens)
    self._add = self.jit(lambda *args: _add_pass(run_config, self.places, *args), self.sums, donate=(1,))

  def put_rows(self, rows: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Rows [B, S, ...] on the devices, dtypes kept."""
    last = lambda name, x: ("vocab",) if name == "kept" else (None,) * (x.ndim - 2)
    return {name: self.put(x, ("batch", "sequence", *last(name, x))) for name, x in rows.items()}

  def reference(self, variables: Any, rows: Rows) -> jax.Array:
    """Log-probabilities [B, S], at least float32, of the rows' targets under other weights, which choose experts
    themselves."""
    return self._reference(variables, rows)

  def policy(self, variables: Any, rows: Rows) -> jax.Array:
    """Log-probabilities [B, S], at least float32, of the rows' targets as training computes them, with the sampler's
    experts."""
    return self._policy(variables, rows)

  def add(self, state: PolicyState, sums: Sums, rows: Rows, counts: Mapping[str, Any]) -> Sums:
    """The sums, which are given up, with a pass added.

    Args:
      rows: of the pass, dtypes as in `problems.rows_of`.
      counts: of all passes of the step, float32 scalars; see `count_layer_losses`.
    """
    return self._add(state, sums, rows, counts)
