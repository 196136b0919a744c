"""Every notebook runs from top to bottom, on a fresh run of a small model, and keeps its outputs in the repository."""

from pathlib import Path

import jax
import nbclient
import nbformat
import pytest

from deepseek_v4.checkpoint.store import CheckpointStore
from deepseek_v4.config import load, to_dict
from deepseek_v4.training.state import init_state

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "launch" / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A run folder with a checkpoint of untrained weights."""
  config = load(ROOT / "configs" / "debug_yarn.py")  # a CSA and an HCA layer
  folder = tmp_path_factory.mktemp("run")
  with CheckpointStore(folder / "checkpoints", keep=1, config_dict=to_dict(config)) as store:
    store.save(1, init_state(config, jax.random.key(0)), {"data": {}})
  return folder


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_executes(path, run, monkeypatch):
  monkeypatch.setenv("DEEPSEEK_V4_RUN", str(run))
  monkeypatch.setenv("PYTHONPATH", str(ROOT))
  notebook = nbformat.read(path, as_version=4)
  nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(path.parent)}}).execute()
  kinds = [kind for cell in notebook.cells for out in cell.get("outputs", ()) for kind in out.get("data", ())]
  assert "image/png" in kinds


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_keeps_its_outputs(path):
  cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
  assert cells and all(cell.execution_count for cell in cells), "execute it on the tiny run and save it"
