"""Steps that went wrong: losses that are not finite or spike, and what follows from them.

A spike is a loss above mean + deviations x standard deviation of the last `window` losses. The report (4.2.3) answers spikes
with a short rollback and a while of anticipatory routing (`anticipation.py`); its rule and lengths are not given, so these
are settings.

What is remembered (`Record`) is part of every checkpoint, and a decision depends on nothing else. So a run that is killed on
the way decides the same again, and leaves out the same batches.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Mapping, Sequence

from deepseek_v4.config import AnomalyConfig

NOT_FINITE, SPIKE = "not finite", "spike"
Rows = tuple[int, int]  # first row of a batch and the one behind it: its place in the data


@dataclasses.dataclass(frozen=True)
class Record:
  """What a run remembers of its losses.

  Attributes:
    losses: of the last steps, oldest first, at most `window`.
    steps: where anomalies were met within the last `window` steps.
    left_out: places of batches that are no longer trained on.
    repeated: [first row, loss] of batches that were computed again after an anomaly; None = the loss was not finite.
    anticipate_until: the last step with anticipatory routing; 0 = none was needed so far.
  """

  losses: tuple[float, ...] = ()
  steps: tuple[int, ...] = ()
  left_out: tuple[Rows, ...] = ()
  repeated: tuple[tuple[int, float | None], ...] = ()
  anticipate_until: int = 0

  def to_dict(self) -> dict[str, Any]:
    """For JSON, which holds every float exactly."""
    return dataclasses.asdict(self)

  @staticmethod
  def from_dict(found: Mapping[str, Any]) -> "Record":
    """The inverse of `to_dict`; an empty mapping, from a run before there were records, is an empty record."""
    pairs = {name: tuple(map(tuple, found.get(name, ()))) for name in ("left_out", "repeated")}
    return Record(tuple(found.get("losses", ())), tuple(found.get("steps", ())), **pairs,
                  anticipate_until=found.get("anticipate_until", 0))


@dataclasses.dataclass(frozen=True)
class Anomaly:
  """A step that went wrong.

  Attributes:
    kind: "not finite" or "spike".
    step: the step's number.
    rows: place of its batch in the data.
    loss: its loss.
    limit: what a loss had to exceed to be a spike.
  """

  kind: str
  step: int
  rows: Rows
  loss: float
  limit: float

  def __str__(self) -> str:
    what = f"loss {self.loss:.4f} above {self.limit:.4f}" if self.kind == SPIKE else f"loss {self.loss}"
    return f"step {self.step}: {self.kind} ({what}) on rows {self.rows[0]} to {self.rows[1] - 1} of the data"


def spike_limit(losses: Sequence[float], config: AnomalyConfig) -> float:
  """Mean + deviations x (population) standard deviation of the last `window` losses; infinite while there are fewer."""
  recent = losses[-config.window:]
  if len(recent) < config.window:
    return math.inf
  mean = math.fsum(recent) / len(recent)
  variance = math.fsum((x - mean) ** 2 for x in recent) / len(recent)
  return mean + config.deviations * math.sqrt(variance)


def judge(record: Record, config: AnomalyConfig, step: int, rows: Rows, loss: float, finite: bool) -> Anomaly | None:
  """The anomaly of a step, if it is one.

  Args:
    step, rows: its number and the place of its batch.
    loss, finite: what the step returned.
  """
  limit = spike_limit(record.losses, config)
  if finite and not loss > limit:
    return None
  return Anomaly(SPIKE if finite else NOT_FINITE, step, rows, loss, limit)


def accepted(record: Record, config: AnomalyConfig, step: int, loss: float) -> Record:
  """The record after a step that counts."""
  return dataclasses.replace(record, losses=(*record.losses, loss)[-config.window:],
                             steps=tuple(n for n in record.steps if n > step - config.window))


def noted(record: Record, anomaly: Anomaly) -> Record:
  """The record with an anomaly met."""
  return dataclasses.replace(record, steps=(*record.steps, anomaly.step))


def too_many(record: Record, config: AnomalyConfig) -> bool:
  """Whether more anomalies were met than the run may go on with."""
  return len(record.steps) > config.limit


def rolled_back(record: Record, earlier: Record, anomaly: Anomaly, policy: str, anticipation_steps: int = 0) -> Record:
  """The record with which a run goes on from an earlier state.

  Args:
    record: at the anomaly.
    earlier: the one that belongs to the earlier state.
    anomaly: what happened.
    policy: "skip" leaves its batch out; "repeat" computes it again, once; "anticipate" too, with anticipatory routing.
    anticipation_steps: how many steps this lasts from the anomalous one on; those before it come on top.
  """
  left_out, repeated = record.left_out, record.repeated
  if policy == "skip":
    left_out = (*left_out, anomaly.rows)
  else:
    repeated = (*repeated, (anomaly.rows[0], anomaly.loss if math.isfinite(anomaly.loss) else None))
  until = record.anticipate_until
  if policy == "anticipate":
    until = max(until, anomaly.step - 1 + anticipation_steps)
  return Record(earlier.losses, record.steps, left_out, repeated, until)


def is_left_out(record: Record, rows: Rows) -> bool:
  """Whether a batch at this place shares rows with one that is left out."""
  return any(first < rows[1] and rows[0] < end for first, end in record.left_out)


def repeated_loss(record: Record, rows: Rows) -> tuple[float | None] | None:
  """None if the batch was not computed again yet; else the loss it had the first time, in a tuple."""
  return next(((loss,) for first, loss in record.repeated if first == rows[0]), None)


def told_again(policy: str, step: int, loss: float, before: float | None) -> str:
  """What is said of a batch that went wrong and now does not."""
  if policy == "anticipate":
    return f"step {step} computed again with older routing: loss {loss}, before {before}"
  return f"warning: step {step} repeated: loss {loss}, before {before}; suspect the hardware"
