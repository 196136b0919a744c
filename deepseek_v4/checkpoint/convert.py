"""A folder of the released (or transformers') form to a checkpoint of ours and back, a few leaves in memory at a time.

A converted checkpoint is a folder like that of a training run:

    checkpoints/0/     params, router and the release's block scales, in parts; manifest with checksums
    release/           config.json, tokenizer and encoder files of the release

Both directions work in `TARGET.unfinished/`, which gets its name when everything is there. Towards a checkpoint, parts that
were finished before an interruption are kept if source and options are the same; otherwise one starts clean.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from etils import epath

from deepseek_v4 import config as config_lib
from deepseek_v4.checkpoint import manifest as manifest_lib
from deepseek_v4.checkpoint.hf_companions import CONFIG_NAME, copy_companions
from deepseek_v4.checkpoint.hf_names import BF16, EXPERTS, FP8, Leaf, leaves
from deepseek_v4.checkpoint.hf_read import Source, find_sources, leaf_dtype, read_leaf, read_scales
from deepseek_v4.checkpoint.hf_write import PLAIN, finished_or_nothing, refuse_occupied, unfinished, write_release
from deepseek_v4.checkpoint.parts import read_leaves, write_part
from deepseek_v4.checkpoint.problems import Problems, refuse
from deepseek_v4.checkpoint.safetensors_files import MAX_FILE_BYTES, read_folder
from deepseek_v4.checkpoint.store import newest_manifest
from deepseek_v4.checkpoint.trees import disk_name
from deepseek_v4.config import ModelConfig
from deepseek_v4.config_checks import refuse as refuse_value

CHECKPOINTS, RELEASE = "checkpoints", "release"
SAME = "same"
PART_BYTES = 4 << 30
READ_BYTES = 1 << 30  # leaves that are read together on the way back
Progress = Callable[[int, int], None]  # bytes done, bytes in all
_STARTED = "conversion.json"


# ---- release -> ours ---------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class _Item:
  """One array that will be on disk: a leaf, or the block scales it was imported with."""

  leaf: Leaf
  sources: Sequence[Source]
  dtype: Any
  is_scales: bool = False

  @property
  def name(self) -> str:
    return disk_name(self.leaf.scales_path if self.is_scales else self.leaf.path)

  @property
  def nbytes(self) -> int:
    if self.is_scales:
      return sum(math.prod(source.scales.shape) for source in self.sources)
    return math.prod(self.leaf.shape) * np.dtype(self.dtype).itemsize

  def read(self) -> np.ndarray:
    return read_scales(self.sources) if self.is_scales else read_leaf(self.leaf, self.sources, self.dtype)


def to_checkpoint(source: str | Path, target: str | Path, *, dtype: str = "float32", drop_draft: bool = False,
                  part_bytes: int = PART_BYTES, progress: Progress = lambda done, total: None) -> ModelConfig:
  """Converts a folder with config.json and safetensors to a checkpoint of ours; returns the model's config.

  In memory at a time: `part_bytes` of leaves, or one leaf (the experts of a layer: a third of it) where that is larger.

  Args:
    source: folder in the released form (FP8, FP4, BF16) or with transformers' state_dict names.
    target: folder that is empty or does not exist yet.
    dtype: of what the release holds in BF16, FP8 or FP4: float32, or bfloat16 where that is exact; what it holds in float32
      stays that.
    drop_draft: leave out `mtp.*`: the prediction block, or the draft stages of later releases.
    part_bytes: size at which a new part of the checkpoint begins.
    progress: called after each part.

  Raises:
    FileNotFoundError: no such folder, or nothing in it.
    ValueError: in one message before anything is written, all that does not fit, by kind (see `load_hf`), draft tensors
      that need `drop_draft` among it; while reading, codes that are no number.
  """
  source, target = Path(source).absolute(), Path(target).absolute()  # Orbax wants absolute paths
  if dtype not in PLAIN:
    refuse_value("dtype", dtype, f"one of {', '.join(PLAIN)}")
  renamed = (target / _STARTED).is_file()  # all is there, but what was left to be tidied up
  if not renamed:
    refuse_occupied(target)
  config = ModelConfig.from_hf(source)
  if drop_draft:
    config = dataclasses.replace(config, num_nextn_predict_layers=0)
  stored, problems = read_folder(source)
  sources = find_sources(stored, config, problems, drop_draft=drop_draft, as_configured=True)
  items = list(_items(config, sources, dtype))
  files = sorted({tensor.file for tensor in stored.values()})
  started = {"source": str(source), "files": [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files],
             "config": config_lib.to_dict(config), "dtype": dtype, "part_bytes": part_bytes}
  if renamed:
    if not _is_of(target, started):
      refuse_occupied(target)
    _tidy(target)
    return config
  work = _resume_or_start(unfinished(target), started)
  table = _write_parts(work / CHECKPOINTS / "0", items, part_bytes, progress)
  extra = {"converted_from": source.name}
  manifest = manifest_lib.of_entries({"model": config_lib.to_dict(config)}, extra, table)
  _write_whole(work / CHECKPOINTS / "0" / "manifest" / "manifest.json", manifest)
  _copy_release(source, work / RELEASE)
  os.replace(work, target)
  _tidy(target)
  return config


def _items(config: ModelConfig, sources: Mapping[str, Sequence[Source]], dtype: str) -> Iterator[_Item]:
  for leaf in leaves(config):
    narrow = leaf.row.stored in (BF16, FP8, EXPERTS) and all(source.is_narrow for source in sources[leaf.path])
    yield _Item(leaf, sources[leaf.path], np.dtype(leaf_dtype(leaf, jnp.dtype(dtype) if narrow else None)))
    if sources[leaf.path][0].format is not None:
      yield _Item(leaf, sources[leaf.path], np.dtype(np.uint8), is_scales=True)


def _is_of(folder: Path, started: Mapping[str, Any]) -> bool:
  """Whether a conversion of the same source with the same options has begun this folder."""
  try:
    return json.loads((folder / _STARTED).read_text(encoding="utf-8")) == json.loads(json.dumps(started))
  except (OSError, ValueError):
    return False


def _resume_or_start(work: Path, started: Mapping[str, Any]) -> Path:
  """The working folder: with what an interrupted conversion of the same source has finished, or empty."""
  if work.exists():
    if _is_of(work, started):
      return work
    shutil.rmtree(work)
  work.mkdir(parents=True)
  _write_whole(work / _STARTED, started)
  return work


def _tidy(target: Path) -> None:
  """Deletes what only an interrupted conversion would have needed; what says so goes last."""
  entries = target / CHECKPOINTS / "0" / "entries"
  if entries.exists():
    shutil.rmtree(entries)
  (target / _STARTED).unlink()


def _write_parts(step: Path, items: Sequence[_Item], part_bytes: int, progress: Progress) -> dict[str, Any]:
  """Writes the arrays part by part; returns the manifest's entries of all leaves."""
  total, done = sum(item.nbytes for item in items), 0
  table: dict[str, Any] = {}
  for number, part in enumerate(_cut(items, part_bytes, lambda item: item.nbytes)):
    name = f"part_{number:04d}"
    finished = step / "entries" / f"{name}.json"  # written after its part: a part with entries is whole
    if not finished.exists():
      arrays = {item.name: item.read() for item in part}
      write_part(epath.Path(step / name), arrays)
      entries = {leaf: {**entry, "part": name} for leaf, entry in manifest_lib.entries(arrays).items()}
      del arrays  # before the next part is read
      _write_whole(finished, entries)
    table.update(json.loads(finished.read_text(encoding="utf-8")))
    done += sum(item.nbytes for item in part)
    progress(done, total)
  return table


