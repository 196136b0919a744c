"""A program as the TPU compiler has laid it out in memory, before it makes machine code of it.

Making code takes nine tenths of a whole step's compilation and changes neither the operations nor where their results lie.
XLA writes both down (xla_dump_to) as soon as they are settled.
"""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import Any

_ALLOCATION = re.compile(r"^allocation \d+: size (\d+),(.*):$", re.MULTILINE)
_PROGRAM, _ASSIGNED = ".after_optimizations.txt", ".after_optimizations-buffer-assignment.txt"
_NEXT = ".after_optimizations_after_buffer_assignment.txt"  # begun when the other two are complete

# Room kept for the code that is not made: whole steps of both models had 0.7 to 0.9 GiB (libtpu 0.0.42.1).
CODE_BYTES = 2**30


def memory(assignment: str) -> dict[str, int]:
  """Bytes of one device by the text of a buffer assignment, named as by `read.memory`.

  "temporaries" is the region that all of them share, and constants; compilers that report them twice in part say more
  (`read.memory`). What is "thread-local" lies inside of fusions and never in HBM. "code" is `CODE_BYTES`.
  """
  sizes = dict.fromkeys(("arguments", "outputs", "aliased", "temporaries"), 0)
  for size, text in _ALLOCATION.findall(assignment):
    kinds = {part.strip().split(" ")[0] for part in text.split(",")}
    if kinds & {"color", "thread-local"}:  # not HBM
      continue
    argument, output = "parameter" in kinds, bool(kinds & {"maybe-live-out", "output"})
    sizes["arguments"] += argument * int(size)
    sizes["outputs"] += output * int(size)
    sizes["aliased"] += (argument and output) * int(size)
    sizes["temporaries"] += (not argument and not output) * int(size)
  held = sum(sizes.values()) - 2 * sizes["aliased"]
  return sizes | {"code": CODE_BYTES, "all": held + CODE_BYTES, "peak": held}


def flags_for(folder: str | Path) -> dict[str, Any]:
  """XLA's options that make it write a program down."""
  return {"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True}


def found(folder: str | Path, name: str = "") -> tuple[dict[str, int], str] | None:
  """The `memory` of the program that lies in a folder, and its text as `.compile().as_text()` would begin; None as long as
  there is none.

  Args:
    name: of the function that was jitted, where other programs may be in the folder, too.
  """
  complete = sorted(Path(folder).glob(f"*jit_{name}*{_NEXT}" if name else f"*{_NEXT}"))
  if not complete:
    return None
  path = str(complete[0]).removesuffix(_NEXT)
  return memory(Path(path + _ASSIGNED).read_text("utf-8")), Path(path + _PROGRAM).read_text("utf-8")


def laid_out(lowered: Any, folder: str | Path) -> tuple[dict[str, int], str]:
  """Compiles until the program is laid out, and returns what is `found` then.

  The compiler cannot be stopped: it goes on in a thread that does not keep the process from ending. Whoever calls this ends
  the process (`os._exit`) when the figures are read.

  Args:
    lowered: a `jax.stages.Lowered` for TPUs.
    folder: an empty one, for some hundred MB.

  Raises:
    jax.errors.JaxRuntimeError: the compiler refuses the program.
    RuntimeError: it ended without writing the layout.
  """
  ended, failed = threading.Event(), []

  def compile_():
    try:
      lowered.compile(compiler_options=flags_for(folder))
    except Exception as error:  # raised again below
      failed.append(error)
    ended.set()
  threading.Thread(target=compile_, daemon=True).start()
  while True:
    over = ended.wait(0.5)
    if failed:
      raise failed[0]
    if (program := found(folder)) is not None:
      return program
    if over:
      raise RuntimeError(f"the compiler ended without a file *{_NEXT} in {folder}: this libtpu cannot be planned by layout")
