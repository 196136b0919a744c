"""The comparison of optimizers with curves in closed form, and in the long tests a short one for real."""

import json
import math

import pytest

from deepseek_v4.config import to_dict
from deepseek_v4.training import loop, metrics
from launch import miniature
from launch.miniatures import NAMES, optimizers
from launch.miniatures.optimizers import STEPS, Curve, best, final, steps_to, swept

BEST = {"muon": 4e-3, "adamw": 2e-3}  # both at the lower edge of their sweep, or below it
FLOOR = {"muon": 2.0, "adamw": 2.2}


def loss_at(optimizer, rate, seed, step):
  """Falls straight to a floor that is 0.1 higher per factor of two beyond the best rate."""
  floor = FLOOR[optimizer] + 0.1 * abs(math.log2(rate / BEST[optimizer])) + 0.01 * seed
  return max(5.5 - step / 20, floor) if rate < 1 else None


@pytest.fixture
def pretended(monkeypatch):
  """`loop.train` writes what a run would have written; returns the runs that were asked for."""
  asked = []

  def train(run, workdir):
    asked.append((run.optimizer.matrix_owner, run.optimizer.learning_rate, run.training.seed))
    workdir.mkdir(parents=True)
    lines = [{"split": "held_out", "step": n, "next_token": loss_at(*asked[-1], n)} for n in range(10, STEPS + 1, 10)]
    lines[-1]["next_token"] = 9.0  # of other text
    (workdir / metrics.LINES).write_text("".join(json.dumps(line) + "\n" for line in lines))
    metrics.write_json(workdir / "config.json", to_dict(run))
    metrics.write_json(workdir / metrics.SUMMARY, {"held_out": {"bits_per_byte": 3.0}})

  monkeypatch.setattr(loop, "train", train)
  return asked


def test_each_optimizer_races_at_its_own_best_rate(pretended, tmp_path, monkeypatch):
  monkeypatch.setattr(optimizers, "SWEEPS", {"muon": (8e-3, 16e-3), "adamw": (1e-3, 2e-3, 4e-3)})
  said = []
  result = optimizers.run(tmp_path, 3, said.append)
  rates = {name: sorted({rate for owner, rate, _ in pretended if owner == name}) for name in BEST}
  assert rates == {"muon": [2e-3, 4e-3, 8e-3, 16e-3], "adamw": [1e-3, 2e-3, 4e-3]}  # Muon's went on downwards until it rose
  assert [seed for owner, rate, seed in pretended if (owner, rate) == ("muon", 4e-3)] == [0, 1, 2]
  assert len(pretended) == 4 + 3 + 2 * 2
  by_rate = {(row["optimizer"], row["learning rate"]): row for row in result.rows}
  adamw, muon = by_rate["adamw", "0.002"], by_rate["muon", "0.004"]
  assert (muon["seeds"], adamw["seeds"], by_rate["muon", "0.016"]["seeds"]) == (3, 3, 1)
  assert muon["loss at the end"] == pytest.approx(2.01) and muon["range"] == pytest.approx(0.02)
  # 2.22 nats, where AdamW's worst seed ends: between 2.5 at step 60 and each run's floor at step 70.
  assert muon["steps to the same loss"] == pytest.approx(60 + 2.8 / 3 * (1 / 0.5 + 1 / 0.49 + 1 / 0.48))
  assert adamw["steps to the same loss"] == pytest.approx(60 + 2.8 / 3 * (1 / 0.3 + 1 / 0.29 + 1 / 0.28))
  assert by_rate["adamw", "0.001"]["steps to the same loss"] is None
  assert [t["reached"] for t in result.targets] == [True, True]
  assert result.targets[1]["value"] == pytest.approx(muon["steps to the same loss"] / adamw["steps to the same loss"])
  assert miniature.table(result.rows).count("\n") == len(result.rows)
  assert (tmp_path / result.picture).stat().st_size > 10_000
  count = len(pretended)
  assert optimizers.run(tmp_path, 3, said.append) == result and len(pretended) == count  # nothing is trained twice
  assert optimizers.run(tmp_path, 4, said.append) and len(pretended) == count + 2


def test_steps_between_scores():
  curve = Curve((10, 20, 30, 40), (5.0, 3.0, 3.5, 1.0), 0.0)
  assert [steps_to(curve, x) for x in (6.0, 5.0, 4.0, 3.0, 2.0, 0.9)] == [10, 10, 15, 20, 36, None]
  assert final(curve) == 2.25 and steps_to(Curve((10, 20), (math.inf, 1.0), 0.0), 2.0) == 20


def test_a_sweep_ends():
  """One whose loss falls with every step outwards stops at the longest; a rate that leads nowhere is never the best."""
  found = swept(lambda rate: Curve((1, 2), (1 / rate, math.inf if rate > 100 else 1 / rate), 0.0), (1.0, 2.0))
  assert list(found) == [1, 2, 4, 8, 16, 32] and best(found) == 32
  assert best({1.0: Curve((1, 2), (1.0, 1.0), 0.0), 2.0: Curve((1, 2), (math.inf, math.inf), math.inf)}) == 1


@pytest.mark.parametrize("optimizer", BEST)
def test_runs_differ_in_the_optimizer_alone(optimizer):
  one, two = (to_dict(optimizers.run_config(name, 1e-3, 0)) for name in ("muon", optimizer))
  one["optimizer"]["matrix_owner"] = optimizer
  assert one == two and "optimizers" in NAMES


@pytest.mark.long
def test_a_short_race(tmp_path, monkeypatch):
  monkeypatch.setattr(optimizers, "STEPS", 50)
  monkeypatch.setattr(optimizers, "SWEEPS", {"muon": (8e-3,), "adamw": (4e-3,)})
  monkeypatch.setattr(optimizers, "LONGEST", 1)
  result = optimizers.run(tmp_path, 1, print)
  assert all(row["loss at the end"] < 4.5 and 10 < row["steps to the same loss"] <= 50 for row in result.rows)
