"""Steps that go wrong: the detector against NumPy in float64, and the loop's answers with the fakes of fakes.py."""

import dataclasses
import json
import math
import pickle

import jax
import numpy as np
import pytest

from deepseek_v4.config import AnomalyConfig
from deepseek_v4.training import anomalies, loop, stages
from deepseek_v4.training.anomalies import Anomaly, Record
from deepseek_v4.training.stopping import Stopped, Stopping
from tests.training.fakes import RUN, World, lines, saved, without_times

DEFAULT = AnomalyConfig()


@pytest.fixture
def world(monkeypatch):
  return World(monkeypatch)


# ---- the detector ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("window, deviations", [(128, 6.0), (2, 0.5), (17, 3.0)])
def test_the_limit_is_mean_and_deviations_of_the_last_losses(window, deviations):
  config = AnomalyConfig(window=window, deviations=deviations)
  losses = np.random.default_rng(0).normal(5, 0.3, 300).tolist()
  recent = np.array(losses[-window:], np.float64)
  # two roundings of sums of 128 float64 numbers
  assert anomalies.spike_limit(losses, config) == pytest.approx(recent.mean() + deviations * recent.std(), rel=1e-13)
  assert anomalies.spike_limit(losses[:window - 1], config) == math.inf


def test_the_default_is_six_deviations_of_128_steps():
  losses = (np.arange(128) % 2 + 3.0).tolist()  # mean 3.5, standard deviation 0.5
  record = Record(losses=tuple(losses))
  verdict = lambda loss, finite=True: anomalies.judge(record, DEFAULT, 200, (8, 16), loss, finite)
  assert verdict(6.5) is None  # not above mean + 6 x 0.5
  assert verdict(np.nextafter(6.5, 7)).kind == "spike"
  assert verdict(0.0) is None  # losses may fall
  assert verdict(3.5, finite=False).kind == "not finite"  # a gradient was not
  assert verdict(math.nan, finite=False).kind == "not finite"
  assert str(verdict(7.0)) == "step 200: spike (loss 7.0000 above 6.5000) on rows 8 to 15 of the data"


def test_a_falling_curve_with_noise_has_no_spikes():
  rng, record = np.random.default_rng(1), Record()
  for n in range(1, 2001):
    loss = 2 + 8 * math.exp(-n / 300) + rng.normal(0, 0.05)
    assert anomalies.judge(record, DEFAULT, n, (n - 1, n), loss, True) is None
    record = anomalies.accepted(record, DEFAULT, n, loss)
  assert len(record.losses) == 128


def test_a_record_comes_back_from_json_bit_for_bit():
  rng = np.random.default_rng(2)
  record = Record(tuple(rng.normal(size=5).tolist()), (3, 7), ((8, 16),), ((24, None), (32, 0.1)), 40)
  assert Record.from_dict(json.loads(json.dumps(record.to_dict()))) == record
  assert Record.from_dict({}) == Record()


def test_old_anomalies_do_not_count():
  config = AnomalyConfig(window=4, limit=2)
  record = Record(steps=(1, 2, 6))
  assert anomalies.too_many(record, config)
  record = anomalies.accepted(record, config, 6, 1.0)
  assert record.steps == (6,) and not anomalies.too_many(record, config)


def test_what_is_left_out_is_so_for_any_batch_size():
  record = anomalies.rolled_back(Record(), Record(losses=(1.0,)), Anomaly("spike", 3, (16, 24), 9.0, 8.0), "skip")
  assert record.losses == (1.0,) and record.left_out == ((16, 24),)
  assert [anomalies.is_left_out(record, rows) for rows in [(8, 16), (16, 24), (20, 24), (12, 18), (0, 32), (24, 32)]] == [
    False, True, True, True, True, False]


@pytest.mark.parametrize("setting, value, expected", [
  ("policy", "ignore", "'skip', 'repeat', 'anticipate', 'log', 'stop'"), ("window", 1, "at least 2"),
  ("deviations", 0.0, "above 0"), ("limit", 0, "at least 1"), ("anticipation_steps", 0, "at least 1"),
  ("anticipation_delay", -1, "at least 0")])
def test_wrong_settings_are_refused(setting, value, expected):
  with pytest.raises(ValueError, match=f"{setting} = {value!r}: expected .*{expected}"):
    AnomalyConfig(**{setting: value})


