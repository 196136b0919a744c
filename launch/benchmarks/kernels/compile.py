"""Compiles programs for one device of a TPU that is not there, in a process of its own: the compiler may abort it.

    python -m launch.benchmarks.kernels.compile v5p:2x2x1 [FOLDER]

is the process; it reads one JSON request a line on stdin, {"builder": "module:function", "arguments": {...}}, calls the
function with the arguments, which returns (fn, operands of jax.ShapeDtypeStruct), and answers with one JSON line on stdout.
A request with "mesh": {axis: size, ...} is compiled for such a mesh instead of one device; its function also returns the
PartitionSpecs of operands and results. "options" go to the compiler.
With a folder the compiler's schedules are read, too. `Compiler` starts it, gives it time, turns its end into an answer, and
starts another one before it has grown too large.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import math
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence

from launch.benchmarks import missing
from launch.benchmarks.kernels import chips
from launch.benchmarks.worker import memory

ROOT = Path(__file__).resolve().parents[3]
TIMEOUT = 600  # seconds for one program
OTHERS_TIMEOUT = 180  # for one of another side: what takes longer costs a bench its own rows
MOST_PROGRAMS, MOST_MEMORY = 25, 8 * 2**30  # of a process, which keeps something of each: bytes behind one
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
               "JAX_ENABLE_COMPILATION_CACHE": "false"}
_NOISE = re.compile(r"TPU_ACCELERATOR_TYPE|TPU_WORKER_HOSTNAMES|InitGoogle|Source Location Trace|tfrc/runtime|^\s*@|"
                    r"^\*\*\*|^\s*$|PC: @|stack trace|symbolize|^\s+\[|Fatal Python error|Extension modules|^\s*File ")


@dataclasses.dataclass(frozen=True)
class Request:
  """A program to compile: `builder` = "module:function", called with `arguments`, returns (fn, operands).

  `mesh`: sizes by axis; the function then returns (fn, operands, their PartitionSpecs, those of the results).
  `options`: of the compiler. `seconds`: how long it may take; None = as long as the `Compiler` says.
  """

  name: str
  builder: str
  arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  mesh: Mapping[str, int] = dataclasses.field(default_factory=dict)
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  seconds: float | None = None


class Compiler:
  """A process that compiles for one topology, started again after it died, after `MOST_PROGRAMS` programs and beyond
  `MOST_MEMORY`.

  Raises:
    ValueError: an unknown topology.
  """

  def __init__(self, topology: str, schedules: bool = True, timeout: float = TIMEOUT):
    chips.chip_of(topology)
    self._topology, self._schedules, self.timeout = topology, schedules, timeout
    self._folder = tempfile.TemporaryDirectory()
    self._process: subprocess.Popen | None = None
    self._compiled = 0  # by this process

  def __enter__(self) -> "Compiler":
    return self

  def __exit__(self, *_) -> None:
    self._stop()
    self._folder.cleanup()

  def _start(self) -> None:
    folder = Path(self._folder.name)
    self._errors = (folder / f"errors_{time.monotonic_ns()}.txt").open("w+", encoding="utf-8", errors="replace")
    command = [sys.executable, "-m", __spec__.name, self._topology]
    if self._schedules:
      dumps = folder / f"schedules_{time.monotonic_ns()}"
      dumps.mkdir()
      command.append(str(dumps))
    self._process = subprocess.Popen(command, cwd=ROOT, env=os.environ | ENVIRONMENT, text=True, stdin=subprocess.PIPE,
                                     stdout=subprocess.PIPE, stderr=self._errors)
    self._compiled = 0
    self._lines: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_forward, args=(self._process.stdout, self._lines), daemon=True).start()

  def _stop(self) -> None:
    if self._process is None:
      return
    self._process.kill()
    self._process.wait()
    self._process.stdin.close()
    self._errors.close()
    self._process = None

  def compile(self, request: Request, left: float = math.inf) -> dict[str, Any]:
    """The process's answer (see `answer`); if it died or took too long, {"ok": False, "error"} with the compiler's words.

    Args:
      left: seconds until all should be over; a program that is not finished then is {"ok": False, "left_out"}, nobody's
        failure.
    """
    limit = self.timeout if request.seconds is None else min(self.timeout, request.seconds)
    if left <= 0:
      return {"ok": False, "left_out": missing.NO_TIME}
    if self._process is None:
      self._start()
    with contextlib.suppress(BrokenPipeError):
      self._process.stdin.write(json.dumps({"builder": request.builder, "arguments": dict(request.arguments),
                                            "mesh": dict(request.mesh), "options": dict(request.options)}) + "\n")
      self._process.stdin.flush()
    try:
      line = self._lines.get(timeout=min(limit, left))
    except queue.Empty:
      if left < limit:
        self._stop()
        return {"ok": False, "left_out": missing.NO_TIME}
      line, reason = "", f"took more than {limit:g} s"
    else:
      reason = "" if line else "the compiler ended the process {ended}"
    if line:
      self._compiled += 1
      if self._compiled >= MOST_PROGRAMS or (memory("VmRSS", self._process.pid) or 0) > MOST_MEMORY:
        self._stop()
      return json.loads(line)
    if reason.startswith("took"):
      self._process.kill()
    code = self._process.wait()
    ended = f"with code {code}" if code >= 0 else f"by {signal.Signals(-code).name}"
    self._errors.seek(0)
    said = _last_words(self._errors.read())
    self._stop()
    return {"ok": False, "error": reason.format(ended=ended) + (f": {said}" if said else "")}

  def compile_all(self, requests: Sequence[Request], say: Callable[[str], None] | None = None,
                  minutes: float | None = None) -> list[dict[str, Any]]:
    """The answers in order; one line of progress each, with the time left. After `minutes` nothing more is compiled."""
    found, start = [], time.monotonic()
    end = math.inf if minutes is None else start + 60 * minutes
    for number, request in enumerate(requests, 1):
      found.append(self.compile(request, end - time.monotonic()))
      if "left_out" in found[-1]:
        rest = len(requests) - number
        if say is not None:
          say(f"{request.name}: {missing.said(found[-1])}" + (f", and {rest} more" if rest else ""))
        return found + [found[-1]] * rest
      if say is not None:
        left = (time.monotonic() - start) / number * (len(requests) - number)
        text = f"{found[-1]['seconds']:.1f} s" if found[-1]["ok"] else found[-1]["error"].splitlines()[0][:160]
        remaining = f"{left / 60:.0f} min" if left >= 90 else f"{left:.0f} s"
        say(f"[{number:>{len(str(len(requests)))}}/{len(requests)}] {request.name}: {text}, about {remaining} left")
    return found


def _forward(stream: Any, lines: queue.Queue) -> None:
  with stream:
    for line in stream:
      lines.put(line)
  lines.put("")


def _last_words(text: str) -> str:
  """The compiler's error in what a process that it ended left on stderr."""
  lines = [line.strip() for line in text.splitlines() if not _NOISE.search(line)]
  failed = [line for line in lines if re.search(r"Check failed|^F\d{4}|RET_CHECK|Error:", line)]
  return " ".join((failed or lines)[:3])[:1000]


