"""Folders of safetensors, read and written one tensor at a time.

A safetensors file is 8 bytes (length of the header, little endian), a JSON header {name: {dtype, shape, data_offsets}} and
the data. Header and data are handled here rather than by the library because its numpy side knows neither bfloat16 nor the
8-bit floats (version 0.8), and because a file is written while its tensors are still being made.
"""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from pathlib import Path
from typing import Any, Iterable, Mapping

import ml_dtypes
import numpy as np

from deepseek_v4.checkpoint.problems import Problems

INDEX_NAME = "model.safetensors.index.json"
MAX_FILE_BYTES = 5 * 10**9
DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
          "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
          "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2, "F8_E8M0": ml_dtypes.float8_e8m0fnu}


# ---- reading -----------------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class StoredTensor:
  """A tensor in a file; `numpy()` reads it."""

  file: Path
  offset: int
  shape: tuple[int, ...]
  dtype: np.dtype

  def numpy(self) -> np.ndarray:
    """The values in `shape` and `dtype`, mapped from the file: pages are read when they are touched."""
    if 0 in self.shape:
      return np.zeros(self.shape, self.dtype)
    data = np.memmap(self.file, np.uint8, "r", self.offset, (int(np.prod(self.shape)) * self.dtype.itemsize,))
    return data.view(self.dtype).reshape(self.shape)


def read_header(file: Path) -> dict[str, StoredTensor]:
  """The tensors of one safetensors file.

  Raises:
    ValueError: the file is cut short or its header makes no sense.
  """
  size = file.stat().st_size
  with file.open("rb") as f:
    start = f.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
    if 8 + length > size:
      raise ValueError(f"cut short: {size} bytes, the header alone says {8 + length}")
    header = json.loads(f.read(length))
  header.pop("__metadata__", None)
  tensors = {}
  for name, entry in header.items():
    if entry["dtype"] not in DTYPES:
      raise ValueError(f"{name} has dtype {entry['dtype']}, expected one of {', '.join(DTYPES)}")
    dtype, (begin, end) = np.dtype(DTYPES[entry["dtype"]]), entry["data_offsets"]
    shape = tuple(entry["shape"])
    if end - begin != int(np.prod(shape)) * dtype.itemsize or 8 + length + end > size:
      raise ValueError(f"cut short: {name} {shape} {dtype} has bytes {begin} to {end} of {size - 8 - length}")
    tensors[name] = StoredTensor(file, 8 + length + begin, shape, dtype)
  return tensors


def read_folder(folder: Path) -> tuple[dict[str, StoredTensor], Problems]:
  """All tensors of a folder (one file, or shards with an index) and what is wrong with its files, by kind.

  Raises:
    FileNotFoundError: no such folder, or no safetensors file in it.
  """
  if not folder.is_dir():
    raise FileNotFoundError(f"source = {str(folder)!r}: expected a folder with safetensors files")
  weight_map = _weight_map(folder / INDEX_NAME)
  present = sorted(f.name for f in folder.glob("*.safetensors"))
  names = present if weight_map is None else sorted(set(weight_map.values()))
  if not names:
    raise FileNotFoundError(f"source = {str(folder)!r}: expected model.safetensors or {INDEX_NAME} with its shards")
  tensors: dict[str, StoredTensor] = {}
  problems: Problems = {"shard listed but absent": [], "unreadable shard": [], "in the index but not in its shard": [],
                        "in a shard but not in the index": [], "in more than one file": [],
                        "file that the index does not list": [name for name in present if name not in names]}
  for name in names:
    listed = {t for t, file in weight_map.items() if file == name} if weight_map is not None else None
    if not (folder / name).is_file():
      problems["shard listed but absent"].append(name)
      continue
    try:
      found = read_header(folder / name)
    except (ValueError, KeyError, TypeError) as error:
      problems["unreadable shard"].append(f"{name} ({error})")
      continue
    if listed is not None:
      problems["in the index but not in its shard"] += [f"{t} ({name})" for t in sorted(listed - set(found))]
      problems["in a shard but not in the index"] += [f"{t} ({name})" for t in sorted(set(found) - listed)]
    problems["in more than one file"] += [f"{t} ({name})" for t in sorted(set(found) & set(tensors))]
    tensors.update(found)
  return tensors, problems


