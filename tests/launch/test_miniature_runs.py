"""What miniatures take from their folders, and what they refuse; shares of held-out text that have no document in common."""

import dataclasses
import json
import pathlib

import pytest

from deepseek_v4 import config as c
from deepseek_v4.training import metrics, sources
from launch.miniatures import runs

RUN = c.RunConfig(training=c.TrainingConfig(steps=4), optimizer=c.OptimizerConfig(warmup_steps=0))


def train(run_config, folder):
  """Leaves what a finished run leaves."""
  folder.mkdir(parents=True, exist_ok=True)
  metrics.write_json(folder / "config.json", c.to_dict(run_config))
  metrics.write_json(folder / metrics.SUMMARY, {})


def changed(**settings):
  return dataclasses.replace(RUN, optimizer=dataclasses.replace(RUN.optimizer, **settings))


def test_a_run_is_made_once(tmp_path):
  said = []
  first = runs.trained(RUN, tmp_path / "a", train, said.append)
  assert 0 <= first < 60 and len(said) == 1
  assert runs.trained(RUN, tmp_path / "a", lambda *_: pytest.fail("trained again"), said.append) == first


def test_one_that_was_interrupted_goes_on_and_its_time_is_not_known(tmp_path):
  train(RUN, tmp_path / "a")
  (tmp_path / "a" / metrics.SUMMARY).unlink()
  assert not runs.finished(RUN, tmp_path / "a") and not runs.finished(RUN, tmp_path / "new")
  assert runs.trained(RUN, tmp_path / "a", train, print) is None and runs.finished(RUN, tmp_path / "a")


@pytest.mark.parametrize("done", [True, False])
def test_a_run_with_other_settings_is_refused(tmp_path, done):
  """Finished or not, in words that name each setting, what it is there and what is asked; nothing is trained."""
  train(RUN, tmp_path / "a")
  if not done:
    (tmp_path / "a" / metrics.SUMMARY).unlink()
  said = (r"a was made with other settings \(there -> expected\): optimizer.learning_rate: 0.00027 -> 0.5; expected another "
          r"--workdir, or the whole --workdir deleted: later runs may have been made from this one")
  with pytest.raises(ValueError, match=said):
    runs.trained(changed(learning_rate=0.5), tmp_path / "a", lambda *_: pytest.fail("trained"), print)


def test_all_runs_are_looked_at_before_one_is_trained(tmp_path):
  """Other settings of the last one; and a finished run whose start or teacher is not."""
  start, student = tmp_path / "start", tmp_path / "student"
  of = lambda **training: dataclasses.replace(RUN, training=dataclasses.replace(RUN.training, **training))
  wanted = {start: RUN, student: of(init_from=str(start))}
  runs.refuse_other_runs(wanted)
  train(RUN, start)
  runs.refuse_other_runs(wanted)
  train(wanted[student], student)
  runs.refuse_other_runs(wanted)
  with pytest.raises(ValueError, match="student was made with other settings .*training.seed: 0 -> 1"):
    runs.refuse_other_runs({start: RUN, student: of(init_from=str(start), seed=1)})
  (start / metrics.SUMMARY).unlink()
  with pytest.raises(ValueError, match="student is finished, and was made from .*start, which is not; expected another"):
    runs.refuse_other_runs(wanted)
  taught = dataclasses.replace(RUN, distillation=c.DistillationConfig(teachers=(c.TeacherConfig("a", str(start)),)))
  train(taught, tmp_path / "taught")
  with pytest.raises(ValueError, match="taught is finished, and was made from .*start, which is not"):
    runs.refuse_other_runs({start: RUN, tmp_path / "taught": taught})


def test_a_plan_is_compared_before_anything_else(tmp_path):
  folder = tmp_path / "new" / "workdir"
  runs.refuse_other_plan(folder, {"plan": {"steps": 3, "sizes": (1, 2)}})
  runs.refuse_other_plan(folder, {"plan": {"steps": 3, "sizes": (1, 2)}})
  with pytest.raises(ValueError, match="plan.steps: 3 -> 4"):
    runs.refuse_other_plan(folder, {"plan": {"steps": 4, "sizes": (1, 2)}})
  (tmp_path / "file").write_text("")
  with pytest.raises(ValueError, match="--workdir = .*file/a': expected a folder; .*file is a file"):
    runs.refuse_other_plan(tmp_path / "file" / "a", {})


def test_shares_of_held_out_text(tmp_path):
  """Every held-out document is in one of them, none in both; read as held-out text they are nearly whole."""
  (tmp_path / "text").mkdir()
  for i in range(200):
    (tmp_path / "text" / f"{i}.txt").write_text(f"document {i} " * (5 + i % 7))
  data = c.DataConfig(source="text", path=str(tmp_path / "text"), held_out_percent=40, sequence_length=64, batch_size=2)
  held_out = [text.decode() for text in sources.read_texts(data, "held_out").texts]
  found = runs.shares(data, tmp_path / "shares")
  read = lambda name: [json.loads(line)["text"] for line in pathlib.Path(found[name].path).read_text().splitlines()]
  choosing, judging = read(runs.CHOOSING), read(runs.JUDGING)
  assert sorted(choosing + judging) == sorted(held_out) and not set(choosing) & set(judging)
  sizes = [sum(map(len, part)) for part in (choosing, judging)]
  assert max(sizes) - min(sizes) <= max(map(len, held_out))
  for name, part in ((runs.CHOOSING, choosing), (runs.JUDGING, judging)):
    assert len(sources.read_texts(found[name], "held_out").texts) > 0.9 * len(part)
    assert (found[name].sequence_length, found[name].batch_size) == (64, 2)
  assert runs.shares(data, tmp_path / "shares") == found


def test_a_document_that_is_there_twice_is_in_one_share(tmp_path):
  (tmp_path / "text").mkdir()
  for name in ("one", "two"):
    (tmp_path / "text" / f"{name}.txt").write_text("the same document")
  data = c.DataConfig(source="text", path=str(tmp_path / "text"), held_out_percent=99, sequence_length=64, batch_size=2)
  assert list(sources.read_texts(data, "held_out").texts) == 2 * [b"the same document"]
  found = runs.shares(data, tmp_path / "shares")
  assert sum(pathlib.Path(part.path).read_text().count("the same document") for part in found.values()) == 1
