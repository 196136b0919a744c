"""The comparison of optimizers with curves in closed form, and in the long tests a short one for real."""

import math

import jax
import numpy as np
import pytest

from deepseek_v4.config import to_dict
from deepseek_v4.training.state import init_state
from deepseek_v4.training.step import make_train_step
from launch import miniature
from launch.miniatures import NAMES, optimizers, runs
from launch.miniatures.optimizers import STEPS, Curve, best, final, steps_to, swept

STEP_LIST = range(10, STEPS + 1, 10)
BEST = {"muon": 4e-3, "adamw": 2e-3}  # both at the lower edge of their sweep, or below it
FLOOR = {"muon": 2.0, "adamw": 2.2}


def loss_at(optimizer, rate, seed, step):
  """Falls straight to a floor that is 0.1 higher per factor of two beyond the best rate."""
  floor = FLOOR[optimizer] + 0.1 * abs(math.log2(rate / BEST[optimizer])) + 0.01 * seed
  return max(5.5 - step / 20, floor)


@pytest.fixture
def pretended(monkeypatch):
  """Trainings are their closed form; returns those that were asked for."""
  asked = []

  class Pretended:
    def __init__(self, optimizer, folder):
      self.optimizer = optimizer

    def train(self, rate, seed):
      asked.append((self.optimizer, rate, seed))
      return Curve(tuple(STEP_LIST), tuple(loss_at(self.optimizer, rate, seed, n) for n in STEP_LIST),
                   1 + loss_at(self.optimizer, rate, seed, STEPS))

  monkeypatch.setattr(optimizers, "Bench", Pretended)
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


def test_a_race_with_other_settings_is_refused(pretended, tmp_path, monkeypatch):
  """Of a training, or of how often and on how much it is scored: nothing is trained or written again."""
  monkeypatch.setattr(optimizers, "SWEEPS", {"muon": (4e-3,), "adamw": (2e-3,)})
  optimizers.run(tmp_path, 1, print)
  files = {file: file.read_bytes() for file in tmp_path.glob("*.json")}
  count = len(pretended)
  for name, value, words in (("STEPS", 30, "training.steps: 200 -> 30"), ("EVERY", 5, "steps between scores: 10 -> 5"),
                             ("SCORED", 8, "batches scored: 16 -> 8")):
    with monkeypatch.context() as changed:
      changed.setattr(optimizers, name, value)
      with pytest.raises(ValueError, match=f"{words}; expected another --workdir"):
        optimizers.run(tmp_path, 1, print)
  assert len(pretended) == count and {file: file.read_bytes() for file in tmp_path.glob("*.json")} == files


def test_steps_between_scores():
  curve = Curve((10, 20, 30, 40), (5.0, 3.0, 3.5, 1.0), 0.0)
  assert [steps_to(curve, x) for x in (6.0, 5.0, 4.0, 3.0, 2.0, 0.9)] == [10, 10, 15, 20, 36, None]
  assert final(curve) == 1 and steps_to(Curve((10, 20), (math.inf, 1.0), 1.0), 2.0) == 20


def test_a_sweep_ends():
  """One whose loss falls with every step outwards stops at the longest; a rate that leads nowhere is never the best."""
  ends_at = lambda loss: Curve((1, 2), (3.0, 3.0), loss)
  found = swept(lambda rate: ends_at(1 / rate), (1.0, 2.0))
  assert list(found) == [1, 2, 4, 8, 16, 32] and best(found) == 32
  assert best({1.0: ends_at(1.0), 2.0: ends_at(math.inf)}) == 1


def test_what_judges_chooses_nothing(pretended, tmp_path, monkeypatch):
  """The rate that is best on the text that chooses races, though another one is better on the text that judges."""
  monkeypatch.setattr(optimizers, "LONGEST", 2)
  monkeypatch.setattr(optimizers, "SWEEPS", {"muon": (1e-3, 2e-3), "adamw": (1e-3, 2e-3)})
  monkeypatch.setattr(optimizers.Bench, "train", lambda self, rate, seed: Curve(
    tuple(STEP_LIST), tuple(2 + 100 * rate for _ in STEP_LIST), -rate))
  result = optimizers.run(tmp_path, 2, print)
  assert [(row["learning rate"], row["seeds"]) for row in result.rows] == 2 * [("0.001", 1), ("0.002", 2)]
  assert [row["loss that chooses"] for row in result.rows] == 2 * [-0.001, -0.002]


@pytest.mark.parametrize("optimizer", BEST)
def test_runs_differ_in_the_optimizer_alone(optimizer):
  one, two = (to_dict(optimizers.run_config(name, 1e-3, 0)) for name in ("muon", optimizer))
  one["optimizer"]["matrix_owner"] = optimizer
  assert one == two and "optimizers" in NAMES


@pytest.mark.long
@pytest.mark.parametrize("optimizer", BEST)
def test_a_rate_as_an_argument_is_the_rate_of_a_run(optimizer, tmp_path):
  """Two steps with the learning rate handed in, against those of the run that has it in its settings."""
  bench = optimizers.Bench(optimizer, tmp_path)
  run = optimizers.run_config(optimizer, 4e-3, 0)
  step = make_train_step(run)
  found, want = (init_state(r, jax.random.key(0)) for r in (bench.run, run))
  for batch in bench.held_out[runs.JUDGING][:2]:
    found, _ = bench._step(found, batch, 4e-3)
    want, _ = step(want, batch)
  before = init_state(run, jax.random.key(0)).params
  for old, a, b in zip(*map(jax.tree.leaves, (before, found.params, want.params))):
    # A difference of float32 numbers near 1 is exact to 6e-8, times the rate; the second step's gradients follow from that.
    np.testing.assert_allclose(a, b, atol=1e-3 * np.abs(b - old).max() + 1e-9)


@pytest.mark.long
def test_a_short_race(tmp_path, monkeypatch):
  """50 steps each for real: both learn, and the files of what is trained are read again."""
  monkeypatch.setattr(optimizers, "STEPS", 50)
  monkeypatch.setattr(optimizers, "SWEEPS", {"muon": (8e-3,), "adamw": (4e-3,)})
  monkeypatch.setattr(optimizers, "LONGEST", 1)
  result = optimizers.run(tmp_path, 1, print)
  assert all(row["loss at the end"] < 3.5 and 0 < row["steps to the same loss"] <= 50 for row in result.rows)
  monkeypatch.setattr(optimizers, "Bench", None)
  assert optimizers.run(tmp_path, 1, print) == result
