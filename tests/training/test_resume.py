"""A run that is killed and goes on in a new process is, bit for bit, the run that nobody disturbed (check A9).

The real loop on eight devices: packed text with fill-in-the-middle, the prediction block, a hash router, a learned router
whose bias moves; saved after steps 3 and 6. One process is killed by SIGKILL in step 8. In a copy of what it left, the save
of step 6 counts as unfinished; there another process, the command of the README, goes on from step 3. What both did in
steps 4 to 7 is compared, and what both saved at 6.
"""

import json
import os
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
from deepseek_v4 import sharding
from deepseek_v4.checkpoint.store import CheckpointStore
from deepseek_v4.checkpoint.trees import disk_parts, groups_of, named_leaves
from deepseek_v4.optim import make_schedule
from deepseek_v4.training import feed, loop, metrics
from deepseek_v4.training.state import abstract_state
from tests.launch.several import cache_of_tests
from tests.training.small import differing, on_host

ROOT = Path(__file__).resolve().parents[2]
CONFIG = """
from deepseek_v4.config import *

def get_config():
  model = ModelConfig(
    vocab_size=320, hidden_size=16, num_hidden_layers=2, layer_types=(SLIDING,) * 2, mlp_layer_types=(HASH,) * 2,
    num_attention_heads=2, head_dim=8, qk_rope_head_dim=4, q_lora_rank=8, o_groups=1, o_lora_rank=8, sliding_window=8,
    n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, hc_mult=2, max_position_embeddings=64,
    pad_token_id=2, init_std=0.1)
  return RunConfig(
    model=model, optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2, decay_steps=3),
    data=DataConfig(source="text", path=PATH, sequence_length=48, batch_size=8, held_out_percent=20, fim_rate=0.5),
    mesh=MeshConfig(data=2, fsdp=2, expert=2, emulated_devices=8),
    training=TrainingConfig(steps=8, log_every=1, eval_every=4, eval_batches=1, checkpoint_every=3, keep_checkpoints=2))
"""
# Kills itself between two saves: step 7 is logged, step 8 computes, and what is on disk is step 6.
KILLED = """
import os, signal, sys, time
from pathlib import Path
from launch import emulate_devices
emulate_devices(8)
from deepseek_v4 import config, sharding
from deepseek_v4.training import loop, metrics
run, workdir = config.load(sys.argv[1]), Path(sys.argv[2])
write = metrics.MetricsWriter.write
def write_and_die(self, split, step, values):
  write(self, split, step, values)
  while step == 7:
    if (workdir / "checkpoints" / "6").is_dir():  # the write in the background is finished
      os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.01)
metrics.MetricsWriter.write = write_and_die
loop.train(run, workdir, sharding.make_mesh(run.mesh))
"""


def python(*arguments):
  """Runs Python with the compilation cache of this process: what the first run compiles, the others load."""
  environment = os.environ | {"PYTHONPATH": str(ROOT), **cache_of_tests()}
  return subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True, text=True,
                        timeout=300)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """What the two processes said, and their workdirs: `first` of the one that was killed, `second` of the other."""
  folder = tmp_path_factory.mktemp("resume")
  text, rng = folder / "text", np.random.default_rng(0)
  text.mkdir()
  for i in range(60):  # from 1 to about 200 bytes: several documents a row, some longer than one
    words = rng.choice("the quick brown fox jumps over a lazy dog".split(), rng.integers(1, 40))
    (text / f"{i:02d}.txt").write_text(" ".join(words))
  file = folder / "run.py"
  file.write_text(CONFIG.replace("PATH", repr(str(text))))
  run = c.load(file)
  killed = python("-c", KILLED, file, folder / "killed")
  shutil.copytree(folder / "killed", folder / "resumed")
  last = folder / "resumed" / loop.CHECKPOINTS / "6"
  last.rename(f"{last}.orbax-checkpoint-tmp")  # what Orbax renames when a checkpoint is whole
  resumed = python("-m", "launch.train", "--config", file, "--workdir", folder / "resumed")
  return types.SimpleNamespace(run=run, mesh=sharding.make_mesh(run.mesh), killed=killed, first=folder / "killed",
                               resumed=resumed, second=folder / "resumed")


def restored(runs, workdir, step, folder):
  """(step, state, extra) of one step's checkpoint, read through a copy that holds no other."""
  shutil.copytree(workdir / loop.CHECKPOINTS / str(step), folder / "only" / str(step), dirs_exist_ok=True)
  with CheckpointStore(folder / "only", keep=2, config_dict=c.to_dict(runs.run)) as store:
    return store.restore_latest(abstract_state(runs.run, runs.mesh))


def lines(workdir, last):
  """The lines of the metrics file up to a step, without what a clock says."""
  return [{name: value for name, value in line.items() if name != "tokens_per_second"}
          for line in metrics.read_lines(workdir / metrics.LINES) if line["step"] <= last]


