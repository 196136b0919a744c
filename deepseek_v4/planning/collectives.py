"""What travels between devices in a compiled step: each collective of the program's text, its devices and its bytes."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Sequence

import numpy as np

from deepseek_v4.planning import hlo

KINDS = ("all-reduce", "all-gather", "all-to-all", "ragged-all-to-all", "reduce-scatter", "collective-permute")
_LINE = re.compile(rf"= (\(*\w+\[.*?) ({'|'.join(sorted(KINDS, key=len, reverse=True))})(-start)?\(")
_BITS = re.compile(r"[a-z]+(\d+)")
_SCATTERED = "all-reduce-scatter"
_BEGIN = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = .* [a-z\-]+-start\(")
_CALLED = re.compile(r" (?:async-start\(.*calls|call-start\(.*to_apply)=%?([\w.\-]+)")  # the latter on a SparseCore
_UPDATE = re.compile(r"%?([\w.\-]+) = .* call-update\(%?([\w.\-]+)[,)]")  # newer compilers start empty, and hand over here
_END = re.compile(r" [a-z\-]+-done\(.*?%([\w.\-]+)[,)]")
_WORK = re.compile(r" (?:fusion|while|conditional|convolution|dot|copy|reduce|sort|scatter|gather|dynamic-slice|"
                   r'dynamic-update-slice)\(|custom_call_target="tpu_custom_call"')


@dataclasses.dataclass(frozen=True)
class Collective:
  """One instruction.

  Attributes:
    kind: one of `KINDS`.
    arrays: (dtype, shape) of each result; behind the operands if they are `named`.
    devices: numbers of the devices that exchange with each other, of the first such group.
    starts: something else runs between its start and its end, in the order in which the program is written.
    runs: how often it runs, loops multiplied out; None inside a loop whose length is known at run time only.
    named: whether it is written as one instruction that starts it, which names operands and results.
  """

  kind: str
  arrays: tuple[tuple[str, tuple[int, ...]], ...]
  devices: tuple[int, ...]
  starts: bool
  runs: int | None = 1
  named: bool = False

  @property
  def bytes(self) -> int:
    """What a device must receive at least in one run. Of a ragged exchange all that there is room for, since the
    text does not know how many rows will come."""
    n, sizes = len(self.devices), [_size(*array) for array in self.arrays]
    size = sum(sizes)
    if self.named:
      size = self._started(sizes)
    if self.kind == "collective-permute":
      return size
    # A started reduce-scatter's arrays are the operands, N times the results.
    factor = {"all-reduce": 2 * (n - 1) / n, "reduce-scatter": (n - 1) / n if self.named else n - 1}
    return round(size * factor.get(self.kind, (n - 1) / n))

  def _started(self, sizes: list[int]) -> int:
    """Bytes of the arrays that count among those that a start names: the results of an all-reduce; of a ragged exchange what
    it lands in, behind what is sent; of others operands, then as many results, then numbers of its own."""
    if self.kind == "ragged-all-to-all":
      return sizes[1]
    arrays = [size for size, (_, shape) in zip(sizes, self.arrays) if shape]
    if self.kind == "all-reduce":
      return sum(arrays)
    half = len(arrays) // 2
    return sum(arrays[half:] if self.kind == "all-gather" else arrays[:half])


def _size(dtype: str, shape: tuple[int, ...]) -> int:
  bits = _BITS.match(dtype)
  return math.prod(shape) * max(int(bits[1]) if bits else 8, 8) // 8


def collectives(text: str) -> list[Collective]:
  """All collectives of a compiled program's text that more than one device takes part in.

  A TPU's reduce-scatter is written as a fusion of its own, of an all-reduce and the slice that a device keeps. Before code
  is made, some are written as computations that another instruction starts; what a SparseCore runs stays so, and then lies
  in a computation that this one calls.
  """
  parts, found = hlo.computations(text), []
  runs, beside = hlo.runs(parts), {name: _beside(lines) for name, lines in parts.items()}
  started = hlo.within(parts, [called for lines in beside.values() for line in lines for called in _CALLED.findall(line)])
  for name, lines in parts.items():
    for line in lines:
      if match := _LINE.search(line):
        kind, arrays, devices = match[2], _arrays(match[1]), tuple(_groups_of(line)[0].tolist())
        if kind == "all-reduce" and match[3] is None and name.startswith(_SCATTERED) and (kept := _kept(line, lines)):
          kind, arrays = "reduce-scatter", kept
        if len(set(devices)) > 1:
          named = match[3] is not None
          starts = line in beside[name] or name in started
          found.append(Collective(kind, arrays, devices, starts, runs.get(name, 1), named))
  return found


def _beside(lines: Sequence[str]) -> set[str]:
  """The lines of a computation that start something which ends behind other work."""
  running: dict[str, tuple[str, bool]] = {}
  found = set()
  for line in lines:
    if begins := _BEGIN.match(line):
      running[begins[1]] = line, False
    elif (hands := _UPDATE.search(line)) and hands[2] in running:
      running[hands[1]] = running.pop(hands[2])[0], False
    elif (ends := _END.search(line)) and ends[1] in running:
      start, worked = running.pop(ends[1])
      found |= {start} if worked else set()
    elif _WORK.search(line):
      running = {name: (start, True) for name, (start, _) in running.items()}
  return found


def _kept(line: str, lines: Sequence[str]) -> tuple[tuple[str, tuple[int, ...]], ...]:
  """What a computation keeps of its only collective, if it ends with a slice of that; nothing if it ends otherwise."""
  name = re.search(r"%?([\w.\-]+) = ", line)[1]
  slices = rf"ROOT %?[\w.\-]+ = (\w+\[[\d,]*\])\S* dynamic-slice\([^%]*%?{re.escape(name)}[,)]"
  (root,) = [found for one in lines if (found := re.search(slices, one))] or (None,)
  return _arrays(root[1]) if root and sum(_LINE.search(one) is not None for one in lines) == 1 else ()


def _arrays(text: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
  """(dtype, shape) of each array that a text names."""
  return tuple((dtype, tuple(map(int, filter(None, shape.split(","))))) for dtype, shape in re.findall(
    r"(\w+)\[([\d,]*)\]", text))


def traffic(found: Sequence[Collective]) -> dict[str, dict[str, int]]:
  """By kind: "count" in the program's text, "started" of these, "bytes" of all runs, "hidden" of these bytes those of
  started ones, and "more": the bytes of one run of those inside loops whose length is not known."""
  table: dict[str, dict[str, int]] = {}
  for one in found:
    row = table.setdefault(one.kind, dict.fromkeys(("count", "started", "bytes", "hidden", "more"), 0))
    row["count"], row["started"] = row["count"] + 1, row["started"] + one.starts
    for field in ["more"] if one.runs is None else ["bytes", "hidden"] if one.starts else ["bytes"]:
      row[field] += one.bytes * (one.runs or 1)
  return dict(sorted(table.items()))


def largest_gather(found: Sequence[Collective]) -> int:
  """The most numbers that a device has after an all-gather; a started one names operands and results, which are larger."""
  return max((math.prod(shape) for one in found if one.kind == "all-gather" for _, shape in one.arrays), default=0)


def _groups_of(line: str) -> np.ndarray:
  """Device numbers [groups, size] of a collective, in each of the ways in which XLA writes them."""
  if found := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}", line):
    return np.array([list(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", found[1])])
  numbers = lambda text: tuple(map(int, text.split(",")))
  order = lambda sizes, turned: np.arange(np.prod(sizes)).reshape(sizes).transpose(turned or range(len(sizes)))
  if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
    return order(numbers(found[2]), found[3] and numbers(found[3])).reshape(numbers(found[1]))
  axes, ids, turned, names = re.search(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}", line).groups()
  sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes)}
  devices = order(numbers(ids), turned and numbers(turned)) if ids else np.arange(np.prod(list(sizes.values())))
  inner = re.findall(r"'(\w+)'", names)
  devices = devices.reshape(tuple(sizes.values()))
  devices = np.moveaxis(devices, [list(sizes).index(name) for name in inner], range(-len(inner), 0))
  return devices.reshape(-1, np.prod([sizes[name] for name in inner]))
