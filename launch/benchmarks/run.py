"""Starts the workers of a length, lets the sides take turns, stops who needs too much memory or time, shows progress."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Callable, Sequence

import numpy as np

from launch.benchmarks import missing, report
from launch.benchmarks.cases import (
  DECODE,
  ENVIRONMENT,
  LOGITS_LENGTH,
  LOGITS_TOLERANCE,
  MEMORY_LIMIT,
  OURS,
  Case,
  cases_of,
  expected_seconds,
  longest_seconds,
  seconds_of,
  turn_seconds,
  turns_of,
  warms_up,
)
from launch.benchmarks.worker import memory

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = (sys.executable, "-m", "launch.benchmarks.worker")
_LOSS_TOLERANCE = 1e-3  # one token that a near tie sends to other experts changes the mean less than that


class WorkerFailed(Exception):
  """A worker ended before it answered; the message says why."""


class OutOfTime(WorkerFailed):
  """It was stopped because the bench's time was over."""


class Worker:
  """A process that measures one side of one case; no answer is waited for beyond `end`, seconds of `time.monotonic`."""

  def __init__(self, case: Case, folder: Path, end: float = math.inf):
    self.case, self._end = case, end
    self._errors = (folder / f"errors {time.monotonic_ns()}.txt").open("w+", encoding="utf-8", errors="replace")
    arguments = [json.dumps(dataclasses.asdict(case)), str(folder)]
    self._process = subprocess.Popen([*PROGRAM, *arguments], cwd=ROOT, env=os.environ | ENVIRONMENT[case.side], text=True,
                                     stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors)
    self._lines: queue.Queue[str] = queue.Queue()
    self._reader = threading.Thread(target=self._read, daemon=True)
    self._reader.start()

  def _read(self) -> None:
    for line in self._process.stdout:
      self._lines.put(line)
    self._lines.put("")

  def reply(self) -> dict[str, Any]:
    """The worker's next message; its memory is watched while it works.

    Raises:
      WorkerFailed: it died, or was stopped because it needs more than MEMORY_LIMIT or `cases.longest_seconds`.
    """
    limit, start = longest_seconds(self.case), time.monotonic()
    while True:
      with contextlib.suppress(queue.Empty):
        line = self._lines.get(timeout=0.05)
        if line:
          return json.loads(line)
        raise WorkerFailed(self._last_words())
      if (memory("VmRSS", self._process.pid) or 0) > MEMORY_LIMIT:
        self._process.kill()
        raise WorkerFailed(f"stopped: needs more than {MEMORY_LIMIT // 2**30} GiB")
      if time.monotonic() > min(start + limit, self._end):
        self._process.kill()
        if time.monotonic() > self._end:
          raise OutOfTime(missing.NO_TIME)
        raise WorkerFailed(f"took more than {limit:.0f} s")

  def _last_words(self) -> str:
    code = self._process.wait()
    self._errors.seek(0)
    said = [line for line in self._errors.read().splitlines() if line.strip()]
    return f"ended with code {code}" + (f": {said[-1].strip()}" if said else "")

  def measure(self, warm: bool) -> dict[str, Any]:
    """One timed pass; `warm`: after one that does not count."""
    with contextlib.suppress(BrokenPipeError):  # the reply then says what happened
      self._process.stdin.write("warm\n" if warm else "run\n")
      self._process.stdin.flush()
    return self.reply()

  def close(self) -> None:
    """Ends the process; a worker that waits for the next line ends by itself."""
    with contextlib.suppress(BrokenPipeError):
      self._process.stdin.close()
    try:
      self._process.wait(timeout=5)
    except subprocess.TimeoutExpired:
      self._process.kill()
      self._process.wait()
    self._reader.join()
    self._process.stdout.close()
    self._errors.close()


