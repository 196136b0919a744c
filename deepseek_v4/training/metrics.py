"""Where a run's numbers go: metrics.jsonl, TensorBoard event files, a progress bar, the closing table.

Every line of metrics.jsonl is one JSON object with `split` ("train", "held_out" or "anomaly") and `step`, the number of
optimizer steps done, and in a run with stages with `stage`, the name of the one it belongs to. A step has at most one line
of training and one of held-out text, also after a run was interrupted and resumed from an earlier checkpoint.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any, Callable, Mapping

import numpy as np
import tensorboardX
import tqdm

LINES, EVENTS, SUMMARY, CURVES = "metrics.jsonl", "tensorboard", "summary.json", "loss_curves.png"


def read_lines(path: str | Path) -> list[dict[str, Any]]:
  """The objects of a JSON-lines file in order; a last line that was cut off in writing is left out, no file is no lines.

  Raises:
    ValueError: a line that is no JSON object; the last one may be cut off.
  """
  path = Path(path)
  texts = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
  lines = []
  for number, text in enumerate(texts, start=1):
    try:
      lines.append(json.loads(text))
    except json.JSONDecodeError as error:
      if number < len(texts):
        raise ValueError(f"{path}, line {number}: expected one JSON object ({error})") from error
  return lines


def write_json(path: str | Path, value: Any) -> None:
  """Writes indented JSON in one piece: a reader sees the old file or the new one. NaN and infinities become null."""
  _replace_text(Path(path), json.dumps(_plain(value), indent=2) + "\n")


def _replace_text(path: Path, text: str) -> None:
  unfinished = path.with_name(path.name + ".tmp")
  unfinished.write_text(text, encoding="utf-8")
  os.replace(unfinished, path)


def _plain(value: Any) -> Any:
  """Scalars of numpy and JAX as Python's; NaN and infinities, which JSON does not have, as None."""
  if isinstance(value, Mapping):
    return {name: _plain(v) for name, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [_plain(v) for v in value]
  if isinstance(value, (str, bool, int, type(None))):
    return value
  number = np.asarray(value).item()
  return number if not isinstance(number, float) or math.isfinite(number) else None


class MetricsWriter:
  """Writes metrics.jsonl and TensorBoard files of a run; `active=False` (all processes but the first) writes nothing."""

  def __init__(self, workdir: str | Path, last_step: int = 0, active: bool = True) -> None:
    """Opens the files; lines beyond `last_step`, the step that the run goes on from, are dropped."""
    self.active = active
    self._written: set[tuple[str, int]] = set()
    if not active:
      return
    self._path = Path(workdir) / LINES
    self._keep(lambda line: line["step"] <= last_step)
    # TensorBoard hides what earlier files say about steps from purge_step on.
    self._events = tensorboardX.SummaryWriter(str(Path(workdir) / EVENTS), purge_step=last_step + 1, flush_secs=20)

  def _keep(self, wanted: Callable[[Mapping[str, Any]], bool]) -> None:
    """Opens the file with the wanted ones of its lines."""
    kept = [line for line in read_lines(self._path) if wanted(line)]
    _replace_text(self._path, "".join(json.dumps(line) + "\n" for line in kept))
    self._written = {(line["split"], line["step"]) for line in kept}
    self._file = self._path.open("a", encoding="utf-8")

  def back_to(self, step: int) -> None:
    """The run goes on from an earlier step: of those behind it only anomalies stay in metrics.jsonl."""
    if self.active:
      self._file.close()
      self._keep(lambda line: line["step"] <= step or line["split"] == "anomaly")

  def write(self, split: str, step: int, values: Mapping[str, Any]) -> None:
    """Adds one line; a second one for the same split and step (a finished run evaluated again) is left out."""
    if (split, step) not in self._written:
      self.add(split, step, values)

  def add(self, split: str, step: int, values: Mapping[str, Any]) -> None:
    """Adds one line, whatever is there already; TensorBoard gets the numbers in it."""
    if not self.active:
      return
    self._written.add((split, step))
    line = _plain({"split": split, "step": step, **values})
    self._file.write(json.dumps(line) + "\n")
    self._file.flush()
    for name, value in line.items():
      if name not in ("split", "step") and isinstance(value, (int, float)):
        self._events.add_scalar(f"{split}/{name}", float(value), step)

  def close(self) -> None:
    """Ends the files."""
    if self.active:
      self._file.close()
      self._events.close()


class Progress:
  """A progress bar with tokens/s, time left and loss; where nobody watches (no terminal), one line per report."""

  def __init__(self, first_step: int, steps: int, active: bool = True) -> None:
    self._bar = tqdm.tqdm(total=steps, initial=first_step, unit="step", dynamic_ncols=True, file=sys.stdout,
                          disable=None if active else True)
    self._first, self._steps, self._active = first_step, steps, active
    self._since_report, self._in_all = np.zeros(2), np.zeros(2)  # tokens, seconds
    self.restart_clock()

  def restart_clock(self) -> None:
    """What happened since the last step (compiling, evaluating, saving) counts in no rate."""
    self._clock = time.perf_counter()
    self._bar.unpause()

  def step(self, tokens: float) -> None:
    """Counts one finished step of so many tokens."""
    now = time.perf_counter()
    self._since_report += tokens, now - self._clock
    self._clock = now
    self._bar.update(1)

  def back_to(self, step: int) -> None:
    """The run goes on from an earlier step."""
    self._bar.n = step
    self.restart_clock()

  def report(self, step: int, loss: float, stage: str = "", name: str = "loss") -> float:
    """Shows the loss, or what else `name` says, and in which stage, and returns the tokens per second since the last
    report."""
    self._in_all += self._since_report
    tokens, seconds = self._since_report
    rate = tokens / max(seconds, 1e-9)
    self._since_report = np.zeros(2)
    self._bar.set_postfix_str(f"{stage and f'{stage}, '}{rate:,.0f} tokens/s, {name} {loss:.4f}")
    if self._bar.disable:
      left = (self._steps - step) * self._in_all[1] / max(1, step - self._first)
      self.say(f"step {step}/{self._steps}  {stage and f'{stage}  '}{name} {loss:.4f}  {rate:,.0f} tokens/s  "
               f"{tqdm.tqdm.format_interval(left)} left")
    return rate

  @property
  def tokens_per_second(self) -> float:
    """Over all reported steps of this process; 0 before the first."""
    tokens, seconds = self._in_all
    return float(tokens / seconds) if seconds else 0.0

  def say(self, text: str) -> None:
    """Prints a line above the bar."""
    if self._active:
      self._bar.write(text, file=sys.stdout)

  def close(self) -> None:
    """Takes the bar away."""
    self._bar.close()


def held_out_table(model: float, baselines: Mapping[str, float], unit: str = "bits per byte") -> str:
  """A small table of the held-out text, best first (lower is better), and in a sentence who is ahead of whom."""
  values = {"this model": model} | {name.replace("_", " "): value for name, value in baselines.items()}
  rows = sorted(values.items(), key=lambda row: row[1])
  width = max(len(name) for name in ("held-out text", *values))
  lines = [f"{'held-out text':{width}}  {unit}", *(f"{name:{width}}  {value:.3f}" for name, value in rows)]
  verdicts = [f"{abs(model - value):.3f} {'better than' if model < value else 'WORSE than'} {name}"
              for name, value in rows if name != "this model"]
  if verdicts:
    lines.append(f"The model is {', '.join(verdicts)}.")
  return "\n".join(lines)
