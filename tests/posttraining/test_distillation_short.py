"""A distillation of two steps: it learns, goes on in the middle of a round, notices other rounds; the same on a mesh."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from deepseek_v4 import config as c
from deepseek_v4.checkpoint.store import restore_variables
from deepseek_v4.posttraining import distillation_loop
from deepseek_v4.sharding import make_mesh
from deepseek_v4.training import metrics
from deepseek_v4.training.stopping import Stopped, Stopping
from tests.posttraining.small import MODEL, run_config, write_run
from tests.training.small import differing, on_host

SHALLOW = dataclasses.replace(MODEL, num_hidden_layers=1, layer_types=(c.SLIDING,), mlp_layer_types=(c.LEARNED,),
                              num_nextn_predict_layers=0)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """One teacher, one round of two steps; prompts of four bytes, replies of eight."""
  root, rng = tmp_path_factory.mktemp("short"), np.random.default_rng(0)
  (root / "text").mkdir()
  for i in range(40):
    (root / "text" / f"{i:02d}.txt").write_text(" ".join(rng.choice("the quick brown fox jumps".split(), 12)))
  write_run(root / "a", SHALLOW)
  return run_config(
    [("a", root / "a", root / "text", 1.0)], SHALLOW, prompt_length=4, shortest_prompt=4, reply_length=8,
    data=c.DataConfig(sequence_length=16, batch_size=8),
    training=c.TrainingConfig(steps=2, log_every=1, eval_every=100, eval_batches=1, checkpoint_every=100))


def lines(workdir):
  clocks = ("seconds", "tokens_per_second")
  return [{name: value for name, value in line.items() if name not in clocks}
          for line in metrics.read_lines(workdir / metrics.LINES)]


def weights(workdir):
  return restore_variables(workdir / "checkpoints")[0]


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
  folder = tmp_path_factory.mktemp("whole") / "run"
  return folder, distillation_loop.distill(run, folder)


def test_a_student_comes_closer_to_its_teacher(whole):
  folder, summary = whole
  train = [line for line in lines(folder) if line["split"] == "train"]
  assert [line["step"] for line in train] == [1, 2] and train[1]["kl"] < 0.98 * train[0]["kl"]
  assert summary["steps"] == 2 and 16 <= summary["sampled_tokens"] <= 2 * 8 * 8
  assert json.loads((folder / metrics.SUMMARY).read_text())["held_out"]["a"] == summary["held_out"]["a"]


def test_stopped_in_the_middle_of_a_round_it_goes_on_without_sampling(run, whole, tmp_path, monkeypatch):
  stop, count = Stopping(), distillation_loop.kl_by_teacher

  def after_the_first(*args):
    stop.ask()
    return count(*args)
  with monkeypatch.context() as patched:
    patched.setattr(distillation_loop, "kl_by_teacher", after_the_first)
    with pytest.raises(Stopped, match="stopped after step 1, which is saved"):
      distillation_loop.distill(run, tmp_path / "run", stop=stop)
  other = dataclasses.replace(run, distillation=dataclasses.replace(run.distillation, steps_per_round=1))
  with pytest.raises(ValueError, match="distillation.steps_per_round = 1: expected 2, with which the run in .* has done 1"):
    distillation_loop.distill(other, tmp_path / "run")
  monkeypatch.setattr(distillation_loop, "sample_replies", lambda *_, **__: pytest.fail("sampled again"))
  distillation_loop.distill(run, tmp_path / "run")
  assert differing(weights(tmp_path / "run"), weights(whole[0])) == []
  assert lines(tmp_path / "run") == lines(whole[0])


@pytest.mark.long
def test_a_round_on_four_devices_is_that_of_one(run, whole, tmp_path):
  """The same replies; float32 sums in another order, which the first updates enlarge up to a hundredth of a step."""
  distillation_loop.distill(run, tmp_path / "run", make_mesh(c.MeshConfig(data=2, tensor=2), jax.devices()[:4]))
  replies = lambda folder: (folder / "samples" / "000000.jsonl").read_text().count("token")
  assert replies(tmp_path / "run") == replies(whole[0])
  for found, want in zip(lines(tmp_path / "run"), lines(whole[0]), strict=True):
    assert found.keys() == want.keys()
    for name, value in want.items():
      assert found[name] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-4, abs=1e-6)), name
  wanted = on_host(weights(whole[0]))
  for name, x in on_host(weights(tmp_path / "run")).items():
    np.testing.assert_allclose(x, wanted[name], atol=1e-2 * run.optimizer.learning_rate, err_msg=name)
