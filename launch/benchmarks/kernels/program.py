"""Reads a compiled program: which instructions run, how often, and the HBM bytes that each moves; and its Pallas calls.

Counted like the compiler's own cost analysis, with two differences: loops are multiplied out, and sizes are those of the
padded tiles that really lie in HBM. A fusion reads its operands once; of an operand that it only slices, the slices.

`deepseek_v4/planning/hlo.py` reads such texts, too: it needs no instruction's operands, and where it has to say that nobody
knows how often something runs (a branch, a loop without a length), here a branch counts once and so does one pass of such a
loop, inner loops multiplied out. With one reader for both, either plans would claim what they do not know or the bench would
lose what it counts.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from typing import Any, Iterator, Mapping, Sequence

import numpy as np

from launch.benchmarks.kernels.sizes import SHAPE, array_bytes, hbm_bytes, in_hbm, type_of

_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-<>]+) = (.*?)\s([a-z][\w\-]*)\((.*)$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.\-<>]+)")
_NOTHING = re.compile(r'^\w+\[\]|custom_call_target="AllocateBuffer"')  # a scalar, or memory only
_BODY = re.compile(r"body=%?([\w.\-<>]+)")
_NAME = re.compile(r"%([\w.\-<>]+(?:#\d+)*)")
_VMEM = re.compile(r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"')
GRANULE = 64  # least bytes that a row's copy from HBM reads
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
         "while", "conditional", "call", "opt-barrier", "iota"}
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
_SLICES = {"dynamic-slice", "slice", "gather"}
_VIEWS = {"bitcast", "reshape", "copy", "transpose"}  # inside a fusion: the same numbers
_ALIASED = "output_to_operand_aliasing={{}: (0, {})}"  # of a fusion inside a fusion: the same memory, in other tiles


@dataclasses.dataclass(frozen=True)
class Part:
  """An instruction that runs on the device.

  Attributes:
    name: as the compiler calls it, also in its schedules.
    kernel: a Pallas call.
    times: executions, loops multiplied out.
    certain: False inside a loop whose length is known at run time only; counted once.
    hbm_bytes: read and written by one execution.
    vmem_bytes: that one execution reserves.
    sparse_core: a call that runs on the SparseCore; its schedule is not known.
    overlaps: of such a call, whether a Pallas call runs on the TensorCore between its start and its end.
    near: numbers of a Pallas call's operands that XLA keeps in VMEM, and of such results, -1 for the last one; what brings
      them there is a part by itself.
  """

  name: str
  kernel: bool
  times: int
  certain: bool
  hbm_bytes: int
  vmem_bytes: int
  sparse_core: bool = False
  overlaps: bool = False
  near: Sequence[int] = ()


@dataclasses.dataclass(frozen=True)
class _Instruction:
  name: str
  type: str
  opcode: str
  rest: str
  root: bool

  @property
  def operands(self) -> list[str]:
    return _NAME.findall(self.rest.split(")", 1)[0])


_Computations = Mapping[str, list[_Instruction]]


def _near(instruction: _Instruction, types: Mapping[str, str]) -> tuple[int, ...]:
  """See `Part.near`."""
  operands, results = [type_of(name, types) for name in instruction.operands], SHAPE.findall(instruction.type)
  return (*(number for number, text in enumerate(operands) if "S(1)" in text),
          *(number - len(results) for number, (*_, layout) in enumerate(results) if "S(1)" in layout))


# ---- computations -----------------------------------------------------------------------------------------------------
def _computations(text: str) -> tuple[dict[str, list[_Instruction]], str]:
  found: dict[str, list[_Instruction]] = {}
  entry, current = "", None
  for line in text.splitlines():
    if line and not line[0].isspace() and line.rstrip().endswith("{") and "->" in line:
      name = line.split("(", 1)[0].replace("ENTRY", "").strip().lstrip("%")
      found[name] = current = []
      entry = name if line.startswith("ENTRY") else entry
    elif current is not None and (match := _INSTRUCTION.match(line)):
      root, name, kind, opcode, rest = match.groups()
      current.append(_Instruction(name, kind, opcode, rest, bool(root)))
  return found, entry


def _called(instruction: _Instruction) -> list[str]:
  return [name.strip().lstrip("%") for group in _CALLED.findall(instruction.rest) for name in group.strip("{}").split(",")]


def _trips(computations: _Computations, loop: _Instruction) -> int | None:
  """Length of a while: the compiler's note, or the only constant of its condition."""
  if note := re.search(r"known_trip_count[^\d]{1,20}(\d+)", loop.rest):
    return int(note[1])
  condition = computations.get(re.search(r"condition=%?([\w.\-<>]+)", loop.rest)[1], [])
  constants = [int(number[1]) for i in condition if i.opcode == "constant" and (number := re.match(r"(\d+)\)", i.rest))]
  return constants[0] if len(constants) == 1 else None


