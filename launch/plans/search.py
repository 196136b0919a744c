"""Which mesh, accumulation and remat policy of a train step fits a slice and is fastest by the bounds.

All of them are estimated from shapes (`planning/estimate.py`), those that cannot fit are dropped, and the others compiled
in the order of their estimated time, each in a process of its own, whose end frees its memory. What a compiled plan needs
beyond its estimate is expected of the candidates after it, too, so that few compilations are spent on what will not fit.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import json
import math
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Callable, Iterator, Sequence

from deepseek_v4 import sharding
from deepseek_v4.config import MeshConfig, RunConfig
from deepseek_v4.config_checks import refuse
from deepseek_v4.config_model import REMAT_POLICIES
from deepseek_v4.planning import estimate, lower, read, state
from deepseek_v4.training.state import abstract_state
from launch import children
from launch.benchmarks.kernels import chips
from launch.plans.measure import TRAIN, Figures, Wanted, rates_of

ROOT = Path(__file__).resolve().parents[2]
MOST_TOKENS = 65536  # of a device in a pass; more only costs memory
SHARES = (1, 2, 4)  # rows of a device group in a pass


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A run's settings that are tried, and what they are expected to take."""

  mesh: MeshConfig
  accumulation: int
  remat: str
  estimate: estimate.Estimate

  @property
  def name(self) -> str:
    sizes = " ".join(f"{axis}={getattr(self.mesh, axis)}" for axis in sharding.SLICE_AXES if getattr(self.mesh, axis) > 1)
    return f"{sizes or 'one device'}, accumulation {self.accumulation}, remat {self.remat}"


