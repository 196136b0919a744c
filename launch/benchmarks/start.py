"""How long a newcomer waits for the model of configs/tiny.py: seconds from the start of a process to its first results.

Each is a process of its own, and nothing is compiled before: no cache of programs is used. `python -m
launch.benchmarks.start NAME` is one of those processes.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Callable, Sequence

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "configs/tiny.py"
TOKENS = 128  # of the first forward pass
LONGEST = 300.0  # seconds until a process is stopped
DONE = "done"  # what a process says; it waits for nothing afterwards

Row = dict[str, Any]


def load_library() -> None:
  """The library with what a model and a training step need, JAX included."""
  import deepseek_v4 as dsv4
  assert dsv4.DeepseekV4 and dsv4.training.make_train_step  # names are looked up when they are asked for


def forward() -> None:
  """Fresh weights and the logits of a row, on one device."""
  import jax
  import numpy as np

  import deepseek_v4 as dsv4
  from deepseek_v4 import config as c
  from deepseek_v4.training.state import fresh_variables
  config = c.load(ROOT / CONFIG).model
  variables = fresh_variables(config, jax.random.key(0))
  tokens = np.arange(TOKENS, dtype=np.int32)[None]
  jax.jit(lambda *given: dsv4.DeepseekV4(config).apply(*given).logits)(variables, tokens).block_until_ready()


def train() -> None:
  """The run as it stands, sharded over its emulated devices: weights, data, and a step with its update."""
  from deepseek_v4 import config as c
  from launch import emulate_devices
  run_config = c.load(ROOT / CONFIG)
  emulate_devices(run_config.mesh.emulated_devices)
  import jax

  import deepseek_v4 as dsv4
  from deepseek_v4.training.feed import dataset, to_device
  mesh = dsv4.sharding.make_mesh(run_config.mesh)
  state = dsv4.training.init_state(run_config, jax.random.key(0), mesh)
  batch = to_device(run_config, mesh, next(iter(dataset(run_config, "train"))))
  jax.block_until_ready(dsv4.training.make_train_step(run_config, mesh)(state, batch))


FIRSTS: dict[str, tuple[Callable[[], None], float]] = {  # what is waited for, and the most seconds that it should take
  "import": (load_library, 3.0), "forward": (forward, 10.0), "train": (train, 30.0)}


def seconds_of(name: str, longest: float = LONGEST) -> float:
  """From the start of a fresh process to what is waited for.

  Raises:
    ValueError: the process failed, or was stopped after the longest time; the message ends with its last words.
  """
  environment = {key: value for key, value in os.environ.items() if key not in ("JAX_COMPILATION_CACHE_DIR", "XLA_FLAGS")}
  with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
    begin = time.perf_counter()
    with subprocess.Popen([sys.executable, "-m", "launch.benchmarks.start", name], cwd=ROOT, text=True, env=environment,
                          stdout=subprocess.PIPE, stderr=errors) as process:
      alarm = threading.Timer(longest, process.kill)
      alarm.start()
      said = process.stdout.readline().strip()
      seconds = time.perf_counter() - begin
      alarm.cancel()
    errors.seek(0)
    last = " ".join(errors.read().strip().splitlines()[-1:])
  if said != DONE:
    ended = f"took more than {longest:g} s" if seconds >= longest else f"ended with code {process.returncode}"
    raise ValueError(f"start {name}: the process {ended}: {last}")
  return seconds


def measure(say: Callable[[str], None], repeats: int = 1, names: Sequence[str] = tuple(FIRSTS)) -> list[Row]:
  """A row per result, the fastest of `repeats` processes: the others say how busy the machine was."""
  rows = []
  for name in names:
    found = [seconds_of(name) for _ in range(repeats)]
    rows.append({"case": name, "seconds": min(found), "slowest": max(found), "repeats": repeats, "ours": True})
    say(f"{name:8} {min(found):6.1f} s" + (f" (slowest {max(found):.1f})" if repeats > 1 else ""))
  return rows


def targets(rows: Sequence[Row]) -> list[Row]:
  """Whether each result came in time."""
  return [{"target": f"start: seconds to the first {row['case']}, at most {FIRSTS[row['case']][1]:g}",
           "bound": FIRSTS[row["case"]][1], "value": row["seconds"], "reached": row["seconds"] <= FIRSTS[row["case"]][1]}
          for row in rows]


if __name__ == "__main__":
  FIRSTS[sys.argv[1]][0]()
  print(DONE, flush=True)
