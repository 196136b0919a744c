"""Every notebook keeps its outputs, and its code and words name what exists; `pytest -m notebooks` executes them all."""

import ast
import importlib
import importlib.util
import inspect
import json
import re
import time

import jax
import nbclient
import nbformat
import pytest

import deepseek_v4
from deepseek_v4.checkpoint.store import CheckpointStore
from deepseek_v4.config import load, to_dict
from deepseek_v4.training import metrics
from deepseek_v4.training.state import init_state
from tests import documents
from tests.documents import ROOT

NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "launch" / "notebooks").glob("*.ipynb"))}
LIMIT = 300  # seconds of each on two cores
# Machines show in paths, in names of users, and in what programs write beside their output.
NO_PLACES = re.compile(r"(/tmp|/home|/root|/work|/usr|/opt|site-packages|[A-Z]:\\\\)")
OURS = ("deepseek_v4", "pallas_kernels", "launch")
# The TPU compiler comes as wheels for Linux on x86-64 only.
EXECUTABLE = [name for name in NOTEBOOKS if name != "plan" or importlib.util.find_spec("libtpu") is not None]


def read(name):
  return nbformat.read(NOTEBOOKS[name], as_version=4)


def code_of(notebook):
  return [cell for cell in notebook.cells if cell.cell_type == "code"]


# ---- what is kept ------------------------------------------------------------------------------------------------------
def test_there_is_one_for_each_question():
  assert set(NOTEBOOKS) == {"tour", "train", "million", "distil", "release", "plan"}


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_outputs_are_kept(name):
  """Of an execution from top to bottom without errors and warnings, with nothing in them that tells of the machine."""
  notebook = read(name)
  nbformat.validate(notebook)
  cells = code_of(notebook)
  assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "execute it and save it"
  outputs = [out for cell in cells for out in cell.outputs]
  assert sum("image/png" in out.get("data", {}) for out in outputs) >= 2
  assert not [out for out in outputs if out.output_type == "error" or out.get("name") == "stderr"]
  for out in outputs:
    for text in (out.get("text", ""), *(x for kind, x in out.get("data", {}).items() if kind.startswith("text/"))):
      assert not NO_PLACES.search(text), text
  assert all(not cell.metadata.get("execution") for cell in cells), "times of the machine are in the metadata"


# ---- what is named -----------------------------------------------------------------------------------------------------
def imported(tree):
  """Name -> object of every import in the code; an import of what does not exist is an error."""
  found = {}
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      for alias in node.names:
        module = importlib.import_module(alias.name)
        found[alias.asname or alias.name.split(".")[0]] = (
          module if alias.asname else importlib.import_module(alias.name.split(".")[0]))
    elif isinstance(node, ast.ImportFrom):
      module = importlib.import_module(node.module)
      for alias in node.names:
        found[alias.asname or alias.name] = (
          getattr(module, alias.name) if hasattr(module, alias.name)
          else importlib.import_module(f"{node.module}.{alias.name}"))
  return found


def resolved(node, names):
  """What a chain such as `c.DataConfig` stands for, as far as it leads through modules; None where it begins elsewhere.

  Raises:
    AttributeError: there is no such name in one of our modules.
  """
  if isinstance(node, ast.Name):
    return names.get(node.id)
  if not isinstance(node, ast.Attribute):
    return None
  value = resolved(node.value, names)
  return getattr(value, node.attr) if inspect.ismodule(value) else None


def is_ours(thing):
  return (getattr(thing, "__module__", None) or "").split(".")[0] in OURS


def check_names(code):
  """Refuses code that imports, reads from a module or passes to one of our functions what it does not have."""
  tree = ast.parse(code)
  names = imported(tree)
  for node in ast.walk(tree):
    if isinstance(node, ast.Attribute):
      resolved(node, names)
    elif isinstance(node, ast.Call) and is_ours(called := resolved(node.func, names)):
      positional = [arg for arg in node.args if not isinstance(arg, ast.Starred)]
      whole = len(positional) == len(node.args) and all(keyword.arg for keyword in node.keywords)
      bind = inspect.signature(called).bind if whole else inspect.signature(called).bind_partial
      bind(*positional, **{keyword.arg: None for keyword in node.keywords if keyword.arg})


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_code_names_what_exists(name):
  """Modules, functions and their arguments, and files of the repository."""
  cells = code_of(read(name))
  check_names("\n".join(cell.source for cell in cells))
  texts = [node.value for cell in cells for node in ast.walk(ast.parse(cell.source))
           if isinstance(node, ast.Constant) and isinstance(node.value, str)]
  missing = [text for text in texts if re.fullmatch(r"(configs|launch|tests|deepseek_v4)/[\w./]*", text)
             and not documents.exists(text) and not text.endswith("_")]  # "configs/v4_" begins a name
  assert not missing


