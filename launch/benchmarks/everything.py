"""All benches one after another, each in a process of its own; one that fails does not stop the others."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Sequence

from launch.benchmarks import cases
from launch.benchmarks.kernels.chips import CHIPS

PLAN, SLICE = "configs/v4_pro_slice.py", "v5p:2x2x2"


def parts(against: str | None) -> dict[str, list[str]]:
  """Arguments behind `python -m` of each part, by its name; a JSON file is added."""
  beside = ["--against", against] if against else []
  bench = lambda *arguments: ["launch.bench", *arguments]
  model = {kind: bench(kind, *beside) for kind in cases.KINDS if kind != cases.REMAT}
  kernels = {f"kernels_{chip.name}": bench("kernels", "--topology", chip.topology) for chip in CHIPS}
  slices = {kind: bench(kind, "--topology", SLICE) for kind in ("memory", "exchange")}
  return {"start": bench("start"), **model, "remat": bench("remat"),
          "context": bench("context", "--tokens", "65536", "--chunks", "1024,750"),
          "plan": ["launch.plan", "--config", PLAN, "--topology", CHIPS[0].topology], **slices, **kernels}


def chosen(names: Sequence[str], against: str | None) -> dict[str, list[str]]:
  """Those of the parts that are asked for; no name = all.

  Raises:
    ValueError: there is none of that name.
  """
  known = parts(against)
  for name in names:
    if name not in known:
      raise ValueError(f"--parts = {name!r}: expected some of {', '.join(known)}")
  return {name: known[name] for name in names or known}


def default_against() -> str | None:
  """transformers where it can be run."""
  installed = all(importlib.util.find_spec(name) is not None for name in ("torch", "transformers"))
  return cases.TRANSFORMERS if installed else None


def measure(wanted: dict[str, list[str]], say: Callable[[str], None], run: Callable[..., Any] = subprocess.run,
            keep: Callable[[dict[str, Any]], None] = lambda found: None) -> dict[str, Any]:
  """{part: what it wrote, or {"failed": how it ended}}; every part's own lines are printed as they come.

  Args:
    wanted: see `parts`.
    run: starts a process and waits for it.
    keep: is given what was found so far after each part.
  """
  found, start = {}, time.monotonic()
  for number, (name, arguments) in enumerate(wanted.items(), 1):
    minutes = (time.monotonic() - start) / 60
    say(f"\n==== {number}/{len(wanted)} {name}, {minutes:.0f} min so far: python -m {' '.join(arguments)}")
    with tempfile.TemporaryDirectory() as folder:
      file = Path(folder) / "part.json"
      done = run([sys.executable, "-m", *arguments, "--json", str(file)])
      found[name] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
      if done.returncode:
        found[name] |= {"failed": f"exit code {done.returncode}"}
    keep(found)
  return found


def summary(found: dict[str, Any]) -> str:
  """A line for each part: rows, targets reached, or how it failed."""
  lines = []
  for name, part in found.items():
    targets = [target["reached"] for target in part.get("targets", ()) if target["reached"] is not None]
    said = part.get("failed") or (f"{len(part['rows'])} rows" if "rows" in part else "done")
    lines.append(f"{name:16}{said}" + (f", {sum(targets)} of {len(targets)} targets reached" if targets else ""))
  return "\n".join(lines)
