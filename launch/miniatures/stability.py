"""What keeps V4's training stable: a way back after a spike (report 4.2.3), and streams that cannot grow (report 2.2).

First a small V4 whose learning rate rises until the loss spikes, and falls again. With `anomalies.policy = "anticipate"` the
run goes back to its newest checkpoint and on with experts that older parameters choose; beside it the same run which only
writes the spike down. (With "repeat" the spike would come again, bit for bit: all computing is deterministic.)

Then 30 layers, so 60 sublayers, whose residual streams are mixed by mHC's doubly stochastic matrices, and beside them by
the free matrices that hyper-connections had before. The second is no option of the model: for this one control the
projection (Sinkhorn's iterations) is left out of the reference implementation, which both then train with.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import sysconfig
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping
from unittest import mock

import jax
import jax.numpy as jnp

from deepseek_v4.analysis import gains, plots_stability
from deepseek_v4.checkpoint.store import restore_variables
from deepseek_v4.config import (
  CSA,
  HASH,
  HCA,
  LEARNED,
  SLIDING,
  AnomalyConfig,
  DataConfig,
  ModelConfig,
  OptimizerConfig,
  RunConfig,
  TrainingConfig,
)
from deepseek_v4.model.transformer import DeepseekV4
from deepseek_v4.training import feed, loop, metrics
from launch.miniatures import Result, runs
from pallas_kernels.hyper_connections import reference

DESCRIPTION = "rollback and anticipatory routing after a spike; mHC against free hyper-connections at 60 sublayers"
PICTURE = "stability.png"
POLICIES = ("anticipate", "log")
MIXINGS = ("mHC", "free")
LAYERS = 30
LAST = 20  # steps at the end of a run whose mean loss stands for it
FORWARD_GOAL, BACKWARD_GOAL, CONTROL = 1e-4, 1.7, 10.0
TEXT = DataConfig(source="text", path=str(Path(sysconfig.get_paths()["stdlib"]) / "*.py"), sequence_length=128, batch_size=8,
                  held_out_percent=1)
SMALL = ModelConfig(
  vocab_size=320, hidden_size=64, num_hidden_layers=3, layer_types=(SLIDING, CSA, HCA),
  mlp_layer_types=(HASH, LEARNED, LEARNED), csa_compress_rate=4, hca_compress_rate=16, num_attention_heads=4, head_dim=16,
  qk_rope_head_dim=8, q_lora_rank=32, o_groups=2, o_lora_rank=32, sliding_window=32, index_n_heads=2, index_head_dim=16,
  index_topk=16, n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, rope_scaling=None,
  max_position_embeddings=1024, num_nextn_predict_layers=0, pad_token_id=2, init_std=0.02)

Say = Callable[[str], None]
Lines = list[dict[str, Any]]


def run(workdir: Path, seeds: int, say: Say) -> Result:
  """Trains and measures; see `launch.miniatures`."""
  jax.config.update("jax_compilation_cache_dir", str(workdir / "compiled"))  # seeds and policies share their programs
  rows, spiking, mixing = [], [], []
  for seed in range(seeds):
    folder = workdir / f"seed{seed}"
    spiking.append({policy: trained(spiking_run(policy, seed), folder / policy, say) for policy in POLICIES})
    mixing.append({kind: mixed(kind, seed, folder / f"{kind.lower()}_{2 * LAYERS}", say) for kind in MIXINGS})
    rows += [row_of_spiking(seed, policy, spiking[-1]) for policy in POLICIES]
    rows += [row_of_mixing(seed, kind, *found) for kind, found in mixing[-1].items()]
  plots_stability.stability(spiking[0], mixing[0], workdir / PICTURE)
  return Result(rows, targets(spiking, mixing), PICTURE)


def trained(run_config: RunConfig, folder: Path, say: Say) -> Lines:
  """The lines of metrics.jsonl of a run, which is trained, or goes on, unless it is finished.

  Raises:
    ValueError: a run with other settings is in the folder.
  """
  runs.trained(run_config, folder, loop.train, say)
  return metrics.read_lines(folder / metrics.LINES)


# ---- a spike -------------------------------------------------------------------------------------------------------------
def spiking_run(policy: str, seed: int) -> RunConfig:
  """Up to a learning rate that is far too high, and down again."""
  return RunConfig(
    model=SMALL, optimizer=OptimizerConfig(learning_rate=1.0, warmup_steps=150, decay_steps=60),
    data=TEXT,
    training=TrainingConfig(steps=240, seed=seed, log_every=1, eval_every=60, eval_batches=4, checkpoint_every=25),
    anomalies=AnomalyConfig(policy=policy, window=32, limit=240, anticipation_delay=4, anticipation_steps=50))


def of_split(lines: Lines, split: str) -> Lines:
  return [line for line in lines if line["split"] == split]


def last_loss(lines: Lines) -> float:
  """Mean training loss of the last steps, nats."""
  return statistics.fmean(line["next_token"] for line in of_split(lines, "train")[-LAST:])


def extra_time(lines: Lines) -> float | None:
  """What choosing experts ahead took, as a share of the time of the steps that it was for; None without a period.

  The median step stands for all: the time of the first has the compilation in it.
  """
  period = [line for line in of_split(lines, "train") if "routing_age" in line]
  if not period:
    return None
  choosing = sum(line["routing_seconds"] for line in period)
  own = [line["tokens"] / line["tokens_per_second"] - line["routing_seconds"] for line in period]
  return choosing / (len(own) * statistics.median(own))


def losses(lines: Lines) -> dict[int, float]:
  """{step: next-token loss}, of each step as it was done last."""
  return {line["step"]: line["next_token"] for line in of_split(lines, "train")}


def around(runs: Mapping[str, Lines]) -> tuple[int, float] | None:
  """(the step of the first spike, mean loss of the steps before it); None without a spike.

  Of the steps before it the run tells that did not do them again.
  """
  spikes = of_split(runs["anticipate"], "anomaly")
  if not spikes:
    return None
  step = spikes[0]["step"]
  return step, statistics.fmean([loss for n, loss in losses(runs["log"]).items() if n < step][-LAST:])


def excess(runs: Mapping[str, Lines], policy: str) -> float | None:
  """Mean loss of the steps from that of the first spike on, above that of those before it, nats; None without a spike."""
  found = around(runs)
  if found is None:
    return None
  step, level = found
  return statistics.fmean([loss for n, loss in losses(runs[policy]).items() if step <= n < step + LAST]) - level


def row_of_spiking(seed: int, policy: str, runs: Mapping[str, Lines]) -> dict[str, Any]:
  lines = runs[policy]
  found = of_split(lines, "anomaly")
  return {"seed": seed, "run": f"spike, policy {policy}", "anomalies": len(found),
          "highest loss": max([line["loss"] for line in found if line["loss"] is not None], default=None),
          f"{LAST} steps from the spike on": excess(runs, policy), "last loss": last_loss(lines),
          "held-out bits/byte": of_split(lines, "held_out")[-1]["bits_per_byte"],
          "extra time": extra_time(lines), "forward gain": None, "backward gain": None}


# ---- mixing of the streams -----------------------------------------------------------------------------------------------
def mixing_run(seed: int) -> RunConfig:
  """As many sublayers as the mHC paper looks at (its figure 3)."""
  model = dataclasses.replace(
    SMALL, hidden_size=32, num_hidden_layers=LAYERS, layer_types=(SLIDING,) * LAYERS, mlp_layer_types=(LEARNED,) * LAYERS,
    num_attention_heads=2, q_lora_rank=16, o_groups=1, o_lora_rank=16, n_routed_experts=4, num_experts_per_tok=1)
  return RunConfig(
    model=model, optimizer=OptimizerConfig(learning_rate=0.01, warmup_steps=10),
    data=dataclasses.replace(TEXT, sequence_length=64, batch_size=4), anomalies=AnomalyConfig(policy="log", limit=1000),
    training=TrainingConfig(steps=100, seed=seed, kernels="reference", log_every=1, eval_every=100, checkpoint_every=50))


@contextlib.contextmanager
def mixing_of(kind: str) -> Iterator[None]:
  """Within it programs that are traced with the reference implementation mix the streams as `kind` says."""
  with mock.patch.object(reference, "sinkhorn", free) if kind == "free" else contextlib.nullcontext():
    yield


def free(logits_NN: jax.Array, *, iterations: int, eps: float) -> jax.Array:
  """In place of Sinkhorn's projection: the logits as they are, but moved so that the initial ones (0 and, off the diagonal,
  -8) become the identity, with which both begin."""
  other = 1 - jnp.eye(logits_NN.shape[-1], dtype=logits_NN.dtype)
  return logits_NN + 1 + 7 * other


def mixed(kind: str, seed: int, folder: Path, say: Say) -> tuple[Lines, list[gains.Gains]]:
  """A trained run's lines, and the gains of its first 1, 2, ... sublayers together on held-out text."""
  run_config = mixing_run(seed)
  with mixing_of(kind):
    lines = trained(run_config, folder, say)
    variables = restore_variables(folder / loop.CHECKPOINTS)[0]
    with contextlib.closing(iter(feed.dataset(run_config, "held_out"))) as batches:
      batch = next(batches)
    rows = {name: jnp.asarray(x[0]) for name, x in batch.items()}
    model = DeepseekV4(run_config.model, run_config.training.kernels)
    combs = gains.model_maps(model, variables, rows["tokens"], rows["positions"], rows["segment_ids"])
  return lines, [gains.composite_gains(combs[:n], batch["segment_ids"][0]) for n in range(1, len(combs) + 1)]


