"""The text of a compiled program: its computations, and how often each of them runs.

`launch/benchmarks/kernels/program.py` reads such texts by other rules, on purpose. Here figures are added up to what a step
does for certain, so a branch, and a loop whose length the text does not give, have no number of runs. There one op's time is
bounded: each branch counts once, and one pass of such a loop is kept, which the bench multiplies by a length that it knows.
"""

from __future__ import annotations

import re
from typing import Iterable, Mapping, Sequence

_CALLED = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)")


def computations(text: str) -> dict[str, list[str]]:
  """Lines of each computation by its name; the one that runs first is "ENTRY", and so is text that names none. Attributes of
  a kernel may have lines of their own, which begin at the margin, too."""
  parts: dict[str, list[str]] = {}
  for part in re.split(r"\n(?=(?:ENTRY )?%?[\w.\-]+ .*\{\s*$)", text, flags=re.MULTILINE):
    head = part.split("(", 1)[0].strip()
    named = re.match(r"%?([\w.\-]+)$", head) if part.split("\n", 1)[0].rstrip().endswith("{") else None
    parts.setdefault(named[1] if named else "ENTRY", []).extend(part.splitlines())
  return parts


def runs(parts: Mapping[str, Sequence[str]]) -> dict[str, int | None]:
  """How often each computation runs; None = that depends on the data."""
  total: dict[str, int | None] = {}

  def visit(name, times):
    known = total.get(name, 0)
    total[name] = None if times is None or known is None else known + times
    for line in parts.get(name, ()):
      loop = re.search(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)", line)
      if loop:
        length = _length(line, parts.get(loop[1], ()))
        visit(loop[2], None if times is None or length is None else times * length)
      else:
        for called in _CALLED.findall(line):
          visit(called, times)
        for branches in re.findall(r"branch_computations=\{([^}]*)\}", line):
          for called in re.findall(r"[\w.\-]+", branches):
            visit(called, None)
  visit("ENTRY", 1)
  return total


def within(parts: Mapping[str, Sequence[str]], names: Iterable[str]) -> set[str]:
  """These computations and all that they call."""
  found: set[str] = set()
  waiting = list(names)
  while waiting:
    name = waiting.pop()
    if name not in found:
      found.add(name)
      waiting += [called for line in parts.get(name, ()) for called in _CALLED.findall(line)]
  return found


def _length(line: str, condition: Sequence[str]) -> int | None:
  """Steps of a loop that counts from 0: as its own line says, or the constant in the comparison that ends it."""
  if found := re.search(r'known_trip_count":\{"n":"(\d+)"', line):
    return int(found[1])
  constants = {found[1]: int(found[2]) for line in condition
               if (found := re.search(r"%([\w.\-]+) = s32\[\]\S* constant\((\d+)\)", line))}
  ends = [found[1] for line in condition if (found := re.search(r"ROOT .* compare\(.*%([\w.\-]+)\), direction=LT", line))]
  return constants.get(ends[0]) if ends else None
