"""Stages: pure functions by counting, one real step of each kind, and the loop with the fakes of fakes.py."""

import dataclasses
import math
import pickle

import numpy as np
import pytest

from deepseek_v4 import config as c
from deepseek_v4 import optim
from deepseek_v4.config import StageConfig
from deepseek_v4.training import feed, loop, stages, trainable
from deepseek_v4.training.stopping import Stopped, Stopping
from tests.test_stage_settings import RUN
from tests.training import fakes
from tests.training.fakes import World, lines, saved, without_times


# ---- which stage, which settings ---------------------------------------------------------------------------------------
def test_phases_follow_each_other_and_hold_every_step_once():
  found = stages.phases(RUN)
  assert [step for phase in found for step in range(phase.first, phase.end)] == list(range(32))
  assert [(p.stage, p.begin, p.steps, p.first, p.end, p.run_config.data.batch_size) for p in found] == [
    ("dense", 0, 10, 0, 2, 2), ("dense", 0, 10, 2, 3, 4), ("dense", 0, 10, 3, 5, 6), ("dense", 0, 10, 5, 6, 8),
    ("dense", 0, 10, 6, 7, 10), ("dense", 0, 10, 7, 10, 12), ("warm-up", 10, 5, 10, 15, 6), ("sparse", 15, 17, 15, 32, 6)]
  for phase in found:
    data = phase.run_config.data
    assert data.batch_size // data.accumulation == {"dense": 2, "warm-up": 6, "sparse": 2}[phase.stage]
    assert phase.total == 32 and phase.run_config.stages == () and phase.run_config.training.watch_gradients
    assert stages.at(RUN, phase.first) == stages.at(RUN, phase.end - 1) == phase
  assert stages.at(RUN, 32) == found[-1]


def test_a_run_without_stages_is_one_phase_with_its_own_settings():
  run = c.RunConfig()
  (phase,) = stages.phases(run)
  assert all(x is run for x in (phase.run_config, phase.stage_config, stages.of_stage(run), stages.shortest(run)))
  assert (phase.stage, phase.first, phase.end, phase.total) == ("", 0, 10_000, 10_000)
  assert not run.training.watch_gradients and stages.table(run) == []


def test_a_stage_has_its_own_settings_and_the_runs_for_the_rest():
  dense, warm_up, sparse = (stages.of_stage(RUN, name) for name in ("dense", "warm-up", "sparse"))
  assert [x.training.attention_mode for x in (dense, warm_up, sparse)] == ["dense", "dense", "sparse"]
  assert [x.training.trainable for x in (dense, warm_up, sparse)] == ["all_but_indexer", "indexer", "all"]
  assert [(x.data.sequence_length, x.data.batch_size, x.data.accumulation) for x in (dense, warm_up, sparse)] == [
    (64, 12, 6), (128, 6, 1), (512, 6, 3)]
  assert [x.loss.mtp_weight for x in (dense, warm_up, sparse)] == [0.3, 0.3, 0.2]
  assert [x.loss.mtp_weight_final for x in (dense, warm_up, sparse)] == [0.1, 0.3, 0.2]
  for settings in (dense, warm_up, sparse):
    assert settings.model == RUN.model and settings.anomalies == RUN.anomalies and settings.data.seed == RUN.data.seed
  assert stages.of_stage(RUN) == stages.of_stage(RUN, "0") == dense and stages.of_stage(RUN, "2") == sparse
  assert stages.shortest(RUN) == dense


@pytest.mark.parametrize("run, name, said", [(RUN, "long", "expected one of dense, warm-up, sparse"), (RUN, "3", "expected"),
                                             (c.RunConfig(), "dense", "expected none, as the run has no stages")])
def test_a_stage_that_is_not_there(run, name, said):
  with pytest.raises(ValueError, match=f"stage = '{name}': {said}"):
    stages.of_stage(run, name)


def test_the_learning_rate_goes_over_all_stages_but_those_with_their_own():
  run = dataclasses.replace(RUN, optimizer=c.OptimizerConfig(learning_rate=8e-4, warmup_steps=4, decay_steps=10))
  for step in range(32):
    if 10 <= step < 15:  # the warm-up: its own peak, two steps of its own to get there, no cosine
      expected = 1e-3 * min((step - 9) / 2, 1)
    else:
      part = max(step + 1 - 22, 0) / 10
      expected = 8e-4 * min((step + 1) / 4, 1) * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * part)))
    assert stages.learning_rate(run, step) == pytest.approx(expected, rel=1e-6)  # float32
  assert stages.learning_rate(run, 20) == float(optim.make_schedule(run.optimizer, 32)(20))


