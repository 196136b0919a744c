"""Every notebook runs from top to bottom, shortened by its parameters, and keeps its outputs in the repository."""

import importlib.util
import json
import re
import time
from pathlib import Path

import jax
import nbclient
import nbformat
import pytest

from deepseek_v4.checkpoint.store import CheckpointStore
from deepseek_v4.config import load, to_dict
from deepseek_v4.training import metrics
from deepseek_v4.training.state import init_state

ROOT = Path(__file__).parents[2]
NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "launch" / "notebooks").glob("*.ipynb"))}
LIMIT = 300  # seconds of a whole one on two cores
# What the suite shortens; the long tier runs them as they are.
SHORT = {
  "train": {"STEPS": 3, "LOOK_EVERY": 2, "SEEDS": (0,)},
  "million": {"TOKENS": 8192, "CHUNK": 2048},
  "distil": {"START_STEPS": 2, "TEACHER_STEPS": 2, "STUDENT_STEPS": 4},
  "plan": {"LAYERS": 1, "MESHES": ({"fsdp": 4},)},
  "release": {}, "tour": {},
}
# Machines show in paths, in names of users, and in what programs write beside their output.
NO_PLACES = re.compile(r"(/tmp|/home|/root|/work|/usr|/opt|site-packages|[A-Z]:\\\\)")
# The TPU compiler comes as wheels for Linux on x86-64 only.
EXECUTABLE = [name for name in NOTEBOOKS if name != "plan" or importlib.util.find_spec("libtpu") is not None]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A run folder with two checkpoints of untrained weights and a log."""
  config = load(ROOT / "configs" / "debug_yarn.py")  # a CSA and an HCA layer
  folder = tmp_path_factory.mktemp("run")
  with CheckpointStore(folder / "checkpoints", keep=2, config_dict=to_dict(config)) as store:
    for step in (1, 2):
      store.save(step, init_state(config, jax.random.key(step)), {"data": {}})
  lines = [{"split": split, "step": step, "next_token": 5.0 - step} for step in (1, 2) for split in ("train", "held_out")]
  (folder / metrics.LINES).write_text("".join(json.dumps(line) + "\n" for line in lines))
  return folder


def with_parameters(notebook, values):
  """The notebook with other values in its cell that is tagged "parameters"; every name must be there."""
  cells = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
  for name, value in values.items():
    found = 0
    for cell in cells:
      cell.source, times = re.subn(rf"(?m)^{name} = [^#\n]*", lambda _, n=name, v=value: f"{n} = {v!r}  ", cell.source)
      found += times
    assert found == 1, f"{name} is set {found} times in cells tagged parameters"
  return notebook


def execute(name, values, monkeypatch):
  """Runs it in a kernel of its own and gives the pictures and what was written; an error in a cell is raised."""
  monkeypatch.setenv("PYTHONPATH", str(ROOT))
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir)
  if name == "plan":
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # those are for XLA's CPU compiler
  notebook = with_parameters(nbformat.read(NOTEBOOKS[name], as_version=4), values)
  nbclient.NotebookClient(notebook, timeout=LIMIT, resources={"metadata": {"path": str(NOTEBOOKS[name].parent)}}).execute()
  return [kind for cell in notebook.cells for out in cell.get("outputs", ()) for kind in out.get("data", ())]


@pytest.mark.parametrize("name", EXECUTABLE)
def test_notebook_executes(name, run, monkeypatch):
  values = SHORT[name] | ({"RUN": str(run)} if name == "tour" else {})
  assert execute(name, values, monkeypatch).count("image/png") >= 2


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in EXECUTABLE if SHORT[name]])
def test_whole_notebook_executes_in_five_minutes(name, monkeypatch):
  start = time.monotonic()
  execute(name, {}, monkeypatch)
  assert time.monotonic() - start < LIMIT


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_keeps_its_outputs(name):
  """Of an execution from top to bottom without errors and warnings, with nothing in them that tells of the machine."""
  notebook = nbformat.read(NOTEBOOKS[name], as_version=4)
  cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
  assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "execute it and save it"
  outputs = [out for cell in cells for out in cell.outputs]
  assert any("image/png" in out.get("data", {}) for out in outputs)
  assert not [out for out in outputs if out.output_type == "error" or out.get("name") == "stderr"]
  for out in outputs:
    for text in (out.get("text", ""), *(x for kind, x in out.get("data", {}).items() if kind.startswith("text/"))):
      assert not NO_PLACES.search(text), text
  assert all(not cell.metadata.get("execution") for cell in cells), "times of the machine are in the metadata"