class Progress:
  """One line per measurement, with the time left: the expected seconds of what is left, scaled by what the rest took."""

  def __init__(self, groups: Sequence[Sequence[Case]], repeats: int, say: Callable[[str], None]):
    self.say, self._total = say, sum((1 + turns_of(group, repeats)) * len(group) for group in groups)
    self._left, self._expected, self._count = seconds_of(groups, repeats), seconds_of(groups, repeats), 0
    self._start = time.monotonic()

  def done(self, case: Case, text: str, seconds: float, count: int = 1) -> None:
    """Counts `count` measurements of a case that were expected to take so many seconds together."""
    self._count, self._left = self._count + count, max(0.0, self._left - seconds)
    finished = max(1e-9, self._expected - self._left)
    left = (time.monotonic() - self._start) / finished * self._left
    minutes = f"{left / 60:.0f} min" if left >= 90 else f"{left:.0f} s"
    number = f"[{self._count:>{len(str(self._total))}}/{self._total}]"
    self.say(f"{number} {case.name:13} {case.label}: {text}, about {minutes} left")


def check_logits(folder: Path, against: str, kind: str, end: float = math.inf) -> str:
  """Compares the logits of both sides on a few rows of random tokens, of decode through caches; returns what to print.

  The sides round differently. Once in some thousands of choices the fourth and the fifth expert are so close that they
  choose differently, which changes the logits of all later places of the row. Different formulas would change every row, so
  the sides agree if one whole row does.

  Raises:
    WorkerFailed: the sides do not compute the same; OutOfTime: `time.monotonic` came to `end` before.
  """
  for side in (OURS, against):
    case = Case("cached_logits" if kind == DECODE else "logits", side, LOGITS_LENGTH)
    with contextlib.closing(Worker(case, folder, end)) as worker:
      worker.reply()
  ours, theirs = (np.load(folder / f"logits {side}.npy") for side in (OURS, against))
  return agreement(ours, theirs, against)


def agreement(ours: np.ndarray, theirs: np.ndarray, against: str) -> str:
  """See `check_logits`; logits [rows, places, vocabulary]."""
  apart = np.abs(ours - theirs).max(-1)
  same = apart <= LOGITS_TOLERANCE
  text = (f"logits within {LOGITS_TOLERANCE:g} of {against} at every place of {same.all(1).sum()} of {len(same)} rows of "
          f"{same.shape[1]} tokens, in all at {same.mean():.1%} of the places (standard deviation {theirs.std():.2f})")
  if not same.all(1).any():
    raise WorkerFailed(f"{text}: the two sides do not compute the same, a comparison of their speed means nothing")
  return text


def measure_group(group: Sequence[Case], folder: Path, repeats: int, progress: Progress,
                  end: float = math.inf) -> list[dict[str, Any]]:
  """Rows of the cases of one length; those that were not measured when `time.monotonic` came to `end` are left out.

  All workers get ready first, then they take turns, so that a slow phase of the machine hits every side; a worker that
  waits does nothing. A turn begins with a pass that does not count: in a virtual machine the memory that another process
  has just freed may have gone back to the host, and who takes it again pays (a fifth of a training step was seen).
  """
  warm, turns = warms_up(group), turns_of(group, repeats)
  rows, workers, ready, samples = {}, {}, {}, {case: [] for case in group}

  def ask(case: Case, question: Callable[[], dict[str, Any]], seconds: float) -> dict[str, Any]:
    """The answer, or nothing if the worker failed: its row is then done."""
    try:
      return question()
    except WorkerFailed as failure:
      if time.monotonic() > end and samples[case]:
        return {}  # the passes before this one are a row
      rows[case] = (report.left_out_row if time.monotonic() > end else report.failed_row)(case, str(failure))
      count = turns - len(samples[case]) + (case not in ready)  # this measurement and those that will not come
      progress.done(case, str(failure), seconds + (count - 1) * turn_seconds(case, group), count)
      return {}

  with contextlib.ExitStack() as stack:
    for case in group:
      workers[case] = Worker(case, folder, end)
      stack.callback(workers[case].close)
      expected = sum(expected_seconds(case))
      if answer := ask(case, workers[case].reply, expected):
        ready[case] = answer
        compiled = f", compiled in {answer['compile_seconds']:.1f} s" if answer["compile_seconds"] else ""
        progress.done(case, f"ready{compiled}", expected)
    check_losses(ready)
    for turn in range(turns):
      for case in [case for case in group if case not in rows and not (samples[case] and time.monotonic() > end)]:
        expected = turn_seconds(case, group)
        if answer := ask(case, functools.partial(workers[case].measure, warm), expected):
          samples[case].append(answer)
          progress.done(case, report.speed(case, answer), expected)
      for line in compare_tokens({case: samples[case][0] for case in group if samples[case]}) if turn == 0 else ():
        progress.say(line)
  made = [[rows[case]] if case in rows else report.make_rows(case, ready[case], samples[case]) for case in group]
  cut = {case for case in group if case not in rows and len(samples[case]) < turns}
  return [row | {"cut": f"{len(samples[case])} of {turns} passes"} if case in cut else row
          for case, its in zip(group, made) for row in its]


