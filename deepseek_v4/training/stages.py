"""Which stage of a run a step is in, and what it runs with. Pure functions of the settings; numbers of steps, no arrays.

A run is a list of phases. A phase is what one compiled step serves: a stage, or the part of it in which the batch has one
size. Its settings are a RunConfig without stages, so whatever works with a run works with a phase. Without stages a run is
one phase, and that phase's settings are the run's.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from deepseek_v4 import optim
from deepseek_v4.config import LossConfig, RunConfig, StageConfig


@dataclasses.dataclass(frozen=True)
class Phase:
  """Steps that run with the same settings.

  Attributes:
    stage: name of the stage; "" for a run without stages.
    begin, steps: first step of the stage, from 0, and how many it has.
    first, end: first step of the phase, and the one after its last.
    run_config: its settings; `data.batch_size` is that of this phase.
    stage_config: those of the whole stage: they differ while the batch grows.
    total: steps of the whole run.
  """

  stage: str
  begin: int
  steps: int
  first: int
  end: int
  run_config: RunConfig
  stage_config: RunConfig
  total: int


def phases(run_config: RunConfig) -> tuple[Phase, ...]:
  """All phases of a run, in order and without gaps."""
  total = run_config.training.steps
  if not run_config.stages:
    return (Phase("", 0, total, 0, total, run_config, run_config, total),)
  found, begin = [], 0
  for stage_config in run_config.stages:
    data = stage_config.data_of(run_config.data)
    whole = _settings(run_config, stage_config, begin)
    steps, sizes = stage_config.length(data), stage_config.batch_sizes(data)
    end = begin + steps
    firsts = [begin + first for first, _ in sizes] + [end]
    for (_, rows), first, following in zip(sizes, firsts, firsts[1:]):
      if first < end:  # a stage may end before its batch is whole
        passes = rows * data.accumulation // data.batch_size
        part = dataclasses.replace(whole, data=dataclasses.replace(data, batch_size=rows, accumulation=passes))
        found.append(Phase(stage_config.name, begin, steps, first, min(following, end), part, whole, total))
    begin = end
  return tuple(found)


def _settings(run_config: RunConfig, stage_config: StageConfig, begin: int) -> RunConfig:
  """The run's settings with those of a stage that begins with step `begin` in their place."""
  data, training = stage_config.data_of(run_config.data), run_config.training
  own: dict[str, Any] = {"attention_mode": stage_config.attention_mode, "trainable": stage_config.trainable}
  training = dataclasses.replace(training, watch_gradients=True, **{k: v for k, v in own.items() if v is not None})
  optimizer, loss = run_config.optimizer, run_config.loss
  if stage_config.learning_rate is not None:
    # Its cosine is not the run's, so it says nothing about the prediction block's loss.
    decaying = begin >= optim.decay_start(optimizer, training.steps)
    loss = _constant(loss, loss.mtp_weight_final if decaying else loss.mtp_weight)
    optimizer = dataclasses.replace(optimizer, learning_rate=stage_config.learning_rate, first_step=begin,
                                    warmup_steps=stage_config.warmup_steps, decay_steps=stage_config.decay_steps)
    training = dataclasses.replace(training, steps=begin + stage_config.length(data))
  if stage_config.mtp_weight is not None:
    loss = _constant(loss, stage_config.mtp_weight)
  # One replacement: between two of them the stages would set the steps again.
  return dataclasses.replace(run_config, data=data, training=training, optimizer=optimizer, loss=loss, stages=())


def _constant(loss: LossConfig, mtp_weight: float) -> LossConfig:
  return dataclasses.replace(loss, mtp_weight=mtp_weight, mtp_weight_final=mtp_weight)


def at(run_config: RunConfig, step: int) -> Phase:
  """The phase that computes step `step`, from 0; the last one for the place behind all steps."""
  return next((phase for phase in phases(run_config) if step < phase.end), phases(run_config)[-1])


def of_stage(run_config: RunConfig, name: str = "") -> RunConfig:
  """The settings of a whole stage: a RunConfig without stages, with the batch that the stage ends with.

  Args:
    name: of the stage, or its place from 0; "" = the first. A run without stages has no other.

  Raises:
    ValueError: there is no such stage.
  """
  names = [stage.name for stage in run_config.stages]
  known = {**{str(i): name for i, name in enumerate(names)}, "": names[0] if names else ""}
  wanted = known.get(name, name)
  for phase in phases(run_config):
    if phase.stage == wanted:
      return phase.stage_config
  there = f"one of {', '.join(names)}" if names else "none, as the run has no stages"
  raise ValueError(f"stage = {name!r}: expected {there}")


def shortest(run_config: RunConfig) -> RunConfig:
  """The settings of the stage with the shortest rows."""
  return min((phase.stage_config for phase in phases(run_config)), key=lambda config: config.data.sequence_length)


def learning_rate(run_config: RunConfig, step: int) -> float:
  """That of the update which step `step`, from 0, makes."""
  config = at(run_config, step).run_config
  return float(optim.make_schedule(config.optimizer, config.training.steps)(step))


def table(run_config: RunConfig) -> list[str]:
  """What a run goes through, a line for each stage; none without stages."""
  lines = []
  for stage in run_config.stages:
    mine = [phase for phase in phases(run_config) if phase.stage == stage.name]
    config = mine[0].stage_config
    first = f"{mine[0].run_config.data.batch_size} to " if len(mine) > 1 else ""
    lines.append(f"stage {stage.name}: steps {mine[0].first + 1} to {mine[-1].end}, rows of {config.data.sequence_length:,} "
                 f"tokens, {first}{config.data.batch_size} a batch, {config.training.attention_mode} attention, trains "
                 f"{config.training.trainable}")
  return lines
