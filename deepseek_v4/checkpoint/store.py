"""Checkpoints of a training run: written by Orbax in the background, verified when they are read.

A step is a folder `<directory>/<step>/` with the arrays (`state/`) and a manifest (`manifest/manifest.json`: config, data
position, versions, a checksum for every leaf). On disk every leaf is one layer's (`params/layers/03/attention/q_a`, experts
stacked), so any mesh and any grouping of layers reads any checkpoint. A step counts only if Orbax finished it and every leaf
that is read has the bytes the manifest says; others are named in a warning and passed over. While the very first one is
being written, a file `.first` lies beside it: only then does a directory with nothing usable count as empty.

Of several processes every one writes and reads what its devices hold, in one directory that all of them see; which steps
there are the first one says, and a step that one of them cannot read is passed over by all.
"""

from __future__ import annotations

import functools
import json
import os
import warnings
from typing import Any, Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from deepseek_v4 import config as config_lib
from deepseek_v4 import sharding
from deepseek_v4.checkpoint import agree, stored_tree
from deepseek_v4.checkpoint import manifest as manifest_lib
from deepseek_v4.checkpoint.manifest import DamagedError
from deepseek_v4.checkpoint.parts import read_leaves
from deepseek_v4.checkpoint.trees import restack, unflatten, unscanned_name

_UNFINISHED = ".orbax-checkpoint-tmp"
_MANIFEST_FILE = "manifest.json"
_FIRST = ".first"  # the first checkpoint of the directory is not finished yet


class CheckpointStore:
  """The checkpoints of one run in one directory.

  Args:
    directory: made when the first checkpoint is written; a path or a URL that Orbax knows.
    keep: how many finished checkpoints stay; older ones are deleted once a newer one is safely written.
    config_dict: `config.to_dict(run_config)`; goes into every manifest, and its kind of run and its "model" must fit what
      is restored.
  """

  def __init__(self, directory: str | os.PathLike[str], *, keep: int, config_dict: Mapping[str, Any]) -> None:
    if keep < 1:
      raise ValueError(f"keep = {keep}: expected at least 1")
    self.directory = _path(directory)
    self._keep = keep
    self._config = config_dict
    self._orbax = ocp.AsyncCheckpointer(_handler())
    self._writing: int | None = None  # the step that Orbax may still be writing
    self._usable: set[int] = set()  # steps known to be whole: written or restored here
    self._damaged: set[int] = set()

  def save(self, step: int, tree: Any, extra: Mapping[str, Any]) -> bool:
    """Copies the tree to the host and starts writing it; the device buffers may be donated as soon as this returns.

    Args:
      step: number of the step; one that is already whole in the directory is not written again (returns False).
      tree: any pytree of arrays, typed PRNG keys included, for example {"params", "router", "opt_state", "step", "key"}.
      extra: what else the run needs to go on, such as the position in the data; must be JSON-able.

    Raises:
      RuntimeError: an earlier checkpoint could not be written (this one is not started), or this one cannot be.
      ValueError: `extra` is not JSON-able.
    """
    self.wait()
    path = self.directory / str(step)
    if step in self._usable or (step not in self._damaged and agree.of_first(
        path.exists() and ocp.utils.is_checkpoint_finalized(path))):
      return False
    try:
      json.dumps(extra)
    except TypeError as error:
      raise ValueError(f"extra = {extra!r}: expected what JSON can hold ({error})") from error
    leaves, impls = stored_tree.to_disk(tree)
    manifest = manifest_lib.build(self._config, extra, leaves, impls)
    self._guard(step, self._mark_first)
    self._guard(step, lambda: self._orbax.save(
      path, force=True,  # only a damaged or an unfinished step can lie there
      args=ocp.args.Composite(state=ocp.args.PyTreeSave(unflatten(leaves)), manifest=ocp.args.JsonSave(manifest))))
    self._writing = step
    return True

  def check_errors(self) -> None:
    """Raises RuntimeError with path and cause if the write in the background has failed; does not wait for it."""
    if self._writing is not None:
      self._guard(self._writing, self._orbax.check_for_errors)

  def wait(self) -> None:
    """Blocks until the write in the background is finished, then deletes checkpoints beyond `keep`; raises if it failed."""
    if self._writing is None:
      return
    step = self._writing
    self._guard(step, self._orbax.wait_until_finished)
    self._writing = None
    self._usable.add(step)
    self._damaged.discard(step)
    self._prune(step)
    if jax.process_index() == 0:
      (self.directory / _FIRST).unlink(missing_ok=True)

  def close(self) -> None:
    """Waits for the write in the background and frees Orbax; raises RuntimeError if the write failed."""
    try:
      self.wait()
    finally:
      self._orbax.close()

  def __enter__(self) -> "CheckpointStore":
    return self

  def __exit__(self, *exception: Any) -> None:
    self.close()

  def steps(self) -> list[int]:
    """Steps with a folder of their own, oldest first; whether they are whole shows when they are read."""
    return sorted(_candidates(_visible(self.directory))[0])

  def restore_latest(self, abstract_tree: Any) -> tuple[int, Any, dict[str, Any]] | None:
    """The newest usable checkpoint in the structure, layer grouping and shardings of `abstract_tree`.

    Args:
      abstract_tree: pytree of arrays or jax.ShapeDtypeStruct; a leaf with a sharding is born with it.

    Returns:
      (step, tree, extra), or None if the directory does not exist or is empty; one that holds nothing but its first
      checkpoint, unfinished, counts as empty.

    Raises:
      ValueError: another kind of run or another model; or, in one message, leaves that this tree wants and the checkpoint
        lacks, leaves it holds and nobody wants, other shapes or dtypes.
      FileNotFoundError: the directory is not empty, but no step in it is usable; each is named with the reason.
    """
    self.wait()

    def read(step: int, manifest: dict[str, Any]) -> tuple[int, Any, dict[str, Any]]:
      manifest_lib.refuse_other_kind(manifest["config"], self._config, str(self.directory))
      manifest_lib.refuse_other_model(manifest["config"], self._config, str(self.directory))
      return step, stored_tree.restore(self.directory / str(step), manifest, abstract_tree), manifest["extra"]

    found = _newest(self.directory, read, self._damaged)
    if found is not None:
      self._usable.add(found[0])
    return found

  def _guard(self, step: int, action: Callable[[], Any]) -> None:
    """Runs an Orbax call; what it raises is raised with the step and the path."""
    try:
      action()
    except Exception as error:
      self._writing = None
      raise RuntimeError(f"checkpoint of step {step}: {self.directory / str(step)} could not be written: {error}") from error

  def _mark_first(self) -> None:
    if jax.process_index() == 0 and not _visible(self.directory):
      self.directory.mkdir(parents=True, exist_ok=True)
      (self.directory / _FIRST).touch()

  def _prune(self, newest: int) -> None:
    """Keeps the newest `keep` whole steps up to `newest`; drops what is older, and what never got finished."""
    if jax.process_index() != 0:
      return
    steps, unfinished = _candidates(_visible(self.directory))
    whole = sorted(s for s in steps if s <= newest and s not in self._damaged)
    oldest = min(whole[-self._keep:], default=0)
    for step in steps:
      if step < oldest:
        (self.directory / str(step)).rmtree()
    for name in unfinished:
      if int(name.split(_UNFINISHED)[0]) <= newest:
        (self.directory / name).rmtree()


