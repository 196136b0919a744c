"""All benches one after another, each in a process of its own and in limited time; one that fails stops no other.

A part that is not finished in time, or that this machine cannot run, is left out: that is said, and is no failure. What an
earlier call finished is not measured again, if nothing that it follows from has changed since (`known`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence

from launch.benchmarks import cases
from launch.benchmarks.kernels.chips import CHIPS
from launch.children import run_for

ROOT = Path(__file__).resolve().parents[2]
CODE = ("deepseek_v4", "pallas_kernels", "configs", "launch")  # what figures follow from
PLAN, SLICE = "configs/v4_pro_slice.py", "v5p:2x2x2"
KERNELS = 90  # minutes for those of a chip
MODEL = {"forward": 60, "train": 120, cases.DECODE: 60, cases.REMAT: 30}  # minutes
SHORTEST = 1.0  # minutes of a part, as long as there are so many
LEAST_MINUTES = 0.1  # that --minutes of a bench may say

Run = Callable[[Sequence[str], float], int | None]


@dataclasses.dataclass(frozen=True)
class Part:
  """A bench.

  Attributes:
    arguments: behind `python -m`; a JSON file is added.
    minutes: it may take at most.
    watches: whether it takes --minutes, and then writes what it has when they are over.
    gigabytes: of free memory that it needs, GiB.
    compiler: whether it needs libtpu.
  """

  arguments: tuple[str, ...]
  minutes: float
  watches: bool = False
  gigabytes: int = 0
  compiler: bool = False


def parts(against: str | None, repeats: int | None = None, lengths: Sequence[str] = (),
          others: bool = True) -> dict[str, Part]:
  """All parts by name; `repeats`, `lengths` and `others` go to those that know them."""
  flags = {"against": ("--against", against) if against else (), "repeats": ("--repeats", str(repeats)) if repeats else (),
           "lengths": ("--lengths", ",".join(lengths)) if lengths else (), "others": () if others else ("--noothers",)}

  def bench(minutes: float, kind: str, *arguments: str, takes: Sequence[str] = (), **more: Any) -> Part:
    given = [word for name in takes for word in flags[name]]
    return Part(("launch.bench", kind, *arguments, *given), minutes, **more)
  model = {kind: bench(minutes, kind, takes=("against",) * (kind != cases.REMAT) + ("repeats", "lengths"), watches=True)
           for kind, minutes in MODEL.items()}
  compiled = {"watches": True, "compiler": True}
  kernels = {f"kernels_{chip.name}": bench(KERNELS, "kernels", "--topology", chip.topology, takes=("lengths", "others"),
                                           **compiled) for chip in CHIPS}
  plan = ("launch.plan", "--config", PLAN, "--topology", CHIPS[0].topology)
  return {"start": bench(15, "start", takes=("repeats",)), **model,
          "context": bench(30, "context", "--tokens", "65536", "--chunks", "1024,750"),
          "plan": Part(plan, 45, gigabytes=12, compiler=True),
          "memory": bench(60, "memory", "--topology", SLICE, takes=("lengths", "others"), **compiled),
          "exchange": bench(45, "exchange", "--topology", SLICE, takes=("lengths",), **compiled), **kernels,
          "flash_plan": bench(45, "plan", gigabytes=6, compiler=True)}


def chosen(names: Sequence[str], known: dict[str, Part]) -> dict[str, Part]:
  """Those of the parts that are asked for, in their own order; no name = all.

  Raises:
    ValueError: there is none of that name.
  """
  for name in names:
    if name not in known:
      raise ValueError(f"--parts = {name!r}: expected some of {', '.join(known)}")
  return {name: part for name, part in known.items() if name in (names or known)}


def default_against() -> str | None:
  """transformers where it can be run."""
  installed = all(importlib.util.find_spec(name) is not None for name in ("torch", "transformers"))
  return cases.TRANSFORMERS if installed else None


# ---- what an earlier call found ---------------------------------------------------------------------------------------
def made_of(machine: Mapping[str, Any], versions: Mapping[str, str]) -> str:
  """Digest of what figures follow from: versions and the machine, as `report.origin` has them, and the project's code."""
  where = [machine["processor"], machine["cores"], round(machine.get("memory_bytes", 0) / 2**30), versions]
  found = hashlib.sha256(json.dumps(where, sort_keys=True).encode())
  for path in sorted(path for folder in CODE for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".json")):
    found.update(path.relative_to(ROOT).as_posix().encode() + b"\n" + path.read_bytes())
  return found.hexdigest()[:12]


def read(path: str) -> dict[str, dict[str, Any]]:
  """The parts of a file that `bench all` wrote.

  Raises:
    ValueError: it is no such file.
  """
  with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):  # no JSON; or JSON of something else
    parts = json.loads(Path(path).read_text(encoding="utf-8"))["parts"]
    if all(isinstance(row, dict) for part in parts.values() for row in (part, *part.get("rows", ()))):
      return parts
  raise ValueError(f"--json = {path!r}: expected, with --resume, a file that launch.bench all wrote")


def _is_whole(found: Mapping[str, Any], part: Part, made: str) -> bool:
  """Whether a file's entry is what this part's command writes now, with nothing left out and nothing of ours failed. What
  others fail in, they fail in again."""
  if (found.get("command"), found.get("made_of")) != (" ".join(part.arguments), made) or {"failed", "left_out"} & set(found):
    return False
  rows = found.get("rows", ())
  return not any("left_out" in row or "cut" in row or ("failed" in row and row.get("ours", True)) for row in rows)


