"""How often each region of a kernel's schedule runs: what the schedule's text does not say.

`schedule.counted` finds the branches and loops of unknown count that do vector work. A plan names them in program order,
which is the order of the `pl.when`s and loops in the kernel's source, with their executions in all; a "?" behind a name says
that the region may be too small to be counted. Where a plan does not fit (a kernel has changed), `fallback` counts the
hottest region once per grid step and the others once per block.

Letters: R rows of a block (queries x heads)   U entries of a tile
"""

from __future__ import annotations

import dataclasses
import math
from typing import Callable, Sequence

import numpy as np

from launch.benchmarks.kernels import bounds
from launch.benchmarks.kernels.cases import Case
from launch.benchmarks.kernels.chips import Chip
from launch.benchmarks.kernels.program import Call

UNIT_ROWS, UNIT_ENTRIES = 8 * 128, 512  # 8 tokens of 128 heads against 512 entries: the unit of the targets


@dataclasses.dataclass(frozen=True)
class Plan:
  """Executions of one call of a kernel, over all cores.

  Attributes:
    counts: name and executions of each counted region, in program order.
    hot: name of the region that the targets are about; "" = a whole step of the grid.
    steps: of the whole grid.
    visits: how often a window whose number is prefetched changes; one number, or one for each such window.
    flops: that the kernel multiplies, masked pairs included.
    units: of the targets in one pass of the hot region; 0 = the op has no such unit.
    fixed: name of the region that runs once per block of queries, and the FLOPs of one pass.
    copied: HBM bytes that the kernel copies by itself, outside the pipeline.
    fits: False for a guess.
  """

  counts: tuple[tuple[str, float], ...]
  hot: str
  steps: float
  visits: float | tuple[float, ...]
  flops: float = 0.0
  units: float = 0.0
  fixed: tuple[str, float] | None = None
  copied: float = 0.0
  fits: bool = True


def plan_of(kernel: str, case: Case, call: Call, chip: Chip) -> Plan | None:
  """The plan of a kernel, by the name that its author gave it; None = there is none."""
  make = PLANS.get(kernel)
  return make(case, call, chip) if make else None


def grid_steps(call: Call) -> int:
  """Steps of a grid whose sizes are known; an axis that is not counts as one step."""
  return math.prod(size or 1 for size in call.grid)


def fit(plan: Plan | None, heat: Sequence[float]) -> Plan | None:
  """The plan for the counted regions, small ones left out; None = it does not fit.

  Args:
    heat: of each region, see `schedule.heat`; a plan whose hot region does less than half of what another does is wrong.
  """
  if plan is None:
    return None
  counts = list(plan.counts)
  while len(counts) > len(heat) and any(name.endswith("?") for name, _ in counts):
    del counts[next(number for number, (name, _) in enumerate(counts) if name.endswith("?"))]
  names = [name.rstrip("?") for name, _ in counts]
  if len(names) != len(heat) or (plan.hot and heat[names.index(plan.hot)] < max(heat) / 2):
    return None
  return dataclasses.replace(plan, counts=tuple(zip(names, (count for _, count in counts))))


def fallback(call: Call, plan: Plan | None, heat: Sequence[float], flops: float) -> Plan:
  """A guess for a kernel without a plan that fits; of one that does not, all but the regions holds."""
  steps, blocks = plan.steps if plan else grid_steps(call), math.prod(size or 1 for size in call.grid[:-1])
  visits = plan.visits if plan and not isinstance(plan.visits, tuple) else steps
  names = [f"region {number}" for number in range(len(heat))]
  hot = max(zip(heat, names), default=(0, ""))[1]
  counts = tuple((name, visits if name == hot else blocks) for name in names)
  if plan is not None:
    return dataclasses.replace(plan, counts=counts, hot=hot, fixed=None, fits=False)
  return Plan(counts, hot, steps, steps, flops, fits=False)