def _operand_bytes(computations: _Computations, name: str, number: int, type_text: str) -> int:
  """What a fused computation reads of an operand."""
  whole, read = hbm_bytes(type_text), 0
  own = {i.name for i in computations[name] if i.opcode == "parameter" and i.rest.startswith(f"{number})")}
  for user in computations[name]:  # in program order
    places = [place for place, operand in enumerate(user.operands) if operand in own]
    if places == [0] and (user.opcode in _VIEWS or _ALIASED in user.rest):
      own.add(user.name)
    elif places == [0] and user.opcode in _SLICES:
      read += hbm_bytes(in_hbm(user.type))
    elif places and user.opcode == "fusion":
      read += sum(_operand_bytes(computations, _called(user)[0], place, type_text) for place in places)
    elif places and not (places == [0] and user.opcode == "dynamic-update-slice"):
      return whole
    if user.root and user.name in own and user.opcode != "parameter":
      return whole  # the fusion does nothing but lay it out anew
  return min(whole, read)


def _result_bytes(computations: _Computations, name: str, type_text: str) -> int:
  """What a fused computation writes: of an array updated in place, the update."""
  by_name = {i.name: i for i in computations[name]}
  types = {i.name: i.type for i in computations[name]}
  for operand in {operand for i in computations[name] for operand in i.operands if "#" in operand}:
    if (whole := by_name.get(operand.split("#")[0])) is not None:
      by_name[operand] = dataclasses.replace(whole, type=type_of(operand, types))
  root = next((i for i in computations[name] if i.root), None)
  if root is None or not hbm_bytes(type_text):
    return hbm_bytes(type_text)
  written = 0
  for result in [by_name[operand] for operand in root.operands if operand in by_name] if root.opcode == "tuple" else [root]:
    size = hbm_bytes(result.type)
    while result.opcode in _VIEWS and result.operands and result.operands[0] in by_name:
      result = by_name[result.operands[0]]
    if result.opcode == "dynamic-update-slice" and result.operands[1] in by_name:
      size = min(size, hbm_bytes(in_hbm(by_name[result.operands[1]].type)))
    elif result.opcode == "fusion":
      size = min(size, _result_bytes(computations, _called(result)[0], result.type))
    written += size
  return written


