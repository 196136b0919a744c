"""A program as the TPU compiler has laid it out in memory, before it makes machine code of it.

Making code takes nine tenths of a whole step's compilation and changes neither the operations nor where their results lie.
XLA writes both down (xla_dump_to) as soon as they are settled.
"""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

_ALLOCATION = re.compile(r"^allocation \d+: size (\d+),(.*):$", re.MULTILINE)
_PROGRAM, _ASSIGNED = ".after_optimizations.txt", ".after_optimizations-buffer-assignment.txt"
_REPORT = ".after_optimizations-memory-usage-report.txt"  # written with the other two, or after them
_NEXT = ".after_optimizations_after_buffer_assignment.txt"  # begun when they are complete; for TPU7x half an hour later
REST = 5.0  # seconds without a change that say it, too

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


def _read(start: str) -> tuple[str, str] | None:
  """Both texts of the program whose files' names begin so; None as long as something is written to them."""
  files = [Path(start + end) for end in (_PROGRAM, _ASSIGNED, _REPORT)]
  if not all(path.is_file() for path in files):
    return None
  if not Path(start + _NEXT).is_file() and max(path.stat().st_mtime for path in files) > time.time() - REST:
    return None
  program, assigned = (path.read_text("utf-8") for path in files[:2])
  return (program, assigned) if program.rstrip().endswith("}") and assigned.endswith("\n") else None


def found(folder: str | Path, name: str = "") -> tuple[dict[str, int], str] | None:
  """The `memory` of the program that lies in a folder, and its text as `.compile().as_text()` would begin; None as long as
  it is not there whole.

  Args:
    name: of the function that was jitted, where other programs may be in the folder, too.
  """
  for path in sorted(Path(folder).glob(f"*jit_{name}*{_PROGRAM}" if name else f"*{_PROGRAM}")):
    if texts := _read(str(path).removesuffix(_PROGRAM)):
      return memory(texts[1]), texts[0]
  return None