# ---- one part ---------------------------------------------------------------------------------------------------------
def free_gigabytes() -> float | None:
  """GiB of memory that programs can still get; None where the system does not say."""
  with contextlib.suppress(OSError):
    for line in Path("/proc/meminfo").read_text().splitlines():
      if line.startswith("MemAvailable:"):
        return int(line.split()[1]) / 2**20
  return None


def obstacle(part: Part) -> str | None:
  """Why this machine cannot run a part now; None if it can."""
  if part.compiler and importlib.util.find_spec("libtpu") is None:
    return "libtpu is not installed"
  free = free_gigabytes() if part.gigabytes else None
  return f"needs {part.gigabytes} GiB, {free:.0f} free" if free is not None and free < part.gigabytes else None


def limit_of(left: Sequence[Part], minutes: float | None) -> float:
  """Minutes of the first of the parts that are left: its share of what is left of all, but not more than its own."""
  own = left[0].minutes
  if minutes is None:
    return own
  return max(0.0, min(own, minutes, max(SHORTEST, minutes * own / sum(part.minutes for part in left))))


def _inside(limit: float) -> float:
  """Minutes that a part which watches them is told; the rest of its limit is for its start and its last lines."""
  return limit - max(0.25, limit / 20)


def _over(part: Part, limit: float) -> bool:
  """Whether a limit is too short to begin with the part."""
  return _inside(limit) < LEAST_MINUTES if part.watches else not limit


def _measured(part: Part, limit: float, run: Run, made: Callable[[], str]) -> dict[str, Any]:
  before = made()
  with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "part.json"
    minutes = ("--minutes", f"{_inside(limit):.3g}") if part.watches else ()
    code = run([sys.executable, "-m", *part.arguments, *minutes, "--json", str(file)], 60 * limit)
    try:
      found = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # never written, or stopped while it was
      found = {}
  if code is None:
    return found | {"left_out": f"stopped after {limit:.3g} minutes"}
  if code:
    return found | {"failed": f"exit code {code}"}
  return found | {"command": " ".join(part.arguments)} | ({"made_of": before} if made() == before else {})


# ---- all --------------------------------------------------------------------------------------------------------------
def measure(wanted: dict[str, Part], say: Callable[[str], None], run: Run = run_for,
            keep: Callable[[dict[str, Any]], None] = lambda found: None, minutes: float | None = None,
            known: Mapping[str, dict[str, Any]] | None = None, made: Callable[[], str] = lambda: "") -> dict[str, Any]:
  """{part: what it wrote, with "failed": how it ended, or "left_out": why}; its own lines are printed as they come.

  Args:
    wanted: see `parts`.
    run: runs a command for at most so many seconds, see `children.run_for`.
    keep: is given all that is known after each part, also of parts that are not wanted or have not had their turn.
    minutes: for all of them together; each gets its share.
    known: from `read`: what an earlier call wrote. Parts of the same command and digest in which nothing is missing are not
      measured again; figures of the others stay until there are new ones.
    made: the digest of now, see `made_of`.
  """
  known, start, now = known or {}, time.monotonic(), made()
  again = {name for name, part in wanted.items() if _is_whole(known.get(name, {}), part, now)}
  found: dict[str, Any] = {}
  for number, (name, part) in enumerate(wanted.items()):
    if name in again:
      say(f"\n==== {number + 1}/{len(wanted)} {name}: kept, of {known[name].get('date', 'before')}")
      found[name] = known[name]
      continue
    spent, reason = (time.monotonic() - start) / 60, obstacle(part)
    later = [one for other, one in list(wanted.items())[number + 1:] if other not in again and not obstacle(one)]
    limit = limit_of([part, *later], None if minutes is None else minutes - spent)
    reason = reason or (f"the {minutes:g} minutes of all are over" if _over(part, limit) else None)
    say(f"\n==== {number + 1}/{len(wanted)} {name}, {spent:.0f} min so far, at most {limit:.3g} more: "
        f"python -m {' '.join(part.arguments)}" + (f"\nleft out: {reason}" if reason else ""))
    new = {"left_out": reason} if reason else _measured(part, limit, run, made)
    found[name] = new if _has_figures(new) or not _has_figures(known.get(name, {})) else known[name] | new
    keep({**known, **found})
  return found


def _has_figures(found: Mapping[str, Any]) -> bool:
  return "rows" in found or "fits" in found


def summary(found: dict[str, Any]) -> str:
  """A line for each part: rows, whether a plan fits, targets reached, and how it failed or why it was left out."""
  return "\n".join(f"{name:16}{', '.join(_words(part))}" for name, part in found.items())


def _words(part: dict[str, Any]) -> list[str]:
  words = []
  if "rows" in part:
    left = sum("left_out" in row for row in part["rows"])
    words.append(f"{len(part['rows'])} rows" + (f", {left} of them left out" if left else ""))
  elif "fits" in part:
    words.append("fits" if part["fits"] else f"does not fit, {part['memory']['all'] / part['hbm_bytes']:.0%}")
  targets = [target["reached"] for target in part.get("targets", ()) if target["reached"] is not None]
  words += [f"{sum(targets)} of {len(targets)} targets reached"] if targets else []
  words += [part["failed"]] if "failed" in part else []
  return words + ([f"left out: {part['left_out']}"] if "left_out" in part else []) or ["done"]
