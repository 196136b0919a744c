"""HLO types as texts: the bytes that their arrays take in HBM (kind, axes, layout with its tiles), and parts of tuples."""

from __future__ import annotations

import functools
import math
import re
from typing import Mapping

_BITS = {"pred": 8, "token": 0, "opaque": 0}  # of the others the name says it
# An array of a type: its kind, its axes with commas between them, its layout.
SHAPE = re.compile(r"\b(pred|token|opaque|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\](?:\{([^}]*)\})?")


def hbm_bytes(type_text: str) -> int:
  """Bytes in HBM of all arrays of an HLO type, tiles padded; scalars, and what the layout puts elsewhere, S(1), are free."""
  return sum(array_bytes(*match) for match in SHAPE.findall(type_text))


def array_bytes(kind: str, dims_text: str, layout: str) -> int:
  """The same of one array, as `SHAPE` finds it."""
  dims = [int(d) for d in dims_text.split(",") if d]
  if not dims or re.search(r"S\([1-9]\)", layout):
    return 0
  order, _, tiling = layout.partition(":")
  physical = [dims[int(axis)] for axis in order.split(",") if axis] if order else dims[::-1]  # minor axis first
  if tile := re.match(r"T\(([\d,]+)\)", tiling):
    for axis, size in enumerate(reversed([int(s) for s in tile[1].split(",")])):
      if axis < len(physical):
        physical[axis] = -(-physical[axis] // size) * size
  bits = _BITS[kind] if kind in _BITS else int(re.search(r"\d+", kind)[0])
  return math.prod(physical) * bits // 8


def type_of(name: str, types: Mapping[str, str]) -> str:
  """The type of an operand, "" if it is not known. Newer compilers name a part of a tuple "name#number"; older ones take it
  out by an instruction."""
  whole, *numbers = name.split("#")
  found = types.get(whole, "")
  for number in numbers:
    found = _parts(found)[int(number)] if found else ""
  return found


@functools.lru_cache(maxsize=256)
def _parts(type_text: str) -> tuple[str, ...]:
  """The types that a tuple's type is made of."""
  depth, begin, found = 0, 1, []
  for place, letter in enumerate(type_text):
    depth += (letter in "([{") - (letter in ")]}")
    if (letter == "," and depth == 1) or (depth == 0 and letter == ")"):
      found.append(type_text[begin:place].strip())
      begin = place + 1
  return tuple(found)


def in_hbm(type_text: str) -> str:
  """The type with all of its arrays in HBM, wherever its layout puts them."""
  return re.sub(r"S\(\d\)", "", type_text)
