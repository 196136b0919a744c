"""A whole distillation: what it learns, that a run which is killed goes on as if nothing had happened, what is refused."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from deepseek_v4 import config as c
from deepseek_v4.checkpoint.store import CheckpointStore
from deepseek_v4.posttraining import distillation_loop
from deepseek_v4.sharding import make_mesh
from deepseek_v4.training import metrics
from deepseek_v4.training.state import abstract_state
from launch import train
from tests.posttraining.small import MODEL, TEACHER, run_config, write_run
from tests.training.small import differing

ROOT = Path(__file__).resolve().parents[2]
CONFIG = """
from tests.posttraining.test_distillation_loop import settings
get_config = lambda: settings({root!r})
"""
# Kills itself when tokens of the second round were written for the second time, after the second step, or when the
# checkpoint of the third one, in the middle of the second round, is whole.
KILLED = """
import os, signal, sys
from deepseek_v4 import config
from deepseek_v4.posttraining import distillation_loop, journal
from deepseek_v4.training import metrics
left = 2
def count(call, counts):
  def counted(*args):
    global left
    result = call(*args)
    left -= counts(args[0])
    if left == 0:
      os.kill(os.getpid(), signal.SIGKILL)
    return result
  return counted
if sys.argv[3] == "sampling":
  journal.Journal.add = count(journal.Journal.add, lambda self: self._path.stem == "000001")
elif sys.argv[3] == "stepping":
  metrics.Progress.step = count(metrics.Progress.step, lambda self: True)
else:
  save = distillation_loop.save
  def saved(tools, place):
    save(tools, place)
    tools.store.wait()
    os.kill(os.getpid(), signal.SIGKILL)
  distillation_loop.save = saved
distillation_loop.distill(config.load(sys.argv[1]), sys.argv[2])
"""


def settings(root, **changes):
  """Two teachers of different sizes, one of them twice as important; two rounds of two steps, two of which are saved."""
  root = Path(root)
  teachers = [("a", root / "a", root / "text", 1.0), ("b", root / "b", root / "text", 2.0)]
  return run_config(teachers, training=c.TrainingConfig(
    steps=4, init_from=str(root / "start"), log_every=1, eval_every=2, eval_batches=1, checkpoint_every=3), **changes)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  folder = tmp_path_factory.mktemp("distillation")
  (folder / "text").mkdir()
  rng = np.random.default_rng(0)
  for i in range(40):
    words = rng.choice("the quick brown fox jumps over a lazy dog".split(), rng.integers(5, 40))
    (folder / "text" / f"{i:02d}.txt").write_text(" ".join(words))
  for seed, (name, model) in enumerate((("a", MODEL), ("b", TEACHER), ("start", MODEL))):
    write_run(folder / name, model, seed)
  (folder / "run.py").write_text(CONFIG.format(root=str(folder)))
  return folder


def python(*arguments, timeout=500):
  environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
                              "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                              "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
  return subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True, text=True,
                        timeout=timeout)


def lines(workdir, clocks=("seconds", "tokens_per_second", "sampled_tokens")):
  return [{name: value for name, value in line.items() if name not in clocks}
          for line in metrics.read_lines(workdir / metrics.LINES)]


@pytest.fixture(scope="module")
def runs(root):
  """The run that nobody disturbed, and those that were killed: while it samples the second round, between its first round's
  steps and its second's, and behind a checkpoint in the middle of the second."""
  whole = python("-m", "launch.distill", "--config", root / "run.py", "--workdir", root / "whole")
  found = types.SimpleNamespace(whole=whole, folder=root / "whole", others={})
  for name in ("sampling", "stepping", "saved"):
    killed = python("-c", KILLED, root / "run.py", root / name, name)
    if name == "saved":
      shutil.copytree(root / name, root / "left")
    resumed = python("-m", "launch.distill", "--config", root / "run.py", "--workdir", root / name)
    found.others[name] = killed, resumed, root / name
  return found


def restored(root, workdir):
  run = settings(root)
  with CheckpointStore(workdir / "checkpoints", keep=2, config_dict=c.to_dict(run)) as store:
    return store.restore_latest(abstract_state(run))


