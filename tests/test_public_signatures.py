"""Every public function of the two libraries says what it takes and gives, and every package what lives in it."""

import ast
import functools
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


def arrays_of(node, array=ARRAY):
  """Names of a function's parameters that are arrays or hold some, and "return" if what it gives does."""
  kinds = {p.arg: p.annotation for p in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)}
  return [name for name, kind in {**kinds, "return": node.returns}.items() if kind and array.search(ast.unparse(kind))]


def shapeless(node):
  """Whether a function takes or gives arrays and nothing says of which shape."""
  names = arrays_of(node)
  return not all(SUFFIX.fullmatch(name) for name in names) and not SHAPE.search(ast.get_docstring(node) or "")


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


# A dtype's name, or a word for which one it is; what a legend on top of the file says holds for all of it.
DTYPE = re.compile(r"\b(float(ing|32|64)?|u?int(egers?|8|16|32|64)?|bool|bfloat16|dtypes?|[Tt]yped)\b")
LEGEND = re.compile(r"^Dtypes: ", re.MULTILINE)


def arrays_named(tree):
  """Names that a module gives to types of arrays."""
  return {ast.unparse(node.targets[0]) for node in tree.body
          if isinstance(node, ast.Assign) and ARRAY.search(ast.unparse(node.value))}


@functools.cache
def arrays_of_modules():
  """The same of every file of ours that does so, by its name as a module."""
  found = {".".join(path.relative_to(ROOT).with_suffix("").parts): arrays_named(ast.parse(path.read_text(encoding="utf-8")))
           for path in FILES}
  return {module: names for module, names in found.items() if names}


def array_types(tree):
  """What is an array in a module's annotations: also by the names that it, or a file of ours that it imports from, gives."""
  names = arrays_named(tree)
  for node in tree.body:
    if isinstance(node, ast.ImportFrom):
      names |= arrays_of_modules().get(node.module, set()) & {alias.name for alias in node.names}
  return re.compile("|".join([ARRAY.pattern, *(rf"\b{name}\b" for name in names)]))


def untold(text):
  """Public functions that take or give arrays, and classes that hold some, of which nothing says which dtype they have."""
  tree = ast.parse(text)
  if LEGEND.search(ast.get_docstring(tree) or ""):
    return []
  array, said = array_types(tree), lambda node: DTYPE.search(ast.get_docstring(node) or "")
  classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")}
  found = [name for name, node in classes.items() if not said(node) and any(
    isinstance(field, ast.AnnAssign) and array.search(ast.unparse(field.annotation)) for field in node.body)]
  for name, node in public_functions(tree.body):
    owner, _, own = name.rpartition(".")
    # __init__ and the like are described where their class is, but for a call, which is what the class is for.
    if arrays_of(node, array) and not said(classes[owner] if own.startswith("__") and own != "__call__" else node):
      found.append(name)
  return found


@pytest.mark.parametrize("folder", ["deepseek_v4", "pallas_kernels"])
def test_arrays_have_dtypes(folder):
  found = {path.relative_to(ROOT).as_posix(): names for path in FILES if path.is_relative_to(ROOT / folder)
           if (names := untold(path.read_text(encoding="utf-8")))}
  assert not found


def test_missing_dtypes_are_seen():
  for text, expected in (("def f(x: jax.Array) -> int: 'Sums of [B, S].'", ["f"]),
                         ("def f(x: jax.Array) -> int: 'Sums of int32 [B, S].'", []),
                         ("def f(n: int) -> jax.Array: 'Zeros [n], floating.'", []),
                         ("def f(n: int) -> int: 'One more.'", []),
                         ("'Dtypes: all float32.'\ndef f(x: jax.Array) -> int: 'Sums of [B, S].'", []),
                         ("'Of dtypes.'\ndef f(x: jax.Array) -> int: 'Sums of [B, S].'", ["f"]),
                         ("Rows = dict[str, np.ndarray]\ndef f(x: Rows) -> int: 'Sums.'", ["f"]),
                         ("from deepseek_v4.posttraining.passes import Rows\ndef f(x: Rows) -> int: 'Sums.'", ["f"]),
                         ("class A:\n  'A.'\n  x: jax.Array\n  def __init__(self, y: jax.Array): pass", ["A", "A.__init__"]),
                         ("class A:\n  'Int32: int32 [B].'\n  x: jax.Array\n  def g(self) -> jax.Array: 'x.'", ["A.g"]),
                         ("class A:\n  'Of int32.'\n  def __call__(self, y: jax.Array): 'One.'", ["A.__call__"])):
    assert untold(text) == expected, text


