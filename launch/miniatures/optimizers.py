"""Muon against AdamW: the same small V4, text and steps, each optimizer at the best learning rate of its own sweep.

With Muon the matrices follow Muon and the rest AdamW, as in V4 (report 2.4); against it everything follows AdamW, with the
report's settings (4.2.2) in both. The learning rate is constant after a short warm-up, so that a curve at any step is what
training to there would have given. A sweep whose best rate lies at its edge goes on in that direction. What is compared is
the loss on held-out text that no run trains on.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import statistics
import sysconfig
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence

import numpy as np

from deepseek_v4.analysis import plots_optimizers
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
  to_dict,
)
from deepseek_v4.training import loop, metrics
from deepseek_v4.training.workdir import CONFIG
from launch.miniatures import Result

DESCRIPTION = "Muon against AdamW, each at its own best learning rate"
STEPS = 200
FACTOR = 2.0  # between neighbouring learning rates
SWEEPS = {"muon": (4e-3, 8e-3, 16e-3), "adamw": (2e-3, 4e-3, 8e-3)}
LONGEST = 6  # learning rates of a sweep that goes on
PICTURE = "optimizers.png"

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Curve:
  """What one training gave.

  Attributes:
    steps: at which a part of the held-out text was scored.
    losses: nats per token there.
    bits_per_byte: of all held-out text after the last step.
  """

  steps: tuple[int, ...]
  losses: tuple[float, ...]
  bits_per_byte: float


def run_config(optimizer: str, rate: float, seed: int) -> RunConfig:
  """One training; the seed decides the initial weights, not the text."""
  model = ModelConfig(
    vocab_size=320, hidden_size=96, num_hidden_layers=3, layer_types=(SLIDING, CSA, HCA),
    mlp_layer_types=(HASH, LEARNED, LEARNED), csa_compress_rate=4, hca_compress_rate=16, num_attention_heads=4, head_dim=32,
    qk_rope_head_dim=16, q_lora_rank=48, o_groups=2, o_lora_rank=32, sliding_window=32, index_n_heads=2, index_head_dim=16,
    index_topk=16, n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=64, hc_mult=2, rope_scaling=None,
    max_position_embeddings=1024, num_nextn_predict_layers=0, pad_token_id=2, init_std=0.02)
  return RunConfig(
    model=model,
    optimizer=OptimizerConfig(learning_rate=rate, warmup_steps=20, matrix_owner=optimizer),
    data=DataConfig(source="text", path=str(Path(sysconfig.get_paths()["stdlib"]) / "*.py"), sequence_length=256,
                    batch_size=8, held_out_percent=1),
    training=TrainingConfig(steps=STEPS, seed=seed, log_every=10, eval_every=10, eval_batches=4, checkpoint_every=50),
    anomalies=AnomalyConfig(policy="log", limit=STEPS))  # a rate that is too high is a result too


# ---- trainings ---------------------------------------------------------------------------------------------------------
def trained(workdir: Path, say: Say, optimizer: str, rate: float, seed: int) -> Curve:
  """The curve of one training: read where it is finished, else begun or gone on with."""
  run, folder = run_config(optimizer, rate, seed), workdir / f"{optimizer}_{rate:g}_{seed}"
  summary, stored = folder / metrics.SUMMARY, folder / CONFIG
  if not (summary.is_file() and json.loads(stored.read_text(encoding="utf-8")) == json.loads(json.dumps(to_dict(run)))):
    say(f"{optimizer}, learning rate {rate:g}, seed {seed}")
    loop.train(run, folder)
  points = [(line["step"], line["next_token"]) for line in metrics.read_lines(folder / metrics.LINES)
            if line["split"] == "held_out" and line["step"] < STEPS]  # the last step scores all text, not this part
  losses = tuple(math.inf if loss is None else loss for _, loss in points)
  found = json.loads(summary.read_text(encoding="utf-8"))["held_out"]["bits_per_byte"]
  return Curve(tuple(step for step, _ in points), losses, math.inf if found is None else found)


def final(curve: Curve) -> float:
  """The loss at the end: mean of the last two scores."""
  return statistics.fmean(curve.losses[-2:])


def best(sweep: Mapping[float, Curve]) -> float:
  """The learning rate with the lowest loss at the end."""
  return min(sweep, key=lambda rate: final(sweep[rate]))


def swept(train: Callable[[float], Curve], rates: Sequence[float]) -> dict[float, Curve]:
  """A curve for each learning rate, and for further ones as long as the best is at an edge; in ascending order."""
  sweep = {rate: train(rate) for rate in rates}
  while best(sweep) in (min(sweep), max(sweep)) and len(sweep) < LONGEST:
    beyond = min(sweep) / FACTOR if best(sweep) == min(sweep) else max(sweep) * FACTOR
    sweep[beyond] = train(beyond)
  return dict(sorted(sweep.items()))


def steps_to(curve: Curve, loss: float) -> float | None:
  """The step at which the curve first is at `loss` or below, straight between scores; None if it never is."""
  for i, (step, value) in enumerate(zip(curve.steps, curve.losses)):
    if value <= loss:
      if i == 0:
        return float(step)
      before, higher = curve.steps[i - 1], curve.losses[i - 1]
      return before + (step - before) * (higher - loss) / (higher - value) if math.isfinite(higher) else float(step)
  return None


# ---- the comparison ----------------------------------------------------------------------------------------------------
def row(optimizer: str, rate: float, curves: Sequence[Curve], loss: float) -> dict[str, Any]:
  """A line of the table: one learning rate, mean over its seeds, and the loss's range over them."""
  ends = [final(curve) for curve in curves]
  steps = [steps_to(curve, loss) for curve in curves]
  return {"optimizer": optimizer, "learning rate": f"{rate:g}", "seeds": len(curves),
          "loss at the end": statistics.fmean(ends), "range": max(ends) - min(ends) if len(ends) > 1 else None,
          "bits per byte": statistics.fmean(curve.bits_per_byte for curve in curves),
          "steps to the same loss": None if None in steps else statistics.fmean(steps)}


