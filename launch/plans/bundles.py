"""Bundles of a program's kernels: each distinct Pallas call, compiled alone for one device of the slice, its schedule read.

    python -m launch.plans.bundles FILE

is a process of its own, since the compiler writes its schedules only if it is told so before it is loaded. It reads a
pickled `measure.Wanted` from stdin and writes JSON: {signature of a call: [bundles of the busiest core, whether the plan of
how often its regions run fits the schedule]}, or of a kernel that fails {signature: text}.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Callable

from launch import children
from launch.benchmarks.kernels import compile as compiling
from launch.benchmarks.kernels import plans, program, schedule
from launch.benchmarks.kernels.chips import Chip, chip_of
from launch.plans import kernels

ROOT = Path(__file__).resolve().parents[2]


def of_plan(wanted: Any, say: Callable[[str], None], stop: Callable[[], bool] = lambda: False) -> dict[str, float]:
  """Bundles by signature; what has none, such as a kernel that the compiler aborts, is left out and said. Where `stop` says
  so, the process is ended."""
  say("compiling the kernels alone for their schedules")
  with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "bundles.json"
    flags = schedule.FLAGS.format(folder=folder)
    environment = os.environ | compiling.ENVIRONMENT | {
      "LIBTPU_INIT_ARGS": f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flags}".strip()}
    (asked := Path(folder) / "asked").write_bytes(pickle.dumps(wanted))
    with asked.open("rb") as source:
      code = children.run_for([sys.executable, "-m", __spec__.name, str(path)], math.inf, stop=stop, cwd=ROOT,
                              env=environment, stdin=source, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
  if code:
    say(f"  the compiler ended the process with code {code}: what follows has no bundles")
  for signature, answer in found.items():
    if isinstance(answer, str) or not answer[1]:
      say(f"  {signature.split()[0]}: {answer if isinstance(answer, str) else 'its regions are counted by a guess'}")
  return {signature: answer[0] for signature, answer in found.items() if not isinstance(answer, str)}


def bundles_of(traced: kernels.Traced, local: kernels.Local | None, found: schedule.Schedule,
               chip: Chip) -> tuple[float, bool]:
  """(Bundles of the busiest core in one execution, whether the plan fits the schedule)."""
  call = traced.call
  cores, plan = min(chip.cores, call.parallel), plans.plan_of(call.name, local, call, chip)
  counted = schedule.counted(found.root, plan.steps if plan else plans.grid_steps(call), cores)
  heat = schedule.heat(counted)
  plan = plans.fit(plan, heat) or plans.fallback(call, plan, heat, traced.flops)
  executions = schedule.executions(found.root, [count for _, count in plan.counts], plan.steps, cores)
  uneven = math.ceil(call.parallel / cores) * cores / call.parallel  # what the busiest core does over the mean
  return schedule.total(executions)["bundles"] / cores * uneven, plan.fits


# ---- the process ------------------------------------------------------------------------------------------------------
def schedule_of(traced: kernels.Traced, device: Any, folder: Path) -> schedule.Schedule:
  """The schedule of a call alone on one described device."""
  import jax
  import numpy as np
  from jax.sharding import Mesh, NamedSharding, PartitionSpec
  mesh, known, equation = Mesh(np.array([device]), ("core",)), tuple(folder.glob("*")), traced.equation
  operands = [jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype, sharding=NamedSharding(mesh, PartitionSpec()))
              for x in equation.invars]
  with jax.set_mesh(mesh):
    text = jax.jit(lambda *arrays: equation.primitive.bind(*arrays, **equation.params)).lower(*operands).compile().as_text()
  (name,) = (part.name for part in program.parts(text) if part.kernel)
  (found,) = (one for one in schedule.read_folder(folder, known) if one.name == name)
  for path in set(folder.glob("*")) - set(known):
    path.unlink()
  return found


def main(path: str) -> None:
  from launch.plans import measure
  children.end_with_parent()
  wanted = pickle.load(sys.stdin.buffer)
  chip, (mesh, traced) = chip_of(wanted.topology), measure.traced_of(wanted)
  one, found = measure.pass_of(wanted, mesh), {}
  for call in kernels.traced_calls(traced.jaxpr.jaxpr):
    if not call.times or call.signature in found:
      continue
    try:
      read = schedule_of(call, mesh.devices.flat[0], Path(path).parent)
      found[call.signature] = bundles_of(call, kernels.local_of(call, one), read, chip)
    except Exception as error:  # whatever the compiler says is the answer
      found[call.signature] = f"{type(error).__name__}: {error}"[:300]
    whole = Path(path).with_suffix(".part")
    whole.write_text(json.dumps(found), encoding="utf-8")
    whole.replace(path)  # the compiler may end the process at any time


if __name__ == "__main__":
  main(*sys.argv[1:])
