"""A step through the TPU's compiler, by a process of its own: a signal ends it at any moment, and its end frees its memory.

    python -m launch.plans.compiler FOLDER

is that process. It reads a pickled `measure.Wanted` from stdin. Of a step that is only laid out XLA writes the program into
the folder, and the process is ended as soon as it lies there, before it makes machine code; of any other the process writes
what the compiled program says, and ends. What the compiler refuses is in `REFUSED` there.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Sequence

from deepseek_v4.planning import layout
from launch import children
from launch.benchmarks.worker import memory

ROOT = Path(__file__).resolve().parents[2]
REFUSED, MEMORY, TEXT = "refused", "memory.json", "program.txt"  # files

Program = tuple[dict[str, int], str]  # memory of a device, bytes by name, and the text


class NoProgram(RuntimeError):
  """The compiler's process ended, has not refused the program, and left none."""


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What a compiler's process has left.

  Attributes:
    program: None if it ended, or was ended, before.
    host_bytes: of this machine, at most.
    seconds: that it took, its start with them.
    code: how it ended by itself; None if it was ended.
  """

  program: Program | None
  host_bytes: int
  seconds: float
  code: int | None


def until(command: Sequence[str], found: Callable[[], Program | None], seconds: float = math.inf,
          stop: Callable[[], bool] = lambda: False, **options: Any) -> Outcome:
  """Runs a command that compiles until its program is found, or so many seconds are over, or something says stop.

  Args:
    options: of `subprocess.Popen`.
  """
  most, program, over = 0, None, False
  begin = time.monotonic()
  with children.started(command, grace=0, **options) as process:
    while program is None and not over and not stop() and time.monotonic() - begin < seconds:
      over = children.ended(process, 0.2)  # asked before the program is, so that what it wrote at its end is seen
      most = memory("VmHWM", process.pid) or most
      program = found()
    took = time.monotonic() - begin
  return Outcome(program, most, took, process.returncode if over else None)


def _compiled(folder: Path) -> Program | None:
  """What `main` leaves of a program that was compiled whole."""
  if not (folder / MEMORY).is_file():
    return None
  return json.loads((folder / MEMORY).read_text(encoding="utf-8")), (folder / TEXT).read_text(encoding="utf-8")


def of_plan(wanted: Any, stop: Callable[[], bool] = lambda: False) -> Outcome:
  """What the process of a step's compiler leaves: its program, always.

  Args:
    wanted: a `measure.Wanted`.
    stop: says that nobody waits for it any more.

  Raises:
    jax.errors.JaxRuntimeError: the compiler refuses the program.
    NoProgram: its process ended otherwise.
  """
  import jax
  with tempfile.TemporaryDirectory() as name:
    folder, output = Path(name) / "program", Path(name) / "said"
    folder.mkdir()
    (asked := Path(name) / "asked").write_bytes(pickle.dumps(wanted))
    with asked.open("rb") as source, output.open("wb") as said:
      outcome = until([sys.executable, "-m", __spec__.name, str(folder)],
                      lambda: layout.found(folder) if wanted.layout else _compiled(folder), stop=stop, cwd=ROOT,
                      stdin=source, stdout=said, stderr=subprocess.STDOUT)
    if (folder / REFUSED).is_file():  # also one that was laid out before
      raise jax.errors.JaxRuntimeError((folder / REFUSED).read_text(encoding="utf-8"))
    lines = output.read_text(encoding="utf-8", errors="replace").strip().splitlines()
  if outcome.program is None:
    expected = ": expected a libtpu that writes the layout down, such as 0.0.42 or newer" if outcome.code == 0 else ""
    raise NoProgram(f"the compiler's process ended with code {outcome.code} and left no program{expected}; its last words: "
                    f"{' '.join(lines[-3:])[-400:]}")
  return outcome


def main(name: str) -> None:
  children.end_with_parent()
  import jax

  from deepseek_v4.planning import lower, read
  from launch.plans import measure
  folder, wanted = Path(name), pickle.load(sys.stdin.buffer)
  mesh, traced = measure.traced_of(wanted)
  try:
    compiled = lower.lowered(traced, mesh).compile(compiler_options=layout.flags_for(folder) if wanted.layout else None)
  except jax.errors.JaxRuntimeError as error:
    (folder / REFUSED).write_text(str(error), encoding="utf-8")
    return
  if not wanted.layout:
    (folder / TEXT).write_text(compiled.as_text(), encoding="utf-8")
    (part := folder / "part").write_text(json.dumps(read.memory(compiled)), encoding="utf-8")
    part.replace(folder / MEMORY)  # the last one, whole


if __name__ == "__main__":
  main(*sys.argv[1:])
