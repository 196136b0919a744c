"""The loop with the fakes of fakes.py: order of work, resuming, what is written, what stops it."""

import dataclasses
import json
import math
import pickle

import numpy as np
import pytest

from deepseek_v4.config import AnomalyConfig
from deepseek_v4.training import loop, metrics, start
from deepseek_v4.training import workdir as workdir_lib
from tests.training.fakes import HELD_OUT_BATCHES, RUN, State, World, lines, saved, without_times


@pytest.fixture
def world(monkeypatch):
  return World(monkeypatch)


def test_a_run_writes_its_files(world, tmp_path, capsys):
  summary = loop.train(RUN, tmp_path / "run")
  workdir = tmp_path / "run"
  assert [(x["split"], x["step"]) for x in lines(workdir)] == [
    ("train", 1), ("train", 2), ("train", 3), ("train", 4), ("held_out", 4), ("train", 5), ("train", 6), ("train", 7),
    ("train", 8), ("held_out", 8), ("train", 9), ("train", 10), ("held_out", 10)]
  assert saved(workdir) == [3, 6, 9, 10]
  assert json.loads((workdir / workdir_lib.CONFIG).read_text())["training"]["steps"] == 10
  assert json.loads((workdir / metrics.SUMMARY).read_text()) == summary
  # 8 bits for 4 tokens, 1.25 tokens per byte; the last evaluation takes all of the held-out batches
  assert summary["held_out"] == {"next_token": pytest.approx(2 * math.log(2)), "tokens": 4 * HELD_OUT_BATCHES,
                                 "bits_per_token": pytest.approx(2), "bits_per_byte": pytest.approx(2.5)}
  assert summary["baselines"] == {"bigram": 3.5, "zlib": 1.5}
  assert world.diary.count("evaluate after 4") == RUN.training.eval_batches
  assert (workdir / metrics.CURVES).read_text() == "13 lines"
  assert list((workdir / metrics.EVENTS).glob("events*"))
  printed = capsys.readouterr().out
  assert "compiled the step in" in printed and "compiled the evaluation in" in printed
  assert "WORSE than zlib" in printed and "1 parameters" in printed


def test_a_folder_release_beside_a_run_from_scratch_stays_where_it_is(world, tmp_path, monkeypatch):
  (tmp_path / "release").mkdir()
  monkeypatch.chdir(tmp_path)
  loop.train(RUN, tmp_path / "run")
  assert not (tmp_path / "run" / "release").exists()


def test_log_every(world, tmp_path):
  run = dataclasses.replace(RUN, training=dataclasses.replace(RUN.training, steps=7, log_every=3, eval_every=100))
  loop.train(run, tmp_path / "run")
  assert [x["step"] for x in lines(tmp_path / "run") if x["split"] == "train"] == [3, 6, 7]


def test_every_step_is_looked_at_before_the_next_one(world, tmp_path):
  loop.train(RUN, tmp_path / "run")
  order = [entry for entry in world.diary if not entry.startswith("evaluate")]
  assert order == [entry for n in range(1, 11) for entry in (f"step {n} on batch {n}", f"fetch {n}")]


def test_a_saved_position_is_that_of_the_saved_step(world, tmp_path):
  """The next batch has been taken by then, for the device not to wait; it is not lost."""
  loop.train(RUN, tmp_path / "run")
  for path in (tmp_path / "run" / loop.CHECKPOINTS).iterdir():
    step, _, extra = pickle.loads(path.read_bytes())
    assert extra["data"] == {"row": step}
    assert len(extra["anomalies"]["losses"]) == step


def test_fewer_steps_than_were_done_are_refused(world, tmp_path):
  loop.train(RUN, tmp_path / "run")
  before = lines(tmp_path / "run")
  shorter = dataclasses.replace(RUN, training=dataclasses.replace(RUN.training, steps=8))
  with pytest.raises(ValueError, match=r"training.steps = 8: expected at least 10, the steps that the run in .* has done"):
    loop.train(shorter, tmp_path / "run")
  assert lines(tmp_path / "run") == before
  assert json.loads((tmp_path / "run" / metrics.SUMMARY).read_text())["steps"] == 10


def test_resumed_equals_uninterrupted(world, tmp_path, capsys):
  loop.train(RUN, tmp_path / "whole")
  world.diary.clear()
  world.killed_at = 9
  with pytest.raises(KeyboardInterrupt):
    loop.train(RUN, tmp_path / "run")
  assert max(x["step"] for x in lines(tmp_path / "run")) == 8  # two steps beyond the checkpoint, written to be dropped
  assert saved(tmp_path / "run")[-1] == 6
  world.killed_at = None
  world.diary.clear()
  loop.train(RUN, tmp_path / "run")
  assert "resumed at step 6" in capsys.readouterr().out
  assert [x for x in world.diary if x.startswith("step")] == [f"step {n} on batch {n}" for n in (7, 8, 9, 10)]
  assert without_times(lines(tmp_path / "run")) == without_times(lines(tmp_path / "whole"))
  final = [pickle.loads((tmp_path / name / loop.CHECKPOINTS / "0010").read_bytes()) for name in ("run", "whole")]
  assert final[0] == final[1]


