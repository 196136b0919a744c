"""Reads the TPU compiler's final schedule: what each loop and branch of a kernel issues, spills and copies.

The compiler (PyPI package libtpu) writes its VLIW bundles as text if `FLAGS` are in LIBTPU_INIT_ARGS before it is loaded. A
bundle is a cycle when nothing stalls, so bundles x executions is a lower bound for the time of a kernel whose data arrives
in time, and repeatable to the last digit for one version of libtpu. What the schedule does not show: waits for DMA, HBM, and
how long the matrix unit is occupied (bare matmuls may schedule below their bound), so time is the largest of several bounds.

A program becomes a tree of regions. Region: a loop, a branch (from a forward jump to its target) or the program itself. Its
own bundles are those outside its inner regions.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, Iterator, Mapping, Sequence

FLAGS = "--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final"
GRANULE = 32  # bytes of the unit in which the text counts DMA sizes
MATRIX, VECTOR = "matrix", "vector"
_UNITS = {"MXU": MATRIX, "MATMUL": MATRIX, "VALU": VECTOR}  # names differ from one libtpu to the next
_WORK = (MATRIX, VECTOR, "EUP", "XLU", "VLOAD", "VSTORE")
_SPILLS, _FILLS = "VSTORE:SPILL", "VLOAD:FILL"
_MANY_COPIES = 16  # in the text of a region: row by row
_FEW_SLOTS = 64  # a branch with less vector work than this only moves data or counts

_FILE = re.compile(r"(\d+)-(.+)-\d+-final_bundles\.txt")
_BUNDLE = re.compile(r"^\s*(0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*:[\s>]*\{")
_LABEL = re.compile(r"Start(?:/End empty)? region (\d+)")
_END = re.compile(r"End region (\d+)")
_JUMP = re.compile(r"sbr\.rel (?:\(!?(%\w+)\) )?target = \$region(\d+)")
_TRIPS = re.compile(r"(%\w+) = scmp\.ge\.s32\.totalorder (?:\(!?%\w+\),? )?%\w+, (\d+) /\* loop exit test")
_DMA = re.compile(r"(?:\{|;;)\s+%\w+ = dma\.(\w+_to_\w+)\b.*?/\*size_in_granules=\*/(\d+)", re.S)


@dataclasses.dataclass
class Region:
  """Part of a schedule.

  Attributes:
    kind: "program", "loop", "branch", or "body" of a loop that tests before it runs.
    first, last: numbers of its bundles.
    trips: of a loop whose exit test is against a constant, the stages of a software pipeline included; else None.
    bundles: its own, inner regions left out.
    slots: own issue slots in use, by unit.
    copies: own DMA by direction ("hbm_to_vmem"), bytes.
    inner: regions inside, in program order.
  """

  kind: str
  first: int
  last: int
  trips: int | None = None
  bundles: int = 0
  slots: dict[str, int] = dataclasses.field(default_factory=dict)
  copies: list[tuple[str, int]] = dataclasses.field(default_factory=list)
  inner: list["Region"] = dataclasses.field(default_factory=list)

  @property
  def work(self) -> int:
    """Own issue slots of the units that touch vectors: what only counts, jumps and starts copies has next to none."""
    return sum(self.slots.get(unit, 0) for unit in _WORK)

  def walk(self) -> Iterator["Region"]:
    """This region and all inside, in program order."""
    yield self
    for region in self.inner:
      yield from region.walk()


@dataclasses.dataclass
class Schedule:
  """The schedule of one kernel or one fused operation.

  Attributes:
    name: of the HLO instruction.
    capacity: issue slots of a bundle, by unit.
    root: the region that holds everything.
  """

  name: str
  capacity: dict[str, int]
  root: Region

  def as_json(self) -> dict[str, Any]:
    return dataclasses.asdict(self)

  @staticmethod
  def from_json(content: Mapping[str, Any]) -> "Schedule":
    return Schedule(content["name"], content["capacity"], _region_from_json(content["root"]))


def _region_from_json(content: Mapping[str, Any]) -> Region:
  copies, inner = [tuple(copy) for copy in content["copies"]], [_region_from_json(region) for region in content["inner"]]
  return Region(**{**content, "copies": copies, "inner": inner})


# ---- reading ----------------------------------------------------------------------------------------------------------
def read_folder(folder: Path, known: Sequence[Path] = ()) -> list[Schedule]:
  """The schedules that the compiler wrote into a folder, in the order in which it made them, but for the `known` files."""
  found = []
  for path in sorted(set(folder.glob("*-final_bundles.txt")) - set(known)):
    match = _FILE.fullmatch(path.name)
    if match is None or match[2].startswith("<") or match[2] == "TLP" or "schedule-analysis" in path.name:
      continue
    units = [other for other in folder.glob(f"{match[1]}-*final_hlo-static-*")
             if other.name.startswith(f"{match[1]}-{match[2]}-")]
    if units:
      found.append(read(match[2], path.read_text(errors="replace"), units[0].read_text()))
  return found


def read(name: str, bundles_text: str, units_text: str) -> Schedule:
  """A schedule from the two texts that the compiler writes for it."""
  capacity, rows = _slots(units_text)
  bundles = _bundles(bundles_text)
  root = _tree(bundles)
  for region in root.walk():
    own = [n for n in range(region.first, region.last + 1) if not any(r.first <= n <= r.last for r in region.inner)]
    region.bundles = len(own)
    region.slots = {unit: sum(rows[n].get(unit, 0) for n in own if n < len(rows)) for unit in capacity}
    region.copies = [(direction, int(granules) * GRANULE) for n in own
                     for direction, granules in _DMA.findall(bundles.get(n, ""))]
  return Schedule(name, capacity, root)


def _slots(text: str) -> tuple[dict[str, int], list[dict[str, int]]]:
  """Slots of a bundle by unit, and those in use in each bundle."""
  lines = [line for line in text.splitlines() if line.strip()]
  head = next(i for i, line in enumerate(lines) if "VALU" in line)
  names = [_UNITS.get(name.strip(), name.strip()) for name in lines[head].split(",")]
  capacity = dict(zip(names, map(int, lines[head + 1].split())))
  rows = [dict(zip(names, map(int, line.split()))) for line in lines[head + 2:] if re.fullmatch(r"[\d\s]+", line)]
  return capacity, rows


def _bundles(text: str) -> dict[int, str]:
  """Text of each bundle by its number; comments may run over several lines."""
  found: dict[int, list[str]] = {}
  number = None
  for line in text.splitlines():
    if match := _BUNDLE.match(line):
      number = int(match[1], 16)
    if number is not None:
      found.setdefault(number, []).append(line)
  return {number: "\n".join(lines) for number, lines in found.items()}


def _tree(bundles: Mapping[int, str]) -> Region:
  """Regions without their figures: a jump back closes a loop, a jump forward leaves a branch out.

  The few bundles between a jump and its branch, which run either way, count as the branch's.
  """
  end = max(bundles, default=0)
  labels = {int(label): number for number, text in bundles.items() for label in _LABEL.findall(text)}
  ends = {int(label): number for number, text in bundles.items() for label in _END.findall(text)}
  trips = {predicate: int(count) for text in bundles.values() for predicate, count in _TRIPS.findall(text)}
  jumps = [(number, predicate, int(label)) for number, text in bundles.items() for predicate, label in _JUMP.findall(text)
           if int(label) in labels]
  targets = sorted({labels[label] for _, _, label in jumps})
  found = []
  for number, predicate, label in jumps:
    target = labels[label]
    if target <= number:
      found.append(Region("loop", target, max(ends.get(label, 0), number), trips.get(predicate)))
      continue
    # Behind a jump without a condition comes what some other jump leads to: the other half of a choice.
    first = number + 1 if predicate else next((other for other in targets if number < other), target)
    if first < target:
      found.append(Region("branch", first, target - 1))
  root = Region("program", 0, end)
  stack = [root]
  for region in sorted(found, key=lambda r: (r.first, -r.last, r.kind == "loop")):
    while region.first > stack[-1].last:
      stack.pop()
    if region.last >= stack[-1].last and stack[-1].kind == "loop" and region.kind == "branch":
      region.kind = "body"  # what a jump out of a loop leaves out
    region.last = min(region.last, stack[-1].last)
    stack[-1].inner.append(region)
    stack.append(region)
  return root


# ---- what is executed how often ---------------------------------------------------------------------------------------
def counted(root: Region, steps: float = 0, cores: int = 1) -> list[Region]:
  """The regions whose executions the text does not give and that matter, in program order.

  These are branches and loops without a constant exit test that do vector work of their own, or inside loops of known
  length, and those that start many copies. Others only move data; they count as executed whenever what is around them is.
  So does the branch of a grid's loop that holds the whole body of a kernel: the first step of the pipeline only fetches.

  Args:
    steps, cores: see `executions`.
  """
  grid = _grid_loop(root) if steps > cores else None
  stages = [region for region in grid.inner if any(_direct_work(r) >= _FEW_SLOTS for r in region.walk())] if grid else []
  always = [grid] + (stages if len(stages) == 1 and stages[0].kind == "branch" else [])
  return [region for region in root.walk()
          if _unknown(region) and _matters(region) and not any(region is other for other in always)]


def _grid_loop(root: Region) -> Region | None:
  """The outermost loop of a kernel, the first one."""
  return next((region for region in root.walk() if region.kind == "loop"), None)


def _unknown(region: Region) -> bool:
  return region.kind == "branch" or (region.kind == "loop" and region.trips is None)


def _matters(region: Region) -> bool:
  return _direct_work(region) >= _FEW_SLOTS or _direct_copies(region) >= _MANY_COPIES


def _direct_copies(region: Region) -> int:
  return len(region.copies) + sum(_direct_copies(inner) for inner in region.inner if not _unknown(inner))


def _direct_work(region: Region) -> int:
  """Vector work of a region outside inner ones of unknown count."""
  return region.work + sum(_direct_work(inner) for inner in region.inner if not _unknown(inner))


def executions(root: Region, counts: Sequence[float] = (), steps: float = 0, cores: int = 1) -> list[tuple[Region, float]]:
  """Every region with how often it runs in all, on all cores together.

  Args:
    root: a schedule's root.
    counts: for each of `counted`.
    steps: of a Pallas call's grid, whose loop is then the outermost one; with one step a core there is no such loop.
      0 = an operation of XLA, which is what it looks like.
    cores: that run the schedule, each with its share.
  """
  known = {id(region): count for region, count in zip(counted(root, steps, cores), counts, strict=True)} if counts else {}
  grid, found = _grid_loop(root) if steps > cores else None, []

  def visit(region: Region, times: float) -> None:
    if id(region) in known:
      times = known[id(region)]
    elif region is grid:
      times = steps
    elif region.kind == "loop":
      times *= region.trips or 1
    found.append((region, times))
    for inner in region.inner:
      visit(inner, times)

  visit(root, float(cores))
  return found


def total(regions: Sequence[tuple[Region, float]]) -> dict[str, float]:
  """Bundles, issue slots, spills, fills and DMA bytes to and from HBM of a whole kernel."""
  sums = {"bundles": 0.0, "hbm_bytes": 0.0, "spills": 0.0, "fills": 0.0, MATRIX: 0.0, VECTOR: 0.0}
  for region, times in regions:
    sums["bundles"] += times * region.bundles
    sums["hbm_bytes"] += times * sum(size for direction, size in region.copies if "hbm" in direction)
    for figure, unit in (("spills", _SPILLS), ("fills", _FILLS), (MATRIX, MATRIX), (VECTOR, VECTOR)):
      sums[figure] += times * region.slots.get(unit, 0)
  return sums


def body(region: Region, without: Sequence[Region] = ()) -> dict[str, int]:
  """Bundles, slots, spills and fills of one pass through a region, loops of known length inside multiplied out.

  Args:
    without: regions that are left out where they lie inside.
  """
  sums = {"bundles": region.bundles, "spills": region.slots.get(_SPILLS, 0), "fills": region.slots.get(_FILLS, 0),
          MATRIX: region.slots.get(MATRIX, 0), VECTOR: region.slots.get(VECTOR, 0)}
  for inner in region.inner:
    if not any(inner is other for other in without):
      times = inner.trips or 1 if inner.kind == "loop" else 1
      for figure, value in body(inner, without).items():
        sums[figure] += times * value
  return sums


def heat(regions: Sequence[Region]) -> list[int]:
  """What each of these does per pass, without the others: matrix slots in use, or vector slots where nobody uses those."""
  slots = [body(region, regions) for region in regions]
  unit = MATRIX if any(sums[MATRIX] for sums in slots) else VECTOR
  return [sums[unit] for sums in slots]
