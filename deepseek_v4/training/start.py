"""How a run starts: its texts, its place (a checkpoint, finished weights, or nothing yet), what it says of itself."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any, Callable, Mapping

import jax
import numpy as np

from deepseek_v4.checkpoint import manifest as manifest_lib
from deepseek_v4.checkpoint.convert import CHECKPOINTS, RELEASE
from deepseek_v4.checkpoint.store import CheckpointStore, newest_manifest, restore_variables
from deepseek_v4.checkpoint.trees import disk_parts, groups_of, named_leaves
from deepseek_v4.config import RunConfig, to_dict
from deepseek_v4.training import anomalies, metrics, stages
from deepseek_v4.training.data import Batches
from deepseek_v4.training.feed import check_same, check_shared, dataset, in_shape_of
from deepseek_v4.training.state import TrainState, abstract_state, init_state, refuse_other_shapes, state_of
from deepseek_v4.training.workdir import CONFIG, changes, refuse_lost_checkpoints

SETTING = "training.init_from"
VARIABLES = ("params", "router")


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a run stands between two steps; what a checkpoint holds.

  Attributes:
    step: optimizer steps done.
    state: the TrainState after them.
    data: position in the data, from which the next batch comes.
    record: of losses and anomalies.
    unscored: whether held-out text was to be scored here and was not yet.
  """

  step: int
  state: Any
  data: Mapping[str, Any]
  record: anomalies.Record = anomalies.Record()
  unscored: bool = False


@dataclasses.dataclass(frozen=True)
class Texts:
  """The documents of a run, in rows of its shortest stage."""

  train: Batches
  held_out: Batches


def read_texts(run_config: RunConfig, mesh: jax.sharding.Mesh | None) -> Texts:
  """Both splits, once all processes have the same."""
  held_out, train_data = (dataset(run_config, split, mesh) for split in ("held_out", "train"))
  check_same(run_config, train_data, held_out)
  return Texts(train_data, held_out)


def newest_place(run_config: RunConfig, workdir: Path, mesh: jax.sharding.Mesh | None, store: CheckpointStore,
                 stored: Mapping[str, Any], first_row: Mapping[str, Any], say: Callable[[str], None]) -> Place:
  """Where to go on, in the order tried: 1. the newest sound checkpoint of this workdir, 2. the weights that
  training.init_from names, 3. from scratch.

  Args:
    stored: settings of the last start in `workdir`; first_row: the data's first position.
  """
  restored = store.restore_latest(abstract_state(run_config, mesh))
  if restored is not None:
    step, state, extra = restored
    return Place(step, state, extra["data"], anomalies.Record.from_dict(extra.get("anomalies", {})),
                 extra.get("unscored", False))
  refuse_lost_checkpoints(workdir, stored)
  key = jax.random.key(run_config.training.seed)
  return Place(0, init_state(run_config, key, mesh) if run_config.training.init_from is None else
               state_from(run_config, key, mesh, say), first_row)


def announce(run_config: RunConfig, workdir: Path, mesh: jax.sharding.Mesh | None, place: Place, stored: Mapping[str, Any],
             texts: Texts, say: Callable[[str], None]) -> None:
  """Says where the run stands and what it is made of, and writes its settings down.

  Raises:
    ValueError: it has done more steps than it is to have; the hosts do not share the workdir.
  """
  training = run_config.training
  if place.step:
    say(f"resumed at step {place.step}")
  if place.step > training.steps:
    raise ValueError(f"training.steps = {training.steps}: expected at least {place.step}, the steps that the run in "
                     f"{workdir} has done")
  for change in changes(stored, json.loads(json.dumps(to_dict(run_config)))) if stored else []:
    say(f"changed since the last start: {change}")
  if jax.process_index() == 0:
    workdir.mkdir(parents=True, exist_ok=True)
    metrics.write_json(workdir / CONFIG, to_dict(run_config))
    if not place.step and training.init_from is not None:
      copy_release(run_config, workdir)
  check_shared(workdir)
  later = refused_later(run_config, mesh, place, texts)
  for line in (describe(place.state, mesh), texts.train.describe(), texts.held_out.describe(), *stages.table(run_config),
               *later):
    say(line)


def refused_later(run_config: RunConfig, mesh: jax.sharding.Mesh | None, place: Place, texts: Texts) -> list[str]:
  """Warnings of stages that cannot begin on this mesh or with these data; the run comes to a stop in front of them, and may
  go on on another mesh."""
  found = []
  for phase in stages.phases(run_config):
    if phase.first == phase.begin > place.step:
      try:
        in_shape_of(texts.train, phase.stage_config, mesh)
      except ValueError as error:
        found.append(f"warning: here stage {phase.stage} will not begin: {error}")
  return found


