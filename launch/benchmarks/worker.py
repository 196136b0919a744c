"""One side of one case in a process of its own, so that its settings are its own and its peak of memory is clean.

    python -m launch.benchmarks.worker '{"kind": "forward", "side": "ours", "length": 512, "variant": ""}' FOLDER

It prepares (weights, compilation, one pass that warms up), says so in one JSON line on stdout, then answers each line on
stdin with the JSON of one timed pass, before which comes an untimed one if the line says "warm"; it ends when stdin does. A
pass that times its own parts gives them by name.
Whatever libraries print goes to stderr.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Callable

from launch.benchmarks.cases import OURS, THREADS, Case


# ---- memory -----------------------------------------------------------------------------------------------------------
def memory(field: str, process: str | int = "self") -> int | None:
  """Bytes of a field of /proc/PROCESS/status (VmRSS: resident now, VmHWM: its peak); None where there is no such file."""
  with contextlib.suppress(OSError):
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
      if line.startswith(field + ":"):
        return int(line.split()[1]) * 1024
  return None


def settle() -> int | None:
  """Gives freed memory back to the system and restarts the peak; returns what is resident now."""
  gc.collect()
  with contextlib.suppress(OSError, AttributeError):
    ctypes.CDLL(None).malloc_trim(0)
  with contextlib.suppress(OSError):
    Path("/proc/self/clear_refs").write_text("5")
  return memory("VmRSS")


# ---- time -------------------------------------------------------------------------------------------------------------
def pin(threads: int) -> None:
  """Keeps the process on its first `threads` processors, where the system can do that."""
  with contextlib.suppress(AttributeError):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def matmul_rate(multiply: Callable[[int], Any]) -> float:
  """FLOPs per second of float32 matmuls, the best of a few; `multiply(n)` waits for [2048, n] x [n, n]."""
  best = 0.0
  for n, times in ((512, 6), (2048, 2)):
    for _ in range(times):
      start = time.perf_counter()
      multiply(n)
      best = max(best, 2 * 2048 * n * n / (time.perf_counter() - start))
  return best


def main(spec: str, folder: str) -> None:
  case = Case(**json.loads(spec))
  channel = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)

  def say(message: dict[str, Any]) -> None:
    channel.write(json.dumps(message) + "\n")
    channel.flush()

  pin(THREADS)
  if case.side == OURS:
    from launch.benchmarks import ours as side
  else:
    from launch.benchmarks import theirs as side
  prepared = side.prepare(case, Path(folder))
  if prepared is None:  # weights or logits, which the folder now holds
    return say({"ready": True})
  run, multiply, compile_seconds = prepared
  for n in (512, 2048):
    multiply(n)
  resident = settle()  # weights, moments and compiled code; never again, or the next pass would pay for it
  first = run()
  loss = None if isinstance(first, dict) else first
  say({"ready": True, "compile_seconds": compile_seconds, "first_loss": loss, "resident_bytes": resident})
  for line in sys.stdin:
    if line.strip() == "warm":
      run()
    start = time.perf_counter()
    parts = run()
    seconds = time.perf_counter() - start
    peak = memory("VmHWM")
    message = {"seconds": seconds, "peak_bytes": peak, "matmul_flops_per_second": matmul_rate(multiply)}
    say(message | (parts if isinstance(parts, dict) else {}))


if __name__ == "__main__":
  main(*sys.argv[1:])