def read_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
  """The config dictionary of the newest step in `directory` that has a readable manifest.

  Raises:
    FileNotFoundError: there is none.
  """
  return newest_manifest(directory)[1]["config"]


def restore_variables(directory: str | os.PathLike[str], *, scan_layers: bool | None = None, keep_scales: bool = False,
                      mesh: jax.sharding.Mesh | None = None,
                      step: int | None = None) -> tuple[dict[str, Any], dict[str, Any], int]:
  """Weights and router state of the newest usable checkpoint, or of a certain one, whatever optimizer the run had.

  Args:
    directory: of the checkpoints, of a run or of a converted release.
    scan_layers: layout of the layers; None = that of the stored config.
    keep_scales: also return the block scales of a quantised release, where the checkpoint holds them.
    mesh: every device reads its own part of each leaf; None = all on the default device.
    step: of the checkpoint; None = the newest usable one.

  Returns:
    ({"params", "router"} and perhaps {"scales"}, config dictionary whose model has this `scan_layers`, step).

  Raises:
    FileNotFoundError: no usable checkpoint.
    ValueError: sizes that the mesh does not divide, or scales on a mesh, where they have no place.
  """
  root = _path(directory)
  if mesh is not None and keep_scales:
    raise ValueError("keep_scales = True: expected no mesh beside it; scales are for exports")
  collections = ("params", "router", "scales") if keep_scales else ("params", "router")

  def read(step: int, manifest: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], int]:
    config = manifest["config"]
    if scan_layers is not None:
      config = {**config, "model": {**config["model"], "scan_layers": scan_layers}}
    model = config_lib.from_dict(config_lib.ModelConfig, config["model"])
    leaves = {n: entry for n, entry in manifest["leaves"].items() if n.split("/")[0] in collections}
    if mesh is not None:
      wanted = _on_mesh(leaves, model, mesh)
      return stored_tree.restore(root / str(step), {**manifest, "leaves": leaves}, wanted), config, step
    arrays = read_leaves(root / str(step), manifest, dict.fromkeys(leaves))
    tree = unflatten({unscanned_name(n): jnp.asarray(x) for n, x in arrays.items()})
    return restack(tree, model, model.scan_layers), config, step

  if step is not None:
    if str(step) not in _visible(root):
      raise FileNotFoundError(f"{directory}: no checkpoint of step {step} there")
    return read(step, _read_manifest(root / str(step)))
  found = _newest(root, read)
  if found is None:
    raise FileNotFoundError(f"{directory}: no checkpoint there")
  return found