# ---- the loop's answers ------------------------------------------------------------------------------------------------
def with_policy(policy, **changes):
  """Losses are 2, 3.5, 5.25, 7.1, 9.06 ... there; three of them put the limit well above the next."""
  return dataclasses.replace(RUN, anomalies=AnomalyConfig(policy=policy, window=3, **changes))


def final(workdir):
  """(step, state, position) of the last checkpoint."""
  step, state, extra = pickle.loads((workdir / loop.CHECKPOINTS / "0010").read_bytes())
  return step, state, extra["data"]


def curve(workdir):
  return [line for line in without_times(lines(workdir)) if line["split"] != "anomaly"]


def noticed(workdir):
  return [(x["step"], x["kind"], x["action"], x["first_row"]) for x in lines(workdir) if x["split"] == "anomaly"]


def test_a_run_that_skips_is_the_run_without_that_batch(world, tmp_path, capsys):
  """Batch 8 poisons the weights; step 6 is the newest on disk to go back to."""
  world.without = {8}
  loop.train(with_policy("skip"), tmp_path / "without")
  world.without, world.spikes_on = (), {8: 1e4}
  world.diary.clear()
  loop.train(with_policy("skip"), tmp_path / "run")
  steps = [entry for entry in world.diary if entry.startswith("step")]
  assert steps[7:] == [f"step {n} on batch {place}" for n, place in ((8, 8), (7, 7), (8, 9), (9, 10), (10, 11))]
  assert final(tmp_path / "run") == final(tmp_path / "without")
  assert curve(tmp_path / "run") == curve(tmp_path / "without")
  assert noticed(tmp_path / "run") == [(8, "spike", "skip", 7)]
  assert "warning: step 8: spike (loss 10014" in capsys.readouterr().out


def test_before_the_first_checkpoint_it_goes_back_to_the_start(world, tmp_path):
  run = with_policy("skip")
  run = dataclasses.replace(run, training=dataclasses.replace(run.training, checkpoint_every=10, eval_every=10))
  world.without = {5}
  loop.train(run, tmp_path / "without")
  world.without, world.spikes_on = (), {5: 1e4}
  world.diary.clear()
  loop.train(run, tmp_path / "run")
  assert "step 5 on batch 5" in world.diary and world.diary.count("step 1 on batch 1") == 2
  assert final(tmp_path / "run") == final(tmp_path / "without") and curve(tmp_path / "run") == curve(tmp_path / "without")


@pytest.mark.parametrize("bad", [{8}, {4, 5}, {1}, {6, 7}])
def test_a_step_that_is_not_finite_costs_its_batch(world, tmp_path, bad):
  world.without = bad if bad == {8} else ()
  for policy in ("skip", "log"):
    world.not_finite_on = bad
    loop.train(with_policy(policy), tmp_path / policy)
  batches = [n for n in range(1, 20) if n not in bad][:10]
  w = 1.0
  for batch in batches:
    w = 0.5 * w + batch
  for policy in ("skip", "log"):
    step, state, position = final(tmp_path / policy)
    assert (step, float(state.params["w"]), position) == (10, w, {"row": batches[-1]})
    assert [x[1:3] for x in noticed(tmp_path / policy)] == ([] if bad == {8} else [("not finite", policy)] * len(bad))
  assert [x["step"] for x in curve(tmp_path / "skip") if x["split"] == "train"] == list(range(1, 11))


def test_a_repeated_spike_counts(world, tmp_path):
  world.spikes_on = {8: 1e4}
  loop.train(with_policy("repeat"), tmp_path / "run")
  assert world.diary.count("step 8 on batch 8") == 2 and world.diary.count("step 7 on batch 7") == 2
  assert noticed(tmp_path / "run") == [(8, "spike", "repeat", 7), (8, "spike", "log", 7)]
  loop.train(with_policy("log"), tmp_path / "log")
  assert final(tmp_path / "run") == final(tmp_path / "log") and curve(tmp_path / "run") == curve(tmp_path / "log")
  assert noticed(tmp_path / "log") == [(8, "spike", "log", 7)]