def run(workdir: Path, seeds: int, say: Say) -> Result:
  """Trains what is not trained yet, and compares.

  The same loss is the highest that any of the best rate's runs of either optimizer ends with, so that all of them reach it.
  """
  runs: dict[str, dict[float, list[Curve]]] = {}
  for optimizer, rates in SWEEPS.items():
    train = functools.partial(trained, workdir, say, optimizer)
    sweep = swept(functools.partial(train, seed=0), rates)
    runs[optimizer] = {rate: [curve] for rate, curve in sweep.items()}
    runs[optimizer][best(sweep)] += [train(best(sweep), seed) for seed in range(1, seeds)]
  chosen = {optimizer: best({rate: curves[0] for rate, curves in by_rate.items()}) for optimizer, by_rate in runs.items()}
  raced = {optimizer: runs[optimizer][rate] for optimizer, rate in chosen.items()}
  loss = max(final(curve) for curves in raced.values() for curve in curves)
  rows = [row(optimizer, rate, curves, loss) for optimizer, by_rate in runs.items() for rate, curves in by_rate.items()]
  steps = {optimizer: np.mean([steps_to(curve, loss) for curve in curves]) for optimizer, curves in raced.items()}
  say(f"the same loss: {loss:.3f} nats; best learning rates: "
      f"{', '.join(f'{optimizer} {rate:g}' for optimizer, rate in chosen.items())}")
  at_edge = sum(rate in (min(runs[optimizer]), max(runs[optimizer])) for optimizer, rate in chosen.items())
  ratio = float(steps["muon"] / steps["adamw"])
  plots_optimizers.race(raced, {name: {rate: [final(c) for c in curves] for rate, curves in by_rate.items()}
                                for name, by_rate in runs.items()}, loss, workdir / PICTURE)
  return Result(rows, [
    {"target": "best learning rates at an edge of their sweep: none", "bound": 0, "value": at_edge, "reached": not at_edge},
    {"target": "Muon's steps to the same loss / AdamW's: at most 1", "bound": 1, "value": ratio, "reached": ratio <= 1},
  ], PICTURE)
