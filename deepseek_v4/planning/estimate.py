"""What a train step takes, from shapes alone: to order meshes before any is compiled, and to drop those that cannot fit.

Memory is what the step holds at its fullest, in the forward and backward pass of one accumulation pass or in the update,
whichever is more; the compiler needs more (copies in other layouts, weights that it gathers ahead). Time is `bound.seconds`
of estimated work. Neither replaces a compiled plan.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Mapping

import jax

from deepseek_v4 import sharding
from deepseek_v4.analysis.count import parameters
from deepseek_v4.config import ModelConfig, RunConfig
from deepseek_v4.config_training import can_run_alone
from deepseek_v4.model.groups import group_layers
from deepseek_v4.model.two_levels import group_length, lone_length
from deepseek_v4.optim.in_place import BLOCK_BYTES
from deepseek_v4.planning import bound

# Forward passes that a step's matmuls cost, by policy: recomputing all of a layer is one more.
PASSES = {"none": 3.0, "mhc": 3.0, "block": 4.0, "offload": 4.0, "full": 5.0}
WIDTHS = {"bfloat16": 2, "float32": 4, "float64": 8}


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Of one device: bytes held at the fullest moment, work, least seconds by kind, and the share of the peak allowed."""

  bytes: float
  work: bound.Work
  seconds: Mapping[str, float]
  utilization: float


def estimate(run_config: RunConfig, mesh: jax.sharding.Mesh, rates: bound.Rates, held: Mapping[str, int]) -> Estimate:
  """The estimate for a run without stages.

  Args:
    held: what `state.by_kind` says of its state on the mesh.

  Raises:
    ValueError: sizes that the mesh does not divide.
  """
  sharding.check_divides(run_config, mesh)
  work = _work(run_config, mesh, held)
  seconds = bound.seconds(work, rates)
  flops = bound.step_flops(run_config)
  return Estimate(_bytes(run_config, mesh, held), work, seconds, bound.utilization(flops, mesh.size, rates, seconds["step"]))


def tokens_of(run_config: RunConfig, mesh: jax.sharding.Mesh) -> int:
  """Tokens of one device in a pass; devices of the axis tensor share theirs."""
  data = run_config.data
  return data.batch_size // data.accumulation * data.sequence_length * mesh.shape["tensor"] // mesh.size


# ---- memory -----------------------------------------------------------------------------------------------------------
def kept_streams(run_config: RunConfig) -> int:
  """How many layers' streams exist at a time in the backward pass."""
  model = run_config.model
  if model.remat == "offload":
    return 2
  if model.remat != "full":
    return model.num_hidden_layers + 1
  groups = group_layers(model)
  lone = groups.num_layers - groups.repeats * groups.unit
  lone = math.ceil(lone / lone_length(lone)) + lone_length(lone) if lone else 0
  if not groups.repeats:
    return lone + 1
  length = group_length(groups.repeats, groups.unit)
  return lone + math.ceil(groups.repeats / length) + length * groups.unit


def _bytes(run_config: RunConfig, mesh: jax.sharding.Mesh, held: Mapping[str, int]) -> float:
  """The state; in a pass the gradients so far, those of the pass, streams and one layer's arrays; in the update, which
  writes in the place of the old state, the gradients and what Newton-Schulz holds of a block of matrices: these and their
  successors in float32, operands, products, and what is exchanged, six times a block as compiled."""
  model, tokens = run_config.model, tokens_of(run_config, mesh)
  width = WIDTHS[model.compute_dtype]
  streams = model.hc_mult * model.hidden_size * width * tokens
  heads = model.num_attention_heads * model.head_dim * width * tokens // mesh.shape["tensor"]
  rows = 1.25 * model.num_experts_per_tok * (model.hidden_size + 3 * model.moe_intermediate_size) * width * tokens
  expert = 3 * model.hidden_size * model.moe_intermediate_size * model.n_routed_experts // _places(model, mesh)[0]
  layer = 4 * heads + rows + 4 * streams + (width + 4) * expert // mesh.shape["tensor"]
  gradients = held["parameters"] * (1 if run_config.data.accumulation == 1 else 2)
  arguments = sum(held.values())
  block = min(BLOCK_BYTES, held["parameters"]) if run_config.optimizer.matrix_owner == "muon" else 0
  return arguments + max(gradients + kept_streams(run_config) * streams + layer, held["parameters"] + 6 * block)


