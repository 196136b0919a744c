"""A step as the compiler lays it out, by a process of its own that is ended before it makes machine code.

    python -m launch.plans.laid_out FOLDER

is that process. It reads a pickled `measure.Wanted` from stdin and lets XLA write the program into the folder; what the
compiler refuses is in `REFUSED` there.
"""

from __future__ import annotations

import dataclasses
import math
import os
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
REFUSED = "refused"  # a file

Program = tuple[dict[str, int], str]  # see `layout.found`


class NoLayout(RuntimeError):
  """The compiler's process ended, did not refuse the program, and has not laid it out."""


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What a compiler's process has left.

  Attributes:
    program: None if it ended, or was ended, before it was laid out.
    host_bytes: of this machine, at most.
    seconds: that it took, its start with them.
    code: how it ended by itself; None if it was ended.
  """

  program: Program | None
  host_bytes: int
  seconds: float
  code: int | None


def until_laid_out(command: Sequence[str], dump: Path, name: str = "", seconds: float = math.inf,
                   stop: Callable[[], bool] = lambda: False, **options: Any) -> Outcome:
  """Runs a command that compiles until its program is there, or so many seconds are over, or something says stop.

  Args:
    dump: the folder in which XLA is told to write it.
    name: of the function that is jitted, where others are, too.
    options: of `subprocess.Popen`.
  """
  most, program, over = 0, None, False
  begin = time.monotonic()
  with children.started(command, grace=0, **options) as process:
    while program is None and not over and not stop() and time.monotonic() - begin < seconds:
      over = children.ended(process, 0.2)  # asked before the folder is, so that what it wrote at its end is seen
      most = memory("VmHWM", process.pid) or most
      program = layout.found(dump, name)
    took = time.monotonic() - begin
  return Outcome(program, most, took, process.returncode if over else None)


def of_plan(wanted: Any, stop: Callable[[], bool] = lambda: False) -> Outcome:
  """What the process of a step's compiler leaves: its program, always.

  Args:
    wanted: a `measure.Wanted`.
    stop: says that nobody waits for it any more.

  Raises:
    jax.errors.JaxRuntimeError: the compiler refuses the program.
    NoLayout: its process ended otherwise.
  """
  import jax
  with tempfile.TemporaryDirectory() as folder:
    asked, said, dump = (Path(folder) / name for name in ("asked", "said", "dump"))
    asked.write_bytes(pickle.dumps(wanted))
    dump.mkdir()
    with asked.open("rb") as source, said.open("wb") as output:
      outcome = until_laid_out([sys.executable, "-m", __spec__.name, str(dump)], dump, stop=stop, cwd=ROOT,
                               stdin=source, stdout=output, stderr=subprocess.STDOUT)
    if outcome.program is not None:
      return outcome
    if (dump / REFUSED).is_file():
      raise jax.errors.JaxRuntimeError((dump / REFUSED).read_text(encoding="utf-8"))
    lines = said.read_text(encoding="utf-8", errors="replace").strip().splitlines()
  raise NoLayout(f"the compiler's process ended with code {outcome.code} and left no layout, expected one of libtpu "
                 f"0.0.42 or newer: {' '.join(lines[-3:])[-400:]}")


def main(folder: str) -> None:
  import jax

  from deepseek_v4.planning import lower
  from launch.plans import measure
  children.end_with(os.getppid())
  mesh, traced = measure.traced_of(pickle.load(sys.stdin.buffer))
  try:
    lower.lowered(traced, mesh).compile(compiler_options=layout.flags_for(folder))
  except jax.errors.JaxRuntimeError as error:
    (Path(folder) / REFUSED).write_text(str(error), encoding="utf-8")


if __name__ == "__main__":
  main(*sys.argv[1:])
