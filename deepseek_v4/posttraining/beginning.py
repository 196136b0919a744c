"""How runs of rounds begin: what distillation and learning from rewards do alike before their first step."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any, Mapping

import jax

from deepseek_v4.checkpoint.store import CheckpointStore
from deepseek_v4.config import RunConfig, to_dict
from deepseek_v4.training import metrics
from deepseek_v4.training.start import check_source, copy_release, state_from
from deepseek_v4.training.state import TrainState, init_state
from deepseek_v4.training.workdir import CHECKPOINTS, CONFIG, changes, check_workdir, refuse_lost_checkpoints


def open_store(stack: contextlib.ExitStack, run_config: RunConfig, workdir: Path,
               mesh: jax.sharding.Mesh | None) -> tuple[CheckpointStore, dict[str, Any]]:
  """(checkpoints of a workdir, settings of the run that is in it, if there is one), with the mesh set until the stack ends.

  Raises:
    ValueError: another run is in the workdir.
  """
  stored = check_workdir(workdir, to_dict(run_config))
  if mesh is not None:
    stack.enter_context(jax.set_mesh(mesh))
  return stack.enter_context(CheckpointStore(workdir / CHECKPOINTS, keep=run_config.training.keep_checkpoints,
                                             config_dict=to_dict(run_config))), stored


def check_beginning(run_config: RunConfig, mesh: jax.sharding.Mesh | None, store: CheckpointStore) -> None:
  """Looks at the weights that a new run is to begin with.

  Raises:
    ValueError, FileNotFoundError: they cannot be used.
  """
  if run_config.training.init_from is not None and not store.steps():
    check_source(run_config, mesh)


def newest(run_config: RunConfig, workdir: Path, store: CheckpointStore, stored: Mapping[str, Any],
           shapes: Any) -> tuple[int, Any, Mapping[str, Any]] | None:
  """(steps done, state, what was saved beside it) of the newest sound checkpoint; None where no run has begun.

  Args:
    shapes: of the state.

  Raises:
    ValueError: checkpoints are lost, or the run has done more steps.
  """
  restored = store.restore_latest(shapes)
  if restored is None:
    refuse_lost_checkpoints(workdir, stored)
    return None
  step, steps = restored[0], run_config.training.steps
  if step > steps:
    raise ValueError(f"training.steps = {steps}: expected at least {step}, the steps that the run in {workdir} has done")
  print(f"resumed at step {step}")
  return restored


def first_state(run_config: RunConfig, mesh: jax.sharding.Mesh | None) -> TrainState:
  """The state before the first step: with the weights of training.init_from, or from scratch."""
  key = jax.random.key(run_config.training.seed)
  return init_state(run_config, key, mesh) if run_config.training.init_from is None else state_from(
    run_config, key, mesh, print)


def write_settings(run_config: RunConfig, workdir: Path, stored: Mapping[str, Any], step: int) -> None:
  """Says what changed since the last start, and writes the settings into the workdir."""
  for change in changes(stored, json.loads(json.dumps(to_dict(run_config)))) if stored else ():
    print(f"changed since the last start: {change}")
  workdir.mkdir(parents=True, exist_ok=True)
  metrics.write_json(workdir / CONFIG, to_dict(run_config))
  if not step and run_config.training.init_from is not None:
    copy_release(run_config, workdir)


def meters(stack: contextlib.ExitStack, run_config: RunConfig, workdir: Path,
           step: int) -> tuple[metrics.MetricsWriter, metrics.Progress]:
  """What writes a run's metrics and what says how far it is, from `step` on; closed when the stack ends."""
  return (stack.enter_context(contextlib.closing(metrics.MetricsWriter(workdir, step))),
          stack.enter_context(contextlib.closing(metrics.Progress(step, run_config.training.steps))))
