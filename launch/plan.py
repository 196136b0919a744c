"""Compiles the real train step of a run for a slice of TPUs that need not be there, and says what it takes.

python -m launch.plan --config configs/v4_pro_slice.py --topology v5p:2x2x1 [--stage NAME] [--set KEY=VALUE]... [--json FILE]

Of a run with stages it is the step of one of them, with the batch that it ends with: the first unless --stage says another
(a name, or a place from 0). The mesh is the run's own; one without -1 may be smaller than the slice. Kernels are on where
the run says "auto". A step of four layers takes minutes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import threading
import time
from pathlib import Path

from absl import app, flags

from launch import use_huge_pages

GIB = 2**30


def define_flags() -> None:
  flags.DEFINE_string("config", None, "Python file with get_config().", required=True)
  flags.DEFINE_string("topology", None, "The slice: v5p:2x2x1, v5p:4x4x4, v6e:4x4, TPU7x:2x2x1, ...", required=True)
  flags.DEFINE_string("stage", "", "Of a run with stages: the one to plan, by its name or its place from 0.")
  flags.DEFINE_multi_string("set", [], "KEY=VALUE replaces a setting, for example mesh.expert=64; repeatable.")
  flags.DEFINE_string("json", None, "File for the figures.")


def measured(run_config, mesh, chip, say) -> dict:
  """The figures of the compiled step; says once a minute that the compiler still works."""
  from deepseek_v4.planning import collectives, lower, read
  clock = time.perf_counter()
  lowered = lower.lower_step(run_config, mesh)
  say(f"lowered in {time.perf_counter() - clock:.0f} s; compiling for {mesh.size} x {mesh.devices.flat[0].device_kind}")
  done = threading.Event()

  def tick():
    while not done.wait(60):
      say(f"  compiling for {time.perf_counter() - clock:.0f} s")
  threading.Thread(target=tick, daemon=True).start()
  try:
    compiled = lowered.compile()
  finally:
    done.set()
  return {"seconds": time.perf_counter() - clock, "devices": mesh.size, "hbm_bytes": chip.hbm_bytes,
          "memory": read.memory(compiled), "kernels": read.kernels(compiled),
          "traffic": collectives.traffic(collectives.collectives(compiled.as_text()))}


def text(figures: dict) -> str:
  """The figures as lines to read."""
  memory, room = figures["memory"], figures["hbm_bytes"]
  lines = [f"compiled in {figures['seconds']:.0f} s for {figures['devices']} devices; bytes of one device, in GiB"]
  lines += [f"  {name:12}{size / GIB:8.2f}" for name, size in memory.items()]
  lines += [f"  of {room / GIB:.2f}: " + ("fits" if memory["all"] <= room else "DOES NOT FIT")]
  lines += ["calls of kernels in the program (one inside a loop counts once)"]
  lines += [f"  {name:28}{count:5}" for name, count in figures["kernels"].items()] or ["  none"]
  lines += ["collectives: GiB that a device receives in a step, how many the program has, how many beside other work",
            "(a ragged exchange as if its room were filled; + GiB for each run of a loop whose length depends on the data)"]
  more = lambda found: f"   + {found['more'] / GIB:.2f}" if found["more"] else ""
  lines += [f"  {kind:20}{found['bytes'] / GIB:8.2f}{found['count']:5}{found['started']:5}{more(found)}"
            for kind, found in figures["traffic"].items()] or ["  none"]
  return "\n".join(lines)


def main(argv: list[str]) -> None:
  if argv[1:]:
    raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
  path = flags.FLAGS["json"].value
  if path is not None and (Path(path).is_dir() or not Path(path).absolute().parent.is_dir()):
    sys.exit(f"error: --json = {path!r}: expected a file in a folder that exists")
  os.environ["JAX_PLATFORMS"] = "cpu"  # the slice is described, not used
  from deepseek_v4 import config
  from deepseek_v4.planning import lower
  from deepseek_v4.training import stages
  from launch.benchmarks.kernels import chips
  os.environ.update(lower.ENVIRONMENT)
  import jax
  say = lambda line: print(line, flush=True)
  try:
    run_config = config.load(flags.FLAGS["config"].value, flags.FLAGS["set"].value)
    for line in stages.table(run_config):
      say(line)
    run_config = stages.of_stage(run_config, flags.FLAGS["stage"].value)
    if run_config.training.kernels == "auto":
      training = dataclasses.replace(run_config.training, kernels="pallas")
      run_config = dataclasses.replace(run_config, training=training)
    mesh = lower.mesh_on(run_config, flags.FLAGS["topology"].value)
    figures = measured(run_config, mesh, chips.chip_of(flags.FLAGS["topology"].value), say)
  except (ValueError, FileNotFoundError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
    sys.exit(f"error: {error}")
  say(text(figures))
  if path is not None:
    Path(path).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
  use_huge_pages()
  define_flags()
  app.run(main)
