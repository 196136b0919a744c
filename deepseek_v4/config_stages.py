"""The stages of a run, such as short dense rows, the indexer's warm-up, long sparse rows; `config.py` hands them on."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from deepseek_v4.config_checks import at_least, one_of, positive, refuse, typed
from deepseek_v4.config_model import CSA
from deepseek_v4.config_training import ATTENTION_MODES, TRAINABLE, DataConfig

_NAME = re.compile(r"[A-Za-z_][\w-]*")  # no number, which would be a place in the list


@dataclasses.dataclass(frozen=True)
class StageConfig:
  """One stage of a run, `steps` long or as many as `tokens` take. What is None is as the run's own settings say.

  Attributes:
    name: as the log, the metrics and overrides (`stages.NAME.steps=20`) call it.
    steps: optimizer steps.
    tokens: in place of steps: the stage ends with the step that fills it up, all places of a row counted.
    sequence_length, batch_size, accumulation: as in `DataConfig`.
    ramp_from, ramp_steps: the batch grows within the first `ramp_steps` steps from so many rows to `batch_size`, a pass
      of batch_size / accumulation rows at a time; None = it does not grow. Each size is another program to compile.
    attention_mode, trainable: as in `TrainingConfig`.
    mtp_weight: weight of the prediction block's loss through the whole stage, where it has one; None =
      `LossConfig.mtp_weight`, and `mtp_weight_final` once the run's learning rate decays.
    learning_rate: peak of a schedule of the stage's own, with `warmup_steps` at its start and a cosine of `decay_steps`
      at its end down to `optimizer.final_fraction`; None = the run's schedule, which goes over all stages.
  """

  name: str
  steps: int | None = None
  tokens: int | None = None
  sequence_length: int | None = None
  batch_size: int | None = None
  accumulation: int | None = None
  ramp_from: int | None = None
  ramp_steps: int = 0
  attention_mode: str | None = None
  trainable: str | None = None
  mtp_weight: float | None = None
  learning_rate: float | None = None
  warmup_steps: int = 0
  decay_steps: int = 0

  def __post_init__(self) -> None:
    typed(self)
    if not _NAME.fullmatch(self.name):
      refuse("stages: name", self.name, "letters, digits, _ and -, not beginning with a digit")
    try:
      self._check()
    except ValueError as error:
      raise ValueError(f"stages.{self.name}.{error}") from None

  def _check(self) -> None:
    if (self.steps is None) == (self.tokens is None):
      refuse("steps", self.steps, f"steps or tokens, one of them, beside tokens = {self.tokens}")
    for name, smallest in (("steps", 1), ("tokens", 1), ("sequence_length", 2), ("batch_size", 1), ("accumulation", 1),
                           ("ramp_from", 1), ("mtp_weight", 0)):
      if getattr(self, name) is not None:
        at_least(self, smallest, name)
    at_least(self, 0, "ramp_steps", "warmup_steps", "decay_steps")
    one_of(self, "attention_mode", (None, *ATTENTION_MODES))
    one_of(self, "trainable", (None, *TRAINABLE))
    if (self.ramp_from is None) != (self.ramp_steps == 0):
      refuse("ramp_steps", self.ramp_steps, "above 0 with ramp_from, else 0")
    if self.learning_rate is not None:
      positive(self, "learning_rate")
    elif self.warmup_steps or self.decay_steps:
      refuse("learning_rate", None, "a number, where the stage has warmup_steps or decay_steps of its own")

  def data_of(self, data: DataConfig) -> DataConfig:
    """The run's data settings with the stage's own ones in their place."""
    own = {name: getattr(self, name) for name in ("sequence_length", "batch_size", "accumulation")}
    return dataclasses.replace(data, **{name: value for name, value in own.items() if value is not None})

  def batch_sizes(self, data: DataConfig) -> tuple[tuple[int, int], ...]:
    """(first step, rows) of each size of the batch, steps counted from the stage's start; `data` as of `data_of`."""
    rows = data.batch_size // data.accumulation
    if self.ramp_from is None:
      return ((0, data.batch_size),)
    passes = self.ramp_from // rows
    more = data.accumulation - passes
    firsts = [-(-self.ramp_steps * i // more) for i in range(more + 1)]  # where a line through the ramp reaches i more
    return tuple((first, (passes + i) * rows) for i, first in enumerate(firsts) if i == more or firsts[i + 1] > first)

  def length(self, data: DataConfig) -> int:
    """Steps of the stage; `data` as of `data_of`."""
    if self.steps is not None:
      return self.steps
    left, sizes = self.tokens or 0, self.batch_sizes(data)
    for (first, rows), (following, _) in zip(sizes, sizes[1:]):
      taken = (following - first) * rows * data.sequence_length
      if taken >= left:
        return first - (-left // (rows * data.sequence_length))
      left -= taken
    first, rows = sizes[-1]
    return first - (-left // (rows * data.sequence_length))


def check(run_config: Any) -> int:
  """The steps of all stages of a RunConfig together, once they fit it and each other.

  Raises:
    ValueError: names the stage and its field.
  """
  names, total = [], 0
  for stage in run_config.stages:
    if stage.name in names:
      refuse("stages", [s.name for s in run_config.stages], f"different names; {stage.name!r} is there twice")
    names.append(stage.name)
    try:
      total += _check_one(run_config, stage)
    except ValueError as error:
      raise ValueError(f"stages.{stage.name}.{error}") from None
  return total


def _check_one(run_config: Any, stage: StageConfig) -> int:
  data = stage.data_of(run_config.data)
  if data.sequence_length > run_config.model.max_position_embeddings:
    refuse("sequence_length", data.sequence_length,
           f"at most model.max_position_embeddings = {run_config.model.max_position_embeddings}")
  rows = data.batch_size // data.accumulation
  if stage.ramp_from is not None and (stage.ramp_from % rows or stage.ramp_from >= data.batch_size):
    refuse("ramp_from", stage.ramp_from, f"a multiple of batch_size / accumulation = {rows}, the rows of a pass, below "
                                         f"batch_size = {data.batch_size}")
  steps = stage.length(data)
  if stage.warmup_steps + stage.decay_steps > steps:
    refuse("warmup_steps + decay_steps", stage.warmup_steps + stage.decay_steps, f"at most the stage's {steps} steps")
  trainable = stage.trainable or run_config.training.trainable
  refuse_without_indexer(run_config.model, "trainable", trainable)
  if trainable == "all" and CSA in run_config.model.layer_types and not run_config.loss.indexer_weight:
    refuse("trainable", trainable, "'all_but_indexer', or loss.indexer_weight above 0: it is 0, and nothing else teaches "
                                   "an indexer")
  if stage.mtp_weight is not None and (not run_config.model.num_nextn_predict_layers or trainable == "indexer"):
    why = "only the indexer trains" if trainable == "indexer" else "model.num_nextn_predict_layers = 0"
    refuse("mtp_weight", stage.mtp_weight, f"None, as {why}: no prediction block has a loss here")
  return steps


def refuse_without_indexer(model: Any, field: str, trainable: str) -> None:
  """Raises ValueError where only an indexer would train and the model has none."""
  if trainable == "indexer" and CSA not in model.layer_types:
    refuse(field, trainable, "another value: no layer of the model has an indexer")
