"""A workdir with another kind of run: all three loops refuse it before they compile or write anything."""

import dataclasses
import itertools
import json

import pytest

from deepseek_v4 import config as c
from deepseek_v4.checkpoint.store import CheckpointStore
from deepseek_v4.posttraining import distillation_loop, reinforcement
from deepseek_v4.training import loop
from deepseek_v4.training.state import abstract_state
from tests.posttraining.small import MODEL, run_config, write_run

MINE = {"text": "a run on text", "teachers": "a distillation", "rewards": "a run with reinforcement"}
LOOPS = {"text": loop.train, "teachers": distillation_loop.distill, "rewards": reinforcement.reinforce}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
  """The folder of a run on text, of which nothing but the checkpoint is left."""
  folder = tmp_path_factory.mktemp("teacher")
  write_run(folder, MODEL)
  return folder


@pytest.fixture(scope="module")
def runs(teacher, tmp_path_factory):
  """A run of each kind, with the same model."""
  folder = tmp_path_factory.mktemp("data")
  for i in range(40):
    (folder / f"{i}.txt").write_text("some words " * 9)
  talks = folder / "talks.jsonl"
  talks.write_text("".join(json.dumps({"messages": [{"role": "user", "content": f"{i}"}], "answer": "1"}) + "\n"
                           for i in range(40)))
  text = c.DataConfig(source="text", path=str(folder), held_out_percent=20, sequence_length=48, batch_size=4)
  chat = c.DataConfig(source="chat", path=str(talks), held_out_percent=20, sequence_length=96, batch_size=4)
  rewards = c.ReinforcementConfig(problems=2, replies=2, minibatches=2, max_new_tokens=8, reasoning_effort="none")
  short = c.TrainingConfig(steps=4)
  plain = c.OptimizerConfig(warmup_steps=0)
  return {"text": c.RunConfig(model=MODEL, data=text, training=short, optimizer=plain),
          "teachers": run_config([("a", teacher, folder, 1.0)]),
          "rewards": c.RunConfig(model=dataclasses.replace(MODEL, max_position_embeddings=128), data=chat, training=short,
                                 optimizer=plain, reinforcement=rewards)}


@pytest.mark.parametrize("there, asked", list(itertools.permutations(MINE, 2)))
def test_a_run_of_another_kind_is_refused_by_its_settings(runs, tmp_path, there, asked):
  """Also where it never came to a checkpoint."""
  (tmp_path / "config.json").write_text(json.dumps(c.to_dict(runs[there])))
  with pytest.raises(ValueError, match=f"workdir = .* holds {MINE[there]}: expected a new or an empty folder, or one that "
                                       f"holds {MINE[asked]}"):
    LOOPS[asked](runs[asked], tmp_path)
  assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("asked", ["teachers", "rewards"])
def test_a_run_of_another_kind_is_refused_by_its_checkpoints(runs, teacher, asked):
  with pytest.raises(ValueError, match=f"checkpoints holds a run on text: expected .* holds {MINE[asked]}"):
    LOOPS[asked](runs[asked], teacher)
  assert [path.name for path in teacher.iterdir()] == ["checkpoints"]


def test_what_a_checkpoint_holds(runs, teacher, tmp_path):
  """The manifest is enough: neither a tree of another kind of run nor converted weights are read."""
  shapes = abstract_state(runs["text"])
  for kind in ("teachers", "rewards"):
    store = CheckpointStore(teacher / "checkpoints", keep=1, config_dict=c.to_dict(runs[kind]))
    with store, pytest.raises(ValueError, match="holds a run on text"):
      store.restore_latest(shapes)
  with CheckpointStore(tmp_path, keep=1, config_dict={"model": c.to_dict(MODEL)}) as store:
    store.save(1, {"x": [1.0]}, {})
  with CheckpointStore(tmp_path, keep=1, config_dict=c.to_dict(runs["text"])) as store:
    with pytest.raises(ValueError, match="holds converted weights: expected .* a run on text"):
      store.restore_latest(shapes)
