"""Checkpoints of which a file is missing, cut, altered or of something else."""

import dataclasses
import json
import random
import shutil
import types

import numpy as np
import pytest

from deepseek_v4.checkpoint import store as stores
from deepseek_v4.checkpoint.convert import to_release
from deepseek_v4.config import RunConfig, to_dict
from deepseek_v4.posttraining import distillation_loop
from deepseek_v4.posttraining.teachers import open_teacher
from deepseek_v4.training.start import check_source
from launch.fault_runs import damage
from tests.bad_input.table import check, table
from tests.bad_input.test_config_fields import DISTILL
from tests.model.small import T0

STEP = "checkpoints/6"
TREE = {"params": {"a": np.arange(12.0, dtype=np.float32).reshape(3, 4), "b": np.arange(5, dtype=np.int32)}}
CONFIG = to_dict(RunConfig())


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
  """A run with one checkpoint."""
  run = tmp_path_factory.mktemp("run")
  with stores.CheckpointStore(run / "checkpoints", keep=1, config_dict=CONFIG) as store:
    store.save(6, TREE, {"at": 6})
  return run


def restored(folder, tree=TREE, config=CONFIG):
  return stores.CheckpointStore(folder / "checkpoints", keep=1, config_dict=config).restore_latest(tree)


def after(harm, use=restored):
  """Uses the run after harm was done to the folder of its step."""
  def call(folder):
    harm(folder / STEP)
    use(folder)
  return call


def manifest(folder):
  return folder / "manifest" / "manifest.json"


def altered(**changes):
  """Harm: another manifest with a checksum that fits, or with `text` any text."""
  def harm(folder):
    if "text" in changes:
      manifest(folder).write_text(changes["text"])
    else:
      manifest(folder).write_text(json.dumps(json.loads(manifest(folder).read_text()) | changes))
  return harm


def kind(name):
  return lambda folder: damage.KINDS[name](folder.parent, 6, random.Random(0))


def largest(folder):
  return max((path for path in folder.rglob("d/*") if path.is_file()), key=lambda path: path.stat().st_size)


def after_rounds(changes):
  """Goes on with a distillation whose checkpoint, of step 8, has other rounds."""
  run = dataclasses.replace(DISTILL, model=T0)  # whose hash tables are there
  rounds = distillation_loop.round_of(run) | changes
  store = types.SimpleNamespace(restore_latest=lambda shapes: (8, None, {"sampled_with": 1, "round": rounds}))
  return lambda folder: distillation_loop.go_back(run, folder, None, store, {})


OTHER_TOKENS = dataclasses.replace(DISTILL, data=dataclasses.replace(DISTILL.data, tokenizer="other.json"),
                                   distillation=None)
nothing = lambda folder: None
other_tree = lambda **leaves: lambda folder: restored(folder, {"params": TREE["params"] | leaves})
weights = lambda folder: stores.restore_variables(folder / "checkpoints")
GONE = "delete it to start over"
WRONG = table(
  (STEP, "JSONDecodeError", GONE, after(kind("_METADATA cut in half")), "_METADATA cut in half"),
  (STEP, "params", GONE, after(kind("array file cut in half")), "array file cut in half"),
  (STEP, "params", GONE, after(kind("array file empty")), "array file empty"),
  (STEP, "params", GONE, after(lambda p: largest(p).unlink()), "array file missing"),
  (STEP, "state", GONE, after(lambda p: (p / "state/manifest.ocdbt").unlink()), "index of arrays missing"),
  (STEP, "state", GONE, after(kind("half-written step")), "half-written step"),
  (STEP, "no manifest", GONE, after(kind("manifest missing")), "manifest missing"),
  (STEP, "manifest", GONE, after(kind("bit of the manifest flipped")), "bit of the manifest flipped"),
  (STEP, "manifest unreadable", GONE, after(altered(text="[1, 2]")), "manifest of another kind"),
  (STEP, "manifest unreadable", GONE, after(altered(text="{")), "manifest cut"),
  (STEP, "manifest unreadable", GONE, after(altered(text="")), "manifest empty"),
  (STEP, "manifest altered", GONE, after(altered(extra={"at": 7})), "manifest with other numbers"),
  (STEP, "never finished", GONE, after(lambda p: shutil.rmtree(p / "manifest")), "folder of the manifest missing"),
  (STEP + ".orbax-checkpoint-tmp", "never finished", GONE, after(lambda p: p.rename(f"{p}.orbax-checkpoint-tmp"))),
  (STEP, "never finished", GONE, after(lambda p: [shutil.rmtree(p), p.mkdir()]), "folder empty"),
  ("checkpoints", "no checkpoint in it", GONE, after(lambda p: p.rename(p.parent / "notes"))),
  (STEP, "no manifest", GONE, after(kind("manifest missing"), weights)),
  ("checkpoints", "nothing", "no checkpoint there", lambda p: weights(p / "nothing")),
  ("checkpoints", "step 4", "no checkpoint of step 4", lambda p: stores.restore_variables(p / "checkpoints", step=4)),
  ("params/a", "(3, 4)", "(3, 5)", other_tree(a=np.zeros((3, 5), np.float32))),
  ("params/b", "int32", "float32", other_tree(b=np.zeros(5, np.float32))),
  ("params/c", "params/c", "wanted but not in the checkpoint", other_tree(c=np.zeros(5, np.float32))),
  ("model.hidden_size", "8", "4096", lambda p: restored(p, config=to_dict(dataclasses.replace(
    RunConfig(), model=dataclasses.replace(RunConfig().model, hidden_size=8))))),
  ("training.init_from", "nowhere", "the folder of a run or of a converted release", lambda p: check_source(
    dataclasses.replace(RunConfig(), training=dataclasses.replace(RunConfig().training, init_from=str(p / "nowhere"))))),
  ("source", "nowhere", "the folder of a run or of a converted release", lambda p: to_release(p / "nowhere", p / "new")),
  ("checkpoints/6 does not fit its config", "missing", "embed", lambda p: to_release(p, p / "new")),
  ("distillation.teachers: one: checkpoint", "nowhere", "the folder of a run", lambda p: open_teacher(
    DISTILL, dataclasses.replace(DISTILL.distillation.teachers[0], name="one", checkpoint=str(p / "nowhere")))),
  (STEP, "no manifest", GONE, after(kind("manifest missing"), lambda p: open_teacher(
    DISTILL, dataclasses.replace(DISTILL.distillation.teachers[0], checkpoint=str(p))))),
  ("one: data.tokenizer of its checkpoint", "None", "the student's, data.tokenizer = 'other.json'", lambda p: open_teacher(
    OTHER_TOKENS, dataclasses.replace(DISTILL.distillation.teachers[0], name="one", checkpoint=str(p)))),
  ("distillation.steps_per_round", "4", "2, with which the run in", after_rounds({"distillation.steps_per_round": 2})),
  ("data.batch_size", "16", "8, with which the run in", after_rounds({"data.batch_size": 8})),
  ("number of distillation.teachers", "2", "3, with which the run in", after_rounds({"number of distillation.teachers": 3})),
  ("keep", "0", "at least 1", lambda p: stores.CheckpointStore(p / "new", keep=0, config_dict={})),
)


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_refused(wrong, sound, tmp_path, compiled):
  shutil.copytree(sound, tmp_path, dirs_exist_ok=True)
  check(wrong, tmp_path, compiled)