def check_losses(ready: dict[Case, dict[str, Any]]) -> None:
  """Before the first update both sides must have the same loss.

  Raises:
    WorkerFailed: they do not.
  """
  losses = {case: answer["first_loss"] for case, answer in ready.items() if answer.get("first_loss") is not None}
  if not all(abs(loss - next(iter(losses.values()))) <= _LOSS_TOLERANCE for loss in losses.values()):
    raise WorkerFailed("first losses differ: " + ", ".join(f"{case.label} {loss:.5f}" for case, loss in losses.items()))


def compare_tokens(passes: dict[Case, dict[str, Any]]) -> list[str]:
  """What to print of the replies of timed passes that decode: how far those of the other side equal ours.

  Which of two tokens with nearly equal logits comes first is each side's own affair, and so is all that follows it. So is
  which of equal index scores is picked (see `cases.check_config`): in long prompts that adds up to logits as far apart as
  those of two good tokens, from the first one on. `check_logits` is where both sides have to compute the same.

  Raises:
    WorkerFailed: a reply of another length.
  """
  replies = {case: parts["tokens"] for case, parts in passes.items() if "tokens" in parts}
  ours = next((reply for case, reply in replies.items() if case.side == OURS), None)
  lines = []
  for case, reply in replies.items():
    if ours is None or case.side == OURS:
      continue
    same = next((i for i, pair in enumerate(zip(ours, reply)) if pair[0] != pair[1]), len(ours))
    if len(reply) != len(ours):
      raise WorkerFailed(f"{case.name}: {case.label} replied {len(reply)} tokens, expected {len(ours)} as ours")
    whole = same == len(ours)
    lines.append(f"{case.name}: {case.label} replies " + (f"the same {same} tokens as ours" if whole else
                 f"other tokens than ours from number {same + 1} of {len(ours)} on"))
  return lines


def measure(kind: str, lengths: Sequence[int], against: str | None, repeats: int,
            say: Callable[[str], None] = print, minutes: float | None = None) -> list[dict[str, Any]]:
  """Measures one kind at all lengths and returns its rows, with ratios; what takes longer than `minutes` is left out.

  Raises:
    WorkerFailed: weights could not be made, or the two sides do not compute the same.
  """
  groups = cases_of(kind, lengths, against)
  rows: list[dict[str, Any]] = []
  end = math.inf if minutes is None else time.monotonic() + 60 * minutes
  with tempfile.TemporaryDirectory() as folder:
    try:
      with contextlib.closing(Worker(Case("weights", OURS, 0), Path(folder), end)) as worker:
        worker.reply()
      if against:
        say(check_logits(Path(folder), against, kind, end))
    except OutOfTime as late:
      return [report.left_out_row(case, str(late)) for group in groups for case in group]
    progress = Progress(groups, repeats, say)
    for group in groups:
      if time.monotonic() > end:
        rows += [report.left_out_row(case, missing.NO_TIME) for case in group]
        continue
      rows += report.with_ratios(measure_group(group, Path(folder), repeats, progress, end))
  return rows
