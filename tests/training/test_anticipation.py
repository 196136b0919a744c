"""Anticipatory routing: which parameters choose for which step, resuming, what it changes; a real step with its own choices.

The loop's tests use the fakes of fakes.py: batch 8 spikes, step 6 is the newest on disk to go back to. The fake routing
pass returns the weight that it sees, and the fake step moves its weight by a thousandth of that.
"""

import dataclasses
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from deepseek_v4 import sharding
from deepseek_v4.checkpoint.store import restore_variables
from deepseek_v4.config import AnomalyConfig, MeshConfig
from deepseek_v4.training import anomalies, anticipation, loop
from deepseek_v4.training.anomalies import Anomaly, Record
from deepseek_v4.training.feed import abstract_batch
from deepseek_v4.training.state import abstract_state
from deepseek_v4.training.step import make_train_step
from deepseek_v4.training.stopping import Stopped, Stopping
from tests.launch.small_run import get_config
from tests.training.fakes import RUN, World, lines, without_times
from tests.training.small import RUN as SMALL
from tests.training.small import differing, random_batch, random_state, single_step
from tests.training.test_anomalies import curve, noticed


class RoutedWorld(World):
  """The fakes with a routing pass; a step on a batch with experts notes what weight chose them."""

  def __init__(self, monkeypatch):
    super().__init__(monkeypatch)
    monkeypatch.setattr(anticipation, "make_routing_pass", lambda run_config, mesh: SimpleNamespace(
      lower=lambda state, batch: SimpleNamespace(out_info={"experts": batch["tokens"]}, compile=lambda: self.choose)))
    monkeypatch.setattr(anticipation, "make_train_step", lambda run_config, mesh: self)
    self.spikes, self.calmed = {8: 1e4}, True
    self.chosen = []  # (steps done, batch)

  def choose(self, state, batch):
    self.chosen.append((state.step, int(batch["tokens"][0, 0, 0])))
    return {"experts": np.float64(state.params["w"])}

  def step(self, state, batch):
    self.spikes_on = {} if "experts" in batch and self.calmed else self.spikes
    new, values = super().step(state, batch)
    if "experts" in batch:
      new = dataclasses.replace(new, params={"w": new.params["w"] + 1e-3 * float(batch["experts"])})
    return new, values


@pytest.fixture
def world(monkeypatch):
  return RoutedWorld(monkeypatch)


def run_of(delay=2, steps=4, every=3, **changes):
  training = dataclasses.replace(RUN.training, steps=16, checkpoint_every=every, eval_every=16)
  changes = dict(policy="anticipate", window=3, anticipation_delay=delay, anticipation_steps=steps) | changes
  return dataclasses.replace(RUN, training=training, anomalies=AnomalyConfig(**changes))


def ages(workdir):
  return {x["step"]: x["routing_age"] for x in lines(workdir) if "routing_age" in x}


# ---- which parameters choose for which step ----------------------------------------------------------------------------
def test_choices_are_made_delay_steps_ahead_and_anew_at_each_checkpoint(world, tmp_path, capsys):
  """The period reaches from step 7 to step 13, six steps from the spike on; checkpoints are at 9 and 12."""
  loop.train(run_of(steps=6), tmp_path)
  assert world.chosen == [(6, 7), (6, 8), (6, 9), (9, 10), (9, 11), (9, 12), (12, 13)]
  assert ages(tmp_path) == {7: 0, 8: 1, 9: 2, 10: 0, 11: 1, 12: 2, 13: 0}
  assert noticed(tmp_path) == [(8, "spike", "anticipate", 7)]
  assert [x for x in world.diary if x.startswith("step")][7:] == [
    f"step {n} on batch {n}" for n in (8, *range(7, 17))]
  said = capsys.readouterr().out
  assert "step 8 computed again with older routing: loss" in said and "hardware" not in said
  assert "anticipatory routing ends with step 13: 7 forward-only passes" in said


def test_between_checkpoints_the_age_is_the_delay(world, tmp_path):
  """Step 6 is one to go back to, and the next is the last; the age grows to the delay and stays. Of the run's end no batch
  is chosen for."""
  run = run_of(delay=3, steps=40, every=6)
  loop.train(dataclasses.replace(run, training=dataclasses.replace(run.training, steps=12)), tmp_path)
  assert ages(tmp_path) == {7: 0, 8: 1, 9: 2, 10: 3, 11: 3, 12: 3}
  assert world.chosen == [(6, 7), (6, 8), (6, 9), (6, 10), (7, 11), (8, 12)]
  assert {"routing_seconds", "tokens_per_second"} <= set(lines(tmp_path)[-2])


