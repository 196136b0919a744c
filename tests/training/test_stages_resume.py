"""A run through real stages on a mesh that is stopped again and again is, bit for bit, the run that nobody disturbed."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from deepseek_v4 import config as c
from deepseek_v4 import sharding
from deepseek_v4.checkpoint.store import CheckpointStore
from deepseek_v4.config import StageConfig
from deepseek_v4.training import loop, metrics
from deepseek_v4.training.state import abstract_state
from deepseek_v4.training.stopping import Stopped, Stopping
from tests.training.fakes import without_times
from tests.training.small import differing
from tests.training.test_trainable import ONE

STAGES = (
  StageConfig("dense", steps=4, sequence_length=24, batch_size=8, accumulation=4, ramp_from=4, ramp_steps=2,
              attention_mode="dense", trainable="all_but_indexer"),
  StageConfig("indexer_warm_up", steps=3, sequence_length=48, attention_mode="dense", trainable="indexer",
              learning_rate=5e-3, decay_steps=2),
  StageConfig("sparse", steps=3, sequence_length=64),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  folder, rng = tmp_path_factory.mktemp("text"), np.random.default_rng(0)
  for i in range(60):
    words = rng.choice("the quick brown fox jumps over a lazy dog".split(), rng.integers(1, 40))
    (folder / f"{i:02d}.txt").write_text(" ".join(words))
  model = dataclasses.replace(ONE.model, vocab_size=320)
  data = c.DataConfig(source="text", path=str(folder), batch_size=4, held_out_percent=20, fim_rate=0.5)
  return dataclasses.replace(ONE, model=model, data=data, stages=STAGES, anomalies=c.AnomalyConfig(window=2),
                             training=c.TrainingConfig(log_every=1, eval_every=5, eval_batches=1, checkpoint_every=3,
                                                       keep_checkpoints=20))


def at(run, mesh, workdir, step, folder):
  """(state, extra) of one step's checkpoint."""
  (folder / "only").mkdir(parents=True)
  (folder / "only" / str(step)).symlink_to(workdir / loop.CHECKPOINTS / str(step))
  with CheckpointStore(folder / "only", keep=2, config_dict=c.to_dict(run)) as store:
    return store.restore_latest(abstract_state(run, mesh))[1:]


@pytest.mark.long
def test_stopped_in_every_stage_and_on_every_border(run, tmp_path, monkeypatch, capsys):
  mesh = sharding.make_mesh(c.MeshConfig(data=1, fsdp=2), jax.devices()[:2])
  loop.train(run, tmp_path / "whole", mesh)
  assert "stage indexer_warm_up from step 5 on trains" in capsys.readouterr().out
  log = loop.log
  for last in (1, 2, 4, 6, 7, 9):
    stop = Stopping()

    def log_and_ask(tools, n, numbers, last=last, stop=stop):
      log(tools, n, numbers)
      if n == last:
        stop.ask()
    monkeypatch.setattr(loop, "log", log_and_ask)
    with pytest.raises(Stopped, match=f"stopped after step {last}, which is saved"):
      loop.train(run, tmp_path / "often", mesh, stop)
  monkeypatch.setattr(loop, "log", log)
  loop.train(run, tmp_path / "often", mesh)
  lines = {name: without_times(metrics.read_lines(tmp_path / name / metrics.LINES)) for name in ("whole", "often")}
  assert lines["often"] == lines["whole"]
  for step in (4, 7, 10):
    (state, extra), (expected, wanted) = (at(run, mesh, tmp_path / name, step, tmp_path / f"{name} {step}")
                                          for name in ("often", "whole"))
    assert differing(state, expected) == [] and json.dumps(extra) == json.dumps(wanted)
  rows = wanted["data"]
  assert rows["earlier"] == [[24, 4 + 6 + 8 + 8], [48, 12]] and rows["row"] == 26 + 12 + 12


@pytest.mark.long
def test_the_warm_up_changes_the_indexer_alone(run, tmp_path):
  """From the border before to the border behind it, three steps later; the language model's loss stays what it was."""
  loop.train(run, tmp_path / "run")
  before, after = (at(run, None, tmp_path / "run", step, tmp_path / str(step))[0] for step in (4, 7))
  for part in ("params", "router", "opt_state"):
    names = [name for name in differing(getattr(before, part), getattr(after, part)) if not name.endswith("count")]
    assert names == [name for name in names if "/indexer/" in name] and bool(names) == (part != "router")