def _weight_map(index: Path) -> dict[str, str] | None:
  """Tensor -> file from a folder's index; None without one."""
  if not index.is_file():
    return None
  try:
    return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(f"{index}: expected a JSON object with a weight_map of tensor names to files "
                     f"({type(error).__name__}: {error})") from error


# ---- writing -----------------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Planned:
  """A tensor that is to be written: `dtype` is a safetensors code such as BF16 or F8_E8M0."""

  dtype: str
  shape: tuple[int, ...]

  @property
  def nbytes(self) -> int:
    """Bytes that it will take in a file."""
    return math.prod(self.shape) * np.dtype(DTYPES[self.dtype]).itemsize


def total_bytes(plan: Mapping[str, Planned]) -> int:
  """Bytes of all tensors: the index's `total_size`."""
  return sum(planned.nbytes for planned in plan.values())


def split_files(plan: Mapping[str, Planned], max_file_bytes: int = MAX_FILE_BYTES) -> list[list[str]]:
  """Names in the plan's order, cut into files; only a tensor that is larger by itself exceeds the bound."""
  files: list[list[str]] = []
  size = 0
  for name, planned in plan.items():
    if not files or size + planned.nbytes > max_file_bytes:
      files.append([])
      size = 0
    files[-1].append(name)
    size += planned.nbytes
  return files


def write_folder(folder: Path, plan: Mapping[str, Planned], tensors: Iterable[tuple[str, np.ndarray]],
                 max_file_bytes: int = MAX_FILE_BYTES) -> None:
  """Writes model.safetensors, or shards, and their index, while the tensors arrive.

  Args:
    folder: exists; files of these names are replaced.
    plan: what will be written, in order.
    tensors: (name, array) in the same order; arrays whose items are as wide as the planned dtype's.
    max_file_bytes: size at which a new file begins.

  Raises:
    ValueError: a tensor that is not the next one of the plan, or of another shape or width.
  """
  arriving = iter(tensors)
  files = split_files(plan, max_file_bytes)
  weight_map: dict[str, str] = {}
  for number, names in enumerate(files, 1):
    file = "model.safetensors" if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
    weight_map.update(dict.fromkeys(names, file))
    with (folder / file).open("wb") as f:
      f.write(_header({name: plan[name] for name in names}))
      for name in names:
        arrived, array = next(arriving, (None, np.zeros(0)))
        if arrived != name:
          raise ValueError(f"tensor {arrived!r}: expected {name!r}, the next one of the plan")
        expected = plan[name].shape, np.dtype(DTYPES[plan[name].dtype]).itemsize
        if (array.shape, array.dtype.itemsize) != expected:
          raise ValueError(f"{name} = {array.dtype}{array.shape}: expected {plan[name].dtype} {plan[name].shape}")
        f.write(np.ascontiguousarray(array).view(np.uint8).data)
  index = {"metadata": {"total_size": total_bytes(plan)}, "weight_map": weight_map}
  (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _header(plan: Mapping[str, Planned]) -> bytes:
  """Length and header of a file that holds these tensors one after another."""
  entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
  end = 0
  for name, planned in plan.items():
    entries[name] = {"dtype": planned.dtype, "shape": list(planned.shape), "data_offsets": [end, end + planned.nbytes]}
    end += planned.nbytes
  text = json.dumps(entries).encode("utf-8")
  text += b" " * (-len(text) % 8)  # data begin at a multiple of 8, as the library has it
  return struct.pack("<Q", len(text)) + text