def test_a_schedule_of_its_own_may_end_in_a_cosine():
  stage = dataclasses.replace(RUN.stages[1], warmup_steps=1, decay_steps=4)
  run = dataclasses.replace(RUN, stages=(RUN.stages[0], stage, RUN.stages[2]))
  rates = [stages.learning_rate(run, step) for step in range(10, 15)]
  cosine = [1e-3 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * i / 4))) for i in range(5)]
  np.testing.assert_allclose(rates, cosine, rtol=1e-6)


def test_the_prediction_blocks_weight_drops_with_the_runs_cosine():
  """0.3, and 0.1 from the start of the decay, also in a stage that has its own schedule there."""
  run = dataclasses.replace(RUN, optimizer=c.OptimizerConfig(warmup_steps=0, decay_steps=25),
                            stages=(*RUN.stages[:2], dataclasses.replace(RUN.stages[2], mtp_weight=None)))
  assert optim.decay_start(run.optimizer, 32) == 7
  warm_up, sparse = (stages.of_stage(run, name) for name in ("warm-up", "sparse"))
  assert (warm_up.loss.mtp_weight, warm_up.loss.mtp_weight_final) == (0.1, 0.1)
  assert (sparse.loss.mtp_weight, sparse.loss.mtp_weight_final) == (0.3, 0.1)
  assert optim.decay_start(sparse.optimizer, sparse.training.steps) == 7


def test_the_table_names_every_stage():
  assert stages.table(RUN) == [
    "stage dense: steps 1 to 10, rows of 64 tokens, 2 to 12 a batch, dense attention, trains all_but_indexer",
    "stage warm-up: steps 11 to 15, rows of 128 tokens, 6 a batch, dense attention, trains indexer",
    "stage sparse: steps 16 to 32, rows of 512 tokens, 6 a batch, sparse attention, trains all"]


def test_batches_are_those_of_the_first_stage():
  assert feed.batch_shape(RUN) == (6, 2, 64)
  assert feed.batch_shape(stages.at(RUN, 0).run_config) == (1, 2, 64)


# ---- the loop ------------------------------------------------------------------------------------------------------------
STAGED = dataclasses.replace(fakes.RUN, stages=(
  StageConfig("short", steps=4), StageConfig("middle", steps=2, sequence_length=4), StageConfig("long", steps=4)))


@pytest.fixture
def world(monkeypatch):
  monkeypatch.setattr(trainable, "group_of", lambda path: "norms")  # of the fakes' only weight
  return World(monkeypatch)


def test_a_run_with_stages_goes_from_one_to_the_next(world, tmp_path, capsys):
  loop.train(STAGED, tmp_path / "run")
  assert [x for x in world.diary if x.startswith("step")] == [f"step {n} on batch {n}" for n in range(1, 11)]
  assert saved(tmp_path / "run") == [3, 4, 6, 9, 10]  # every third step, and at the end of each stage
  found = [(x["step"], x["stage"]) for x in lines(tmp_path / "run") if x["split"] == "train"]
  assert found == [(n, "short" if n < 5 else "middle" if n < 7 else "long") for n in range(1, 11)]
  assert [(x["step"], x["stage"]) for x in lines(tmp_path / "run") if x["split"] == "held_out"] == [
    (4, "short"), (8, "long"), (10, "long")]
  printed = capsys.readouterr().out
  for name, first, last in (("short", 1, 4), ("middle", 5, 6), ("long", 7, 10)):
    assert f"stage {name}: steps {first} to {last}," in printed and f"stage {name} from step {first} on trains 1" in printed
  assert printed.count("compiled the step in") == 3 and "step 5/10  middle  loss" in printed


def test_without_stages_nothing_says_stage(world, tmp_path, capsys):
  loop.train(fakes.RUN, tmp_path / "run")
  assert "stage" not in capsys.readouterr().out and not [x for x in lines(tmp_path / "run") if "stage" in x]