def _cut(items: Sequence[Any], bound: int, nbytes: Callable[[Any], int]) -> list[list[Any]]:
  """Items in their order, cut where they would exceed the bound; only one that is larger by itself does."""
  parts: list[list[Any]] = []
  size = 0
  for item in items:
    if not parts or size + nbytes(item) > bound:
      parts.append([])
      size = 0
    parts[-1].append(item)
    size += nbytes(item)
  return parts


def _write_whole(file: Path, content: Any) -> None:
  """A JSON file that is there with all of its content or not at all."""
  file.parent.mkdir(parents=True, exist_ok=True)
  unfinished(file).write_text(json.dumps(content), encoding="utf-8")
  os.replace(unfinished(file), file)


def _copy_release(source: Path, folder: Path) -> None:
  if folder.exists():
    shutil.rmtree(folder)
  folder.mkdir()
  shutil.copyfile(source / CONFIG_NAME, folder / CONFIG_NAME)
  copy_companions(source, folder)


# ---- ours -> release ---------------------------------------------------------------------------------------------------
def to_release(source: str | Path, target: str | Path, *, quantization: str | None = SAME, dtype: str = "bfloat16",
               max_file_bytes: int = MAX_FILE_BYTES, progress: Progress = lambda done, total: None) -> ModelConfig:
  """Writes the newest checkpoint of a training run or a converted release as a released folder; returns its config.

  Blocks keep the scales they were imported with wherever these represent their values exactly (see `save_hf`).

  Args:
    source: folder of the run or of the conversion.
    target: folder that is empty or does not exist yet.
    quantization: None, "fp8", "fp8+fp4", or "same" as the release that the weights came from, which a run that began with
      them has beside its checkpoints (None where they were trained from scratch).
    dtype, max_file_bytes: see `save_hf`.
    progress: called after each reading.

  Raises:
    FileNotFoundError: no usable checkpoint there.
    ValueError: a target that is not empty, unknown options, or, in one message, leaves that the checkpoint lacks or holds
      in another shape.
    DamagedError: a leaf whose bytes are not those that were saved.
  """
  source, target = Path(source).absolute(), Path(target).absolute()
  if not (source / CHECKPOINTS).is_dir():
    raise FileNotFoundError(f"source = {str(source)!r}: expected the folder of a run or of a converted release, with a "
                            f"folder {CHECKPOINTS!r} in it")
  path, manifest = newest_manifest(source / CHECKPOINTS)
  config = config_lib.from_dict(ModelConfig, manifest["config"]["model"])
  companions = source / RELEASE if (source / RELEASE).is_dir() else None
  if quantization == SAME:  # a run's own config need not say how the weights were stored that it began with
    released = companions if companions is not None and (companions / CONFIG_NAME).is_file() else None
    quantization = (config if released is None else ModelConfig.from_hf(released)).quantization
  stored = manifest["leaves"]
  problems: Problems = {"missing": [], "wrong shape": []}
  for leaf in leaves(config):
    name = disk_name(leaf.path)
    if name not in stored:
      problems["missing"].append(name)
    elif tuple(stored[name]["shape"]) != leaf.shape:
      problems["wrong shape"].append(f"{name} {tuple(stored[name]['shape'])}, expected {leaf.shape}")
  refuse(f"the checkpoint {path} does not fit its config", problems)
  with finished_or_nothing(target) as work:
    read = _Reader(path, manifest, config, progress)
    write_release(work, config, quantization, dtype, companions, read, max_file_bytes)
  return config