def test_the_run_uses_what_resuming_could_lose(runs):
  batches = iter(feed.dataset(runs.run, "train"))
  batch = [next(batches) for _ in range(7)]
  assert max(b["segment_ids"].max() for b in batch) > 1 and min(b["segment_ids"].min() for b in batch) == 0
  assert any((b["tokens"] == sentinel).any() for b in batch for sentinel in feed.dataset(runs.run, "train").tokenizer.fim)
  train = [line for line in lines(runs.first, 7) if line["split"] == "train"]
  assert [line["step"] for line in train] == [1, 2, 3, 4, 5, 6, 7]
  assert len({line["learning_rate"] for line in train}) > 3 and train[0]["mtp"] > 1
  assert train[-1]["loss"] < train[0]["loss"]


def test_the_process_was_killed_between_two_saves(runs):
  assert runs.killed.returncode == -signal.SIGKILL, runs.killed.stderr
  assert sorted(path.name for path in (runs.first / loop.CHECKPOINTS).iterdir()) == ["3", "6"]
  assert not (runs.first / metrics.SUMMARY).exists()


def test_a_new_process_goes_on_with_the_same_numbers(runs):
  """Bit for bit, by step number: JSON holds every float exactly. Step 4 was also scored on held-out text."""
  assert runs.resumed.returncode == 0, runs.resumed.stderr
  assert "resumed at step 3" in runs.resumed.stdout
  assert "6.orbax-checkpoint-tmp: never finished; using step 3" in runs.resumed.stderr
  assert len(lines(runs.second, 7)) == 8 and lines(runs.second, 7) == lines(runs.first, 7)
  assert lines(runs.second, 99)[-1]["step"] == json.loads((runs.second / metrics.SUMMARY).read_text())["steps"] == 8
  assert sorted(path.name for path in (runs.second / loop.CHECKPOINTS).iterdir()) == ["6", "8"]


def test_checkpoints_are_equal_in_every_leaf(runs, tmp_path):
  """Parameters, moments, router, step, key and position in the data."""
  found, state, extra = restored(runs, runs.second, 6, tmp_path / "a")
  expected, expected_state, expected_extra = restored(runs, runs.first, 6, tmp_path / "b")
  assert found == expected == 6 == int(state.step)
  assert differing(state, expected_state) == []
  assert extra == expected_extra and extra["data"]["row"] == 8 * 6
  assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x.sharding, abstract_state(runs.run, runs.mesh))
  router = on_host(state.router)
  assert router["layers/unit_0/moe/router/hash_table"].any() and router["mtp/block/moe/router/bias"].any()


def test_restoring_twice_is_restoring_once(runs, tmp_path):
  first, second = (restored(runs, runs.first, 3, tmp_path) for _ in range(2))
  assert first[0] == second[0] == 3 and differing(first[1], second[1]) == [] and first[2] == second[2]
  # the fourth update has the fourth learning rate, whatever came between
  line = next(line for line in lines(runs.second, 4) if line["step"] == 4)
  rate = make_schedule(runs.run.optimizer, 8)(first[1].step)
  assert line["learning_rate"] == pytest.approx(float(rate), rel=1e-6)
  counts = [int(x) for name, x in on_host(first[1].opt_state).items() if name.endswith("/count")]
  assert counts and set(counts) == {3}


def test_every_leaf_of_the_state_is_on_disk(runs):
  manifest = json.loads((runs.second / loop.CHECKPOINTS / "6" / "manifest" / "manifest.json").read_text())
  named, _ = named_leaves(abstract_state(runs.run))
  parts = [part for name, _ in named for part, _ in disk_parts(name, groups_of(named))]
  assert sorted(parts) == sorted(manifest["leaves"])
  assert {"step", "key", "router/layers/01/moe/router/hash_table"} <= set(parts)


@pytest.mark.parametrize("missing", ["hash_table", "trace"])
def test_a_checkpoint_without_a_leaf_is_refused_by_name(runs, tmp_path, missing):
  _, state, extra = restored(runs, runs.first, 3, tmp_path)
  if missing == "hash_table":
    router = {**state.router, "layers": {"unit_0": {"moe": {"router": {}}}}}
    short, names = state.replace(router=router), [f"router/layers/{i:02d}/moe/router/hash_table" for i in (0, 1)]
  else:
    def cut(path, x):
      return None if sharding.path_names(path)[-4:] == ("layers", "unit_0", "attention", "kv") else x
    short = state.replace(opt_state=jax.tree_util.tree_map_with_path(cut, state.opt_state))
    names = [f"layers/{i:02d}/attention/kv is wanted but not in the checkpoint" for i in (0, 1)]
  with CheckpointStore(tmp_path / "short", keep=2, config_dict=c.to_dict(runs.run)) as store:
    store.save(3, short, extra)
    with pytest.raises(ValueError) as error:
      store.restore_latest(abstract_state(runs.run, runs.mesh))
  assert all(name in str(error.value) for name in names) and str(error.value).count("is wanted") == 2
