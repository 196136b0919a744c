"""The manifest of a checkpoint: its config, what else the run needs to go on, and a checksum for every leaf.

The checksum of a leaf is a sum over its elements, each weighted by a hash of its place in the whole array. So it does not
depend on how the leaf is cut over devices and processes (parts add up), one changed element always changes it, and
exchanged elements do too (but for one case in 2**33).
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import importlib.metadata
import json
import platform
from typing import Any, Mapping, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from deepseek_v4 import config as config_lib

FORMAT = 1
_CHUNK = 1 << 18  # elements whose weights exist at a time


class DamagedError(ValueError):
  """A checkpoint that cannot be used, with the reason."""


def _block_sum(block: np.ndarray, starts: Sequence[int], shape: Sequence[int]) -> int:
  """Sum of one block of a leaf, modulo 2**64; `starts` is where it begins in a leaf of this shape."""
  block = np.asarray(block, order="C")
  if not block.size:
    return 0
  width = max(block.dtype.itemsize // 4, 1)  # wider elements are several 32-bit words
  unit = np.dtype(f"u{min(block.dtype.itemsize, 4)}")
  words = block.reshape(-1).view(unit).reshape(*block.shape, width)
  rows = words.reshape(-1, words.shape[-2] * width if block.ndim else width)
  # Place of each row's first word in the whole leaf: rows are the last axis of the block, the axes before it are walked.
  place: np.ndarray = np.zeros((), np.uint64)
  stride = width
  for axis in reversed(range(block.ndim)):
    length = 1 if axis == block.ndim - 1 else block.shape[axis]
    along = (np.arange(length, dtype=np.uint64) + np.uint64(starts[axis])) * np.uint64(stride)
    place = along.reshape(-1, *(1,) * (block.ndim - 1 - axis)) + place
    stride *= shape[axis]
  place = place.reshape(-1, 1)
  total, step = 0, max(_CHUNK // rows.shape[1], 1)
  columns = np.arange(rows.shape[1], dtype=np.uint64)
  for i in range(0, len(rows), step):
    hashed = (place[i:i + step] + columns) * np.uint64(0x9E3779B97F4A7C15)
    hashed ^= hashed >> np.uint64(32)
    hashed *= np.uint64(0xD6E8FEB86659FD93)
    hashed |= np.uint64(1)  # odd: no change of one word can cancel modulo 2**64
    hashed *= rows[i:i + step]
    total += int(hashed.sum(dtype=np.uint64))
  return total % 2**64


def _local_sum(x: Any) -> int:
  if isinstance(x, jax.Array):
    return sum(_block_sum(np.asarray(s.data), [i.start or 0 for i in s.index], x.shape)
               for s in x.addressable_shards if s.replica_id == 0) % 2**64
  return _block_sum(x, [0] * x.ndim, x.shape) if jax.process_index() == 0 else 0  # all processes hold the same


def checksums(leaves: Mapping[str, Any]) -> dict[str, str]:
  """Checksum of every leaf (numpy, or JAX arrays on any mesh), as 16 hex digits; called by all processes together."""
  with concurrent.futures.ThreadPoolExecutor() as pool:
    sums = np.array(list(pool.map(_local_sum, leaves.values())), np.uint64)
  if jax.process_count() > 1:  # as 32-bit halves: JAX would cut 64-bit integers
    halves = np.asarray(multihost_utils.process_allgather(sums.view(np.uint32)))
    sums = np.ascontiguousarray(halves).view(np.uint64).sum(axis=0, dtype=np.uint64)
  return {name: f"{int(s):016x}" for name, s in zip(leaves, sums, strict=True)}


def build(config: Mapping[str, Any], extra: Mapping[str, Any], leaves: Mapping[str, Any],
          key_impls: Mapping[str, str]) -> dict[str, Any]:
  """The manifest of a checkpoint with these leaves; `key_impls` names the generator of each typed PRNG key among them."""
  table = entries(leaves)
  for name, impl in key_impls.items():
    table[name]["key_impl"] = impl
  return of_entries(config, extra, table)


def entries(leaves: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
  """Shape, dtype and checksum of every leaf, as a manifest holds them."""
  sums = checksums(leaves)
  return {name: {"shape": list(x.shape), "dtype": str(x.dtype), "sum": sums[name]} for name, x in leaves.items()}


def of_entries(config: Mapping[str, Any], extra: Mapping[str, Any], table: Mapping[str, Any]) -> dict[str, Any]:
  """The manifest of a checkpoint whose leaves have these entries."""
  versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint")}
  versions["python"] = platform.python_version()
  body = {"format": FORMAT, "config": config, "extra": extra, "versions": versions, "leaves": table}
  body = json.loads(json.dumps(body))  # tuples become lists now, not after a restore
  return {**body, "sha256": _digest(body)}


def _digest(body: Mapping[str, Any]) -> str:
  return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def parse(content: bytes) -> dict[str, Any]:
  """A manifest from its file's content.

  Raises:
    DamagedError: it is cut short, altered, or of an unknown format.
  """
  try:
    manifest = json.loads(content.decode("utf-8"))
    stated = manifest.pop("sha256")
  except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
    raise DamagedError(f"manifest unreadable ({error})") from error
  if stated != _digest(manifest):
    raise DamagedError("manifest altered (its checksum does not fit)")
  if manifest["format"] != FORMAT:
    raise DamagedError(f"manifest of format {manifest['format']}, expected {FORMAT}")
  return manifest


def verify(manifest: Mapping[str, Any], leaves: Mapping[str, Any]) -> None:
  """Compares restored leaves with the manifest.

  Raises:
    DamagedError: names every leaf that is missing or whose shape, dtype or bytes are not those that were saved.
  """
  wrong = []
  for name, x in leaves.items():
    entry = manifest["leaves"][name]
    if not hasattr(x, "dtype"):
      wrong.append(f"{name} is missing")
    elif (list(x.shape), str(x.dtype)) != (entry["shape"], entry["dtype"]):
      wrong.append(f"{name} is {x.shape} {x.dtype}, saved as {tuple(entry['shape'])} {entry['dtype']}")
  if wrong:
    raise DamagedError(", ".join(wrong))
  bad = [name for name, s in checksums(leaves).items() if s != manifest["leaves"][name]["sum"]]
  if bad:
    raise DamagedError(f"checksum of {', '.join(bad)} does not fit")


# Fields of the model that may differ between the run that saved and the one that goes on: they change how the model is laid
# out, computed, bounded or first filled, or name tokens, but not what its weights mean.
FREE_FIELDS = ("scan_layers", "remat", "expert_exchange", "compute_dtype", "inference_rounding", "qat", "init_std",
               "mhc_init", "quantization", "loss_chunk_size", "max_position_embeddings", "bos_token_id", "eos_token_id",
               "pad_token_id")


_KINDS = {"distillation": "a distillation", "reinforcement": "a run with reinforcement"}  # by the settings that make it one


def kind_of(config: Mapping[str, Any]) -> str:
  """What a folder with a run of this config holds, in words; configs of releases have nothing but a model."""
  other = "a run on text" if "training" in config else "converted weights"
  return next((words for name, words in _KINDS.items() if config.get(name) is not None), other)


def refuse_other_kind(stored: Mapping[str, Any], wanted: Mapping[str, Any], where: str) -> None:
  """Raises a ValueError if two run configs are not both of training, both of a distillation or both with reinforcement."""
  if stored and wanted and kind_of(stored) != kind_of(wanted):
    raise ValueError(f"{where} holds {kind_of(stored)}: expected a new or an empty folder, or one that holds "
                     f"{kind_of(wanted)}")


def refuse_other_model(stored: Mapping[str, Any], wanted: Mapping[str, Any], where: str) -> None:
  """Raises a ValueError that names the differing fields if two run configs are of different models."""
  # Through the dataclass, so that a field that was added since has its default in the older one.
  old, new = (config_lib.to_dict(config_lib.from_dict(config_lib.ModelConfig, c.get("model", {}))) for c in (stored, wanted))
  names = [n for n in new if n not in FREE_FIELDS and old[n] != new[n]]
  if names:
    fields = "; ".join(f"model.{n} = {new.get(n)!r}, there {old.get(n)!r}" for n in names)
    raise ValueError(f"the checkpoint in {where} is of another model: {fields}; expected the same, or another directory")