def test_the_step_takes_what_was_chosen_for_its_batch(world, tmp_path):
  """The weights by hand: w <- w / 2 + batch + 0.001 x the weight that chose."""
  loop.train(run_of(), tmp_path)
  w, losses = [1.0], []
  for n in range(1, 17):
    older = {7: 6, 8: 6, 9: 6, 10: 9, 11: 9}.get(n)
    losses.append(0.5 * w[-1] + n)
    w.append(losses[-1] + (0 if older is None else 1e-3 * w[older]))
  assert [x["loss"] for x in lines(tmp_path) if x["split"] == "train"] == losses


def test_without_delay_it_is_the_plain_step(world, tmp_path):
  loop.train(run_of(delay=0), tmp_path / "run")
  assert not world.chosen and not ages(tmp_path / "run")
  loop.train(run_of(policy="repeat"), tmp_path / "repeat")
  assert curve(tmp_path / "run") == curve(tmp_path / "repeat")


# ---- what goes wrong in a period ---------------------------------------------------------------------------------------
def test_a_spike_that_comes_again_counts_and_another_prolongs_the_period(world, tmp_path):
  world.spikes, world.calmed = {8: 1e4, 11: 3e4}, False
  loop.train(run_of(steps=5), tmp_path)
  assert noticed(tmp_path) == [(8, "spike", "anticipate", 7), (8, "spike", "log", 7), (11, "spike", "anticipate", 10),
                               (11, "spike", "log", 10)]
  # what was chosen ahead went with the step that spiked again; from the checkpoint of step 9 on it is as ever
  assert ages(tmp_path) == {7: 0, 8: 1, 9: 0, 10: 0, 11: 1, 12: 0, 13: 0, 14: 1, 15: 2}


def test_not_finite_goes_back_too_and_is_left_out_if_it_comes_again(world, tmp_path):
  world.spikes, world.not_finite_on = {}, {8}
  loop.train(run_of(), tmp_path)
  assert noticed(tmp_path) == [(8, "not finite", "anticipate", 7), (8, "not finite", "log", 7)]
  assert [x for x in world.diary if x.startswith("step")][7:12] == [
    f"step {n} on batch {place}" for n, place in ((8, 8), (7, 7), (8, 8), (8, 9), (9, 10))]
  assert world.chosen[:4] == [(6, 7), (6, 8), (6, 9), (7, 9)]


def test_the_period_is_part_of_the_record():
  spike = Anomaly("spike", 8, (7, 8), 9.0, 1.0)
  record = anomalies.rolled_back(Record(), Record(losses=(1.0,)), spike, "anticipate", 5)
  assert (record.anticipate_until, record.losses, record.left_out, record.repeated) == (12, (1.0,), (), ((7, 9.0),))
  assert anomalies.rolled_back(record, Record(), spike, "anticipate", 2).anticipate_until == 12
  assert anomalies.accepted(record, AnomalyConfig(), 9, 1.0).anticipate_until == 12
  assert Record.from_dict(record.to_dict()) == record


# ---- going on in a period ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("killed_at", range(7, 16))
def test_a_run_that_is_killed_goes_on_as_if_it_had_not_been(world, tmp_path, killed_at):
  loop.train(run_of(steps=6), tmp_path / "whole")
  seen = []

  def step(state, batch):
    seen.append("experts" in batch)
    if state.step + 1 == killed_at and (any(seen) or killed_at > 13) and None not in seen:
      seen.append(None)
      raise KeyboardInterrupt
    return RoutedWorld.step(world, state, batch)
  world.step = step
  with pytest.raises(KeyboardInterrupt):
    loop.train(run_of(steps=6), tmp_path / "run")
  loop.train(run_of(steps=6), tmp_path / "run")
  assert differing_lines(tmp_path / "run", tmp_path / "whole") == []


def differing_lines(a, b):
  timeless = lambda workdir: [{k: v for k, v in x.items() if k != "routing_seconds"} for x in without_times(lines(workdir))]
  return [(x, y) for x, y in zip(timeless(a), timeless(b), strict=True) if x != y]


def test_one_that_was_told_to_stop_between_checkpoints_is_determined_too(world, tmp_path):
  """It goes on from step 10 with choices of step 10, twice the same."""
  for name in ("once", "twice"):
    world.chosen, stop = [], Stopping()

    def choose(state, batch, stop=stop):
      if state.step == 9:
        stop.ask()
      return RoutedWorld.choose(world, state, batch)
    world.choose = choose
    with pytest.raises(Stopped, match="stopped after step 10"):
      loop.train(run_of(steps=8, every=6), tmp_path / name, stop=stop)
    before = len(world.chosen)
    loop.train(run_of(steps=8, every=6), tmp_path / name)
    assert world.chosen[before:before + 3] == [(10, 11), (10, 12), (12, 13)]
  assert not differing_lines(tmp_path / "once", tmp_path / "twice")


