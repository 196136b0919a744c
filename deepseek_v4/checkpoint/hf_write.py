"""Our leaves to a folder in the released layout: what will be written is planned from shapes, then made tensor by tensor."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import itertools
import os
import shutil
import warnings
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping, Sequence

import ml_dtypes
import numpy as np

from deepseek_v4.checkpoint import hf_format
from deepseek_v4.checkpoint.hf_companions import copy_companions, write_config
from deepseek_v4.checkpoint.hf_names import EXPERTS, F32, I64, Tensor, scale_name, tensors
from deepseek_v4.checkpoint.hf_read import format_of
from deepseek_v4.checkpoint.hf_trees import unscanned_leaves
from deepseek_v4.checkpoint.safetensors_files import MAX_FILE_BYTES, Planned, write_folder
from deepseek_v4.config import ModelConfig
from deepseek_v4.config_checks import refuse

QUANTIZATIONS = (None, "fp8", "fp8+fp4")
PLAIN = {"bfloat16": ("BF16", ml_dtypes.bfloat16), "float32": ("F32", np.float32)}


def release_plan(config: ModelConfig, quantization: str | None, dtype: str = "bfloat16") -> dict[str, Planned]:
  """Names, dtypes and shapes of all tensors of this model in the released layout, scales included, in writing order.

  Args:
    config: the model.
    quantization: None, "fp8" (attention, shared experts and experts in FP8) or "fp8+fp4" (experts in FP4).
    dtype: of what a release holds in BF16 and of unquantised matrices: bfloat16 or float32.

  Raises:
    ValueError: a value that is none of these, or experts of odd width in FP4.
  """
  if quantization not in QUANTIZATIONS:
    refuse("quantization", quantization, f"one of {', '.join(map(repr, QUANTIZATIONS))}")
  if dtype not in PLAIN:
    refuse("dtype", dtype, f"one of {', '.join(PLAIN)}")
  if quantization == "fp8+fp4":
    for field in ("hidden_size", "moe_intermediate_size"):
      if getattr(config, field) % 2:
        refuse(field, getattr(config, field), "an even number for experts in FP4, two to a byte")
  plan = {}
  for name, tensor in tensors(config, "release").items():
    if (format := format_of(tensor, quantization)) is not None:
      code = "I8" if format is hf_format.FP4 else "F8_E4M3"
      plan[name] = Planned(code, format.stored_shape(tensor.shape))
      plan[scale_name(name)] = Planned("F8_E8M0", format.grid(tensor.shape))
    else:
      plan[name] = Planned({F32: "F32", I64: "I64"}.get(tensor.stored, PLAIN[dtype][0]), tensor.shape)
  return plan


def encoded_tensors(config: ModelConfig, quantization: str | None, dtype: str,
                    read: Callable[[Sequence[str]], Mapping[str, np.ndarray]],
                    wide: list[str]) -> Iterator[tuple[str, np.ndarray]]:
  """(name, array) of everything in `release_plan`, in its order, shapes and dtypes as planned there.

  Args:
    config, quantization, dtype: as in the plan.
    read: paths of leaves -> their arrays, unscanned; asked for one tensor's leaves at a time, with the paths of the block
      scales they were imported with, which it may leave out.
    wide: gets the names of FP4 experts that FP8 is not sure to hold exactly (`hf_format.LOSSLESS_SPREAD`).

  Of a model with `qat` = "fp4" experts are written as it computes with them, in FP4 numbers, whatever holds these.

  Raises:
    ValueError: values that a quantised tensor cannot hold; names the tensor.
  """
  for _, group in itertools.groupby(tensors(config, "release").values(), key=lambda t: [leaf.path for leaf in t.leaves]):
    members = list(group)
    leaves = members[0].leaves
    quantised = format_of(members[0], quantization) is not None
    arrays = read([leaf.path for leaf in leaves] + [leaf.scales_path for leaf in leaves if quantised])
    fp4 = config.qat == "fp4" and members[0].stored == EXPERTS
    encode = functools.partial(_encode, quantization=quantization, dtype=dtype, arrays=arrays, fp4=fp4, wide=wide)
    with concurrent.futures.ThreadPoolExecutor() as pool:
      for named in pool.map(encode, members):
        yield from named


def _encode(tensor: Tensor, quantization: str | None, dtype: str, arrays: Mapping[str, np.ndarray], fp4: bool,
            wide: list[str]) -> list[tuple[str, np.ndarray]]:
  """(name, array) of a tensor and its scales; with `fp4` of its FP4 numbers, its name in `wide` where FP8 is too narrow."""
  whole = tensor.join(arrays)
  format = format_of(tensor, quantization)
  try:
    if fp4:
      whole = hf_format.fp4_values(np.ascontiguousarray(whole, np.float32))
      if hf_format.scale_spread(whole) > hf_format.LOSSLESS_SPREAD:
        wide.append(tensor.name)
    if format is None:
      wanted = {F32: np.float32, I64: np.int64}.get(tensor.stored, PLAIN[dtype][1])
      return [(tensor.name, whole.astype(wanted, copy=False))]
    kept = arrays.get(tensor.leaves[0].scales_path)
    if kept is not None and tensor.expert is not None:
      kept = kept[tensor.expert]
    codes, scales = hf_format.encode(np.ascontiguousarray(whole, np.float32), format, kept)
  except ValueError as error:
    raise ValueError(f"{tensor.name}: {error}") from error
  return [(tensor.name, codes), (scale_name(tensor.name), scales)]


@contextlib.contextmanager
def finished_or_nothing(target: Path) -> Iterator[Path]:
  """A new folder beside `target` that takes its name when the block ends without an error, and is deleted otherwise.

  Raises:
    ValueError: `target` is there and not empty.
  """
  refuse_occupied(target)
  work = unfinished(target)
  if work.exists():
    shutil.rmtree(work)  # of a process that was killed
  work.mkdir(parents=True)
  try:
    yield work
  except BaseException:
    shutil.rmtree(work)
    raise
  os.replace(work, target)


def refuse_occupied(target: Path) -> None:
  """Raises a ValueError if there is something under this name already."""
  if target.exists() and not (target.is_dir() and not any(target.iterdir())):
    refuse("target", str(target), "a folder that is empty or does not exist yet")


def unfinished(target: Path) -> Path:
  """Where a folder is made before it takes its name."""
  return target.with_name(target.name + ".unfinished")


def write_release(folder: Path, config: ModelConfig, quantization: str | None, dtype: str, copy_files_from: Path | None,
                  read: Callable[[Sequence[str]], Mapping[str, np.ndarray]], max_file_bytes: int = MAX_FILE_BYTES) -> None:
  """Weights, index, config.json and the files beside them into an existing folder; see `encoded_tensors` for `read`, whose
  arrays are floating, of any dtype, but for int32 hash tables and uint8 scales."""
  plan = release_plan(config, quantization, dtype)
  write_config(folder, config, quantization, dtype, copy_files_from)
  if copy_files_from is not None:
    copy_companions(copy_files_from, folder)
  wide: list[str] = []
  write_folder(folder, plan, encoded_tensors(config, quantization, dtype, read, wide), max_file_bytes)
  if wide:
    warnings.warn(f"{len(wide)} experts' matrices have blocks of 128 x 128 in which FP4 scales are more than "
                  f"2^{hf_format.LOSSLESS_SPREAD} apart, so that turned into FP8 they may lose small values: "
                  f"{', '.join(sorted(wide)[:3])}{' and others' if len(wide) > 3 else ''}", stacklevel=3)


def save_hf(variables: Mapping[str, Any], config: ModelConfig, folder: str | Path, quantization: str | None = None,
            copy_files_from: str | Path | None = None, *, dtype: str = "bfloat16",
            max_file_bytes: int = MAX_FILE_BYTES) -> None:
  """Writes a folder in the released layout, which transformers reads too.

  Args:
    variables: {"params", "router"}, layers scanned or not. With "scales" (see `load_hf`) a block keeps its imported scale
      wherever that represents the present values exactly, so that an untouched import is written with the same bytes.
    config: the model.
    folder: empty or not there yet; it gets its name when everything in it is written.
    quantization: None, "fp8" or "fp8+fp4".
    copy_files_from: folder of the release that the weights come from: its config.json (adapted), tokenizer and encoder
      files are copied.
    dtype: of what is not quantised and not always float32 or integer: bfloat16 or float32.
    max_file_bytes: size at which a new file begins.

  Raises:
    FileNotFoundError: no folder `copy_files_from`.
    ValueError: a folder that is not empty, unknown options; in one message, every leaf that is missing, unknown or of the
      wrong shape; or values that cannot be quantised.
  """
  if missing := [name for name in ("params", "router") if name not in variables]:
    refuse("variables", sorted(variables), f"a dictionary with {' and '.join(missing)}")
  arrays = unscanned_leaves({k: v for k, v in variables.items() if k in ("params", "router", "scales")}, config)
  source = None if copy_files_from is None else Path(copy_files_from)
  with finished_or_nothing(Path(folder)) as work:
    write_release(work, config, quantization, dtype, source, lambda paths: {p: arrays[p] for p in paths if p in arrays},
                  max_file_bytes)
