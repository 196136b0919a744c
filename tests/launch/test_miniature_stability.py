"""The miniature of stability without its minutes: what its figures are made of, and a control that is what it says."""

import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_v4.analysis.gains import Gains
from launch.miniatures import stability
from pallas_kernels.hyper_connections import reference


def line(split, step, **numbers):
  return {"split": split, "step": step} | numbers


def test_the_control_begins_with_the_identity_and_is_linear_in_its_logits():
  n = 4
  logits = -8.0 * (1 - np.eye(n, dtype=np.float32))
  np.testing.assert_array_equal(stability.free(jnp.asarray(logits), iterations=20, eps=1e-6), np.eye(n))
  added = np.random.default_rng(0).normal(size=(2, 3, n, n)).astype(np.float32)
  np.testing.assert_allclose(stability.free(logits + added, iterations=20, eps=1e-6), np.eye(n) + added, atol=2e-6)


def test_only_within_the_control_sinkhorn_is_left_out():
  rng = np.random.default_rng(1)
  arguments = (rng.normal(size=(1, 2, 4, 8)), rng.normal(size=(32, 24)), rng.normal(size=24), np.ones(3))
  arguments = [np.float32(x) for x in arguments]
  comb = lambda: np.asarray(reference.collapse(*arguments, norm_eps=1e-6, eps=1e-6, iterations=20)[2])
  before = comb()
  with stability.mixing_of("free"):
    free = comb()
  with stability.mixing_of("mHC"):
    np.testing.assert_array_equal(comb(), before)
  np.testing.assert_array_equal(comb(), before)
  np.testing.assert_allclose(before.sum(-2), 1, atol=1e-5)
  assert np.abs(free.sum(-2) - 1).max() > 1


def test_runs_differ_in_what_they_compare_only():
  a, b = (stability.spiking_run(policy, 3) for policy in stability.POLICIES)
  assert a.anomalies.policy == "anticipate" and b.anomalies.policy == "log" and a.training.seed == 3
  assert (a.model, a.optimizer, a.data, a.training) == (b.model, b.optimizer, b.data, b.training)
  mixing = stability.mixing_run(0)
  assert 2 * mixing.model.num_hidden_layers == 60 and mixing.training.kernels == "reference"


def spiking():
  """Losses 2, 1.9, ... to a spike in step 31, then 1 to step 60; a period of four steps of 2 s, choosing 0.5 s of each."""
  train = [line("train", n, next_token=2 - 0.01 * n if n < 31 else 1.0, loss=2.0, tokens=100, tokens_per_second=50.0)
           for n in range(1, 61)]
  period = [x | {"routing_age": 1, "routing_seconds": 0.5} if 28 <= x["step"] <= 31 else x for x in train]
  return [*period, line("anomaly", 31, loss=9.0, kind="spike"), line("held_out", 60, bits_per_byte=1.5, next_token=1.0)]


def test_figures_of_a_spike():
  lines = spiking()
  assert stability.last_loss(lines) == 1.0
  assert stability.extra_time(lines) == pytest.approx(2 / 6) and stability.extra_time(lines[:5]) is None
  # the 20 steps before the spike: 11 to 30, mean 2 - 0.205
  assert stability.recovery({"anticipate": lines, "log": lines}) == pytest.approx(1 / 1.795)
  assert stability.recovery({"anticipate": lines[:30], "log": lines}) is None
  # on its second way past the spike a run tells what it did last: 1 from step 31 on
  again = [line("train", 30, next_token=1.6), *(line("train", n, next_token=3.0) for n in range(31, 36)), *lines]
  worse = lambda x: x | {"next_token": 2.0} if x["split"] == "train" and 31 <= x["step"] < 36 else x
  runs = {"anticipate": again, "log": [worse(x) for x in lines]}
  assert stability.around(runs) == (31, pytest.approx(1.795))
  assert stability.excess(runs, "anticipate") == pytest.approx(1 - 1.795)
  assert stability.excess(runs, "log") == pytest.approx(1 - 1.795 + 5 / 20)
  assert stability.excess({"anticipate": lines[:30], "log": lines}, "log") is None
  row = stability.row_of_spiking(0, "anticipate", runs)
  assert row["20 steps from the spike on"] == pytest.approx(1 - 1.795)
  assert (row["anomalies"], row["highest loss"], row["held-out bits/byte"]) == (1, 9.0, 1.5)


def test_targets_are_for_the_worst_seed():
  good, bad = Gains(1.00005, 1.2, 1.0, 1.1), Gains(1.0, 1.3, 0.9998, 1.8)
  free = [Gains(500.0, 3.0, 40.0, 2.0), Gains(3.0, 12.0, 1.0, 1.0)]
  lines = spiking()
  mixing = [{"mHC": (lines, [bad, good]), "free": (lines, [free[0]])}, {"mHC": (lines, [bad]), "free": (lines, [free[1]])}]
  found = stability.targets([{"anticipate": lines, "log": lines}] * 2, mixing)
  assert [x["reached"] for x in found] == [True, False, False, True]
  assert [x["value"] for x in found[1:]] == [pytest.approx(2e-4), 1.8, 12.0]
  found = stability.targets([dict.fromkeys(stability.POLICIES, x) for x in (lines, lines[:30])], mixing[:1])
  assert [x["reached"] for x in found] == [None, True, True, True]


def test_the_picture(tmp_path):
  lines = [x | {"learning_rate": 0.1} for x in spiking()]
  mixing = {kind: (lines, [Gains(1.0, 1.1, 1.0, 1.0), Gains(1.0, 1.2, 1.0, 1.0)]) for kind in stability.MIXINGS}
  stability.plots_stability.stability({"anticipate": lines, "log": lines}, mixing, tmp_path / "x.png")
  assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