def _places(model: ModelConfig, mesh: jax.sharding.Mesh) -> tuple[int, int]:
  """Over how many places a layer's experts are split, and over how many devices each place's matrices."""
  places = math.prod(mesh.shape[axis] for axis in sharding.split_over("expert", model.n_routed_experts, mesh.shape))
  return places, math.prod(mesh.shape[axis] for axis in sharding.MEMORY_AXES) // places


# ---- time -------------------------------------------------------------------------------------------------------------
def _work(run_config: RunConfig, mesh: jax.sharding.Mesh, held: Mapping[str, int]) -> bound.Work:
  """Matmuls as the model's, with what the policy computes again; weights and gradients that travel in every pass, and sums
  of what the axis tensor splits; rows that travel to their experts and back, and to the parts of the head; HBM for weights,
  gradients and a few dozen reads and writes of a layer's streams."""
  model, data, shape = run_config.model, run_config.data, mesh.shape
  forward = bound.forward_flops(model, data.sequence_length, run_config.training.attention_mode)
  tokens, passes, width = tokens_of(run_config, mesh), data.accumulation, WIDTHS[model.compute_dtype]
  share = PASSES[model.remat] * tokens * passes / shape["tensor"]
  count = parameters(model)
  places, gathered = _places(model, mesh)
  experts = (count.main["routed_experts"] + count.mtp.get("routed_experts", 0)) / (places * shape["tensor"])
  dense = count.total + count.total_mtp - experts * places * shape["tensor"]
  missing = lambda *axes: 1 - 1 / math.prod(shape[axis] for axis in axes)
  # Embedding and head, whose parts on fsdp stay where they are if it divides the vocabulary.
  table = model.vocab_size * model.hidden_size
  heads_parts = shape["fsdp"] if "fsdp" in sharding.split_over("head_vocab", model.vocab_size, shape) else 1
  whole = experts * (1 - 1 / gathered) + ((dense - 2 * table) * missing(*sharding.MEMORY_AXES) + missing("expert", "context")
                                          * table * (1 / shape["fsdp"] + 1 / heads_parts)) / shape["tensor"]
  rounded = 0.5 if run_config.training.gradient_reduction == "bfloat16" else 1
  copies = held["parameters"] * missing(*sharding.COPY_AXES) * 2 * rounded * (1 if can_run_alone(shape) else passes)
  weights = passes * whole * (2 * width + 4) + copies  # gathered twice, gradients reduced once
  rows = 1.25 * model.num_experts_per_tok * model.hidden_size * width * tokens * (1 - 1 / places)
  layers = model.num_hidden_layers + model.num_nextn_predict_layers
  exchanged = (PASSES[model.remat] + 1) * 2 * rows * layers * passes / 2
  # Hidden states come from all of fsdp to each part of the head, their gradients in float32 back.
  heads = 1 + model.num_nextn_predict_layers
  exchanged += heads * (heads_parts - 1) * tokens * model.hidden_size * (width + 4) * passes
  streams = model.hc_mult * model.hidden_size * width * tokens
  moved = passes * (2 * width * PASSES[model.remat] * (experts + dense / shape["tensor"])
                    + 12 * PASSES[model.remat] * streams * layers + 3 * held["parameters"]) + 8 * sum(held.values())
  # Attention's and the experts' sums over the axis tensor, forward and for the gradients of their inputs.
  summed = PASSES[model.remat] * 2 * 2 * model.hidden_size * width * tokens * missing("tensor") * layers * passes
  return bound.Work(share * sum(forward.values()), 0.0, 0.0, moved, weights + summed, exchanged)
