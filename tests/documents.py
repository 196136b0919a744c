"""What the documents of this repository say that a machine can check: commands, paths, links, names."""

import dataclasses
import re
import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOP = ("deepseek_v4", "pallas_kernels", "configs", "launch", "tests", ".ci", ".github")
SCRIPTS = (".py", ".sh", ".ipynb", ".yaml", ".svg")  # a bare name with one of these endings is a file of this repository
PROGRAMS = ("python", "pip", "pytest", "bash")


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
  """Every command of the blocks without a language, and of the spans that begin with python -m; each once."""
  lines = []
  for language, content in blocks(text):
    if not language:
      lines += content.replace("\\\n", " ").splitlines()
  lines += [span for span in spans(text) if span.startswith("python -m ")]
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