def _on_mesh(leaves: Mapping[str, Any], config: config_lib.ModelConfig, mesh: jax.sharding.Mesh) -> dict[str, Any]:
  """Shapes and shardings of the variables that a manifest's leaves make up, in the config's layout."""
  sharding.check_model_divides(config, mesh)
  stored = unflatten({unscanned_name(name): jax.ShapeDtypeStruct(tuple(entry["shape"]), jnp.dtype(entry["dtype"]))
                      for name, entry in leaves.items()})
  shapes = jax.eval_shape(lambda tree: restack(tree, config, config.scan_layers), stored)
  place = lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
  return {name: jax.tree.map(place, tree, sharding.parameter_shardings(tree, mesh)) for name, tree in shapes.items()}


def newest_manifest(directory: str | os.PathLike[str]) -> tuple[epath.Path, dict[str, Any]]:
  """(path, manifest) of the newest step in `directory` that has a readable manifest; leaves are verified when they are read.

  Raises:
    FileNotFoundError: there is none.
  """
  found = _newest(_path(directory), lambda step, manifest: (_path(directory) / str(step), manifest))
  if found is None:
    raise FileNotFoundError(f"{directory}: no checkpoint there")
  return found


# ---- the directory ---------------------------------------------------------------------------------------------------
def _path(directory: str | os.PathLike[str]) -> epath.Path:
  text = os.fspath(directory)
  return epath.Path(text if "://" in text else os.path.abspath(text))


def _handler() -> ocp.CompositeCheckpointHandler:
  return ocp.CompositeCheckpointHandler(state=ocp.PyTreeCheckpointHandler(),
                                        manifest=ocp.JsonCheckpointHandler(_MANIFEST_FILE))


def _visible(directory: epath.Path) -> list[str]:
  return [p.name for p in directory.iterdir() if not p.name.startswith(".")] if directory.exists() else []


def _candidates(names: Sequence[str]) -> tuple[list[int], list[str]]:
  """Steps with a folder, and names of folders that Orbax did not finish."""
  return [int(n) for n in names if n.isdigit()], [n for n in names if n.split(_UNFINISHED)[0].isdigit() and not n.isdigit()]


def _newest(directory: epath.Path, read: Callable[[int, dict[str, Any]], Any], damaged: set[int] | None = None) -> Any:
  """`read(step, manifest)` of the newest step where it finds no damage; None if the directory is empty.

  Steps passed over are named in a warning and added to `damaged`; if none is usable, all are named in the error.
  """
  # All processes look at the same steps, in the same order.
  names, first_unfinished = agree.of_first([_visible(directory), (directory / _FIRST).exists()])
  if not names:
    return None
  steps, unfinished = _candidates(names)
  if len(unfinished) == len(names) and first_unfinished:
    for name in unfinished:
      _warn(f"{directory / name}: never finished; it was the first, nothing was saved before")
    return None
  reasons = [f"{directory / name}: never finished" for name in sorted(unfinished)]
  for step in sorted(steps, reverse=True):
    path = directory / str(step)
    try:
      result = read(step, agree.unless_any_fails(functools.partial(_read_manifest, path), DamagedError))
    except DamagedError as error:
      reasons.append(f"{path}: {error}")
      if damaged is not None:
        damaged.add(step)
      continue
    for reason in reasons:
      _warn(f"{reason}; using step {step}")
    return result
  listed = "\n  ".join(reasons or ["no checkpoint in it"])
  raise FileNotFoundError(f"{directory} is not empty, but holds no usable checkpoint; delete it to start over:\n  {listed}")


def _warn(text: str) -> None:
  if jax.process_index() == 0:
    warnings.warn(f"checkpoint passed over: {text}", stacklevel=4)


def _read_manifest(path: epath.Path) -> dict[str, Any]:
  file = path / "manifest" / _MANIFEST_FILE
  if not file.exists() or not ocp.utils.is_checkpoint_finalized(path):
    raise DamagedError("never finished, or not a checkpoint (no manifest)")
  try:
    content = file.read_bytes()
  except OSError as error:
    raise DamagedError(f"manifest unreadable ({error})") from error
  return manifest_lib.parse(content)
