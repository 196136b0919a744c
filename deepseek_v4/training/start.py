"""The first state of a run that goes on from finished weights: those of a converted release, or of another run."""

from __future__ import annotations

import math
import os
import shutil
import time
from pathlib import Path
from typing import Any, Callable

import jax
import numpy as np

from deepseek_v4.checkpoint import manifest as manifest_lib
from deepseek_v4.checkpoint.convert import CHECKPOINTS, RELEASE
from deepseek_v4.checkpoint.store import newest_manifest, restore_variables
from deepseek_v4.checkpoint.trees import disk_parts, groups_of, named_leaves
from deepseek_v4.config import RunConfig, to_dict
from deepseek_v4.training.state import TrainState, abstract_state, refuse_other_shapes, state_of

SETTING = "training.init_from"
VARIABLES = ("params", "router")


def check_source(run_config: RunConfig, mesh: jax.sharding.Mesh | None = None) -> tuple[os.PathLike[str], dict[str, Any]]:
  """(path, manifest) of the newest checkpoint in `training.init_from`, once it fits the run; no weight is read.

  Raises:
    FileNotFoundError: no such folder, or no usable checkpoint in it.
    ValueError: its model is another one than `run_config.model`, leaves that are not that model's, by name and shape, or
      sizes that the mesh does not divide.
  """
  folder = Path(run_config.training.init_from)
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
  """A state at step 0 with the weights and the router's state of the newest usable checkpoint in `training.init_from`.

  The optimizer starts afresh, whatever the weights were trained with, and so does the data's order.

  Raises:
    FileNotFoundError, ValueError: see `check_source`.
  """
  folder = Path(run_config.training.init_from)
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
  source = Path(run_config.training.init_from) / RELEASE
  if source.is_dir() and source.resolve() != (workdir / RELEASE).resolve():
    shutil.copytree(source, workdir / RELEASE, dirs_exist_ok=True)