class _Reader:
  """Leaves of a checkpoint by their paths, asked for in the table's order; neighbours are read together."""

  def __init__(self, path: epath.Path, manifest: dict[str, Any], config: ModelConfig, progress: Progress):
    self._path, self._manifest, self._progress = path, manifest, progress
    paths = [p for leaf in leaves(config) for p in (leaf.path, leaf.scales_path) if disk_name(p) in manifest["leaves"]]
    self._bundles = _cut(paths, READ_BYTES, self._nbytes)
    self._bundle_of = {path: number for number, bundle in enumerate(self._bundles) for path in bundle}
    self._held: dict[int, dict[str, np.ndarray]] = {}
    self._total, self._done = sum(map(self._nbytes, paths)), 0

  def _nbytes(self, path: str) -> int:
    entry = self._manifest["leaves"][disk_name(path)]
    return math.prod(entry["shape"]) * jnp.dtype(entry["dtype"]).itemsize

  def __call__(self, paths: Sequence[str]) -> dict[str, np.ndarray]:
    present = [p for p in paths if p in self._bundle_of]
    wanted = {self._bundle_of[p] for p in present}
    self._held = {number: arrays for number, arrays in self._held.items() if number in wanted}
    for number in sorted(wanted - set(self._held)):
      names = {disk_name(p): p for p in self._bundles[number]}
      arrays = read_leaves(self._path, self._manifest, dict.fromkeys(names))
      self._held[number] = {names[name]: array for name, array in arrays.items()}
      self._done += sum(map(self._nbytes, self._bundles[number]))
      self._progress(self._done, self._total)
    return {p: self._held[self._bundle_of[p]][p] for p in present}