def test_weights_of_another_run_are_where_a_new_run_starts(world, tmp_path, monkeypatch, capsys):
  """And only a new one: one that has a checkpoint goes on from its own, whatever the setting says."""
  asked = []

  def state_from(run_config, key, mesh, say):
    asked.append(run_config.training.init_from)
    return State(0, {"w": np.float64(64.0)})

  monkeypatch.setattr(start, "state_from", state_from)
  monkeypatch.setattr(loop, "check_source", lambda run_config, mesh: asked.append("fits?"))
  (tmp_path / "other" / "release").mkdir(parents=True)
  (tmp_path / "other" / "release" / "tokenizer.json").write_text("{}")
  training = dataclasses.replace(RUN.training, init_from=str(tmp_path / "other"))
  run = dataclasses.replace(RUN, training=dataclasses.replace(training, steps=3))
  loop.train(run, tmp_path / "run")
  assert lines(tmp_path / "run")[0]["loss"] == 0.5 * 64 + 1
  assert (tmp_path / "run" / "release" / "tokenizer.json").read_text() == "{}"
  (tmp_path / "run" / "release" / "tokenizer.json").write_text("kept")
  loop.train(dataclasses.replace(run, training=training), tmp_path / "run")
  assert "resumed at step 3" in capsys.readouterr().out
  assert asked == ["fits?", str(tmp_path / "other")] and lines(tmp_path / "run")[-1]["step"] == 10
  assert (tmp_path / "run" / "release" / "tokenizer.json").read_text() == "kept"


def test_a_finished_run_is_only_evaluated_again(world, tmp_path):
  loop.train(RUN, tmp_path / "run")
  before = lines(tmp_path / "run")
  world.diary.clear()
  summary = loop.train(RUN, tmp_path / "run")
  assert not [x for x in world.diary if x.startswith("step")]
  assert lines(tmp_path / "run") == before
  assert summary["held_out"]["bits_per_byte"] == pytest.approx(2.5)


def test_a_run_stopped_before_its_first_checkpoint_starts_again(world, tmp_path):
  world.killed_at = 2
  with pytest.raises(KeyboardInterrupt):
    loop.train(RUN, tmp_path / "run")
  world.killed_at = None
  with pytest.warns(UserWarning, match="holds a run of 1 steps, but no checkpoint .*: it starts over"):
    loop.train(RUN, tmp_path / "run")
  assert [x["step"] for x in lines(tmp_path / "run") if x["split"] == "train"] == list(range(1, 11))


@pytest.mark.parametrize("bad, saved_before", [(5, [3]), (6, [3]), (7, [3, 6])])
def test_not_finite_stops_with_the_name_and_saves_nothing(world, tmp_path, bad, saved_before):
  world.not_finite_at = bad
  run = dataclasses.replace(RUN, anomalies=AnomalyConfig(policy="stop"))
  said = (rf"step {bad}: not finite \(loss .*\) on rows {bad - 1} to {bad - 1} of the data: "
          r"gradient of layers/03/attention/q_b\. The run ends: anomalies.policy = 'stop'\. Nothing")
  with pytest.raises(FloatingPointError, match=said):
    loop.train(run, tmp_path / "run")
  state, place = world.searched
  assert place == bad  # the batch of the step that failed
  assert state.step == bad - 1  # and the state that step was given
  assert f"step {bad + 1} on batch {bad + 1}" not in world.diary
  assert saved(tmp_path / "run") == saved_before
  assert max(x["step"] for x in lines(tmp_path / "run")) == bad - 1


def test_a_search_that_finds_nothing_says_so(world, tmp_path, monkeypatch):
  world.not_finite_at = 2
  monkeypatch.setattr(loop, "find_non_finite", lambda run_config, mesh: lambda state, batch: None)
  with pytest.raises(FloatingPointError, match="step 2: not finite .*: no tensor when the step is repeated"):
    loop.train(dataclasses.replace(RUN, anomalies=AnomalyConfig(policy="stop")), tmp_path / "run")


def test_a_folder_that_is_no_run_is_refused(world, tmp_path):
  (tmp_path / "thesis.tex").write_text("years of work")
  with pytest.raises(ValueError, match="workdir = .*expected a new or an empty folder.*it holds thesis.tex"):
    loop.train(RUN, tmp_path)
  with pytest.raises(ValueError, match="expected a folder"):
    loop.train(RUN, tmp_path / "thesis.tex")
  assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_changed_settings_are_named(world, tmp_path, capsys):
  loop.train(RUN, tmp_path / "run")
  longer = dataclasses.replace(RUN, training=dataclasses.replace(RUN.training, steps=12))
  loop.train(longer, tmp_path / "run")
  assert "changed since the last start: training.steps: 10 -> 12" in capsys.readouterr().out
  assert [x["step"] for x in lines(tmp_path / "run") if x["split"] == "train"] == list(range(1, 13))


def test_changes_are_found_at_every_depth():
  old, new = {"a": 1, "b": {"c": [1, 2], "d": None}}, {"a": 1, "b": {"c": [1, 3], "d": {"e": 1}}, "f": 0}
  assert workdir_lib.changes(old, new) == ["b.c: [1, 2] -> [1, 3]", "b.d: None -> {'e': 1}", "f: None -> 0"]