# A section, an equation or a table of a report, or a paper by its authors and year; see the docstrings of the two libraries.
SOURCE = re.compile(r"\b([Rr]eport|V3(\.2)?|mHC( paper)?)\s(eqs?\.\s|table\s)?\d|\b(et\sal\.|and\s[A-Z]\w+)\s\d{4}")
# Where formulas live, and the files there that have none of others: they move, cut, count and check, or hold tests' cases.
FORMULAS = [path for path in FILES if path.parents[1].name == "pallas_kernels"
            or {"model", "optim", "posttraining", "generation"} & set(path.parts[len(ROOT.parts):])]
PLUMBING = {"deepseek_v4/model/": "__init__ context groups", "deepseek_v4/optim/": "__init__ in_place",
            "deepseek_v4/generation/": "__init__ decode requests stream",
            "deepseek_v4/posttraining/": "__init__ beginning passes prompts",
            "pallas_kernels/grouped_matmul/": "cases kernel_calls", "pallas_kernels/hyper_connections/": "cases",
            "pallas_kernels/indexer/": "cases forms largest",
            "pallas_kernels/sparse_attention/": "cases forms tiles sparse_copies sparse_lists sparse_plan sparse_rows "
                                                "sparse_table"}


def sources(text):
  """The sources that the docstrings of a file name."""
  kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
  said = [ast.get_docstring(node) or "" for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)]
  return [match.group() for part in said for match in SOURCE.finditer(part)]


def test_formulas_name_their_source():
  without = {path.relative_to(ROOT).as_posix() for path in FORMULAS if not sources(path.read_text(encoding="utf-8"))}
  assert without == {f"{folder}{name}.py" for folder, names in PLUMBING.items() for name in names.split()}


def test_sources_can_be_looked_up():
  for package, reports in (("deepseek_v4", ("2606.19348", "2412.19437", "2512.02556", "2512.24880")),
                           ("pallas_kernels", ("2606.19348", "2512.02556", "2512.24880"))):
    said = ast.get_docstring(ast.parse((ROOT / package / "__init__.py").read_text(encoding="utf-8")))
    assert all(number in said for number in reports), package


def test_missing_sources_are_seen():
  for text, expected in (("'Attention (report 2.3).'", ["report 2"]), ("'As V3 2.2 has it.'", ["V3 2"]),
                         ("def f(): 'By hand (mHC table 5).'", ["mHC table 5"]), ("'A report of 5 lines.'", []),
                         ("class A: 'YaRN (Peng et al. 2023).'", ["et al. 2023"]), ("# report 2.3", [])):
    assert sources(text) == expected, text


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


MAY_NOT = "What may not live here:"
OWN_WORDS = {  # of packages that say it otherwise
  "deepseek_v4": "Nothing else lives here.", "deepseek_v4/analysis": "neither training nor checkpoints.",
  "deepseek_v4/checkpoint": "No step and no loop:", "deepseek_v4/generation": "Nothing here learns:",
  "deepseek_v4/model": "No optimizer, no data, no files,", "deepseek_v4/optim": "neither losses nor data nor a model",
  "deepseek_v4/planning": "It builds nothing of its own:", "deepseek_v4/posttraining": "neither knows it.",
  "pallas_kernels": "What may not: configs, parameters, flax,",
  "deepseek_v4/text": "It imports no JAX and knows no model:", "deepseek_v4/training": "No kernels and no model code here.",
  "launch/fault_runs": "nothing of the library is called or patched here."}
PACKAGES = sorted(path for folder in ("deepseek_v4", "pallas_kernels", "launch")
                  for path in (ROOT / folder).rglob("__init__.py"))


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.parent.relative_to(ROOT).as_posix())
def test_a_package_says_what_lives_in_it_and_what_may_not(package):
  said = ast.get_docstring(ast.parse(package.read_text(encoding="utf-8"))) or ""
  words = OWN_WORDS.get(package.parent.relative_to(ROOT).as_posix(), MAY_NOT)
  before, found, after = " ".join(said.split()).partition(words)
  assert found and len(before) > 30 and (words != MAY_NOT or len(after) > 20)