def describe(state: Any, mesh: jax.sharding.Mesh | None) -> str:
  """Number of parameters and of devices, in a line."""
  parameters = sum(math.prod(x.shape) for x in jax.tree.leaves(state.params))
  axes = {} if mesh is None else {name: size for name, size in mesh.shape.items() if size > 1}
  count, kind = (1 if mesh is None else mesh.size), jax.devices()[0].device_kind
  layout = f" ({' x '.join(f'{name} {size}' for name, size in axes.items())})" if axes else ""
  return f"{parameters:,} parameters on {count} {kind} device{'s' if count > 1 else ''}{layout}"


# ---- finished weights --------------------------------------------------------------------------------------------------
def check_source(run_config: RunConfig, mesh: jax.sharding.Mesh | None = None) -> tuple[os.PathLike[str], dict[str, Any]]:
  """(path, manifest) of the newest checkpoint in `training.init_from`, once it fits the run; no weight is read.

  Raises:
    FileNotFoundError: no such folder, or no usable checkpoint in it.
    ValueError: its model is another one than `run_config.model`, leaves that are not that model's, by name and shape, or
      sizes that the mesh does not divide.
  """
  folder = Path(run_config.training.init_from or "")
  if not (folder / CHECKPOINTS).is_dir():
    released = (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))
    hint = f"; a release is converted first: python -m launch.convert --source {folder} --to orbax --target ..."
    raise FileNotFoundError(f"{SETTING} = {str(folder)!r}: expected the folder of a run or of a converted release, with a "
                            f"folder {CHECKPOINTS!r} in it{hint if released else ''}")
  path, manifest = newest_manifest(folder / CHECKPOINTS)
  manifest_lib.refuse_other_model(manifest["config"], to_dict(run_config), f"{folder} ({SETTING})")
  shapes = abstract_state(run_config, mesh)
  named, _ = named_leaves({name: getattr(shapes, name) for name in VARIABLES})
  groups = groups_of(named)
  wanted = {part: leaf.shape[index is not None:] for name, leaf in named for part, index in disk_parts(name, groups)}
  stored = {name: tuple(entry["shape"]) for name, entry in manifest["leaves"].items() if name.split("/")[0] in VARIABLES}
  refuse_other_shapes(stored, wanted, f"{path} ({SETTING})")
  return path, manifest


def state_from(run_config: RunConfig, key: jax.Array, mesh: jax.sharding.Mesh | None,
               say: Callable[[str], None]) -> TrainState:
  """A state at step 0 with the weights and the router's state of the newest usable checkpoint in `training.init_from`, and
  the run's typed key.

  The optimizer starts afresh, whatever the weights were trained with, and so does the data's order.

  Raises:
    FileNotFoundError, ValueError: see `check_source`.
  """
  folder = Path(run_config.training.init_from or "")
  path, manifest = check_source(run_config, mesh)
  size = sum(math.prod(entry["shape"]) * np.dtype(entry["dtype"]).itemsize for name, entry in manifest["leaves"].items()
             if name.split("/")[0] in VARIABLES)
  say(f"reading {size / 2**20:,.1f} MiB of weights from {path}")
  started = time.perf_counter()
  variables, _, step = restore_variables(folder / CHECKPOINTS, scan_layers=run_config.model.scan_layers, mesh=mesh)
  state = state_of(run_config, variables, key, mesh)
  say(f"starting from the weights of step {step} in {folder}, read in {time.perf_counter() - started:.1f} s")
  tokenizer = folder / RELEASE / "tokenizer.json"
  if run_config.data.tokenizer is None and tokenizer.is_file():
    say(f"warning: data.tokenizer = None trains on bytes, but the weights came with another vocabulary: expected "
        f"--set data.tokenizer={tokenizer}")
  if run_config.data.source == "chat" and run_config.data.chat_template is None and (folder / RELEASE / "encoding").is_dir():
    say(f"warning: data.chat_template = None trains on our own wording, but the weights came with another one: expected "
        f"--set data.chat_template={folder}")
  return state


def copy_release(run_config: RunConfig, workdir: Path) -> None:
  """Copies config.json, tokenizer and encoder of the release that the weights came from, if they came from one, so that the
  run can be talked to and exported as the release could."""
  source = Path(run_config.training.init_from or "") / RELEASE
  if source.is_dir() and source.resolve() != (workdir / RELEASE).resolve():
    shutil.copytree(source, workdir / RELEASE, dirs_exist_ok=True)