def _tiles(case: Case, queries: int, blocks: int, entries: int) -> np.ndarray:
  """Tiles that each of all blocks visits: every one that the block's last query sees; with many picks none is empty."""
  last = bounds.visible(case)[np.minimum((np.arange(blocks // case.batch) + 1) * queries, case.queries) - 1]
  return np.tile(np.ceil(last / entries), case.batch)


# ---- attention --------------------------------------------------------------------------------------------------------


def _attention(case: Case, call: Call, matmuls: int, names: Sequence[str]) -> Plan:
  """Grid (parts, blocks, tiles of the longest list); `matmuls` per pair of a row and a key.

  Where all entries are one tile, a block's start does it together with the window; where there are none, the program
  holds the part for a tile all the same and never runs it.
  """
  (rows, width), queries, entries = call.blocks[0][1:], call.blocks[1][1], call.blocks[2][1]
  near = next(block[-2] for block in call.blocks[3:] if block[-1] == width and block[-2] != rows)  # the window's keys
  blocks = math.prod(size for size in call.grid[:2])
  tiles, merged = _tiles(case, queries, blocks, entries), 0 < case.entries <= entries
  window_only = case.entries == 0
  visits = float(blocks) if merged else float(tiles.sum())
  pair = 2 * matmuls * width
  times = {"clear": call.grid[0], "new window": blocks * queries * 2 / near, "start": blocks, "tile": visits,
           "finish": blocks, "flush": call.grid[0]}
  counts = tuple((name, times[name.rstrip("?")]) for name in names if name != "tile" or not merged)
  flops = pair * rows * (visits * entries * (case.entries > 0) + blocks * near)
  if merged or window_only:
    return Plan(counts, "start", float(blocks), visits, flops)
  return Plan(counts, "tile", blocks * max(float(tiles.max()), 1.0), visits, flops,
              rows * entries / (UNIT_ROWS * UNIT_ENTRIES), ("start", pair * rows * near))


def _masked_attention(case: Case, call: Call, chip: Chip) -> Plan:
  return _attention(case, call, 2, ("start", "tile", "finish"))


def _masked_attention_backward(case: Case, call: Call, chip: Chip) -> Plan:
  plan = _attention(case, call, 5, ("clear", "new window", "start", "tile", "finish", "flush?"))
  return dataclasses.replace(plan, copied=call.grid[0] * case.entries * case.shapes.width * 4.0)


# ---- indexer ----------------------------------------------------------------------------------------------------------
# Of two counting passes until every one of 32 queries has its threshold: normal scores of 16,384 entries need 7.7 (for 512
# of them 7.3), fewer entries 7.0 to 7.5, scores as the formula makes them up to 9; counted for all.
ROUNDS = 7.8


def _index_select(case: Case, call: Call, chip: Chip) -> Plan:
  """Counting passes go over groups of 4,096 entries; blocks that see no more than `top_k` entries need only the first."""
  queries, heads, width = call.blocks[0][1:]
  entries, blocks = call.blocks[3][1], math.prod(call.grid[:3])
  tiles = _tiles(case, queries, blocks, entries)
  slots = min(4096 // entries, call.grid[3])
  groups = np.ceil(tiles / slots)
  searching = tiles * entries > case.shapes.top_k
  passes, visits = float((groups * searching).sum()) * ROUNDS, float(tiles.sum())
  counts = (("start", blocks), ("score", visits), ("finish", blocks), ("hide before?", 0.0),
            ("hide behind?", float((groups * slots - tiles).sum())), ("extent", float(groups.sum())),
            ("search", float(searching.sum()) * ROUNDS), ("first trial", passes), ("second trial", passes),
            ("ties?", 0.0), ("tie trial", 0.0), ("write", float(groups.sum())))
  return Plan(_without_ends(counts, call), "score", math.prod(call.grid), visits,
              2.0 * queries * heads * width * entries * visits)


def _without_ends(counts: tuple[tuple[str, float], ...], call: Call) -> tuple[tuple[str, float], ...]:
  """With a single tile every step is a block's first and last one, and nothing is left of these conditions."""
  return tuple(pair for pair in counts if call.grid[-1] != 1 or pair[0].rstrip("?") not in ("start", "finish"))


def _sparse_attention(case: Case, call: Call, chip: Chip) -> Plan:
  """Grid (runs of a chunk, steps, tiles). Listed: queries, near keys and their words, and both results.

  A kernel that copies rows by itself has two more operands, the last of which gives their number; a run starts with those of
  its first step, and its last step copies once more.
  """
  places = call.blocks[7][2] if len(call.blocks) == 12 else 0
  listed = lambda steps, runs: (steps, runs, steps, steps, steps)
  plan = _sparse_steps(call, 2, ("first copies?",) if places else (), listed, places)
  _, queries, _, words = call.blocks[0]
  return dataclasses.replace(plan, copied=(plan.steps + call.grid[0]) * queries * places * words * 4.0)


def _sparse_attention_backward(case: Case, call: Call, chip: Chip) -> Plan:
  return _sparse_steps(call, 5, ("new window?",), lambda steps, runs: (steps, runs, *[steps] * 5, runs))


def _sparse_steps(call: Call, matmuls: int, names: Sequence[str],
                  visits: Callable[[int, int], tuple[float, ...]], places: int = 0) -> Plan:
  """`visits` of the windows whose number is prefetched, from the steps and runs of the grid; `places` beside the tiles'."""
  tile, (rows, width), near = call.blocks[0][2], call.blocks[2][1:], call.blocks[3][2]
  steps, runs = math.prod(call.grid), call.grid[0]
  flops = 2.0 * matmuls * rows * width * (steps * (tile + places) + math.prod(call.grid[:2]) * near)
  return Plan(tuple((name, runs) for name in names), "", steps, visits(steps, runs), flops)


def _index_loss(case: Case, call: Call, chip: Chip) -> Plan:
  return _index_loss_tiles(case, call, 1, ("start", "tile", "finish?"))


def _index_loss_backward(case: Case, call: Call, chip: Chip) -> Plan:
  plan = _index_loss_tiles(case, call, 3, ("clear", "start", "tile", "finish", "flush?"))
  return dataclasses.replace(plan, copied=chip.cores * case.batch * case.entries * case.shapes.index_width * 4.0)


def _index_loss_tiles(case: Case, call: Call, matmuls: int, names: Sequence[str]) -> Plan:
  """`matmuls`: of the indexer's size per tile, beside the one of the attention's."""
  (queries, heads, width), (_, attention_heads, attention_width) = call.blocks[0][1:], call.blocks[3][1:]
  entries, blocks = call.blocks[2][1], math.prod(call.grid[:3])
  visits = float(_tiles(case, queries, blocks, entries).sum())
  rows = math.prod(call.grid[:2])
  times = {"clear": rows, "start": blocks, "tile": visits, "finish": blocks, "flush": rows}
  flops = 2.0 * queries * entries * visits * (matmuls * heads * width + attention_heads * attention_width)
  counts = tuple((name, times[name.rstrip("?")]) for name in names)
  return Plan(_without_ends(counts, call), "tile", math.prod(call.grid), visits, flops)


# ---- hyper-connections ------------------------------------------------------------------------------------------------
def _every_step(*names: str) -> Callable[[Case, Call, Chip], Plan]:
  """A kernel whose steps are alike; regions `names` run once per core."""
  def make(case: Case, call: Call, chip: Chip) -> Plan:
    steps = grid_steps(call)
    return Plan(tuple((name, chip.cores) for name in names), "", steps, steps)
  return make


# ---- experts ----------------------------------------------------------------------------------------------------------
def _expert_tiles(case: Case, tile: int) -> int:
  """Tiles in use if all experts have the same number of rows."""
  return case.experts * math.ceil(case.rows / case.experts / tile)


def _expert_rows(matmuls: int, weights: int) -> Callable[[Case, Call, Chip], Plan]:
  """`rows_call`: grid (blocks of columns, tiles); a block of weights stays for all tiles of its expert."""
  def make(case: Case, call: Call, chip: Chip) -> Plan:
    tile = call.blocks[0][0]
    blocks, tiles = call.grid[0], _expert_tiles(case, tile)
    flops = 2.0 * matmuls * tiles * tile * case.shapes.hidden * case.shapes.expert_width
    return Plan((), "", blocks * tiles, (blocks * case.experts,) * weights, flops)
  return make


def _expert_weights(matmuls: int) -> Callable[[Case, Call, Chip], Plan]:
  """`weights_call`: grid (blocks of rows, blocks of columns, tiles); a sum per expert is written when its tiles are done."""
  def make(case: Case, call: Call, chip: Chip) -> Plan:
    tile = call.blocks[0][0]
    blocks, tiles = call.grid[0] * call.grid[1], _expert_tiles(case, tile)
    sums, steps = blocks * case.experts, blocks * tiles
    flops = 2.0 * matmuls * tiles * tile * case.shapes.hidden * case.shapes.expert_width
    visits = (steps,) * (1 + matmuls) + (sums,) * matmuls
    return Plan((("tile", steps), ("clear", 0), ("write", sums)), "tile", steps, visits, flops)
  return make


# ---- JAX's splash attention -------------------------------------------------------------------------------------------
def _splash(matmuls: int, by_keys: bool = False) -> Callable[[Case, Call, Chip], Plan]:
  """Grid (heads, blocks of queries, of keys); by keys (blocks of keys, heads, blocks of queries), where a sum over all heads
  starts and ends once. Blocks without any pair that sees each other are skipped."""
  def make(case: Case, call: Call, chip: Chip) -> Plan:
    queries, keys = call.blocks[0][1], call.blocks[1][0]
    heads, width, block = case.shapes.heads, case.shapes.width, np.arange(case.queries // queries)
    first, last = np.maximum(block * queries - (case.shapes.window - 1), 0) // keys, ((block + 1) * queries - 1) // keys
    visits = heads * float((last - first + 1 + _tiles(case, queries, len(block), keys)).sum())
    ends = float(call.grid[0] if by_keys else heads * call.grid[1])
    return Plan((("start", ends), ("tile", visits), ("finish", ends)), "tile", grid_steps(call), visits,
                2.0 * matmuls * queries * keys * width * visits)
  return make


def _list_entries(case: Case, call: Call, chip: Chip) -> Plan:
  """All steps alike; where each core has but one, it is a region."""
  steps = grid_steps(call)
  return Plan((("step?", steps),) if steps <= chip.cores and call.parallel > 1 else (), "", steps, steps)


PLANS: dict[str, Callable[[Case, Call, Chip], Plan]] = {
    "masked_attention": _masked_attention,
    "masked_attention_backward": _masked_attention_backward,
    "attend_rows": _sparse_attention, "attend_rows_backward": _sparse_attention_backward,
    "list_entries": _list_entries,
    "entry_tables": _every_step(),
    "index_select": _index_select, "index_loss": _index_loss, "index_loss_backward": _index_loss_backward,
    **{f"splash_mqa_{name}_residuals": plan for documents in ("", "_segmented") for name, plan in (
        (f"fwd{documents}_no", _splash(2)), (f"fwd{documents}", _splash(2)), (f"dq{documents}_no", _splash(3)),
        (f"dkv{documents}_no", _splash(4, by_keys=True)))},
    "hyper_collapse": _every_step(), "hyper_expand": _every_step(), "hyper_expand_collapse": _every_step(),
    "hyper_collapse_backward": _every_step("clear"), "hyper_expand_backward": _every_step(),
    "hyper_expand_collapse_backward": _every_step("clear"), "sinkhorn": _every_step(),
    "experts_hidden": _expert_rows(2, 2), "experts_down": _expert_rows(1, 1),
    "experts_d_hidden": _expert_rows(1, 1), "experts_d_rows": _expert_rows(2, 2),
    "experts_d_gate_up": _expert_weights(2), "experts_d_down": _expert_weights(1),
}
