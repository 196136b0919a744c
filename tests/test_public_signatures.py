"""Every public function of the two libraries says what it takes and gives, and every package what lives in it."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(path for folder in ("deepseek_v4", "pallas_kernels") for path in (ROOT / folder).rglob("*.py"))


def public_functions(body, inside=""):
  """(name, node) of a module's functions and of its public classes' methods, __init__ and the like included."""
  for node in body:
    if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
      yield from public_functions(node.body, f"{node.name}.")
    elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and (
        not node.name.startswith("_") or node.name.startswith("__")):
      yield inside + node.name, node


def untyped(node, method):
  """Names of the parameters without a type, and "return"."""
  given = node.args
  parameters = [*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]
  missing = [p.arg for p in parameters if p.annotation is None and not (method and p.arg in ("self", "cls"))]
  return missing + ["return"] * (node.returns is None)


def of_text(text):
  return {name: untyped(node, "." in name) for name, node in public_functions(ast.parse(text).body)}


def test_public_signatures_are_typed():
  found = {f"{path.relative_to(ROOT)}: {name}": missing for path in FILES
           for name, missing in of_text(path.read_text(encoding="utf-8")).items() if missing}
  assert not found


def test_missing_types_are_seen():
  text = ("def f(a, *, b: int): pass\nclass A:\n  def __init__(self, c) -> None: pass\n  def _g(self): pass\n"
          "def h(*x: int) -> int: pass")
  assert of_text(text) == {"f": ["a", "return"], "A.__init__": ["c"], "h": []}


ARRAY = re.compile(r"jax\.Array|np\.ndarray|ArrayLike")
# Axes in brackets, a word for them, or where else they are said.
SHAPE = re.compile(r"\[[^\]]+\]|\bscalar|\bshape|[Ss]ee `|inverse of|transpose of|[Aa]rguments (as|in)|as `|of `\w+`")
SUFFIX = re.compile(r"\w+_[A-Zk]+")  # letters of axes, which the legend on top of the file explains


def shapeless(node):
  """Whether a function takes or gives arrays and nothing says of which shape."""
  given = {p.arg: ast.unparse(p.annotation) for p in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
           if p.annotation}
  gives = node.returns is not None and ARRAY.search(ast.unparse(node.returns))
  takes = [name for name, kind in given.items() if ARRAY.search(kind)]
  named = not gives and all(SUFFIX.fullmatch(name) for name in takes)
  return bool(gives or takes) and not named and not SHAPE.search(ast.get_docstring(node) or "")


def test_arrays_have_shapes():
  found = [f"{path.relative_to(ROOT)}: {name}" for path in FILES
           for name, node in public_functions(ast.parse(path.read_text(encoding="utf-8")).body)
           if not name.split(".")[-1].startswith("__") and shapeless(node)]
  assert not found


def test_missing_shapes_are_seen():
  for text, expected in (("def f(x: jax.Array) -> int: 'Sums.'", True),
                         ("def f(x: jax.Array) -> int: 'Sums of [B, S].'", False),
                         ("def f(x_BS: jax.Array) -> None: 'Looks.'", False), ("def f(n: int) -> int: 'One more.'", False),
                         ("def f(x_BS: jax.Array) -> jax.Array: 'Sums.'", True)):
    assert shapeless(ast.parse(text).body[0]) == expected, text


# What other people call, deepseek_v4's own names and the ops: here dtypes are said too.
CALLED = {"deepseek_v4/model/transformer.py": ("DeepseekV4.__call__",),
          "deepseek_v4/model/cache.py": ("cache_lengths", "cache_entries", "rewind"),
          "deepseek_v4/analysis/trace.py": ("trace",),
          "deepseek_v4/optim/newton_schulz.py": ("newton_schulz",), "deepseek_v4/generation/decode.py": ("generate",),
          "deepseek_v4/training/state.py": ("init_state",), "deepseek_v4/training/step.py": ("make_train_step",),
          "deepseek_v4/posttraining/distillation.py": ("reverse_kl",),
          **{path.relative_to(ROOT).as_posix(): None for path in FILES
             if path.name == "__init__.py" and path.parent.parent.name == "pallas_kernels"}}


@pytest.mark.parametrize("file, names", CALLED.items(), ids=list(CALLED))
def test_what_others_call_says_dtypes(file, names):
  functions = dict(public_functions(ast.parse((ROOT / file).read_text(encoding="utf-8")).body))
  for name in names or [name for name, node in functions.items() if ARRAY.search(ast.unparse(node.args))]:
    said = ast.get_docstring(functions[name]) or ""
    assert re.search(r"\b(float(ing|32|64)?|int(32)?|bool|dtypes?|bfloat16|typed)\b", said), f"{file}: {name}"


def silent(node):
  """Whether a function raises or refuses something itself, of which its docstring says nothing."""
  said = ast.get_docstring(node) or ""
  raises = any(isinstance(part, ast.Raise) and part.exc is not None
               or isinstance(part, ast.Call) and getattr(part.func, "id", "") == "refuse" for part in ast.walk(node))
  return raises and not any(word in said for word in ("Raises", "raises", "raised", "Refuses", "refuses"))


def test_errors_are_documented():
  found = [f"{path.relative_to(ROOT)}: {name}" for path in FILES
           for name, node in public_functions(ast.parse(path.read_text(encoding="utf-8")).body)
           if not name.split(".")[-1].startswith("__") and silent(node)]
  assert not found


PACKAGES = sorted(path for folder in ("deepseek_v4", "pallas_kernels", "launch")
                  for path in (ROOT / folder).rglob("__init__.py"))


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.parent.relative_to(ROOT).as_posix())
def test_a_package_says_what_lives_in_it_and_what_may_not(package):
  said = ast.get_docstring(ast.parse(package.read_text(encoding="utf-8"))) or ""
  assert len(said) > 40
  assert re.search(r"\b(no|not|neither|nothing|only)\b", said.lower())
