"""Muon against AdamW: the same small V4, text and steps, each optimizer at the best learning rate of its own sweep.

With Muon the matrices follow Muon and the rest AdamW, as in V4 (report 2.4); against it everything follows AdamW, with the
report's settings (4.2.2) in both. The learning rate is constant after a short warm-up, so that a curve at any step is what
training to there would have given. A sweep whose best rate lies at its edge goes on in that direction. Rates are chosen by
the loss on one share of the held-out text, and compared by that on the other, whose documents chose nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import statistics
import sysconfig
import time
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence

import jax
import numpy as np

from deepseek_v4.analysis import plots_optimizers
from deepseek_v4.config import (
  CSA,
  HASH,
  HCA,
  LEARNED,
  SLIDING,
  DataConfig,
  ModelConfig,
  OptimizerConfig,
  RunConfig,
  TrainingConfig,
  to_dict,
)
from deepseek_v4.training import feed, metrics
from deepseek_v4.training.state import init_state
from deepseek_v4.training.step import compiler_options, make_eval_step, train_step
from launch.miniatures import Result, runs

DESCRIPTION = "Muon against AdamW, each at its own best learning rate"
STEPS, EVERY = 200, 10  # of a training, and between scores
SCORED = 16  # batches of each share of the held-out text
FACTOR = 2.0  # between neighbouring learning rates
SWEEPS = {"muon": (4e-3, 8e-3, 16e-3), "adamw": (2e-3, 4e-3, 8e-3)}
LONGEST = 6  # learning rates of a sweep that goes on
PICTURE = "optimizers.png"

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Curve:
  """What one training gave.

  Attributes:
    steps: after which the text that judges was scored.
    losses: nats per token there; infinite where it was no number any more.
    choosing: the same at the end, on the text by which a learning rate is chosen.
  """

  steps: tuple[int, ...]
  losses: tuple[float, ...]
  choosing: float


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
                    batch_size=4, held_out_percent=2),
    training=TrainingConfig(steps=STEPS, seed=seed))


# ---- trainings ---------------------------------------------------------------------------------------------------------
class Bench:
  """What all trainings with one optimizer share: text, and programs that have the learning rate as an argument.

  An update is proportional to the learning rate, W <- W - rate (O + decay W), so the step is compiled once, for the rate 1,
  and goes a part of the way.
  """

  def __init__(self, optimizer: str, folder: Path):
    """`folder`: for the two shares of the held-out text."""
    self.run = run_config(optimizer, 1.0, 0)
    self.text = feed.dataset(self.run, "train")
    self.held_out = {name: self._batches(data) for name, data in runs.shares(self.run.data, folder).items()}
    self._score = make_eval_step(self.run)

    def step(state, batch, rate):
      new, found = train_step(self.run, None, None, state, batch)
      part = lambda old, far: old + rate * (far - old)
      return new.replace(params=jax.tree.map(part, state.params, new.params)), found["loss"]

    self._step = jax.jit(step, donate_argnums=0, compiler_options=compiler_options(None))

  def _batches(self, data: DataConfig) -> list[Any]:
    with contextlib.closing(iter(feed.dataset(dataclasses.replace(self.run, data=data), "held_out"))) as batches:
      return [feed.to_device(self.run, None, batch) for batch in itertools.islice(batches, SCORED)]

  def score(self, state: Any, share: str) -> float:
    """Loss on a share of the held-out text, nats per token; infinite if it is no number."""
    found = [self._score(state, batch) for batch in self.held_out[share]]
    total, count = (sum(float(x[name]) for x in found) for name in ("next_token_sum", "next_token_count"))
    return total / count if math.isfinite(total) else math.inf

  def train(self, rate: float, seed: int) -> Curve:
    """A whole training from scratch."""
    state, points = init_state(self.run, jax.random.key(seed)), []
    with contextlib.closing(iter(self.text)) as batches:
      for n, batch in enumerate(itertools.islice(batches, STEPS), start=1):
        state, _ = self._step(state, feed.to_device(self.run, None, batch), rate)
        if n % EVERY == 0:
          points.append((n, self.score(state, runs.JUDGING)))
    steps, losses = zip(*points)
    return Curve(steps, losses, self.score(state, runs.CHOOSING))


def trained(workdir: Path, say: Say, bench: Callable[[str], Bench], optimizer: str, rate: float, seed: int) -> Curve:
  """The curve of one training: read from its file if it was finished, else trained and written.

  Raises:
    ValueError: it was finished with other settings.
  """
  file = workdir / f"{optimizer}_{rate:g}_{seed}.json"
  settings = json.loads(json.dumps(to_dict(run_config(optimizer, rate, seed))))  # lists for tuples, as in the file
  if file.is_file():
    found = json.loads(file.read_text(encoding="utf-8"))
    runs.refuse_changes(file, found["settings"], settings)
    number = lambda loss: math.inf if loss is None else loss
    return Curve(tuple(found["steps"]), tuple(map(number, found["losses"])), number(found["choosing"]))
  started = time.perf_counter()
  curve = bench(optimizer).train(rate, seed)
  say(f"{optimizer}, learning rate {rate:g}, seed {seed}: loss {final(curve):.3f} in {time.perf_counter() - started:.0f} s")
  metrics.write_json(file, {"settings": settings, **dataclasses.asdict(curve)})
  return curve


def final(curve: Curve) -> float:
  """The loss after the last step."""
  return curve.losses[-1]


def best(sweep: Mapping[float, Curve]) -> float:
  """The learning rate with the lowest loss on the text that chooses."""
  return min(sweep, key=lambda rate: sweep[rate].choosing)


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
          "loss that chooses": curves[0].choosing, "loss at the end": statistics.fmean(ends),
          "range": max(ends) - min(ends) if len(ends) > 1 else None,
          "steps to the same loss": None if None in steps else statistics.fmean(steps)}


def run(workdir: Path, seeds: int, say: Say) -> Result:
  """Trains what is not trained yet, and compares.

  The same loss is the highest that any of the best rate's runs of either optimizer ends with, so that all of them reach it.
  """
  runs.refuse_other_plan(workdir, {"steps between scores": EVERY, "batches scored": SCORED})
  bench = functools.cache(lambda optimizer: Bench(optimizer, workdir / "text"))  # if all is trained, nothing is compiled
  done: dict[str, dict[float, list[Curve]]] = {}
  for optimizer, rates in SWEEPS.items():
    train = functools.partial(trained, workdir, say, bench, optimizer)
    sweep = swept(functools.partial(train, seed=0), rates)
    done[optimizer] = {rate: [curve] for rate, curve in sweep.items()}
    done[optimizer][best(sweep)] += [train(best(sweep), seed) for seed in range(1, seeds)]
  chosen = {optimizer: best({rate: curves[0] for rate, curves in by_rate.items()}) for optimizer, by_rate in done.items()}
  raced = {optimizer: done[optimizer][rate] for optimizer, rate in chosen.items()}
  loss = max(final(curve) for curves in raced.values() for curve in curves)
  rows = [row(optimizer, rate, curves, loss) for optimizer, by_rate in done.items() for rate, curves in by_rate.items()]
  steps = {optimizer: np.mean([steps_to(curve, loss) for curve in curves]) for optimizer, curves in raced.items()}
  say(f"the same loss: {loss:.3f} nats; best learning rates: "
      f"{', '.join(f'{optimizer} {rate:g}' for optimizer, rate in chosen.items())}")
  at_edge = sum(rate in (min(done[optimizer]), max(done[optimizer])) for optimizer, rate in chosen.items())
  ratio = float(steps["muon"] / steps["adamw"])
  plots_optimizers.race(raced, {name: {rate: [final(c) for c in curves] for rate, curves in by_rate.items()}
                                for name, by_rate in done.items()}, loss, workdir / PICTURE)
  return Result(rows, [
    {"target": "best learning rates at an edge of their sweep: none", "bound": 0, "value": at_edge, "reached": not at_edge},
    {"target": "Muon's steps to the same loss / AdamW's: at most 1", "bound": 1, "value": ratio, "reached": ratio <= 1},
  ], PICTURE)
