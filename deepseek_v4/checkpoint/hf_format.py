"""Reading folders of safetensors: headers first, tensors one at a time when they are asked for.

A safetensors file is 8 bytes (length of the header, little endian), a JSON header {name: {dtype, shape, data_offsets}} and
the data. The header is read here rather than by the library because its numpy reader knows no bfloat16 (version 0.8).
Quantised folders are refused by `hf_names` for now.
"""

from __future__ import annotations

import dataclasses
import json
import struct
from pathlib import Path
from typing import Any, Mapping

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from deepseek_v4.checkpoint.hf_names import Problems, read_variables
from deepseek_v4.config import ModelConfig

INDEX_NAME = "model.safetensors.index.json"
_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
           "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
           "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2, "F8_E8M0": ml_dtypes.float8_e8m0fnu}


@dataclasses.dataclass(frozen=True)
class StoredTensor:
  """A tensor in a file; `numpy()` reads it."""

  file: Path
  offset: int
  shape: tuple[int, ...]
  dtype: np.dtype

  def numpy(self) -> np.ndarray:
    """The values, mapped from the file: pages are read when they are touched."""
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
    if entry["dtype"] not in _DTYPES:
      raise ValueError(f"{name} has dtype {entry['dtype']}, expected one of {', '.join(_DTYPES)}")
    dtype, (begin, end) = np.dtype(_DTYPES[entry["dtype"]]), entry["data_offsets"]
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
  names = sorted(f.name for f in folder.glob("*.safetensors")) if weight_map is None else sorted(set(weight_map.values()))
  if not names:
    raise FileNotFoundError(f"source = {str(folder)!r}: expected model.safetensors or {INDEX_NAME} with its shards")
  tensors: dict[str, StoredTensor] = {}
  problems: Problems = {"shard listed but absent": [], "unreadable shard": [], "in the index but not in its shard": [],
                        "in a shard but not in the index": [], "in more than one file": []}
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


def load_hf(source: str | Path | Mapping[str, Any], config: ModelConfig, dtype: Any = None) -> dict[str, Any]:
  """The variables of a model in transformers' or the released names and layouts.

  Args:
    source: a folder with safetensors (one file, or shards with an index), or a mapping name -> array.
    config: the model, for example `ModelConfig.from_hf(folder)`; its `scan_layers` says how layers are laid out.
    dtype: of the floating parameters; None = float32. Router biases stay float32, hash tables int32.

  Returns:
    {"params", "router"}, ready for `model.apply`.

  Raises:
    FileNotFoundError: no such folder or nothing in it.
    ValueError: quantised tensors; or, in one message, everything that does not fit, by kind (see `from_hf_names`), shards
      that are absent or cut short and tensors where index and shards disagree.
  """
  if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
    raise ValueError(f"dtype = {dtype!r}: expected a floating type, such as float32 or bfloat16")
  if isinstance(source, Mapping):
    return read_variables(source, config, {}, dtype)
  tensors, problems = read_folder(Path(source))
  return read_variables(tensors, config, problems, dtype)