@pytest.mark.long
def test_a_student_comes_closer_to_its_teachers(runs):
  assert runs.whole.returncode == 0, runs.whole.stderr
  train = [line for line in lines(runs.folder) if line["split"] == "train"]
  assert [line["step"] for line in train] == [1, 2, 3, 4]
  assert train[-1]["kl"] < 0.95 * train[0]["kl"] and train[0]["distillation"] > train[0]["kl/a"] / 2
  assert {"kl/a", "kl/b", "grad_norm", "learning_rate", "balance", "indexer"} <= set(train[0])
  held_out = [line for line in lines(runs.folder) if line["split"] == "held_out"]
  assert [line["step"] for line in held_out] == [0, 2] and "bits_per_byte/b" in held_out[0]
  summary = json.loads((runs.folder / metrics.SUMMARY).read_text())
  assert summary["steps"] == 4 and set(summary["held_out"]) == {"a", "b"}
  assert (runs.folder / distillation_loop.CURVES).stat().st_size > 10_000
  rollouts = [line for line in metrics.read_lines(runs.folder / metrics.LINES) if line["split"] == "rollout"]
  assert [line["step"] for line in rollouts] == [0, 2] and summary["sampled_tokens"] == sum(
    line["sampled_tokens"] for line in rollouts) <= 16 * 24


@pytest.mark.long
@pytest.mark.parametrize("name", ["sampling", "stepping", "saved"])
def test_killed_and_gone_on_it_is_the_same_run(runs, root, name):
  killed, resumed, folder = runs.others[name]
  assert killed.returncode == -signal.SIGKILL, killed.stderr
  assert resumed.returncode == 0, resumed.stderr
  text = lambda folder: [path.read_text() for path in sorted((folder / "samples").iterdir())]
  tokens = lambda folder: [sorted((i, first, tokens) for line in file.splitlines()[1:] for i, first, tokens in zip(
    *(json.loads(line[9:])[k] for k in ("request", "first", "tokens")))) for file in text(folder)]

  def replies(folder):
    found = []
    for of_round in tokens(folder):
      said = {}
      for i, first, new in of_round:
        assert first == len(said.setdefault(i, []))  # no token was sampled twice
        said[i] += new
      found.append(said)
    return found

  assert replies(folder) == replies(runs.folder)
  assert lines(folder) == lines(runs.folder)
  found, want = restored(root, folder), restored(root, runs.folder)
  assert found[0] == want[0] == 4 and found[2] == want[2] and differing(found[1], want[1]) == []
  counted = [tuple(map(int, pair)) for pair in re.findall(r"(\d+) sampled now, (\d+) before", resumed.stdout)]
  if name == "saved":  # only the second round is gone on with, and all of its replies are there
    assert "resumed at step 3" in resumed.stdout and len(counted) == 1 and counted[0][0] == 0 < counted[0][1]
    return
  (again, before), (new, found_there) = counted
  assert again == 0 < before and new > 0  # what the first round had sampled was not sampled again
  assert (found_there > 0) == (name == "sampling")


@pytest.mark.long
def test_replies_that_were_lost_in_the_middle_of_a_round_are_not_drawn_by_later_weights(runs, root):
  (root / "left" / "samples" / "000001.jsonl").unlink()
  with pytest.raises(FileNotFoundError, match="000001.jsonl: replies of round 1 are missing, and the weights that drew them "
                                              "are gone after step 3"):
    distillation_loop.distill(settings(root), root / "left")


@pytest.mark.long
def test_text_of_the_teachers_instead_of_samples(root):
  """Off-policy: no token is sampled."""
  run = settings(root, samples=c.TEXT)
  summary = distillation_loop.distill(run, root / "off")
  train = [line for line in lines(root / "off") if line["split"] == "train"]
  assert train[-1]["kl"] < train[0]["kl"] and summary["sampled_tokens"] == 0
  assert not (root / "off" / "samples").exists()