def shapes_of(devices: int, axes: int = len(sharding.SLICE_AXES)) -> Iterator[tuple[int, ...]]:
  """All ways to write a number as a product of so many sizes."""
  if axes == 1:
    yield (devices,)
    return
  for size in (n for n in range(1, devices + 1) if devices % n == 0):
    for others in shapes_of(devices // size, axes - 1):
      yield (size, *others)


def candidates(run_config: RunConfig, topology: str, remats: Sequence[str]) -> list[Candidate]:
  """Everything that the sizes allow and that may fit, the fastest by the estimate first.

  Raises:
    ValueError: an unknown slice or policy.
  """
  for name in remats:
    if name not in REMAT_POLICIES:
      refuse("--remat", name, f"some of {', '.join(REMAT_POLICIES)}, with commas between them")
  devices = lower.devices_of(topology)
  chip = chips.chip_of(topology)
  shapes, found = abstract_state(dataclasses.replace(run_config, mesh=MeshConfig())), []
  for sizes in shapes_of(len(devices)):
    mesh_config = MeshConfig(**dict(zip(sharding.SLICE_AXES, sizes)))
    mesh = sharding.make_mesh(mesh_config, devices)
    try:
      sharding.check_model_divides(run_config.model, mesh)
    except ValueError:
      continue
    held = state.by_kind(state.placed(shapes, mesh))
    for accumulation, remat in itertools.product(_accumulations(run_config, mesh_config), remats):
      data = dataclasses.replace(run_config.data, accumulation=accumulation)
      tried = dataclasses.replace(run_config, mesh=mesh_config, data=data,
                                  model=dataclasses.replace(run_config.model, remat=remat))
      try:
        found.append(Candidate(mesh_config, accumulation, remat, estimate.estimate(tried, mesh, rates_of(chip), held)))
      except ValueError:  # the sizes do not divide
        continue
  room = read.SHARE * chip.hbm_bytes
  return sorted((one for one in found if one.estimate.bytes <= room), key=lambda one: one.estimate.seconds["step"])


def _accumulations(run_config: RunConfig, mesh: MeshConfig) -> list[int]:
  """Passes with one, two or four rows for each group of devices that shares rows, while a device has few tokens."""
  data, groups = run_config.data, mesh.data * mesh.fsdp * mesh.expert
  tokens = lambda share: share * data.sequence_length // mesh.context
  return [data.batch_size // (share * groups) for share in SHARES
          if data.batch_size % (share * groups) == 0 and (share == 1 or tokens(share) <= MOST_TOKENS)]


# ---- compiling the best -----------------------------------------------------------------------------------------------
def search(wanted: Wanted, command: Sequence[str], accumulation: str, remats: Sequence[str], compiles: int, jobs: int,
           timeout: float, say: Callable[[str], None]) -> list[Figures]:
  """Plans of the best candidates, ranked: those that fit by their bound, the fastest first; then the others.

  Args:
    command: arguments of `launch.plan` that name the run and the slice.
    accumulation: what --set calls the number of passes.
    timeout: seconds of one compilation.

  Raises:
    ValueError: not a train step, or nothing can fit.
  """
  if wanted.step != TRAIN:
    refuse("--step", wanted.step, f"{TRAIN!r} with --search")
  waiting = candidates(wanted.run_config, wanted.topology, remats)
  room = read.SHARE * chips.chip_of(wanted.topology).hbm_bytes
  if not waiting:
    raise ValueError(f"--search on {wanted.topology}: no mesh fits even by the estimate, expected a larger slice")
  say(f"{len(waiting)} candidates may fit; compiling at most {compiles}, {jobs} at a time")
  found: list[Figures] = []
  excess, clock, stopped = [1.0], time.monotonic(), threading.Event()
  with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
    running: dict[concurrent.futures.Future, Candidate] = {}
    try:
      while True:
        while len(running) < jobs and len(found) + len(running) < compiles and waiting:
          waiting = [one for one in waiting if one.estimate.bytes * statistics.median(excess) <= room]
          if waiting:
            one = waiting.pop(0)
            running[pool.submit(_compile, one, command, accumulation, timeout, stopped.is_set)] = one
        if not running:
          break
        done, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
        for future in done:
          one = running.pop(future)
          found.append(_row(one, future.result()))
          if "memory" in found[-1]:
            excess = [*(excess if len(found) > 1 else []), found[-1]["memory"]["all"] / one.estimate.bytes]
          say(progress(len(found), compiles if waiting else len(found) + len(running), time.monotonic() - clock, found[-1]))
    finally:  # also where a signal ends it: no compiler is left behind
      stopped.set()
  return ranked(found)


def _compile(one: Candidate, command: Sequence[str], accumulation: str, timeout: float, stop: Callable[[], bool]) -> Figures:
  """The figures that a process of its own writes, or {"failed": the last thing that it said}. Where `stop` says so, it is
  ended."""
  settings = {f"mesh.{axis}": getattr(one.mesh, axis) for axis in sharding.MESH_AXES}
  settings |= {accumulation: one.accumulation, "model.remat": one.remat}
  with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "plan.json"
    asked = [*command, *(part for name, value in settings.items() for part in ("--set", f"{name}={value}"))]
    with (errors := Path(folder) / "errors").open("wb") as output:
      code = children.run_for([sys.executable, "-m", "launch.plan", *asked, "--json", str(path)], timeout, stop=stop,
                              cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=output)
    if code is None:
      return {"failed": f"took more than {timeout / 60:.0f} minutes"}
    if code or not path.is_file():
      said = [line for line in errors.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
      failed = [line for line in said if line.startswith("error:")] or said[-1:]
      return {"failed": " ".join(failed)[:300] or f"ended with code {code}"}
    return json.loads(path.read_text(encoding="utf-8"))


def _row(one: Candidate, figures: Figures) -> Figures:
  return {"candidate": one.name, "estimated_bytes": one.estimate.bytes, "estimated_utilization": one.estimate.utilization,
          **figures}


def ranked(found: Sequence[Figures]) -> list[Figures]:
  """Those that fit by the seconds of a step that their bounds allow, then those that do not, then what failed."""
  def place(row):
    return ("failed" in row, not row.get("fits"), row["bounds"]["step"] if "bounds" in row else math.inf)
  return sorted(found, key=place)


# ---- what is said -----------------------------------------------------------------------------------------------------
def progress(done: int, of: int, seconds: float, row: Figures) -> str:
  """One line for each plan: rate and time left."""
  left = seconds / done * (of - done)
  return f"[{done}/{of}] {_verdict(row)}; {60 * done / seconds:.2f} a minute, about {left / 60:.0f} min left"


def _verdict(row: Figures) -> str:
  if "failed" in row:
    return f"{row['candidate']}: {row['failed']}"
  share = row["memory"]["all"] / row["hbm_bytes"]
  return (f"{row['candidate']}: {share:.0%} of the memory{'' if row['fits'] else ', DOES NOT FIT'}, step at least "
          f"{row['bounds']['step']:.2f} s, utilisation {row['utilization']:.1%}")


def table(found: Sequence[Figures]) -> str:
  """The rank of each."""
  return "\n".join(f"{number}. {_verdict(row)}" for number, row in enumerate(found, 1))