@pytest.mark.parametrize("code, error", [
  ("import deepseek_v4 as d\nd.trace_all", AttributeError),
  ("from deepseek_v4.analysis import plots_of", ImportError),
  ("from deepseek_v4 import config as c\nc.DataConfig(lenght=3)", TypeError),
  ("from deepseek_v4 import config as c\nc.load('configs/debug.py', [], 1, 2)", TypeError),
  ("from deepseek_v4 import config as c\nc.load()", TypeError),
])
def test_planted_mistakes_are_seen(code, error):
  with pytest.raises(error):
    check_names(code)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_words_name_what_exists(name):
  """Commands, files, other notebooks and public names."""
  text = "\n".join(cell.source for cell in read(name).cells if cell.cell_type == "markdown")
  for main in re.findall(r"python -m\s+launch\.(\w+)", text) + re.findall(r"`launch\.(\w+)", text):
    assert (ROOT / "launch" / f"{main}.py").exists(), main
  assert not [path for path in documents.paths(text) if not documents.exists(path)]
  for chain in re.findall(r"`dsv4((?:\.\w+)+)", text):
    thing = deepseek_v4
    for part in chain.strip(".").split("."):
      thing = getattr(thing, part)


# ---- executed ----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A run folder of configs/tiny.py with two checkpoints of untrained weights and a log."""
  config = load(ROOT / "configs" / "tiny.py")
  folder = tmp_path_factory.mktemp("run")
  with CheckpointStore(folder / "checkpoints", keep=2, config_dict=to_dict(config)) as store:
    for step in (1, 2):
      store.save(step, init_state(config, jax.random.key(step)), {"data": {}})
  lines = [{"split": split, "step": step, "next_token": 5.0 - step} for step in (1, 2) for split in ("train", "held_out")]
  (folder / metrics.LINES).write_text("".join(json.dumps(line) + "\n" for line in lines))
  return folder


def kinds(notebook):
  """Of each code cell, what it gives out: streams, and kinds of results in their order."""
  streams = lambda cell: sorted({out.name for out in cell.outputs if out.output_type == "stream"})
  return [(streams(cell), [sorted(out.data) for out in cell.outputs if "data" in out]) for cell in code_of(notebook)]


def executed(name, monkeypatch, **values):
  """The notebook after a kernel of its own has run it, with other values of its parameters; an error in a cell is raised."""
  notebook = read(name)
  for variable, value in values.items():
    cell = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    cell.source, times = re.subn(rf"(?m)^{variable} = [^#\n]*", lambda _, n=variable, v=value: f"{n} = {v!r}  ", cell.source)
    assert times == 1, variable
  monkeypatch.setenv("PYTHONPATH", str(ROOT))
  for variable in ("XLA_FLAGS", "NPROC", "JAX_COMPILATION_CACHE_DIR"):  # those of tests; a reader has none
    monkeypatch.delenv(variable, raising=False)
  nbclient.NotebookClient(notebook, timeout=LIMIT, resources={"metadata": {"path": str(NOTEBOOKS[name].parent)}}).execute()
  return notebook


@pytest.mark.notebooks
@pytest.mark.parametrize("name", EXECUTABLE)
def test_a_notebook_gives_what_it_keeps_within_its_limit(name, run, monkeypatch):
  start = time.monotonic()
  notebook = executed(name, monkeypatch, **({"RUN": str(run)} if name == "tour" else {}))
  assert time.monotonic() - start < LIMIT
  assert kinds(notebook) == kinds(read(name))
  if name != "tour":  # that one reads weights that are not those of the kept run
    # What is sampled differs by machine, and plans by compiler.
    same_text(said(notebook), said(read(name)), numbers=name != "distil" and (name != "plan" or jax.__version__ == "0.10.2"))
  if name == "distil":
    found = re.findall(r"KL to the teacher of \w+: ([\d.]+) -> ([\d.]+)", " ".join(
      out.text for cell in code_of(notebook) for out in cell.outputs if out.output_type == "stream"))
    assert len(found) == 3 and all(float(after) < 0.6 * float(before) for before, after in found), found


def said(notebook):
  """The words and numbers that all code cells print, in order."""
  text = " ".join(out.text for cell in code_of(notebook) for out in cell.outputs if out.output_type == "stream")
  return re.findall(r"[-+]?\d[\d,]*\.\d+|\d[\d,]*|[^\s\d]+", text)


def same_text(found, kept, numbers):
  """Words and whole numbers are equal; what has decimals was measured or trained, in float32 on other cores, and is near."""
  assert len(found) == len(kept)
  for a, b in zip(found, kept):
    if re.fullmatch(r"[-+]?\d[\d,]*\.\d+", b):
      x, y = (float(n.replace(",", "")) for n in (a, b))
      assert not numbers or abs(x - y) <= 0.1 * abs(y) + 0.05, (a, b)
    else:
      assert a == b or not numbers and a[:1].isdigit() and b[:1].isdigit(), (a, b)


def test_a_text_that_says_something_else_is_found():
  kept = ["loss", "2.65", "4", "kernels"]
  same_text(["loss", "2.70", "4", "kernels"], kept, True)
  for other in (["loss", "3.65", "4", "kernels"], ["loss", "2.65", "5", "kernels"], ["norm", "2.65", "4", "kernels"]):
    with pytest.raises(AssertionError):
      same_text(other, kept, True)