@pytest.mark.parametrize("changes, said", [
  (dict(), "training.steps = 3: expected a multiple of distillation.steps_per_round = 2"),
  (dict(mesh=dict(context=2)), "mesh.context = 2: expected 1, as replies are decoded on the same mesh"),
  (dict(mesh=dict(data=8), decode_batch=12),
   "decode_batch = 12: expected a multiple of dcn_data x data x fsdp x expert = 8"),
])
def test_what_cannot_be_distilled(root, changes, said):
  run = settings(root, **{k: v for k, v in changes.items() if k != "mesh"})
  mesh = changes.get("mesh")
  if mesh is None:
    run = dataclasses.replace(run, training=dataclasses.replace(run.training, steps=3))
  else:
    mesh = make_mesh(c.MeshConfig(**{"data": 1} | mesh), jax.devices()[:max(mesh.values())])
  with pytest.raises(ValueError, match=said):
    distillation_loop.distill(run, root / "none", mesh)
  assert not (root / "none").exists()


@pytest.mark.parametrize("changes, said", [
  (dict(temperature=0.0), "temperature = 0.0: expected a finite number above 0"),
  (dict(shortest_prompt=9), "shortest_prompt = 9: expected at most prompt_length = 8"),
  (dict(reply_length=41), r"distillation.prompt_length \+ distillation.reply_length = 49: expected at most data.sequence_l"),
  (dict(samples="both"), "samples = 'both': expected one of 'student', 'text'"),
  (dict(hidden_dtype="float16"), "hidden_dtype = 'float16': expected one of 'bfloat16', 'float32'"),
  (dict(steps_per_round=0), "steps_per_round = 0: expected at least 1"),
  (dict(data=c.DataConfig(sequence_length=48, batch_size=3)), "data.batch_size = 3: expected a multiple of the number of"),
  (dict(data=c.DataConfig(sequence_length=48, batch_size=4, tokenizer="x")), "a: data.tokenizer = None: expected that of"),
  (dict(stages=(c.StageConfig("long", steps=4),)), r"stages = \['long'\]: expected none beside distillation"),
])
def test_settings_that_do_not_go_together(changes, said):
  with pytest.raises(ValueError, match=said):
    settings("root", **changes)


@pytest.mark.parametrize("teacher, said", [
  (dict(name="a/b"), "name = 'a/b': expected letters, digits, '_' and '-'"),
  (dict(checkpoint=""), "checkpoint = '': expected a folder"),
  (dict(weight=-1.0), "weight = -1.0: expected a finite number above 0"),
])
def test_teachers_that_are_none(teacher, said):
  with pytest.raises(ValueError, match=said):
    c.TeacherConfig(**dict(name="a", checkpoint="b") | teacher)


@pytest.mark.parametrize("training, said", [
  (dict(trainable="all_but_indexer"), "training.trainable = 'all_but_indexer': expected 'all' beside distillation"),
  (dict(attention_mode="dense"), "training.attention_mode = 'dense': expected 'sparse' beside distillation"),
  (dict(watch_gradients=True), "training.watch_gradients = True: expected False beside distillation"),
  (dict(gradient_reduction="bfloat16"), "training.gradient_reduction = 'bfloat16': expected 'float32' beside distillation"),
])
def test_what_only_pre_training_knows(root, training, said):
  run = settings(root)
  with pytest.raises(ValueError, match=said):
    dataclasses.replace(run, training=dataclasses.replace(run.training, **training))
  with pytest.raises(ValueError, match="anomalies = .*: expected the defaults beside distillation"):
    dataclasses.replace(run, anomalies=c.AnomalyConfig(policy="log"))


def test_a_run_is_one_kind_of_post_training(root):
  with pytest.raises(ValueError, match="reinforcement = 'given': expected None beside distillation"):
    dataclasses.replace(settings(root), reinforcement=c.ReinforcementConfig(rewards=("a.b",)))


def test_names_of_teachers():
  for names in ((), ("a", "a")):
    with pytest.raises(ValueError, match=r"teachers = .*: expected at least one, each with a name of its own"):
      c.DistillationConfig(teachers=tuple(c.TeacherConfig(name, "b") for name in names))


def test_training_alone_refuses_a_distillation(root):
  with pytest.raises(ValueError, match="distillation: expected None, or the command python -m launch.distill"):
    train.train(settings(root), root / "none")
  assert not (root / "none").exists()