def test_a_fault_that_does_not_come_again_is_told(world, tmp_path, capsys):
  """As of broken hardware: the same state and batch give another loss the second time."""
  spikes = iter([1e4])

  def step(state, batch):
    world.spikes_on = {8: next(spikes, 0.0)} if int(batch["tokens"][0, 0, 0]) == 8 else {}
    return World.step(world, state, batch)
  world.step = step
  loop.train(with_policy("repeat"), tmp_path / "run")
  assert "step 8 repeated: loss 14.01" in (said := capsys.readouterr().out) and "suspect the hardware" in said
  world.step = lambda state, batch: World.step(world, state, batch)
  world.spikes_on = {}
  loop.train(with_policy("repeat"), tmp_path / "undisturbed")
  assert final(tmp_path / "run") == final(tmp_path / "undisturbed")
  assert curve(tmp_path / "run") == curve(tmp_path / "undisturbed")


@pytest.mark.parametrize("policy, run_ends", [("stop", "policy = 'stop'"), ("repeat", "it came again"),
                                              ("skip", "more than anomalies.limit = 2 anomalies within 3 steps")])
def test_what_ends_a_run(world, tmp_path, policy, run_ends):
  world.not_finite_on = {4, 5, 6, 7}
  with pytest.raises(FloatingPointError, match=f"step 4: not finite .* gradient of layers/03/attention/q_b.*{run_ends}"):
    loop.train(with_policy(policy, limit=2), tmp_path / "run")
  assert saved(tmp_path / "run") == [3]


@pytest.mark.parametrize("killed_at, count", [(7, 2), (9, 1)])
def test_a_run_that_is_killed_while_it_recovers_decides_the_same_again(world, tmp_path, killed_at, count):
  world.spikes_on = {8: 1e4}
  loop.train(with_policy("skip"), tmp_path / "whole")

  left = [count]

  def step(state, batch):
    left[0] -= state.step + 1 == killed_at
    if left[0] == 0:
      left[0] = -1
      raise KeyboardInterrupt
    return World.step(world, state, batch)
  world.step = step
  with pytest.raises(KeyboardInterrupt):
    loop.train(with_policy("skip"), tmp_path / "run")
  loop.train(with_policy("skip"), tmp_path / "run")
  assert final(tmp_path / "run") == final(tmp_path / "whole")
  assert without_times(lines(tmp_path / "run")) == without_times(lines(tmp_path / "whole"))


def test_a_run_that_is_stopped_while_it_recovers_leaves_out_the_same(world, tmp_path):
  """The checkpoint of step 7, written between the rollback to 6 and the batch that is left out, knows which that is."""
  world.spikes_on = {8: 1e4}
  loop.train(with_policy("skip"), tmp_path / "whole")
  stop = Stopping()
  world.diary.clear()
  told = lambda place: stop.ask() if world.diary.count("step 7 on batch 7") == 2 else None
  world.reading = told
  with pytest.raises(Stopped, match="stopped after step 7, which is saved"):
    loop.train(with_policy("skip"), tmp_path / "run", stop=stop)
  world.reading = lambda place: None
  world.diary.clear()
  loop.train(with_policy("skip"), tmp_path / "run")
  assert [x for x in world.diary if x.startswith("step")][0] == "step 8 on batch 9"
  assert final(tmp_path / "run") == final(tmp_path / "whole") and curve(tmp_path / "run") == curve(tmp_path / "whole")


def test_what_the_anomalous_step_left_is_freed_first(world, tmp_path, monkeypatch):
  x = jax.numpy.ones(3)
  tools = loop.Tools(with_policy("skip"), None, None, None, lambda: loop.Place(3, "older", {"row": 3}), None, None,
                     *[type("Quiet", (), {"__getattr__": lambda self, name: lambda *a: None})()] * 2, Stopping(),
                     stages.at(with_policy("skip"), 0), None, None, 0.0)
  taken = loop.Taken({}, (7, 8), {"row": 7}, {"row": 8})
  spike = Anomaly("spike", 8, (7, 8), 9.0, 1.0)
  place = loop.recover(tools, loop.Place(7, None, {"row": 7}), loop.Place(8, {"w": x}, {"row": 8}), taken, spike)
  assert place.state == "older" and place.step == 3 and place.record.left_out == ((7, 8),) and x.is_deleted()
