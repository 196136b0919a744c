"""From the rows that each process reads to arrays of the whole batch, and what all processes must have in common.

Every process makes only the rows that its devices hold, so a row is made once per host that needs it: by two hosts where
the mesh's context or tensor axis goes across them. Which rows those are follows from the sharding, so any order of the
devices in the mesh gives the batches of a single process.

Axes: A accumulation passes, B rows of a pass (of all processes), S tokens of a row.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
import time
from pathlib import Path
from typing import Any, Mapping

import jax
import numpy as np

from deepseek_v4.checkpoint import agree
from deepseek_v4.config import RunConfig, to_dict
from deepseek_v4.sharding import batch_sharding, check_divides, local_rows
from deepseek_v4.training import stages
from deepseek_v4.training.data import Batches, make_dataset
from deepseek_v4.training.step import ARRAYS, check_batch

SHARED = ".shared"  # a file of the workdir, for a moment
_PATIENCE = 30.0  # seconds in which a new file has to be seen by all hosts


def dataset(run_config: RunConfig, split: str, mesh: jax.sharding.Mesh | None = None) -> Batches:
  """This process's part of the batches of a split.

  Of a run with stages these are some rows of the stage with the shortest ones; `in_shape_of` makes the batches of any stage
  of them. The documents that fit the shortest rows are those that fill-in-the-middle may rearrange, in all stages.

  Raises:
    ValueError: as `make_dataset`; rows that the mesh does not divide.
  """
  settings = stages.shortest(run_config)
  rows = [0] if run_config.stages else _rows_here(settings, mesh)
  return make_dataset(settings.data, settings.model.vocab_size, split=split, rows=rows,
                      document_end=settings.model.eos_token_id)


def beginning(batches: Batches) -> dict[str, Any]:
  """The first position in the data."""
  with contextlib.closing(iter(batches)) as rows:
    return rows.get_state()


def in_shape_of(batches: Batches, run_config: RunConfig, mesh: jax.sharding.Mesh | None = None) -> Batches:
  """The same documents in rows and batches of the sizes that a phase's settings name.

  Raises:
    ValueError: fewer rows than a batch; rows that the mesh does not divide.
  """
  return batches.reshaped(run_config.data, _rows_here(run_config, mesh))


def _rows_here(run_config: RunConfig, mesh: jax.sharding.Mesh | None) -> list[int] | None:
  """Rows of each pass that this process makes; None = all."""
  if mesh is None:
    return None
  check_divides(run_config, mesh)
  return local_rows(mesh, batch_shape(run_config)[1])


def batch_shape(run_config: RunConfig) -> tuple[int, int, int]:
  """[A,B,S] of a batch over all processes; of a run with stages that of the first, as in `step.make_train_step`."""
  data = stages.of_stage(run_config).data
  return data.accumulation, data.batch_size // data.accumulation, data.sequence_length


def abstract_batch(run_config: RunConfig, mesh: jax.sharding.Mesh | None) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes [A,B,S] of a batch over all processes, with its sharding."""
  sharding = None if mesh is None else batch_sharding(mesh)
  return {name: jax.ShapeDtypeStruct(batch_shape(run_config), np.int32, sharding=sharding) for name in ARRAYS}


def to_device(run_config: RunConfig, mesh: jax.sharding.Mesh | None,
              batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
  """A process's rows -> arrays of the whole batch, int32 [A, B, S] by name, spread over the mesh.

  Raises:
    ValueError: rows that `step.check_batch` refuses.
  """
  check_batch(batch)
  if mesh is None:
    return jax.device_put(dict(batch))
  place, shape = batch_sharding(mesh), batch_shape(run_config)
  return {name: jax.make_array_from_process_local_data(place, x, shape) for name, x in batch.items()}


# ---- what all processes must have in common ------------------------------------------------------------------------------
def check_same(run_config: RunConfig, train_data: Batches, held_out: Batches) -> None:
  """Refuses processes that would train something else than the first one.

  Raises:
    ValueError: names the process and what differs, in all of them.
  """
  if jax.process_count() == 1:
    return
  digest = lambda value: hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
  mine = {"settings": digest(to_dict(run_config)), "training documents": digest(train_data.identity),
          "held-out documents": digest(held_out.identity)}
  all_of_them = [json.loads(text) for text in agree.texts_of_all(json.dumps(mine))]
  different = [f"process {i} has other {name} than process 0" for i, theirs in enumerate(all_of_them)
               for name in mine if theirs[name] != all_of_them[0][name]]
  if different:
    raise ValueError(f"{'; '.join(different)}: expected the same command, config file and data on every host")


def check_shared(workdir: Path) -> None:
  """Refuses a workdir that is another folder on another host: each would hold a part of every checkpoint.

  Raises:
    ValueError: names the processes that do not see what the first one writes, in all of them.
  """
  if jax.process_count() == 1:
    return
  file, first = workdir / SHARED, jax.process_index() == 0
  text = agree.of_first(secrets.token_hex(16))
  if first:
    file.write_text(text)
  deadline = time.monotonic() + _PATIENCE
  while not (seen := _reads(file, text)) and time.monotonic() < deadline:
    time.sleep(0.2)
  blind = [i for i, answer in enumerate(agree.texts_of_all("yes" if seen else "no")) if answer == "no"]
  if first:
    file.unlink()
  if blind:
    raise ValueError(f"workdir = {str(workdir)!r}: of {jax.process_count()} processes {', '.join(map(str, blind))} do not "
                     f"see what process 0 writes there; expected a folder that all hosts share")


def _reads(file: Path, text: str) -> bool:
  try:
    return file.read_text() == text
  except OSError:
    return False


def refuse_alone(mesh: Any) -> None:
  """Raises ValueError for several processes without a mesh over their devices."""
  if mesh is None and jax.process_count() > 1:
    raise ValueError(f"mesh = None: expected a mesh over the devices of all {jax.process_count()} processes")