@pytest.mark.long
def test_a_real_run_goes_on_in_a_period_bit_for_bit(tmp_path, monkeypatch):
  """The loop with a model of one layer, in which step 5 is called a spike the first time. What the finished run left behind
  its checkpoint of step 6, in the middle of the period, is taken away; the same command computes it again."""
  monkeypatch.setattr(anomalies, "judge", lambda record, config, step, rows, loss, finite: Anomaly(
    "spike", step, rows, loss, 0.0) if step == 5 and anomalies.repeated_loss(record, rows) is None else None)
  (tmp_path / "texts").mkdir()
  for n in range(40):
    (tmp_path / "texts" / f"{n}.txt").write_text(f"document {n}: " + "some words " * (n % 7 + 3))
  run = get_config()
  run = dataclasses.replace(
    run, data=dataclasses.replace(run.data, path=str(tmp_path / "texts"), fim_rate=0.0),
    training=dataclasses.replace(run.training, steps=10, keep_checkpoints=10),
    anomalies=AnomalyConfig("anticipate", anticipation_delay=2, anticipation_steps=20))
  loop.train(run, tmp_path / "run")
  whole = ages(tmp_path / "run")
  assert whole == {4: 0, 5: 1, 6: 2, 7: 0, 8: 1, 9: 2, 10: 0}
  last = restore_variables(tmp_path / "run" / loop.CHECKPOINTS)
  shutil.copytree(tmp_path / "run", tmp_path / "again")
  for step in (9, 10):
    shutil.rmtree(tmp_path / "again" / loop.CHECKPOINTS / str(step))
  loop.train(run, tmp_path / "again")
  again = restore_variables(tmp_path / "again" / loop.CHECKPOINTS)
  assert (last[2], again[2]) == (10, 10) and not differing(last[0], again[0])
  assert ages(tmp_path / "again") == whole and not differing_lines(tmp_path / "run", tmp_path / "again")


# ---- a real step -------------------------------------------------------------------------------------------------------
def with_choices(run, mesh=None):
  """(chooser, step of a batch with experts), compiled for the small run's shapes."""
  state, batch = abstract_state(run, mesh), abstract_batch(run, mesh)
  choose = anticipation.make_routing_pass(run, mesh).lower(state, batch).compile()
  place = None if mesh is None else sharding.batch_sharding(mesh)
  experts = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for name, x in choose.out_info.items()}
  step = make_train_step(run, mesh).lower(state, {**batch, **experts}).compile()
  return choose, step


@pytest.mark.long
def test_a_step_on_choices_of_its_own_parameters_is_the_plain_step():
  """Forward-only pass and replay change no bit of the new state, the losses and the metrics."""
  choose, step = with_choices(SMALL)
  state, batch = random_state(), random_batch()
  put = single_step().put
  experts = choose(put(state), batch)
  assert experts["experts"].shape == (1, 8, 32, 4, 2) and experts["mtp_experts"].shape == (1, 8, 32, 2)
  new, metrics = step(put(state), {**batch, **experts})
  want, expected = single_step()(state, batch)
  assert not differing(new, want) and not differing(metrics, expected)
  # Those of other parameters are followed: by loads, balance loss and the router's bias.
  others = choose(put(random_state(seed=1)), batch)
  new, metrics = step(put(state), {**batch, **others})
  assert float(metrics["loss"]) != float(expected["loss"]) and float(metrics["balance"]) != float(expected["balance"])
  experts, segments = np.asarray(others["experts"][0]), batch["segment_ids"][0]
  for layer, bias in ((1, 0), (3, 1)):
    load = np.bincount(experts[segments > 0, layer].reshape(-1), minlength=8)
    moved = state.router["layers"]["unit_1"]["moe"]["router"]["bias"][bias] + np.float32(1e-2) * np.sign(load.mean() - load)
    np.testing.assert_allclose(new.router["layers"]["unit_1"]["moe"]["router"]["bias"][bias], moved, atol=1e-7)


@pytest.mark.long
@pytest.mark.parametrize("sizes", [dict(fsdp=2, context=2, tensor=2), dict(data=2, expert=2, tensor=2)], ids=str)
def test_on_a_mesh_with_accumulation(sizes):
  """Choices of a mesh, replayed on it, give the numbers of one device's plain step (tolerances of test_mesh.py)."""
  mesh = sharding.make_mesh(MeshConfig(**{"data": 1} | sizes), jax.devices()[:8])
  run = dataclasses.replace(SMALL, data=dataclasses.replace(SMALL.data, accumulation=2))
  choose, step = with_choices(run, mesh)
  state = random_state()
  state = state.replace(key=jax.random.wrap_key_data(np.array(jax.random.key_data(state.key))))  # the step consumes it
  state = jax.device_put(state, jax.tree.map(lambda x: x.sharding, abstract_state(run, mesh)))
  batch = jax.device_put(random_batch(2), sharding.batch_sharding(mesh))
  experts = choose(state, batch)
  _, metrics = step(state, {**batch, **experts})
  _, expected = single_step()(random_state(), random_batch())
  for name in ("loss", "next_token", "mtp", "balance", "indexer", "grad_norm"):
    assert float(metrics[name]) == pytest.approx(float(expected[name]), rel=3e-6), name
