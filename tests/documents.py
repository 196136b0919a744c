"""What the documents of this repository say that a machine can check: commands, paths, links, names.

python -m tests.documents writes README's list of files anew, from what each file's docstring begins with.
"""

import ast
import dataclasses
import re
import shlex
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOP = ("deepseek_v4", "pallas_kernels", "configs", "launch", "tests", ".ci", ".github")
SCRIPTS = (".py", ".sh", ".ipynb", ".yaml", ".svg")  # a bare name with one of these endings is a file of this repository
PROGRAMS = ("python", "pip", "pytest", "bash", "hf")


@dataclasses.dataclass(frozen=True)
class Command:
  """One command: its program and arguments, with placeholders such as FILE as they stand."""

  words: tuple[str, ...]

  def __str__(self) -> str:
    return shlex.join(self.words)

  @property
  def main(self) -> str | None:
    """NAME of python -m launch.NAME; None for other programs."""
    return self.words[2].removeprefix("launch.") if self.words[:2] == ("python", "-m") and len(self.words) > 2 else None

  @property
  def arguments(self) -> tuple[str, ...]:
    return self.words[3:]

  def value_of(self, flag: str) -> str | None:
    """What stands behind --flag."""
    return self.words[self.words.index(f"--{flag}") + 1] if f"--{flag}" in self.words else None


def blocks(text: str) -> list[tuple[str, str]]:
  """(language, content) of each fenced block."""
  return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)


def spans(text: str) -> list[str]:
  """Code between single backticks, outside of blocks; a line break inside is a space."""
  prose = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
  return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def commands(text: str) -> list[Command]:
  """Every command of the blocks without a language, and of the spans that begin with python -m or pytest; each once."""
  lines = []
  for language, content in blocks(text):
    if not language:
      lines += content.replace("\\\n", " ").splitlines()
  lines += [span for span in spans(text) if span.startswith(("python -m ", "pytest "))]
  found = {}
  for line in lines:
    if line.split(" ")[0] in PROGRAMS:
      words = shlex.split(line, comments=True)
      while words:
        end = words.index("&&") if "&&" in words else len(words)
        found[Command(tuple(words[:end]))] = None
        words = words[end + 1:]
  return list(found)


def links(text: str) -> list[str]:
  """Targets of links and pictures, without a part of a page."""
  return [target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text)]


def paths(text: str) -> list[str]:
  """Files and folders of this repository that code or commands name; with stars where some are meant."""
  code = [*spans(text), *(content for language, content in blocks(text))]
  words = {word.rstrip(".,:;") for piece in code for word in re.split(r"[\s=\"'(){}\[\]|]+", piece)}
  mine = lambda word: word.split("/")[0] in TOP and "/" in word or ("/" not in word and word.endswith(SCRIPTS))
  return sorted(word for word in words if mine(word))


def tree(text: str) -> list[str]:
  """The paths of a block that draws the repository as a tree: a name at the beginning of a line, below the last folder
  whose name stands further left."""
  drawing = next(content for _, content in blocks(text) if content.startswith("deepseek_v4/"))
  found, above = [], []
  for line in drawing.splitlines():
    indent = len(line) - len(line.lstrip())
    match = re.match(r"([\w.]+(?:/|\.py|\.md)?)(\s|$)", line.lstrip())
    if indent > 16 or not match:  # a remark goes on
      continue
    while above and above[-1][0] >= indent:
      above.pop()
    name = match.group(1)
    found.append("/".join([*(folder for _, folder in above), name.rstrip("/")]))
    if name.endswith("/"):
      above.append((indent, name.rstrip("/")))
  return found


def exists(path: str, root: Path = ROOT) -> bool:
  """Whether there is such a file or folder; a bare name may lie anywhere."""
  if "*" in path or "/" not in path:
    return any(root.glob(path)) or any(any((root / top).rglob(path.lstrip("/"))) for top in TOP)
  return (root / path).exists()


# ---- every file with what it says of itself ----------------------------------------------------------------------------
LISTED = ("deepseek_v4", "pallas_kernels", "launch", "configs")
_LIST = re.compile(r"^```text\ndeepseek_v4/.*?^```$", re.M | re.S)  # the tree of `tree` is a block without a language
_COLUMN, _WIDTH = 28, 124


def remark(path: Path) -> str:
  """How a file's docstring begins: its first sentence without the full stop; of one that needs two lines as many clauses as
  have room in one."""
  said = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n\n")[0]
  sentence = re.split(r"\.(?:\s|$)", " ".join(said.split()))[0]
  ends = [len(sentence), *(match.start() for match in re.finditer(r"[,:;] | \(", sentence))]
  fits = [end for end in ends if end <= _WIDTH - _COLUMN and sentence[:end].count("(") == sentence[:end].count(")")]
  return sentence[:max(fits, default=len(sentence))]


def _folder(path: Path) -> list[str]:
  """Lines of a folder and of those in it: itself with what its `__init__.py` says, then its files."""
  files = sorted(path.glob("*.py"))
  package = path / "__init__.py"
  named = [(f"{path.relative_to(ROOT).as_posix()}/", remark(package) if package in files else "")]
  named += [(f"  {file.name}", remark(file)) for file in files if file != package]
  lines = []
  for name, said in named:
    lines += textwrap.wrap(f"{name:{_COLUMN - 1}} {said}", _WIDTH, subsequent_indent=" " * _COLUMN,
                           break_long_words=False, break_on_hyphens=False, drop_whitespace=True)
  for below in sorted(folder for folder in path.iterdir() if folder.is_dir() and any(folder.glob("*.py"))):
    lines += _folder(below)
  return lines


def listing() -> str:
  """The block of README that names every Python file of the libraries, mains and configs."""
  return "\n".join(["```text", *(line for top in LISTED for line in _folder(ROOT / top)), "```"])


def listed(text: str) -> str:
  """That block as a document has it."""
  return _LIST.search(text)[0]


if __name__ == "__main__":
  README = ROOT / "README.md"
  README.write_text(_LIST.sub(lambda _: listing(), README.read_text(encoding="utf-8")), encoding="utf-8")
