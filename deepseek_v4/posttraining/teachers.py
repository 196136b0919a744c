"""The teachers of a distillation, one after another (report 5.2.2): what they say of the samples is computed once.

A teacher is the folder of a run or of a converted release. Its weights are on the devices only while its hidden states of a
round's samples are computed: what its head multiplies, after the final norm. These are cached in files, a few bytes a token
where logits would take the whole vocabulary, and its head is kept in a file of its own and put on the devices whenever its
samples' turn comes in a step, in the place of the head before.

Axis letters: R rows   B rows of a pass   S sequence   E hidden size of the teacher   V vocabulary
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any, Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_v4 import config as config_lib
from deepseek_v4 import sharding
from deepseek_v4.checkpoint.convert import CHECKPOINTS
from deepseek_v4.checkpoint.parts import read_leaves
from deepseek_v4.checkpoint.store import newest_manifest, restore_variables
from deepseek_v4.config import ModelConfig, RunConfig, TeacherConfig
from deepseek_v4.config_checks import refuse
from deepseek_v4.model.transformer import DeepseekV4
from deepseek_v4.training import stages

_HEAD = "params/lm_head/kernel"
_UNFINISHED = ".unfinished"


@dataclasses.dataclass(frozen=True)
class Teacher:
  """A teacher whose checkpoint has been looked at, but not read.

  Attributes:
    config: its settings.
    model: its architecture.
    attention_mode: with which it was trained.
    step: of that checkpoint.
    identity: digest of the checkpoint: of its configuration and the checksums of its weights.
  """

  config: TeacherConfig
  model: ModelConfig
  attention_mode: str
  step: int
  identity: str

  @property
  def name(self) -> str:
    """As the config calls it."""
    return self.config.name


def open_teacher(run_config: RunConfig, config: TeacherConfig, mesh: jax.sharding.Mesh | None = None) -> Teacher:
  """Reads the manifest of a teacher's newest checkpoint.

  Raises:
    FileNotFoundError: no checkpoint there.
    ValueError: another tokenizer than the student's, too few positions for its samples, or sizes that the mesh does not
      divide.
  """
  where = f"distillation.teachers: {config.name}"
  folder = Path(config.checkpoint) / CHECKPOINTS
  if not folder.is_dir():
    raise FileNotFoundError(f"{where}: checkpoint = {config.checkpoint!r}: expected the folder of a run or of a converted "
                            f"release, with a folder {CHECKPOINTS!r} in it")
  source, manifest = newest_manifest(folder)
  stored = manifest["config"]
  _check_tokenizer(where, stored, run_config.data.tokenizer)
  model = config_lib.from_dict(ModelConfig, stored["model"])
  length = run_config.data.sequence_length
  if model.max_position_embeddings < length:
    raise ValueError(f"{where}: max_position_embeddings = {model.max_position_embeddings}: expected at least "
                     f"data.sequence_length = {length}")
  if mesh is not None:
    sharding.check_model_divides(model, mesh)
    sharding.check_parts(model, "data.sequence_length", length, mesh.shape["context"])
  sums = {name: entry["sum"] for name, entry in manifest["leaves"].items() if name.split("/")[0] in ("params", "router")}
  mode = _attention_mode(stored, int(source.name))
  identity = _digest([stored["model"], mode, sums])
  return Teacher(config, model, mode, int(source.name), identity)


def _check_tokenizer(where: str, stored: Mapping[str, Any], of_student: str | None) -> None:
  """Refuses a run that was trained on other tokens than the student speaks; a converted release does not say on which."""
  if "data" not in stored:
    return
  of_teacher = stored["data"].get("tokenizer")
  if of_teacher == of_student:
    return
  files = [Path(name) for name in (of_teacher, of_student) if name is not None]
  if len(files) == 2 and all(file.is_file() for file in files) and files[0].read_bytes() == files[1].read_bytes():
    return
  refuse(f"{where}: data.tokenizer of its checkpoint", of_teacher,
         f"the student's, data.tokenizer = {of_student!r}: token ids mean what the tokenizer says")


def _attention_mode(stored: Mapping[str, Any], step: int) -> str:
  """How the run that a checkpoint is of attended at that step; a converted release attends sparsely."""
  if not stored.get("stages"):
    return stored.get("training", {}).get("attention_mode", "sparse")
  return stages.at(config_lib.from_dict(RunConfig, stored), max(step - 1, 0)).run_config.training.attention_mode


def _digest(value: Any) -> str:
  return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


@functools.partial(jax.jit, static_argnames=("model", "attention_mode", "dtype"))
def _hidden(model: DeepseekV4, variables: Any, rows: Mapping[str, jax.Array], *, attention_mode: str,
            dtype: Any) -> jax.Array:
  """[B, S, E] after the final norm."""
  out = model.apply(variables, rows["tokens"], rows["positions"], rows["segment_ids"], logits="none", mtp=False,
                    attention_mode=attention_mode)
  return sharding.constrain(out.hidden.astype(dtype), ("batch", "sequence", None))


class Library:
  """What teachers say, in files.

  Args:
    run_config: of the student.
    folder: for the files; they can all be made again.
    mesh: devices; None = the default one.
  """

  def __init__(self, run_config: RunConfig, folder: str | Path, mesh: jax.sharding.Mesh | None = None) -> None:
    self._run_config, self._folder, self._mesh = run_config, Path(folder), mesh
    self._dtype = jnp.dtype(run_config.distillation.hidden_dtype)

  def hidden(self, teacher: Teacher, number: int, passes: list[Mapping[str, np.ndarray]],
             put: Callable[[Mapping[str, np.ndarray]], Mapping[str, jax.Array]],
             between: Callable[[], None] = lambda: None) -> np.ndarray:
    """[number of passes, B, S, E], dtype `distillation.hidden_dtype`, of a round's passes: from the file of this round, or
    computed now.

    Args:
      number: of the round.
      passes: rows int32 [B, S] each.
      put: brings rows to the devices.
      between: called between passes; what it raises ends the computation.
    """
    tokens = hashlib.sha256(b"".join(np.ascontiguousarray(p[name]).tobytes() for p in passes for name in (
      "tokens", "segment_ids", "positions")))
    asked = _digest([teacher.identity, str(self._dtype), tokens.hexdigest()])
    path = self._round(number) / f"{teacher.name}-{asked}.npy"
    if not path.is_file():
      found = self._compute(teacher, passes, put, between)
      _write(path, found, (len(passes), *passes[0]["tokens"].shape, teacher.model.hidden_size), self._dtype)
    return _read(path, self._dtype)

  def _compute(self, teacher: Teacher, passes, put, between) -> Iterable[np.ndarray]:
    """The hidden states of one pass after another; the weights are given back behind the last."""
    # The prediction block, which can be a part of the checkpoint, has no say in them.
    variables, _, _ = restore_variables(Path(teacher.config.checkpoint) / CHECKPOINTS, scan_layers=teacher.model.scan_layers,
                                        mesh=self._mesh, step=teacher.step)
    model = DeepseekV4(teacher.model, self._run_config.training.kernels)
    for rows in passes:
      between()
      # Ids that only the student has are no words of the teacher's: the loss leaves them out, here they read its last row.
      rows = rows | {"tokens": np.minimum(rows["tokens"], teacher.model.vocab_size - 1)}
      rows = {name: x for name, x in put(rows).items() if name != "loss_mask"}
      yield np.asarray(_hidden(model, variables, rows, attention_mode=teacher.attention_mode, dtype=self._dtype))

  def head(self, teacher: Teacher) -> np.ndarray:
    """[E, V] of the teacher on the host, in the dtype of its hidden states, with the student's number of columns: those
    beyond are cut off, missing ones are zero.

    Raises:
      ValueError: the teacher's newest checkpoint is another one than when the run began.
    """
    vocab_size = self._run_config.model.vocab_size
    path = self._folder / "heads" / f"{teacher.name}-{_digest([teacher.identity, str(self._dtype), vocab_size])}.npy"
    if not path.is_file():
      source, manifest = newest_manifest(Path(teacher.config.checkpoint) / CHECKPOINTS)
      if int(source.name) != teacher.step:
        raise ValueError(f"distillation.teachers: {teacher.name}: its newest checkpoint is that of step {source.name}, "
                         f"expected step {teacher.step} as when this run began; the same command goes on with the new one")
      head = read_leaves(source, manifest, {_HEAD: None})[_HEAD][:, :vocab_size]
      head = np.pad(head, ((0, 0), (0, vocab_size - head.shape[1])))
      _write(path, [head.astype(self._dtype)], (1, *head.shape), self._dtype)
    return _read(path, self._dtype)[0]

  def forget(self, before: int) -> None:
    """Deletes the hidden states of the rounds before this one."""
    for path in self._folder.glob("round_*"):
      if int(path.name.removeprefix("round_")) < before:
        shutil.rmtree(path)

  def _round(self, number: int) -> Path:
    return self._folder / f"round_{number:06d}"


class Resident:
  """The one head that is on the devices.

  Args:
    library: where heads are.
    put: brings a head [E, V], its dtype kept, to the devices.

  Attributes:
    loads: how many times a head was brought there.
  """

  def __init__(self, library: Library, put: Callable[[np.ndarray], jax.Array]) -> None:
    self._library, self._put = library, put
    self._name: str | None = None
    self._head: jax.Array | None = None
    self.loads = 0

  def head(self, teacher: Teacher) -> jax.Array:
    """The teacher's head [E, V], dtype as of `Library.head`, in the place of the one before.

    Raises:
      ValueError: the teacher's newest checkpoint is another one than when the run began.
    """
    if self._name != teacher.name:
      if self._head is not None:
        self._head.delete()
      self._name, self._head = teacher.name, self._put(self._library.head(teacher))
      self.loads += 1
    return self._head


# ---- files ---------------------------------------------------------------------------------------------------------------
def _bits(dtype: np.dtype) -> np.dtype:
  """NumPy's files know no bfloat16: its bits are stored."""
  return np.dtype(f"<u{dtype.itemsize}")


def _write(path: Path, parts: Iterable[np.ndarray], shape: tuple[int, ...], dtype: np.dtype) -> None:
  """Writes an array part by part along its first axis; the file has its name only when all of it is there."""
  path.parent.mkdir(parents=True, exist_ok=True)
  unfinished = path.with_name(path.name + _UNFINISHED)
  file = np.lib.format.open_memmap(unfinished, mode="w+", dtype=_bits(dtype), shape=shape)
  for i, part in enumerate(parts):
    file[i] = part.view(_bits(dtype))
  file.flush()
  del file
  os.replace(unfinished, path)


def _read(path: Path, dtype: np.dtype) -> np.ndarray:
  return np.load(path, mmap_mode="r").view(dtype)
