"""Runs of several real processes on this machine: each is the training command, joined by Gloo; a hang fails."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "tests" / "launch" / "small_run.py"


def free_port():
  with socket.socket() as free:
    free.bind(("localhost", 0))
    return free.getsockname()[1]


def corpus(folder):
  """Sixty short documents; returns the folder."""
  folder.mkdir(parents=True)
  rng = np.random.default_rng(0)
  for i in range(60):
    words = rng.choice("the quick brown fox jumps over a lazy dog".split(), rng.integers(1, 40))
    (folder / f"{i:02d}.txt").write_text(" ".join(words))
  return folder


def cache_of_tests():
  """Environment: the compilation cache of this process."""
  return {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
          "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}


class Processes:
  """`count` processes of one run in `workdir`, with `devices` emulated devices in all; with one, the plain command.

  Args:
    settings: for --set; those of process i are `settings(i)` if it is a function.
    environment: what differs from this process's.
  """

  def __init__(self, count, workdir, settings, devices, log, **environment):
    self.logs = [log.with_name(f"{log.name}.{i}") for i in range(count)]
    joined = lambda i: [] if count == 1 else [f"--coordinator=localhost:{free}", f"--num_processes={count}",
                                              f"--process_id={i}", "--initialization_timeout=60"]
    free = free_port()
    environment = os.environ | {"PYTHONPATH": str(ROOT), **cache_of_tests()} | environment
    self.processes = []
    for i, path in enumerate(self.logs):
      parts = [f"--set={setting}" for setting in (settings(i) if callable(settings) else settings)]
      folder = workdir(i) if callable(workdir) else workdir
      command = [sys.executable, "-u", "-m", "launch.train", f"--config={CONFIG}", f"--workdir={folder}", *joined(i),
                 f"--set=mesh.emulated_devices={devices}", *parts]
      with path.open("wb") as output:
        self.processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT))

  def texts(self):
    """What each has said so far."""
    return [path.read_text() for path in self.logs]

  def wait(self, seconds=150):
    """Their exit codes; those that still run after so long are killed, and the test fails."""
    deadline = time.monotonic() + seconds
    try:
      return [process.wait(max(deadline - time.monotonic(), 0.1)) for process in self.processes]
    except subprocess.TimeoutExpired:
      for process in self.processes:
        process.kill()
      raise AssertionError(f"still running after {seconds} s: {self.texts()}") from None

  def wait_for(self, text, seconds=150):
    """Until process 0 has said this."""
    deadline = time.monotonic() + seconds
    while text not in self.logs[0].read_text():
      ended = [process.poll() for process in self.processes]
      if any(code is not None for code in ended) or time.monotonic() > deadline:
        for process in self.processes:
          process.kill()
        raise AssertionError(f"{text!r} was not said; exit codes {ended}: {self.texts()}")
      time.sleep(0.02)


def lines(workdir, split="train"):
  """{step: numbers without times} of a split."""
  found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  return {line["step"]: {name: x for name, x in line.items() if name not in ("tokens_per_second", "split", "step")}
          for line in found if line["split"] == split}