# ---- the process ------------------------------------------------------------------------------------------------------
def answer(topology: str, request: Mapping[str, Any], folder: Path | None) -> dict[str, Any]:
  """Compiles one request for the first devices of a topology.

  For one device the compiler lays operands and results out as inside a model; for more it does not offer that.

  Returns:
    {"ok": True, "seconds", "memory" (bytes by kind), "cost" (flops and bytes accessed, loops once), "parts", "calls",
    "arrays" (types of those outside kernels), "matmul_flops" (outside kernels, loops multiplied out), "traffic"
    (collectives by kind), "schedules"}; or {"ok": False, "error"} with what Python or the compiler raised.
  """
  import jax
  import numpy as np
  from jax.experimental import topologies
  from jax.experimental.layout import Format, Layout
  from jax.sharding import Mesh, NamedSharding, PartitionSpec

  from deepseek_v4.planning.collectives import collectives, traffic
  from launch.benchmarks.kernels import program, schedule

  start = time.monotonic()
  try:
    module, function = request["builder"].split(":")
    sizes = request.get("mesh") or {"core": 1}
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[:math.prod(sizes.values())]
    mesh = Mesh(np.array(devices).reshape(tuple(sizes.values())), tuple(sizes))
    place = lambda spec: NamedSharding(mesh, spec)
    anywhere = Format(Layout.AUTO, place(PartitionSpec()))
    known = set(folder.glob("*")) if folder else set()
    with jax.set_mesh(mesh):  # Pallas asks the mesh which TPU it compiles for
      fn, operands, *specs = getattr(importlib.import_module(module), function)(**request["arguments"])
      of_operands, of_results = jax.tree.map(place, tuple(specs)) if specs else (anywhere, anywhere)
      traced = jax.jit(fn, in_shardings=of_operands, out_shardings=of_results).trace(*operands)
      compiled = traced.lower().compile(compiler_options=request.get("options"))
    found = {"ok": True, "seconds": time.monotonic() - start, "memory": _memory(compiled), "cost": _cost(compiled),
             "parts": [dataclasses.asdict(part) for part in program.parts(compiled.as_text())],
             "calls": [dataclasses.asdict(call) for call in program.calls(traced.jaxpr.jaxpr)],
             "arrays": program.arrays(compiled.as_text()),
             "matmul_flops": program.matmul_flops(traced.jaxpr.jaxpr),
             "traffic": traffic(collectives(compiled.as_text())),
             "schedules": [s.as_json() for s in schedule.read_folder(folder, tuple(known))] if folder else []}
    for path in set(folder.glob("*")) - known if folder else ():
      path.unlink()
    return found
  except Exception as error:  # whatever the compiler says is the answer
    text = re.sub(r'"body":"[^"]*"', '"body":"..."', str(error))
    return {"ok": False, "error": f"{type(error).__name__}: {text[:2000]}"}


def _memory(compiled: Any) -> dict[str, int]:
  """Bytes by kind; `total` is what the program takes of the device's HBM."""
  memory = compiled.memory_analysis()
  sizes = {kind: int(getattr(memory, f"{kind}_size_in_bytes")) for kind in
           ("argument", "output", "alias", "temp", "generated_code")}
  return sizes | {"total": sum(sizes.values()) - 2 * sizes["alias"]}


def _cost(compiled: Any) -> dict[str, float]:
  cost = compiled.cost_analysis() or {}
  cost = cost[0] if isinstance(cost, list) else cost
  return {"flops": float(cost.get("flops", 0)), "bytes": float(cost.get("bytes accessed", 0))}


def main(topology: str, folder: str | None = None) -> None:
  channel = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)  # whatever libraries print goes to stderr
  if folder is not None:
    from launch.benchmarks.kernels import schedule
    flags = schedule.FLAGS.format(folder=folder)
    os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flags}".strip()
  for line in sys.stdin:
    channel.write(json.dumps(answer(topology, json.loads(line), Path(folder) if folder else None)) + "\n")
    channel.flush()


if __name__ == "__main__":
  main(*sys.argv[1:])
