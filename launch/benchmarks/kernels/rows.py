"""From a compiler's answer to the row of a case: schedules times executions, beside the bounds.

A part is an instruction of the program: a kernel or a fused operation of XLA. Its time in cycles is the largest of
its schedule, its HBM bytes and, of a kernel, its matmuls at the chip's rates; parts run one after another, so the
program's time is their sum. Only what the SparseCore does beside a kernel of the TensorCore overlaps: both together
take the larger of the TensorCore's time and of their HBM bytes. XLA's parts together take no less than their matmuls;
a loop inside one of them whose length its schedule does not give counts once, so others may look better than they
are.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any, Mapping, Sequence

from launch.benchmarks import missing
from launch.benchmarks.kernels import bounds, plans, program, report, schedule
from launch.benchmarks.kernels.cases import OURS, Case
from launch.benchmarks.kernels.chips import Chip
from launch.benchmarks.kernels.plans import Plan

Row = dict[str, Any]
MOST_PARTS = 8  # of a program that a row names, the longest ones


@dataclasses.dataclass(frozen=True)
class KernelFigures:
  """A Pallas call: totals of one execution, which in a loop is that of a chunk of the tokens, and its parts.

  Attributes:
    name: as the author gave it.
    bundles: one core's, everything included.
    hbm_bytes, matrix, vector: bytes; cycles of the matrix and the vector unit.
    regions: bundles of one pass, executions, spills and fills by name of the region.
    step: bundles of a grid step that does nothing.
    whole_step: of a mean grid step; also its spills and fills.
    plan: executions by region.
  """

  name: str
  bundles: float
  hbm_bytes: float
  matrix: float
  vector: float
  regions: dict[str, dict[str, float]]
  step: float
  whole_step: dict[str, float]
  plan: Plan


def kernel_figures(case: Case, found: schedule.Schedule, call: program.Call, chip: Chip, near: Sequence[int] = ()
                   ) -> KernelFigures:
  """Reads a kernel's schedule with its plan, or with a guess where the plan does not fit; `near`: see `program.Part`."""
  cores, plan = min(chip.cores, call.parallel), plans.plan_of(call.name, case, call, chip)
  counted = schedule.counted(found.root, plan.steps if plan else plans.grid_steps(call), cores)
  heat = schedule.heat(counted)
  plan = plans.fit(plan, heat) or plans.fallback(call, plan, heat, bounds.least(case).flops)
  executions = schedule.executions(found.root, [count for _, count in plan.counts], plan.steps, cores)
  sums = schedule.total(executions)
  regions = {name: schedule.body(region, counted) | {"count": count} for (name, count), region in zip(plan.counts, counted)}
  inside = sum(region["bundles"] * region["count"] for region in regions.values())
  uneven = math.ceil(call.parallel / cores) * cores / call.parallel  # what the busiest core does over the mean
  size = program.window_bytes(call, plan.steps, plan.visits, near, cores) + plan.copied
  return KernelFigures(
      call.name, sums["bundles"] / cores * uneven, size, plan.flops / chip.flops_per_cycle,
      sums[schedule.VECTOR] / cores / found.capacity[schedule.VECTOR], regions,
      (sums["bundles"] - inside) / max(plan.steps, 1),
      {figure: sums[figure] / max(plan.steps, 1) for figure in ("bundles", "spills", "fills")}, plan)


def taken(case: Case, chip: Chip) -> str:
  """The form that `implementation="pallas"` runs at this shape, as the ops' tables call it."""
  from pallas_kernels.sparse_attention import forms as attention_forms
  if case.op == "kl_loss":
    from pallas_kernels import tpu
    from pallas_kernels.indexer import forms as index_forms
    on = next(found for found in (tpu.V5P, tpu.V6E, tpu.TPU7X) if found.name == chip.name)
    return index_forms.choose_loss(case.entries, case.shapes.index_width, on)
  if case.op.startswith("attention"):
    everything = case.op in ("attention_heavy", "attention_window")
    top_k = case.entries if everything else min(case.shapes.top_k, case.entries)
    return attention_forms.choose(case.queries, case.entries, top_k, chip.name)
  return "kernel"  # the others are at all shapes of the bench


def row_of(case: Case, answer: Mapping[str, Any], chip: Chip) -> Row:
  """The figures of a case; cycles are those of all its tokens on one device."""
  head = {"case": case.name, "side": case.side, "chip": chip.name, "op": case.op, "model": case.model,
          "length": case.length, "direction": case.direction, "ours": case.side == OURS, "taken": taken(case, chip)}
  if not answer["ok"]:
    return head | missing.of_answer(answer)
  kernels = []
  sums = dict.fromkeys(("kernels", "others", "schedule", "vector", "hbm_bytes", "beside", "alone", "alone_bytes"), 0.0)
  schedules, parts = _schedules(answer), []
  calls = [program.call_from_json(content) for content in answer["calls"]]
  for part in (program.Part(**content) for content in answer["parts"]):
    found = schedule.Schedule.from_json(schedules[part.name]) if part.name in schedules else None
    call = _take(calls, part.name) if part.kernel else None
    times = part.times * (1 if part.certain else _loop_trips(case))
    if found is not None and call is not None:
      figures = kernel_figures(case, found, call, chip, part.near)
      kernels.append((figures, part.vmem_bytes, times))
      bundles, slots, matrix, size = figures.bundles, figures.vector, figures.matrix, figures.hbm_bytes
    else:
      total = schedule.total(schedule.executions(found.root)) if found else {"bundles": 0.0, schedule.VECTOR: 0.0}
      bundles, size, matrix = total["bundles"], part.hbm_bytes, 0.0
      slots = total[schedule.VECTOR] / found.capacity[schedule.VECTOR] if found else 0.0
    time = times * max(bundles, matrix, size / chip.bytes_per_cycle)
    parts.append({"part": part.name, "times": times, "time_cycles": time, "schedule_cycles": times * bundles,
                  "hbm_bytes": times * size, "sparse_core": part.sparse_core})
    if part.sparse_core:
      sums["beside" if part.overlaps else "alone"] += time
      sums["alone_bytes"] += 0 if part.overlaps else times * size
    else:
      sums["kernels" if part.kernel else "others"] += time
    for figure, value in (("schedule", bundles), ("vector", slots), ("hbm_bytes", size)):
      sums[figure] += times * value
  tensor = sums["kernels"] + max(sums["others"], answer["matmul_flops"] / chip.flops_per_cycle)
  sums["serial"] = tensor + sums["beside"] + sums["alone"]
  together = max(tensor, (sums["hbm_bytes"] - sums["alone_bytes"]) / chip.bytes_per_cycle) if sums["beside"] else tensor
  cycles = together + sums["alone"]
  parts.sort(key=lambda part: -part["time_cycles"])
  return head | _figures(case, chip, answer, kernels, cycles, sums) | {
      "parts": parts[:MOST_PARTS], "sparse_core": [part for part in parts if part["sparse_core"]]}


