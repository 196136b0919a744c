"""The arrays of a step on disk: one Orbax tree written at once (a training run), or several written one after another.

A manifest's entry of a leaf may name the folder that holds it ("part"); without one it is `state/`.
"""

from __future__ import annotations

from typing import Any, Mapping

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from deepseek_v4.checkpoint import agree
from deepseek_v4.checkpoint import manifest as manifest_lib
from deepseek_v4.checkpoint.manifest import DamagedError
from deepseek_v4.checkpoint.trees import named_leaves, unflatten

STATE = "state"
CHUNK_BYTES = 1 << 26  # of a stored chunk: devices that need a slice of a leaf read little more than that


def read_leaves(path: epath.Path, manifest: dict[str, Any], shardings: Mapping[str, Any]) -> dict[str, Any]:
  """The named leaves, verified: with a sharding as JAX arrays on it, with None as numpy arrays.

  Raises:
    DamagedError: a file is missing or unreadable, or a leaf's checksum does not fit.
  """
  by_part: dict[str, dict[str, Any]] = {}
  for name, sharding in shardings.items():
    by_part.setdefault(manifest["leaves"].get(name, {}).get("part", STATE), {})[name] = sharding

  def read() -> dict[str, Any]:
    return {name: x for part, wanted in by_part.items() for name, x in _read_part(path / part, manifest, wanted).items()}

  leaves = agree.unless_any_fails(read, DamagedError)  # a broken file is met by those processes that need it
  manifest_lib.verify(manifest, leaves)
  return leaves


def _read_part(folder: epath.Path, manifest: dict[str, Any], shardings: Mapping[str, Any]) -> dict[str, Any]:
  def arguments(name: str) -> ocp.RestoreArgs:
    if shardings[name] is None:
      return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.ArrayRestoreArgs(restore_type=jax.Array, sharding=shardings[name],
                                global_shape=tuple(manifest["leaves"][name]["shape"]))

  tree = unflatten({name: 0 for name in shardings})  # the 0 comes back where Orbax has no such leaf
  # Nobody waits for others in here, who may have met damage and gone on.
  alone = ocp.options.MultiprocessingOptions(primary_host=None, active_processes={jax.process_index()})
  try:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(), multiprocessing_options=alone) as reader:
      restored = reader.restore(folder, args=ocp.args.PyTreeRestore(
        item=tree, restore_args=unflatten({n: arguments(n) for n in shardings}), partial_restore=True))
  except (MemoryError, jax.errors.JaxRuntimeError):  # nothing is wrong with the files
    raise
  except Exception as error:  # for absent and broken files Orbax and TensorStore raise many kinds, this plain one among them
    raise DamagedError(_reason(error)) from error
  return {name: x for name, x in named_leaves(restored)[0]}


def _reason(error: BaseException) -> str:
  """Kind and message of an error and of what caused it, without TensorStore's specifications."""
  text = str(error).split(" [tensorstore_spec")[0].split(" See full TensorStore details")[0]
  cause = error.__cause__
  return f"{type(error).__name__}: {text}" + (f" ({_reason(cause)})" if cause is not None else "")


def write_part(folder: epath.Path, leaves: Mapping[str, np.ndarray]) -> None:
  """Writes host arrays of any shape and dtype by their names on disk; the folder has its name only when all of it is there.

  Replaces what is left there of an interrupted write.
  """
  # Orbax would copy the arrays first, against changes while it writes; nobody changes these, and they are large.
  handlers = ocp.type_handlers
  registry = handlers.create_type_handler_registry((np.ndarray, handlers.NumpyHandler(deepcopy_host_arrays=False)),
                                                   (jax.Array, handlers.ArrayHandler()))  # Orbax warns without it
  tree = unflatten(leaves)
  chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), tree)
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=registry)) as writer:
    writer.save(folder, args=ocp.args.PyTreeSave(tree, save_args=chunks), force=True)