def row_of_mixing(seed: int, kind: str, lines: Lines, found: list[gains.Gains]) -> dict[str, Any]:
  return {"seed": seed, "run": f"{2 * LAYERS} sublayers, {kind}", "anomalies": len(of_split(lines, "anomaly")),
          "highest loss": max(line["loss"] for line in of_split(lines, "train") if line["loss"] is not None),
          f"{LAST} steps from the spike on": None, "last loss": last_loss(lines),
          "held-out bits/byte": of_split(lines, "held_out")[-1]["bits_per_byte"],
          "extra time": None, "forward gain": found[-1].forward, "backward gain": found[-1].backward}


# ---- targets -------------------------------------------------------------------------------------------------------------
def recovery(runs: Mapping[str, Lines]) -> float | None:
  """Mean loss of the last steps with anticipatory routing over that before the spike; None without a spike."""
  found = around(runs)
  return None if found is None else last_loss(runs["anticipate"]) / found[1]


def targets(spiking: list[Mapping[str, Lines]], mixing: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
  """The goals, each for the worst seed."""
  recovered = [recovery(runs) for runs in spiking]
  worst = None if None in recovered else max(recovered)
  ends = {kind: [found[kind][1][-1] for found in mixing] for kind in MIXINGS}
  forward = max(abs(g - 1) for one in ends["mHC"] for g in (one.forward, one.forward_of_mean))
  backward = max(g for one in ends["mHC"] for g in (one.backward, one.backward_of_mean))
  control = min(max(one.forward, one.backward) for one in ends["free"])
  at_most = lambda text, bound, value: {"target": text, "bound": bound, "value": value,
                                        "reached": None if value is None else value <= bound}
  return [
    at_most("after rollback and anticipatory routing the loss ends below that before the spike (ratio)", 1.0, worst),
    at_most(f"mHC: forward gain of {2 * LAYERS} sublayers, distance from 1", FORWARD_GOAL, forward),
    at_most(f"mHC: backward gain of {2 * LAYERS} sublayers", BACKWARD_GOAL, backward),
    {"target": f"free hyper-connections: gain of {2 * LAYERS} sublayers", "bound": CONTROL, "value": control,
     "reached": control >= CONTROL}]
