"""One optimizer step of a distillation: passes of one teacher each, their gradients added up, then one update.

The loss is the KL to the teacher whose sample it is (report 5.1.2); passes are programs of their own (`passes.py`), since
between them another teacher's head takes the place of the one before.

Axis letters: B rows   S sequence   D, E hidden sizes of student and teacher   V vocabulary
"""

from __future__ import annotations

from typing import Any, Mapping

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from deepseek_v4 import sharding
from deepseek_v4.config import RunConfig
from deepseek_v4.model.losses import next_token_targets
from deepseek_v4.model.transformer import DeepseekV4
from deepseek_v4.posttraining.distillation import reverse_kl_sum
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

ROWS = ("tokens", "segment_ids", "positions", "loss_mask")


@flax.struct.dataclass
class Pass:
  """One pass's rows and what their teacher says of them.

  Attributes:
    rows: int32 [B, S] each: "tokens", "segment_ids", "positions", "loss_mask" (1 on tokens that the student drew).
    hidden: [B, S, E], the teacher's, what its head multiplies, floating.
    head: [E, V] of the teacher, floating, with as many columns as the student's.
    weight: float32 [], of this teacher in the loss.
    vocabulary: ids that both have, the first of them.
  """

  rows: dict[str, jax.Array]
  hidden: jax.Array
  head: jax.Array
  weight: jax.Array
  vocabulary: int = flax.struct.field(pytree_node=False)


def count_losses(run_config: RunConfig, rows: Rows) -> dict[str, jax.Array]:
  """How many terms each loss has in rows, int32 [B, S], as float32 scalars; counts of the passes of a step add up."""
  return {"distillation": (_targets(rows) >= 0).sum().astype(jnp.float32), **count_layer_losses(run_config, rows)}


def _targets(rows: Rows) -> jax.Array:
  return next_token_targets(rows["tokens"], rows["segment_ids"], rows["loss_mask"])


def pass_losses(run_config: RunConfig, params: Any, router: Any, part: Pass) -> tuple[dict[str, jax.Array], jax.Array]:
  """({loss: sum over the pass, without weights}, scalars at least float32; experts' load, int32 [L, E])."""
  model, rows = DeepseekV4(run_config.model, run_config.training.kernels), part.rows
  targets = _targets(rows)
  # Targets ask for the layers' losses; nobody reads the next-token loss, so it is not computed.
  out = model.apply({"params": params, "router": router}, rows["tokens"], rows["positions"], rows["segment_ids"],
                    targets=targets, mtp=False, attention_mode=run_config.training.attention_mode)
  path = ("lm_head", "kernel")
  head = sharding.gathered(params["lm_head"]["kernel"].astype(run_config.model.compute_dtype), path)
  kl, _ = reverse_kl_sum(out.hidden, head, part.hidden, part.head, targets >= 0, chunk=run_config.model.loss_chunk_size,
                         vocabulary=part.vocabulary)
  return {"distillation": kl, **{name: out.losses[name][0] for name in LAYER_LOSSES}}, out.routing["load"]


def _add_pass(run_config: RunConfig, places: Any, state: TrainState, sums: Sums, part: Pass,
              counts: Mapping[str, jax.Array]) -> tuple[Sums, jax.Array]:
  def values_of(params: Any) -> Any:
    found, load = pass_losses(run_config, params, state.router, part)
    values = means(found, counts)
    return values | {"distillation": part.weight * values["distillation"]}, load, found["distillation"]

  return add_pass(loss_weights(run_config, "distillation"), places, state, sums, part.rows["segment_ids"], values_of)


# ---- programs ------------------------------------------------------------------------------------------------------------
class Steps(Frame):
  """The jitted programs of a run's steps.

  Args:
    run_config: the run.
    mesh: devices; None = the default device alone.

  Raises:
    ValueError: sizes that the mesh does not divide.
  """

  def __init__(self, run_config: RunConfig, mesh: Mesh | None = None) -> None:
    super().__init__(run_config, mesh, abstract_state(run_config, mesh), loss_weights(run_config, "distillation"),
                     ("distillation", *LAYER_LOSSES))
    self.count = self.jit(lambda rows: count_losses(run_config, rows), self.everywhere)
    self._add = self.jit(lambda *args: _add_pass(run_config, self.places, *args), (self.sums, self.everywhere), donate=(1,))

  def add(self, state: TrainState, sums: Sums, part: Pass, counts: Mapping[str, Any]) -> tuple[Sums, jax.Array]:
    """(the sums, which are given up, with a pass added; the KL sum of the pass in nats, at least float32, without weight).

    Args:
      counts: float32 scalars, of each loss over all passes of the step, see `count_losses`.
    """
    return self._add(state, sums, part, counts)

  # ---- arrays of a pass, where they belong ---------------------------------------------------------------------------
  def put_rows(self, rows: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Rows, int32 [B, S] by name, on the devices."""
    return {name: self.put(rows[name], ("batch", "sequence")) for name in ROWS}

  def put_hidden(self, hidden: Any) -> jax.Array:
    """Hidden states [B, S, E], floating, dtype kept, on the devices."""
    return self.put(hidden, ("batch", "sequence", None))

  def put_head(self, head: Any) -> jax.Array:
    """A teacher's head [E, V], floating, dtype kept, on the devices, split along V."""
    return self.put(head, (None, "vocab"))