def _moved(instruction: _Instruction, types: Mapping[str, str], computations: _Computations) -> int:
  operands = [type_of(name, types) for name in instruction.operands]
  if instruction.opcode == "fusion":
    name = _called(instruction)[0]
    read = sum(_operand_bytes(computations, name, number, kind) for number, kind in enumerate(operands))
    return read + _result_bytes(computations, name, instruction.type)
  if instruction.opcode in _SLICES:
    return 2 * hbm_bytes(instruction.type)
  if instruction.opcode == "dynamic-update-slice":
    return 2 * hbm_bytes(operands[1])
  travels = instruction.name.startswith(_COLLECTIVES)  # a SparseCore may run those, too
  if _on_sparse_core(instruction) and "gather" in instruction.name and not travels:  # a table's row for each int32 number
    table, numbers, *others = [array_bytes(*array) for array in SHAPE.findall(instruction.type) if array[1]]
    return max(_gathered(instruction.type, others), numbers // 4 * GRANULE) + numbers + sum(others)
  if instruction.opcode.endswith(("-start", "-update")) or _on_sparse_core(instruction):  # the type holds source and target
    return hbm_bytes(instruction.type)
  return sum(map(hbm_bytes, operands)) + hbm_bytes(instruction.type)


def _on_sparse_core(instruction: _Instruction) -> bool:
  """The start of a call there; newer compilers start it empty and hand over its arrays in an update."""
  arrays = sum(bool(dims) for _, dims, _ in SHAPE.findall(instruction.type))
  return instruction.opcode in ("call-start", "call-update") and arrays > 2


def _gathered(type_text: str, others: Sequence[int]) -> int:
  """Bytes that a call took out of its first operand: those of the result with rows like the operand's; where it took single
  numbers, of its last result."""
  arrays = [array for array in SHAPE.findall(type_text) if array[1]]
  kind = lambda array: (array[0], array[1].split(",")[1:])
  return next((size for array, size in zip(arrays[:1:-1], reversed(others)) if kind(array) == kind(arrays[0])), others[-1])


def parts(text: str) -> list[Part]:
  """The instructions of optimised HLO text that run, in the order of the text."""
  computations, entry = _computations(text)
  found = []

  def visit(name: str, times: int, certain: bool) -> None:
    types = {i.name: i.type for i in computations.get(name, ())}
    for number, instruction in enumerate(computations.get(name, ())):
      opcode = instruction.opcode
      if opcode in ("while", "conditional", "call"):
        trips = _trips(computations, instruction) if opcode == "while" else 1
        called = [_BODY.search(instruction.rest)[1]] if opcode == "while" else _called(instruction)
        for inner in called:
          visit(inner, times * (trips or 1), certain and trips is not None)
      elif opcode not in _FREE and not opcode.endswith("-done") and not _NOTHING.search(instruction.type + instruction.rest):
        used = _VMEM.search(instruction.rest)
        after = itertools.takewhile(lambda other, start=instruction.name: not (
            other.opcode == "call-done" and start in other.operands), computations[name][number + 1:])
        asynchronous, kernel = _on_sparse_core(instruction), _is_kernel(instruction)
        found.append(Part(instruction.name, kernel, times, certain, _moved(instruction, types, computations),
                          int(used[1]) if used else 0, asynchronous, asynchronous and any(map(_is_kernel, after)),
                          _near(instruction, types) if kernel else ()))

  visit(entry, 1, True)
  return found


def arrays(text: str) -> list[str]:
  """Types such as "bf16[8,128]" of what optimised HLO text makes outside of fusions and kernels, in any memory."""
  computations, entry = _computations(text)
  found, waiting, known = set(), [entry], {entry}
  while waiting:
    for instruction in computations.get(waiting.pop(), ()):
      found |= {f"{kind}[{dims}]" for kind, dims, _ in SHAPE.findall(instruction.type) if dims}
      inner = set() if instruction.opcode == "fusion" else set(_called(instruction)) - known
      waiting, known = [*waiting, *inner], known | inner
  return sorted(found)


def _is_kernel(instruction: _Instruction) -> bool:
  return instruction.opcode == "custom-call" and "tpu_custom_call" in instruction.rest


# ---- Pallas calls -----------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Window:
  """A block of an operand or result that the pipeline moves.

  Attributes:
    bytes: of one block.
    moves: how often its number changes during the whole grid; None = that is known at run time only.
    listed: whether prefetched numbers choose the block.
    block: its number among the call's blocks.
  """

  bytes: int
  moves: int | None
  listed: bool
  block: int = 0


@dataclasses.dataclass(frozen=True)
class Call:
  """A Pallas call of a traced program.

  Attributes:
    name: as the kernel's author gave it.
    grid: steps by axis; None = known at run time only.
    blocks: shapes of the windows, operands first; None in place of an axis that the kernel does not see.
    windows: those that the pipeline moves between HBM and VMEM.
    parallel: steps of the axes that the cores of a device share; 1 = one core does all.
    numbers: operands in front of those that have blocks: sizes of the grid and prefetched numbers.
  """

  name: str
  grid: tuple[int | None, ...]
  blocks: tuple[tuple[int | None, ...], ...]
  windows: tuple[Window, ...]
  parallel: int
  numbers: int = 0

  def blocks_of(self, near: Sequence[int]) -> set[int]:
    """Numbers of the blocks of these operands and results, see `Part.near`."""
    return {number - self.numbers if number >= 0 else len(self.blocks) + number for number in near}


def calls(jaxpr: Any) -> list[Call]:
  """The Pallas calls of a jaxpr in program order; those inside loops once."""
  found = []
  for equation in jaxpr.eqns:
    if equation.primitive.name == "pallas_call":
      found.append(_call(equation.params))
      continue
    for inner in _inner_jaxprs(equation.params):
      found += calls(inner)
  return found


def matmul_flops(jaxpr: Any, times: int = 1) -> int:
  """FLOPs of the matmuls outside Pallas calls, scans multiplied out; a loop of unknown length counts once."""
  total = 0
  for equation in jaxpr.eqns:
    name, params, inner_times = equation.primitive.name, equation.params, times
    if name == "pallas_call":
      continue
    if name == "dot_general":
      (contracted, _), _ = params["dimension_numbers"]
      contracted_size = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
      total += times * 2 * contracted_size * math.prod(equation.outvars[0].aval.shape)
    elif name.startswith("ragged_dot"):
      total += times * 2 * math.prod(equation.invars[0].aval.shape) * equation.outvars[0].aval.shape[-1]
    elif name == "scan":
      inner_times *= params["length"]
    for inner in _inner_jaxprs(params):
      total += matmul_flops(inner, inner_times)
  return total


def _inner_jaxprs(params: Mapping[str, Any]) -> Iterator[Any]:
  for value in params.values():
    for inner in value if isinstance(value, (tuple, list)) else (value,):
      inner = getattr(inner, "jaxpr", inner)
      if hasattr(inner, "eqns"):
        yield inner


def _call(params: Mapping[str, Any]) -> Call:
  mapping = params["grid_mapping"]
  name = params.get("name") or getattr(params.get("name_and_src_info"), "name", "kernel")
  grid = tuple(int(size) if isinstance(size, int) else None for size in mapping.grid)
  blocks, windows = [], []
  for block in mapping.block_mappings:
    shape = tuple(getattr(size, "block_size", size if isinstance(size, int) else None) for size in block.block_shape)
    blocks.append(shape)
    memory = str(getattr(block.block_aval, "memory_space", None)).lower()
    if any(kind in memory for kind in ("any", "smem", "hbm", "semaphore")):
      continue
    array = getattr(block, "array_aval", None) or block.array_shape_dtype
    moves, listed = _moves(block.index_map_jaxpr, grid)
    windows.append(Window(math.prod(size or 1 for size in shape) * array.dtype.itemsize, moves, listed, len(blocks) - 1))
  semantics = re.search(r"dimension_semantics=\(([^)]*)\)", str(params.get("compiler_params")).lower())
  axes = re.findall("parallel|arbitrary", semantics[1]) if semantics else []
  parallel = math.prod(size or 1 for size, axis in zip(grid, axes) if axis == "parallel")
  numbers = mapping.num_index_operands + mapping.num_dynamic_grid_bounds
  return Call(str(name), grid, tuple(blocks), tuple(windows), parallel, numbers)


def _moves(index_map: Any, grid: tuple[int | None, ...]) -> tuple[int | None, bool]:
  """(changes of an index map's results along the grid, whether they depend on prefetched numbers)."""
  import jax
  jaxpr, axes = index_map.jaxpr, len(grid)
  sources = {id(variable): {number} for number, variable in enumerate(jaxpr.invars)}
  of = lambda variables: set().union(*(sources.get(id(variable), set()) for variable in variables), set())
  for equation in jaxpr.eqns:
    for variable in equation.outvars:
      sources[id(variable)] = of(equation.invars)
  reached = of(jaxpr.outvars)
  last = max((number for number in reached if number < axes), default=-1)
  if any(number >= axes for number in reached) or None in grid[:last + 1]:
    return None, any(number >= axes for number in reached)
  # Further axes do not matter, and prefetched numbers are not looked at.
  points = np.stack(np.unravel_index(np.arange(math.prod(grid[:last + 1])), grid[:last + 1] or (1,)), 1)
  places = np.zeros((len(points), axes), np.int32)
  places[:, :last + 1] = points[:, :last + 1]
  rest = [None] * (len(jaxpr.invars) - axes)
  numbers = jax.vmap(lambda place: jax.core.eval_jaxpr(jaxpr, index_map.consts, *place, *rest))(places)
  numbers = np.stack([np.broadcast_to(np.asarray(number), len(points)) for number in numbers], 1)
  return 1 + int((numbers[1:] != numbers[:-1]).any(1).sum()), False


def call_from_json(content: Mapping[str, Any]) -> Call:
  """The inverse of `dataclasses.asdict`, after JSON."""
  as_tuple = lambda values: tuple(as_tuple(v) if isinstance(v, list) else v for v in values)
  windows = tuple(Window(**window) for window in content["windows"])
  return Call(content["name"], as_tuple(content["grid"]), as_tuple(content["blocks"]), windows, content["parallel"],
              content["numbers"])


def window_bytes(call: Call, steps: float, visits: float | Sequence[float], near: Sequence[int] = (),
                 cores: int = 1) -> float:
  """HBM bytes that a call's pipeline moves: a block goes over whenever its number changes, and once for each core at least.

  Args:
    steps: of the whole grid.
    visits: how often a block whose number is prefetched changes; one number, or one for each such window.
    near: operands and results that do not lie in HBM, see `Part`.
    cores: that share the grid.
  """
  skipped = call.blocks_of(near)
  listed = iter(visits) if isinstance(visits, Sequence) else itertools.repeat(visits)
  moved = 0.0
  for window in call.windows:
    times = min(next(listed), steps) if window.listed else max(window.moves or steps, cores)
    moved += 0 if window.block in skipped else window.bytes * times
  return moved