def _loop_trips(case: Case) -> int:
  """Mean length of the loops whose length is known at run time only: an expert's tiles in the blockwise form."""
  if case.op != "experts":
    return 1
  from pallas_kernels.grouped_matmul import row_tile
  return -(-case.rows // case.experts // row_tile(case.rows, case.experts))


def _take(calls: list[program.Call], name: str) -> program.Call | None:
  """The first call with the name that XLA made this one of, with transformations around and a number behind it.

  It is taken off the list unless it is the last.
  """
  called = lambda call: re.fullmatch(rf"(?:transpose_|jvp_|vmap_|checkpoint_)*{re.escape(call.name)}_*(\.\d+)*", name)
  found = [number for number, call in enumerate(calls) if called(call)]
  return (calls.pop(found[0]) if len(found) > 1 else calls[found[0]]) if found else None


def _schedules(answer: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
  """Schedule of each part by name. The compiler schedules equal parts once: another number, the same bytes."""
  own = {content["name"]: content for content in answer["schedules"]}
  kind = lambda part: (re.sub(r"(\.\d+)+$", "", part["name"]), part["hbm_bytes"], part["vmem_bytes"])
  equal = {kind(part): own[part["name"]] for part in answer["parts"] if part["name"] in own}
  return own | {part["name"]: equal[kind(part)] for part in answer["parts"]
                if part["name"] not in own and kind(part) in equal}


def _figures(case: Case, chip: Chip, answer: Mapping[str, Any], kernels: Sequence[tuple[KernelFigures, int, int]],
             cycles: float, sums: Mapping[str, float]) -> Row:
  least = bounds.least(case)
  floor = {"matrix": least.flops / chip.flops_per_cycle, "hbm": least.bytes / chip.bytes_per_cycle,
           "vector": least.vector / chip.cores}
  largest = max(floor.values())
  time = max(cycles, largest)
  row = {
      "matrix_cycles": floor["matrix"], "hbm_cycles": floor["hbm"], "vector_cycles": floor["vector"] or None,
      "vector_slot_cycles": sums["vector"], "schedule_cycles": sums["schedule"],
      "time_cycles": time, "serial_cycles": max(sums["serial"], largest), "ratio": time / largest,
      "cycles_per_token": time / case.tokens,
      "tokens_per_second_per_chip": case.tokens * chip.clock / time * chip.devices_per_chip,
      "hbm_bytes": sums["hbm_bytes"], "hbm_bytes_least": least.bytes, "hbm_ratio": sums["hbm_bytes"] / least.bytes,
      "vmem_bytes": max((part["vmem_bytes"] for part in answer["parts"] if part["kernel"]), default=0),
      "temp_bytes": answer["memory"]["temp"], "compile_seconds": answer["seconds"], "kernels": {}}
  for kernel, vmem_bytes, times in kernels:
    number = 1 + sum(report.named(label) == kernel.name for label in row["kernels"])
    label = kernel.name if number == 1 else f"{kernel.name} #{number}"
    row["kernels"][label] = _kernel_row(kernel, chip) | {"vmem_bytes": vmem_bytes, "times": times}
  return row


def _kernel_row(kernel: KernelFigures, chip: Chip) -> Row:
  plan, hot = kernel.plan, kernel.regions.get(kernel.plan.hot) or kernel.whole_step
  row = {"guessed": not plan.fits, "bundles": kernel.bundles, "matrix_cycles": kernel.matrix,
         "vector_slot_cycles": kernel.vector, "hbm_bytes": kernel.hbm_bytes, "step_bundles": kernel.step,
         "mean_step_bundles": kernel.whole_step["bundles"],
         "hot_bundles": hot["bundles"], "spills": hot["spills"], "fills": hot["fills"], "regions": kernel.regions}
  if plan.units:
    row["unit_bundles"] = hot["bundles"] / plan.units
  # A block of queries that meets all its keys at once has nothing but its start.
  name, flops = plan.fixed or (("start", plan.flops / dict(plan.counts)["start"]) if plan.hot == "start" else ("", 0))
  if name in kernel.regions and flops:
    bound = flops / (chip.flops_per_cycle / chip.cores)
    row["fixed_bundles"] = kernel.regions[name]["bundles"]
    row["fixed_ratio"] = row["fixed_bundles"] / bound
  return row
