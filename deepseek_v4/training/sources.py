"""Where documents come from: the standard library's sources, text files, JSON lines, ArrayRecord files of token ids.

Conversations are JSON lines too; `conversations.py` reads what is on them.

Every document has a name (path inside the source, and line or record number), and a hash of the name decides whether it is
training or held-out text. Names do not hold the folder's own place, so a data set may move; files are read in the order of
their names.

An ArrayRecord file holds one document per record: its token ids as little-endian int32, without a document end (the pipeline
adds one). `write_array_record` also writes `FILE.index.npz` with the lengths and the largest id, so that a start does not
have to read all records; where it is missing or belongs to another version of the file, the records are read once.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import json
import os
import re
import sysconfig
import zipfile
from pathlib import Path
from typing import Callable, Iterable, Iterator, Sequence

import numpy as np

from deepseek_v4.config import DataConfig

SPLITS = ("train", "held_out")
# Folders of an installation that hold something else than the standard library.
FOREIGN_FOLDERS = ("site-packages", "dist-packages", "__pycache__")
_READ_AT_ONCE = 1024  # records per call while a file without index is read


def in_split(name: str, split: str, held_out_percent: int) -> bool:
  """Whether the document `name` belongs to `split`: the same on every machine and in every run."""
  digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
  held_out = int.from_bytes(digest[:8], "little") % 100 < held_out_percent
  return held_out == (split == "held_out")


def describe(config: DataConfig) -> str:
  """The source as messages name it."""
  return f"data.source = {config.source!r}" if config.path is None else f"data.path = {config.path!r}"


# ---- files --------------------------------------------------------------------------------------------------------------
def find_files(config: DataConfig) -> tuple[Path, list[str]]:
  """Root folder and the sorted names (relative to it, with "/") of the source's files.

  A folder is searched with its subfolders but without hidden ones; a file is taken as it is; anything else is a glob.

  Raises:
    ValueError: nothing there.
  """
  if config.source == "stdlib":
    root = Path(sysconfig.get_paths()["stdlib"])
    names = _walk(root, lambda name: name.endswith(".py"), FOREIGN_FOLDERS)
    if not names:
      raise ValueError(f"data.source = 'stdlib': expected Python's sources in {root}, found none; take 'text' with a path")
    return root, names
  assert config.path is not None  # DataConfig sees to it
  path = Path(config.path)
  if path.is_dir():
    lines = lambda name: name.endswith((".jsonl", ".ndjson"))
    accept = {"text": lambda name: True, "jsonl": lines, "chat": lines,
              "array_record": lambda name: ".array_record" in name and not name.endswith(".npz")}
    root, names = path, _walk(path, accept[config.source], ("__pycache__",))
  elif path.is_file():
    root, names = path.parent, [path.name]
  else:
    # Names are relative to the folder before the first wildcard.
    root = Path(os.path.dirname(re.split(r"[*?\[]", config.path)[0]))
    found = [Path(p) for p in glob.glob(config.path, recursive=True)]
    names = sorted(os.path.relpath(p, root).replace(os.sep, "/") for p in found
                   if p.is_file() and not p.name.endswith(".index.npz"))
  if not names:
    kind = {"text": "files", "array_record": ".array_record files"}.get(config.source, ".jsonl or .ndjson files")
    raise ValueError(f"data.path = {config.path!r}: expected a file, a glob or a folder with {kind}; found none")
  return root, names


def _walk(root: Path, accept: Callable[[str], bool], skip: Sequence[str]) -> list[str]:
  names = []
  for folder, folders, files in os.walk(root):
    folders[:] = [f for f in folders if f not in skip and not f.startswith(".")]
    relative = Path(folder).relative_to(root)
    for file in files:
      full = Path(folder) / file
      # Links without a target stay in: reading them names them. Pipes would block and are no files.
      if not file.startswith(".") and accept(file) and (full.is_file() or not full.exists()):
        names.append((relative / file).as_posix())
  return sorted(names)


def read_file(file: Path) -> bytes:
  """The bytes of a file, or a ValueError that names it.

  Raises:
    ValueError: it cannot be read.
  """
  try:
    return file.read_bytes()
  except OSError as error:
    raise ValueError(f"data.path: cannot read {file}: {error.strerror or error}") from error


# ---- text ---------------------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Texts:
  """Documents as UTF-8 bytes, with their names; and the names of files that are no UTF-8."""

  names: list[str]
  texts: list[bytes]
  left_out: list[str]


def read_texts(config: DataConfig, split: str) -> Texts:
  """The documents of one split of a "stdlib", "text" or "jsonl" source; empty ones and files that are no UTF-8 are left out.

  Raises:
    ValueError: no file, an unreadable one, or a line that is no JSON object with the text field: named with file and line.
  """
  if config.source not in ("stdlib", "text", "jsonl"):
    raise ValueError(f"data.source = {config.source!r}: expected a source of text: 'stdlib', 'text' or 'jsonl'")
  root, files = find_files(config)
  names, texts, left_out = [], [], []
  for file in files:
    if config.source == "jsonl":
      found = [(name, text) for name, text in _json_lines(root / file, file, config.text_field)
               if in_split(name, split, config.held_out_percent)]
    elif in_split(file, split, config.held_out_percent):
      text = read_file(root / file)
      found = [(file, text)] if _is_utf8(text) else []
      left_out += [] if found else [file]
    else:
      found = []
    names += [name for name, text in found if text]
    texts += [text for _, text in found if text]
  return Texts(names, texts, left_out)


def _is_utf8(text: bytes) -> bool:
  try:
    text.decode("utf-8")
  except UnicodeDecodeError:
    return False
  return True


def _json_lines(file: Path, name: str, field: str) -> Iterator[tuple[str, bytes]]:
  for number, line in enumerate(read_file(file).split(b"\n"), 1):
    if not line.strip():
      continue
    try:
      # Encoded inside: a lone surrogate is valid JSON, but no text.
      text = json.loads(line)[field].encode("utf-8")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
      raise ValueError(f"data.path: {file}, line {number}: expected a JSON object with a string in "
                       f"data.text_field = {field!r}; {type(error).__name__}: {error}") from error
    yield f"{name}#{number}", text


# ---- ArrayRecord --------------------------------------------------------------------------------------------------------
class RecordFile:
  """One ArrayRecord file of token ids.

  Attributes:
    lengths: int64 [N], ids of each record.
    largest: the largest id in the file, -1 without any.
  """

  def __init__(self, file: Path, name: str) -> None:
    from array_record.python import array_record_module
    self.file, self.name = file, name
    _check_readable(file)
    # Reads jump between records: reading ahead would fetch what nobody asked for.
    self._reader = array_record_module.ArrayRecordReader(str(file), "readahead_buffer_size:0,max_parallelism:0")
    if not self._reader.ok():
      raise ValueError(f"data.path: {file}: expected an ArrayRecord file")
    index = _read_index(file, self._reader.num_records())
    self.lengths, self.largest = index if index is not None else self._scan()

  def read(self, record: int) -> np.ndarray:
    """The ids of a record, int32 [n].

    Raises:
      ValueError: the record has changed or is damaged.
    """
    ids = self._decode(self._fetch([record])[0], record)
    if len(ids) != self.lengths[record]:
      raise ValueError(f"data.path: {self.file}, record {record}: expected {self.lengths[record]} ids, found {len(ids)}; "
                       "the file has changed since the run started or its index was written")
    if len(ids) and not 0 <= ids.min() <= ids.max() <= self.largest:
      raise ValueError(f"data.path: {self.file}, record {record}: expected ids from 0 to {self.largest}, found {ids.min()} "
                       f"to {ids.max()}; the file has changed since the run started or its index was written")
    return ids

  def _fetch(self, records: Sequence[int]) -> list[bytes]:
    try:
      return self._reader.read(list(records))
    except (RuntimeError, IndexError) as error:
      raise ValueError(f"data.path: {self.file}, record {records[0]} or after it: damaged; {error}") from error

  def _decode(self, record: bytes, number: int) -> np.ndarray:
    if len(record) % 4:
      raise ValueError(f"data.path: {self.file}, record {number}: expected int32 ids, found {len(record)} bytes")
    return np.frombuffer(record, "<i4")

  def _scan(self) -> tuple[np.ndarray, int]:
    count = self._reader.num_records()
    lengths, largest = np.zeros(count, np.int64), -1
    for first in range(0, count, _READ_AT_ONCE):
      numbers = range(first, min(first + _READ_AT_ONCE, count))
      for number, record in zip(numbers, self._fetch(numbers), strict=True):
        ids = self._decode(record, number)
        lengths[number] = len(ids)
        if len(ids):
          if ids.min() < 0:
            raise ValueError(f"data.path: {self.file}, record {number}: token id {ids.min()}; expected ids from 0")
          largest = max(largest, int(ids.max()))
    return lengths, largest

  def first_above(self, vocab_size: int) -> tuple[int, int]:
    """(record, id) of the first id that is not below `vocab_size`, for a message.

    Raises:
      ValueError: no record holds the largest id that the index names.
    """
    for number in range(len(self.lengths)):
      ids = self.read(number)
      if (ids >= vocab_size).any():
        return number, int(ids[ids >= vocab_size][0])
    raise ValueError(f"data.path: {self.file}: its index names the id {self.largest}, but no record holds it; delete "
                     f"{_index(self.file)}")


def open_records(config: DataConfig, vocab_size: int) -> list[RecordFile]:
  """The files of an "array_record" source.

  Raises:
    ValueError: no file, an unreadable or damaged one, or ids outside 0 ... vocab_size - 1: named with file and record.
  """
  root, names = find_files(config)
  files = [RecordFile(root / name, name) for name in names]
  for file in files:
    if file.largest >= vocab_size:
      record, value = file.first_above(vocab_size)
      raise ValueError(f"data.path: {file.file}, record {record}: token id {value}; expected ids below "
                       f"model.vocab_size = {vocab_size}")
  return files


def write_array_record(path: str | Path, documents: Iterable[Sequence[int]]) -> None:
  """Writes token ids, one document per record, and the index beside the file (see the top of this module).

  Args:
    path: the file; its name should hold ".array_record", so that a folder's search finds it.
    documents: token ids of each document, without document end.

  Raises:
    ValueError: an id that is not an integer in 0 ... 2^31 - 1.
  """
  from array_record.python import array_record_module
  path = Path(path)
  lengths, largest = [], -1
  writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")  # single records can be read alone
  try:
    for number, document in enumerate(documents):
      ids = np.asarray(document)
      if len(ids):
        if ids.ndim != 1 or ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= 2**31:
          raise ValueError(f"documents[{number}]: expected a list of token ids in 0 ... 2147483647")
        largest = max(largest, int(ids.max()))
      writer.write(ids.astype("<i4").tobytes())
      lengths.append(len(ids))
  finally:
    writer.close()
  with open(_index(path), "wb") as file:
    np.savez(file, lengths=np.array(lengths, np.int64), largest=largest, size=path.stat().st_size)


def _check_readable(file: Path) -> None:
  try:
    with open(file, "rb"):
      pass
  except OSError as error:
    raise ValueError(f"data.path: cannot read {file}: {error.strerror or error}") from error


def _index(file: Path) -> Path:
  return file.with_name(file.name + ".index.npz")


def _read_index(file: Path, records: int) -> tuple[np.ndarray, int] | None:
  """Lengths and largest id from the file's index, or None where there is none that belongs to it."""
  try:
    with np.load(_index(file)) as index:
      if int(index["size"]) == file.stat().st_size and index["lengths"].shape == (records,):
        return index["lengths"], int(index["largest"])
  except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
    pass  # without a usable index the records themselves are read
  return None