@pytest.mark.parametrize("stop_at", [1, 3, 4, 5, 6, 9])
def test_resumed_in_the_right_stage_also_on_a_border(world, tmp_path, stop_at, capsys):
  loop.train(STAGED, tmp_path / "whole")
  world.diary.clear()
  stop = Stopping()
  world.reading = lambda place: stop.ask() if place == stop_at + 1 else None
  with pytest.raises(Stopped, match=f"stopped after step {stop_at}, which is saved"):
    loop.train(STAGED, tmp_path / "run", stop=stop)
  world.reading = lambda place: None
  capsys.readouterr()
  loop.train(STAGED, tmp_path / "run")
  first = next(x for x in capsys.readouterr().out.splitlines() if " on trains " in x)
  name = "short" if stop_at < 4 else "middle" if stop_at < 6 else "long"
  assert first.startswith(f"stage {name} from step {stop_at + 1} on")
  assert [x for x in world.diary if x.startswith("step")] == [f"step {n} on batch {n}" for n in range(1, 11)]
  assert without_times(lines(tmp_path / "run")) == without_times(lines(tmp_path / "whole"))
  final = [pickle.loads((tmp_path / name / loop.CHECKPOINTS / "0010").read_bytes()) for name in ("run", "whole")]
  assert final[0] == final[1]


def test_losses_of_another_stage_make_no_spike(world, tmp_path):
  """Losses grow by a factor of ten with the second stage; within a stage the same would be a spike."""
  run = dataclasses.replace(STAGED, anomalies=c.AnomalyConfig(policy="stop", window=3))
  world.spikes_on = {5: 1e4}
  loop.train(run, tmp_path / "run")
  one = dataclasses.replace(fakes.RUN, anomalies=run.anomalies)
  with pytest.raises(FloatingPointError, match="step 5: spike"):
    loop.train(one, tmp_path / "one")


def test_a_spike_behind_a_border_goes_back_across_it(world, tmp_path):
  """The checkpoint of the border is lost: the run goes on in the stage before, and comes to the border once more."""
  stage = lambda name, steps, length: StageConfig(name, steps=steps, sequence_length=length)
  run = dataclasses.replace(STAGED, anomalies=c.AnomalyConfig(policy="skip", window=2),
                            stages=(stage("a", 4, 4), stage("b", 6, 2)))
  world.without = {8}
  loop.train(run, tmp_path / "without")
  world.without, world.spikes_on = (), {8: 1e4}
  world.diary.clear()

  def lose(place):
    for n in (4, 6):
      if place == 8 and world.diary.count("step 7 on batch 7") == 1 and "step 8 on batch 8" not in world.diary:
        (tmp_path / "run" / loop.CHECKPOINTS / f"{n:04d}").unlink(missing_ok=True)
  world.reading = lose
  loop.train(run, tmp_path / "run")
  steps = [x for x in world.diary if x.startswith("step")]
  assert steps[7:] == [f"step {n} on batch {place}" for n, place in (
    (8, 8), (4, 4), (5, 5), (6, 6), (7, 7), (8, 9), (9, 10), (10, 11))]
  ends = [pickle.loads((tmp_path / name / loop.CHECKPOINTS / "0010").read_bytes()) for name in ("run", "without")]
  assert ends[0][1:2] == ends[1][1:2] and ends[0][2]["data"] == ends[1][2]["data"]


def test_who_gets_no_gradient_ends_the_run_with_its_name(world, tmp_path, monkeypatch):
  """Two groups get none from step 5 on; it is met where the stage's logging interval is over."""
  step = world.step

  def without_gradient(state, batch):
    state, values = step(state, batch)
    zero = 0.0 if state.step > 4 else 1.0
    return state, values | {"grad_norm/mtp": zero, "grad_norm/indexer": zero, "grad_norm/norms": float(state.step % 2)}
  world.step = without_gradient
  run = dataclasses.replace(STAGED, training=dataclasses.replace(STAGED.training, log_every=3))
  with pytest.raises(FloatingPointError, match="stage middle, steps 5 to 6: the gradient of indexer, mtp was exactly 0"):
    loop.train(run, tmp_path / "run")
  assert saved(tmp_path / "run")[-1] == 4
  one = dataclasses.replace(fakes.RUN, training=run.training)
  with pytest.raises(FloatingPointError, match="^steps 5 to 7: the gradient of indexer, mtp was exactly 0"):
    loop.train(one, tmp_path / "one")
