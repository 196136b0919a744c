"""Three kinds of text that every machine with this package has: Python, C, and English about software.

    python    the standard library's sources
    c         headers of Python, NumPy and jaxlib
    english   licences, notices and descriptions of the installed distributions

A paragraph (what stands between empty lines) is kept once in all of a kind: licences repeat each other, and what is held out
must not stand in the training text. Each kind is two files of JSON lines, one document a line: taught/KIND.jsonl, of which
runs train on most and look at the rest, and judged/KIND.jsonl, which no run sees.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
import sysconfig
from pathlib import Path
from typing import Iterator

import jaxlib
import numpy as np

from deepseek_v4.config import DataConfig
from deepseek_v4.training import sources

KINDS = ("python", "c", "english")
MAX_BYTES = 1_000_000  # of a kind
TAUGHT, JUDGED = "taught", "judged"
_JUDGED_BYTES = 70_000  # of a kind, at least
_LEAST, _MOST = 400, 10_000  # characters of a document; longer ones are cut, so that none makes up much of its kind
_LICENCE = re.compile(r"(licen[cs]e|copying|notice|authors|readme|changelog|news)[^/]*$", re.IGNORECASE)


def write(folder: Path) -> None:
  """Writes taught/KIND.jsonl and judged/KIND.jsonl of each kind into the folder, unless they are there."""
  for kind in KINDS:
    paths = [folder / part / f"{kind}.jsonl" for part in (TAUGHT, JUDGED)]
    if all(path.is_file() for path in paths):
      continue
    for path, texts in zip(paths, divided(chosen(documents(kind)))):
      path.parent.mkdir(parents=True, exist_ok=True)
      unfinished = path.with_suffix(".unfinished")
      unfinished.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
      unfinished.rename(path)


def divided(texts: list[str]) -> tuple[list[str], list[str]]:
  """(what is taught, what models are judged on): the last documents, as many as make `_JUDGED_BYTES`."""
  backwards = np.cumsum([len(text.encode()) for text in reversed(texts)])
  count = int(np.searchsorted(backwards, _JUDGED_BYTES)) + 1
  return texts[:-count], texts[-count:]


def documents(kind: str) -> Iterator[str]:
  """The texts of a kind, as they are."""
  if kind == "english":
    yield from _english()
    return
  if kind == "python":
    root, names = sources.find_files(DataConfig())
    files = [root / name for name in names]
  else:
    folders = (Path(sysconfig.get_paths()["include"]), Path(np.get_include()), Path(jaxlib.__file__).parent / "include")
    files = [file for folder in folders for file in sorted(folder.rglob("*.h"))]
  for file in files:
    yield file.read_text(encoding="utf-8", errors="replace")


def _english() -> Iterator[str]:
  for distribution in sorted(importlib.metadata.distributions(), key=lambda d: str(d.metadata["Name"])):
    yield distribution.metadata.get("Description") or str(distribution.metadata.get_payload() or "")
    for file in distribution.files or ():
      if _LICENCE.search(str(file)) and file.suffix in ("", ".txt", ".md", ".rst"):
        path = Path(str(distribution.locate_file(file)))
        if path.is_file():
          yield path.read_text(encoding="utf-8", errors="replace")


def chosen(texts: Iterator[str]) -> list[str]:
  """Documents of paragraphs that have not been seen before, in the order of a hash, up to `MAX_BYTES`."""
  seen: set[str] = set()
  kept = []
  for text in texts:
    new = []
    for paragraph in re.split(r"\n\s*\n", text):
      key = " ".join(paragraph.lower().split())
      if key and key not in seen:
        seen.add(key)
        new.append(paragraph.rstrip())
    whole = "\n\n".join(new)[:_MOST]
    if len(whole) >= _LEAST:
      kept.append(whole)
  kept.sort(key=lambda text: hashlib.sha256(text.encode()).digest())
  sizes = np.cumsum([len(text.encode()) for text in kept])
  return kept[:int(np.searchsorted(sizes, MAX_BYTES)) + 1]
