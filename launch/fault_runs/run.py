"""A run that is killed, stopped, damaged and starved of disk again and again, and what has to be true after each time.

Every start is the real command, `python -m launch.train`, in a process of its own. What the next start must do follows from
what lies on the disk: go on from the newest step folder that nobody damaged, name what it passes over, and never start over.
When a disturbed run is through, its curve and its last checkpoint must be those of the undisturbed one, bit for bit; then
another run begins, until all faults have happened.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable

from deepseek_v4.training import metrics
from deepseek_v4.training.stopping import INTERRUPTED, STOPPED
from deepseek_v4.training.workdir import CHECKPOINTS
from launch.fault_runs import damage

ROOT = Path(__file__).resolve().parents[2]
FILE_BYTES = 50_000  # more than the other files of a run, less than the arrays of a checkpoint
STOPS = {"SIGTERM": (signal.SIGTERM, STOPPED), "SIGINT": (signal.SIGINT, INTERRUPTED)}
KILL, FULL = "SIGKILL", "full disk"
GRACE = 25.0  # training.grace_seconds
_POLL = 0.02


@dataclasses.dataclass(frozen=True)
class Settings:
  """What is run: the config file with overrides, for the training command; seconds that a start may take at most."""

  config: str
  overrides: tuple[str, ...]
  folder: Path
  seed: int
  patience: float = 600.0


@dataclasses.dataclass(frozen=True)
class Fault:
  """One disturbance: SIGKILL, SIGTERM, SIGINT or a full disk, and for SIGKILL perhaps damage on top of it."""

  kind: str
  damage: str | None = None

  @property
  def name(self) -> str:
    return f"{self.kind}, {self.damage}" if self.damage else self.kind


def plan(kills: int, stops: int, full_disks: int, rng: random.Random) -> list[Fault]:
  """The faults in random order: as many of each as asked for, every kind of damage in turn after every other kill."""
  kinds = list(damage.KINDS)
  kinds = [kinds[i // 2 % len(kinds)] if i % 2 else None for i in range(max(kills, 2 * len(kinds)) if kills else 0)]
  faults = [Fault(KILL, kind) for kind in kinds] + [Fault(FULL)] * full_disks
  faults += [Fault(list(STOPS)[i % len(STOPS)]) for i in range(stops)]
  rng.shuffle(faults)
  return faults


# ---- one process -------------------------------------------------------------------------------------------------------
class Start:
  """One start of the training command; its output goes to a file."""

  def __init__(self, settings: Settings, workdir: Path, file_bytes: int | None = None):
    self.workdir, self._patience = workdir, settings.patience
    earlier = len(list(workdir.parent.glob(f"{workdir.name}.*.log")))
    self.log = workdir.with_name(f"{workdir.name}.{earlier:03d}.log")
    arguments = ["-m", "launch.train", "--config", settings.config, "--workdir", str(workdir)]
    arguments += [part for override in settings.overrides for part in ("--set", override)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1",
                                "JAX_COMPILATION_CACHE_DIR": str(settings.folder / "compiled"),
                                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                                "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
    limit = None if file_bytes is None else lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    self.began = time.monotonic()
    with self.log.open("wb") as log:
      # Under a limit, what it says comes through a pipe: the limit holds for that file, too.
      self.process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=environment, preexec_fn=limit,
                                      stdout=log if limit is None else subprocess.PIPE, stderr=subprocess.STDOUT)

  def wait(self) -> int:
    """The exit code."""
    try:
      said, _ = self.process.communicate(timeout=self._patience)
      if said is not None:
        self.log.write_bytes(said)
      return self.process.returncode
    except subprocess.TimeoutExpired:
      self.process.kill()
      self.process.wait()
      raise RuntimeError(f"{self.log}: expected the process to end within {self._patience:g} s") from None

  def output(self) -> str:
    """All that was said so far, without what a progress bar overwrites."""
    return self.log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n")

  def wait_until(self, condition: Callable[[], bool]) -> bool:
    """Whether the condition became true before the process ended."""
    while not condition():
      if self.process.poll() is not None:
        return False
      if time.monotonic() > self.began + self._patience:
        self.process.kill()
        raise RuntimeError(f"{self.log}: nothing happened for {self._patience:g} s")
      time.sleep(_POLL)
    return self.process.poll() is None


def steps_done(workdir: Path) -> int:
  """The last step of the metrics file."""
  try:
    lines = metrics.read_lines(workdir / metrics.LINES)
  except ValueError:  # a line is being written
    lines = []
  return max((line["step"] for line in lines if line["split"] == "train"), default=0)


# ---- what a disk holds -------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Expected:
  """What a start has to do, by what lies on the disk before it.

  Attributes:
    step: of the newest step folder that nobody damaged; 0 = there is none.
    harmless: newer ones whose damage may have hit bytes that nobody reads.
    others: {step: path} of everything newer than that, damaged, empty or unfinished.
  """

  step: int
  harmless: tuple[int, ...]
  others: dict[int, Path]

  def problem(self, output: str) -> str:
    """What is wrong with where a start went on, by what it said; "" if nothing is, or if it did not get that far."""
    resumed = re.search(r"^resumed at step (\d+)$", output, re.MULTILINE)
    if resumed is None:
      started_over = self.step and " parameters on " in output
      return f"expected it to go on from step {self.step}, it started over" if started_over else ""
    got = int(resumed[1])
    if got != self.step and got not in self.harmless:
      return f"expected it to go on from step {self.step}, it went on from {got}"
    silent = [str(path) for step, path in self.others.items() if step > got and f"passed over: {path}:" not in output]
    return f"expected it to name what it passed over, and why: {', '.join(silent)}" if silent else ""


class Disk:
  """The checkpoints of a workdir, and which of them were damaged here and not written again since."""

  def __init__(self, workdir: Path):
    self.checkpoints = workdir / CHECKPOINTS
    self._damaged: dict[int, tuple[int, str]] = {}  # step -> when, in ns, and what kind

  def damage(self, kind: str, rng: random.Random) -> bool:
    """Damages the newest sound step; returns False, and does nothing, if there is no other one to fall back on."""
    sound = self._sound()
    apart = kind in damage.NOT_IN_THE_NEWEST
    if len(sound) < 2 - apart:
      return False
    path = damage.KINDS[kind](self.checkpoints, max(damage.steps(self.checkpoints)) if apart else sound[-1], rng)
    if path.name.isdigit():
      self._damaged[int(path.name)] = (time.time_ns(), kind)
    return True

  def _is_damaged(self, step: int) -> bool:
    # Whole again once it has a newer manifest; a save that was killed may only have begun to delete the damaged one.
    manifest = self.checkpoints / str(step) / "manifest" / "manifest.json"
    return step in self._damaged and not (manifest.is_file() and manifest.stat().st_mtime_ns > self._damaged[step][0])

  def _sound(self) -> list[int]:
    return [step for step in damage.steps(self.checkpoints) if not self._is_damaged(step)]

  def expected(self) -> Expected:
    """What the next start has to do."""
    step = max(self._sound(), default=0)
    visible = [path for path in self.checkpoints.glob("[0-9]*")]
    others = {int(path.name.split(damage.UNFINISHED)[0]): path for path in visible}
    harmless = [n for n, (_, kind) in self._damaged.items() if n in others and kind in damage.PERHAPS_HARMLESS]
    return Expected(step, tuple(harmless), {n: path for n, path in others.items() if n > step})


# ---- faults ------------------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Rhythm:
  """How the undisturbed run goes: seconds until its first step, seconds per step, steps from save to save, steps in all."""

  start: float
  step: float
  every: int
  steps: int


class Disturbed:
  """One disturbed run in its folder."""

  def __init__(self, settings: Settings, number: int, rng: random.Random, rhythm: Rhythm):
    self.workdir = settings.folder / f"disturbed_{number:02d}"
    self.disk = Disk(self.workdir)
    self._settings, self._rng, self._rhythm = settings, rng, rhythm

  def suffer(self, fault: Fault) -> dict[str, Any] | None:
    """Starts the run and lets the fault happen; None if the run was through before it did.

    Returns:
      {"case", "moment", "step", "seconds", "problem"}: what happened when, and what was wrong then ("" = nothing).
    """
    expected = self.disk.expected()
    if fault.kind == FULL and expected.step == self._rhythm.steps:
      return None  # there is nothing left to save
    start = Start(self._settings, self.workdir, FILE_BYTES if fault.kind == FULL else None)
    moment, code, problem = self._strike(start, fault)
    if code == 0:
      return None
    row = {"case": fault.name, "moment": moment, "step": steps_done(self.workdir),
           "seconds": time.monotonic() - start.began, "problem": problem or expected.problem(start.output())}
    if not row["problem"] and fault.damage and not self.disk.damage(fault.damage, self._rng):
      return row | {"case": KILL, "postponed": fault.damage}
    return row

  def _strike(self, start: Start, fault: Fault) -> tuple[str, int, str]:
    """Lets the fault happen; returns when, the exit code, and what is wrong with how the process ended."""
    if fault.kind == FULL:
      code = start.wait()
      return "at a save", code, full_disk_problem(code, start.output(), self.disk.checkpoints)
    moment = self._wait_for_moment(start)
    number, wanted = STOPS.get(fault.kind, (signal.SIGKILL, -signal.SIGKILL))
    start.process.send_signal(number)
    sent = time.monotonic()
    code, output = start.wait(), start.output()
    too_early = code == -number and re.match(r"$|Traceback", output)  # Python did not listen yet
    if code != wanted and not too_early:
      return moment, code, f"expected exit code {wanted}, got {code}: {output[-2000:]}"
    return moment, code, self._stop_problem(output, time.monotonic() - sent) if fault.kind in STOPS else ""

  def _wait_for_moment(self, start: Start) -> str:
    """Waits for a random moment: three times in ten while the run starts, else within the steps and saves after it."""
    if self._rng.random() < 0.3:
      # Python itself needs a moment before it can listen.
      until = start.began + self._rng.uniform(1.0, self._rhythm.start)
      start.wait_until(lambda: time.monotonic() > until)
      return "while it starts"
    # When it has compiled, it has dropped the lines behind the checkpoint that it goes on from.
    start.wait_until(lambda: "compiled the evaluation" in start.output())
    last = steps_done(self.workdir) + self._rng.randrange(3 * self._rhythm.every)
    start.wait_until(lambda: steps_done(self.workdir) >= last)
    until = time.monotonic() + self._rng.uniform(0, self._rhythm.step)
    start.wait_until(lambda: time.monotonic() > until)
    return "while it trains"

  def _stop_problem(self, output: str, seconds: float) -> str:
    """What is wrong with how a run ended that was told to stop."""
    done, saved = steps_done(self.workdir), max(damage.steps(self.disk.checkpoints), default=0)
    if "stopped after step" in output and saved < done:
      return f"expected all {done} finished steps to be saved, found {saved}"
    return "" if seconds < GRACE else f"expected the end within {GRACE:g} s of the signal, it took {seconds:.1f} s"


def full_disk_problem(code: int, output: str, checkpoints: Path) -> str:
  """What is wrong with how a run ended that could not write its checkpoint."""
  pattern = rf"checkpoint of step \d+: {re.escape(str(checkpoints))}/\d+ could not be written: .*File too large"
  said = re.search(pattern, output, re.DOTALL)
  return "" if code == 1 and said else f"expected exit code 1, path and cause, got {code}: {output[-2000:]}"


# ---- all of it ---------------------------------------------------------------------------------------------------------
def through(settings: Settings, workdir: Path) -> tuple[Start, str]:
  """Trains to the end; returns the start and what was wrong with it."""
  start = Start(settings, workdir)
  code = start.wait()
  return start, "" if code == 0 else f"expected exit code 0, got {code}: {start.output()[-2000:]}"


def undisturbed(settings: Settings) -> Rhythm:
  """Trains the run to compare with, twice: the second time everything is compiled, as it is for the disturbed runs."""
  workdir = settings.folder / "undisturbed"
  for _ in range(2):
    shutil.rmtree(workdir, ignore_errors=True)
    start = Start(settings, workdir)
    first = start.wait_until(lambda: steps_done(workdir) > 0)
    began = time.monotonic()
    code = start.wait()
    if code or not first:
      raise RuntimeError(f"the undisturbed run failed (exit code {code}):\n{start.output()[-3000:]}")
  training = json.loads((workdir / "config.json").read_text(encoding="utf-8"))["training"]
  seconds = (time.monotonic() - began) / training["steps"]
  return Rhythm(began - start.began, seconds, training["checkpoint_every"], training["steps"])


def difference(workdir: Path, other: Path) -> str:
  """How two finished runs differ, in their curves or in any bit of their last checkpoints; "" = not at all."""
  curves, ends = [], []
  for folder in (workdir, other):
    lines = metrics.read_lines(folder / metrics.LINES)
    curves.append([{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines])
    last = max(damage.steps(folder / CHECKPOINTS))
    manifest = json.loads((folder / CHECKPOINTS / str(last) / "manifest" / "manifest.json").read_text(encoding="utf-8"))
    sums = {name: leaf["sum"] for name, leaf in manifest["leaves"].items()}
    ends.append({"step": last, "extra": manifest["extra"]} | sums)
  if curves[0] != curves[1]:
    where = next((a for a, b in zip(*curves) if a != b), f"{len(curves[0])} lines, not {len(curves[1])}")
    return f"another curve: {where}"
  unequal = [name for name in ends[1] if ends[0].get(name) != ends[1][name]]
  return f"another last checkpoint: {', '.join(unequal)}" if unequal else ""


def nothing_usable(settings: Settings, workdir: Path, rng: random.Random) -> str:
  """Damages every checkpoint of a finished run; returns what is wrong with its next start, which must refuse."""
  checkpoints, before = workdir / CHECKPOINTS, (workdir / metrics.LINES).read_bytes()
  for step in damage.steps(checkpoints):
    damage.KINDS["_METADATA cut in half"](checkpoints, step, rng)
  start = Start(settings, workdir)
  code, output = start.wait(), start.output()
  named = all(f"{checkpoints / str(step)}:" in output for step in damage.steps(checkpoints))
  if code != 1 or "holds no usable checkpoint" not in output or not named:
    return f"expected exit code 1 and every checkpoint named, got {code}: {output[-2000:]}"
  return "" if (workdir / metrics.LINES).read_bytes() == before else "expected the metrics file to stay as it was"


def measure(settings: Settings, kills: int, stops: int, full_disks: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
  """Lets all faults happen; returns one row for each, one for the end of each disturbed run, and one for a run past help."""
  rng = random.Random(settings.seed)
  faults = collections.deque(plan(kills, stops, full_disks, rng))
  settings.folder.mkdir(parents=True, exist_ok=True)
  say("training the undisturbed run, twice: once to compile")
  rhythm = undisturbed(settings)
  say(f"{rhythm.start:.1f} s until the first step, {rhythm.step * 1000:.0f} ms a step; {len(faults)} faults to come")
  rows: list[dict[str, Any]] = []
  began, total, number = time.monotonic(), len(faults), 0
  while faults:
    number += 1
    disturbed, open_end = Disturbed(settings, number, rng, rhythm), True
    while faults and open_end:
      row = disturbed.suffer(faults[0])
      open_end = row is not None
      if row is None:
        continue
      faults.popleft()
      if (kind := row.pop("postponed", None)) is not None:  # nothing to fall back on yet: another time
        faults.append(Fault(KILL, kind))
        total += 1
      rows.append(row | {"run": number})
      spent, happened = time.monotonic() - began, total - len(faults)
      left = len(faults) * spent / happened
      progress = f"{happened}/{total} faults, {60 * happened / spent:.1f} a minute, {left / 60:.1f} min left"
      problem = ": " + row["problem"].splitlines()[0] if row["problem"] else ""
      say(f"{progress}: {row['case']} {row['moment']}, step {row['step']}{problem}")
    _, problem = through(settings, disturbed.workdir)
    problem = problem or difference(disturbed.workdir, settings.folder / "undisturbed")
    rows.append({"case": "end of a disturbed run", "run": number, "step": steps_done(disturbed.workdir), "problem": problem})
    say(f"run {number} is through: {problem or 'curve and last checkpoint equal, bit for bit'}")
  rows.append({"case": "no usable checkpoint", "run": number,
               "problem": nothing_usable(settings, disturbed.workdir, rng)})
  say(f"no usable checkpoint: {rows[-1]['problem'] or 'refused, every one named'}")
  return rows
