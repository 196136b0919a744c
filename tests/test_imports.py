"""Who may know whom: each layer imports from the layers further right only, and a few files have rules of their own."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# launch -> everything; planning, posttraining -> generation -> ... -> config; model and all before it -> pallas_kernels.
ORDER = [("planning", "posttraining"), ("generation",), ("training",), ("checkpoint",), ("optim",), ("analysis",),
         ("model",), ("sharding",), ("text",), ("config",)]
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}
WITHOUT_JAX = {"config", "text"}
SHIPPED = ("deepseek_v4", "pallas_kernels", "launch")


def sources(root, *folders):
  return sorted(path for folder in folders for path in (root / folder).rglob("*.py"))


def imports(path, root):
  """(line, dotted module) of every import in a file, also inside functions; relative ones made absolute."""
  package = path.parent.relative_to(root).parts
  for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
    if isinstance(node, ast.Import):
      yield from ((node.lineno, name.name) for name in node.names)
    elif isinstance(node, ast.ImportFrom):
      above = package[:len(package) - node.level + 1] if node.level else ()
      base = ".".join([*above, *filter(None, [node.module])])
      # `from deepseek_v4 import sharding` names the module last
      yield from ((node.lineno, f"{base}.{name.name}") for name in node.names)


def layer(parts):
  """Layer of a module of deepseek_v4: its folder, or its own name."""
  return "config" if parts[1].startswith("config_") else parts[1]


def violations(root):
  """Every import that the rule forbids, as 'file:line imports module'."""
  found = []

  def forbid(path, line, module):
    found.append(f"{path.relative_to(root).as_posix()}:{line} imports {module}")

  for path in sources(root, "deepseek_v4"):  # launch may import everything
    parts = path.relative_to(root).with_suffix("").parts
    if parts == ("deepseek_v4", "__init__"):  # the lazy public names import nothing of ours at all
      for line, module in imports(path, root):
        if module.split(".")[0] not in sys.stdlib_module_names:
          forbid(path, line, module)
      continue
    mine = layer(parts)
    for line, module in imports(path, root):
      other = module.split(".")
      if other[0] in ("launch", "configs", "tests") or other == ["deepseek_v4"]:
        forbid(path, line, module)
      elif other[0] == "deepseek_v4":
        theirs = layer(other)
        if theirs not in LEVEL or (LEVEL[theirs] <= LEVEL[mine] and theirs != mine):
          forbid(path, line, module)
      elif other[0] == "pallas_kernels":
        if LEVEL[mine] > LEVEL["model"]:
          forbid(path, line, module)
      elif mine in WITHOUT_JAX and other[0] in ("jax", "flax", "optax", "grain"):
        forbid(path, line, module)
  for path in sources(root, "pallas_kernels"):
    for line, module in imports(path, root):
      if module.split(".")[0] not in {"jax", "pallas_kernels", *sys.stdlib_module_names}:
        forbid(path, line, module)
  for path in sources(root, "configs"):
    for line, module in imports(path, root):
      if not (module.startswith("deepseek_v4.config.") or module.split(".")[0] in sys.stdlib_module_names):
        forbid(path, line, module)
  return found


def test_imports_point_one_way():
  assert not violations(ROOT)


def test_every_room_has_its_place():
  rooms = {path.stem for path in (ROOT / "deepseek_v4").iterdir() if path.is_dir() or path.suffix == ".py"}
  assert {layer(("", room)) for room in rooms - {"__init__", "__pycache__"}} <= set(LEVEL)


MODEL = "deepseek_v4/model/attention.py"
KERNEL = "pallas_kernels/indexer/kernel.py"


@pytest.mark.parametrize("file, line, caught", [
  (MODEL, "from deepseek_v4.training import loop", True),
  (MODEL, "import deepseek_v4.optim.muon as muon", True),
  (MODEL, "from deepseek_v4 import checkpoint", True),
  (MODEL, "from ..training import loop", True),
  (MODEL, "def f():\n  from deepseek_v4.generation import decode", True),
  (MODEL, "import deepseek_v4", True),
  (MODEL, "from deepseek_v4 import load_hf", True),
  (MODEL, "from launch import train", True),
  (MODEL, "from deepseek_v4.model import rope\nfrom . import norm\nfrom deepseek_v4 import sharding", False),
  (MODEL, "from pallas_kernels import sparse_attention\nimport flax", False),
  ("deepseek_v4/sharding.py", "import pallas_kernels", True),
  ("deepseek_v4/planning/lower.py", "from deepseek_v4.posttraining import sft", True),
  ("deepseek_v4/planning/lower.py", "from deepseek_v4.training import step", False),
  ("deepseek_v4/text/chat.py", "import jax.numpy as jnp", True),
  ("deepseek_v4/config_hf.py", "from deepseek_v4.config import ModelConfig\nimport json", False),
  ("deepseek_v4/__init__.py", "from deepseek_v4.config import ModelConfig", True),
  (KERNEL, "import flax.linen as nn", True),
  (KERNEL, "from deepseek_v4.config import ModelConfig", True),
  (KERNEL, "from jax.experimental import pallas\nimport functools\nfrom . import reference", False),
  ("configs/new.py", "from deepseek_v4 import sharding", True),
  ("configs/new.py", "import jax", True),
  ("configs/new.py", "from deepseek_v4.config import RunConfig\nfrom pathlib import Path", False),
])
def test_planted_imports_are_caught(tmp_path, file, line, caught):
  planted = tmp_path / file
  planted.parent.mkdir(parents=True)
  planted.write_text(line + "\n")
  assert bool(violations(tmp_path)) == caught


def test_step_knows_no_orbax_and_loop_no_jnp():
  for file, forbidden in (("step", "orbax"), ("loop", "jax.numpy")):
    path = ROOT / f"deepseek_v4/training/{file}.py"
    assert not [module for _, module in imports(path, ROOT) if module.startswith(forbidden)]
  loop = ast.parse((ROOT / "deepseek_v4/training/loop.py").read_text(encoding="utf-8"))
  assert "jnp" not in {node.id for node in ast.walk(loop) if isinstance(node, ast.Name)}


# Names of tensors in released checkpoints and in transformers; parameters of ours are called differently.
THEIRS = re.compile(r"\b(self_attn|\w+_proj|e_score_correction_bias|tid2eid|attn_sink|wq_[ab]|wkv|wo_[ab]|wgate|hc_attn_\w+|"
                    r"hc_ffn_\w+|input_layernorm|post_attention_layernorm|embed_tokens|ape)\b")


def identifiers_and_strings(path):
  """Names and strings of a file; docstrings and comments may speak of anything."""
  tree = ast.parse(path.read_text(encoding="utf-8"))
  documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
  docstrings = {id(node.body[0].value) for node in ast.walk(tree)
                if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)}
  for node in ast.walk(tree):
    text = getattr(node, "id", None) or getattr(node, "attr", None) or getattr(node, "arg", None)
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
      text = node.value
    if isinstance(text, str):
      yield node.lineno, text


def test_other_peoples_tensor_names_are_in_one_file():
  ours = {"embed_proj", "hidden_proj"}
  found = [f"{path.relative_to(ROOT)}:{line} {text!r}" for path in sources(ROOT, *SHIPPED) if path.name != "hf_names.py"
           for line, text in identifiers_and_strings(path) if set(THEIRS.findall(text)) - ours]
  assert not found
  table = ROOT / "deepseek_v4/checkpoint/hf_names.py"
  assert [text for _, text in identifiers_and_strings(table) if THEIRS.search(text)]
