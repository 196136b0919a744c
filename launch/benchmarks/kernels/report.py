"""The table of a bench of kernels, which targets are reached, and where others win."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Callable, Sequence

from launch.benchmarks.kernels.cases import DECODE, FORWARD
from launch.benchmarks.kernels.chips import CHIPS, Chip
from launch.benchmarks.missing import measured, said

Row = dict[str, Any]
CHIP = {chip.name: chip for chip in CHIPS}


# ---- targets ----------------------------------------------------------------------------------------------------------
Values = Callable[[Sequence[Row]], list[float | None]]


@dataclasses.dataclass(frozen=True)
class Target:
  """At most `bounds[chip]` for the largest of the `values` of our rows.

  Attributes:
    text: what is asked.
    bounds: by the chip's name.
    values: of all rows; None, or none at all, where the target does not speak about a row.
  """

  text: str
  bounds: dict[str, float]
  values: Values


def _kernel(name: str, figure: str, ops: Sequence[str] = ("attention",)) -> Values:
  """A kernel's figure in these ops' rows, without decoding; a guess says nothing."""
  return lambda rows: [kernel.get(figure) for row in rows if row["op"] in ops and row["length"]
                       for label, kernel in row["kernels"].items() if named(label) == name and not kernel["guessed"]]


def named(label: str) -> str:
  """The kernel's name, of a label such as "list_entries #2" of a program's second call of it."""
  return label.split(" #")[0]


def _of_op(ops: Sequence[str], figure: Callable[[Row], float | None], length: int | None = None) -> Values:
  """A figure of these ops' rows; length: None = all but decoding."""
  wanted = lambda row: row["op"] in ops and (row["length"] if length is None else row["length"] == length)
  return lambda rows: [figure(row) for row in rows if wanted(row)]


def _growth(op: str, direction: str, short: int, long: int) -> Values:
  """Time per token at the long context over that at the short one, less one, of each model that has both rows."""
  def values(rows: Sequence[Row]) -> list[float | None]:
    times = {(row["model"], row["length"]): row["cycles_per_token"] for row in rows
             if (row["op"], row["direction"]) == (op, direction)}
    return [times[model, long] / time - 1 for (model, length), time in times.items()
            if length == short and (model, long) in times]
  return values


def _forward_ratio(row: Row) -> float | None:
  return row["ratio"] if row["direction"] == FORWARD else None


def _select_ratio(row: Row) -> float:
  """Time of the selection over its bound: the matrix unit's on v5p, else the vector slots that the scores need."""
  return row["time_cycles"] / row["matrix_cycles" if row["chip"] == "v5p" else "vector_cycles"]


def _on(v5p: float, v6e: float, tpu7x: float) -> dict[str, float]:
  return {"v5p": v5p, "v6e": v6e, "tpu7x": tpu7x}


_MIXING = ("collapse", "expand", "expand_collapse")
TARGETS = (
    Target("attention forward, bundles per 8 tokens x 128 heads x 512 entries", _on(7500, 2350, 2100),
           _kernel("masked_attention", "unit_bundles")),
    Target("attention backward, bundles per 8 tokens x 128 heads x 512 entries", _on(18000, 5400, 4600),
           _kernel("masked_attention_backward", "unit_bundles")),
    Target("attention forward, fixed part per block of queries over its matrix bound", _on(1.1, 1.6, 2.0),
           _kernel("masked_attention", "fixed_ratio")),
    Target("attention forward of all entries (HCA) or none (sliding), fixed part per block of queries over its matrix bound",
           _on(1.1, 1.6, 2.0), _kernel("masked_attention", "fixed_ratio", ("attention_heavy", "attention_window"))),
    Target("sparse form of attention forward at 64K, time over the largest bound", _on(1.7, 2.6, 2.6),
           _of_op(("attention_sparse",), _forward_ratio, 65536)),
    Target("sparse form of attention forward, time per token at 1M over that at 64K, less one", _on(0.1, 0.1, 0.1),
           _growth("attention_sparse", FORWARD, 65536, 2**20)),
    Target("selection at 64K over the matrix bound (v5p) or the scores' vector slots", _on(1.6, 2.0, 2.0),
           _of_op(("select",), _select_ratio, 65536)),
    Target("hyper-connections, HBM bytes over the least", _on(1.3, 1.3, 1.3), _of_op(_MIXING, lambda row: row["hbm_ratio"])),
    Target("hyper-connections in decoding, HBM bytes over the least", _on(1.3, 1.3, 1.3),
           _of_op(_MIXING, lambda row: row["hbm_ratio"], DECODE)),
)


def targets(rows: Sequence[Row], chip: Chip) -> list[Row]:
  """Each target with its `value` and whether it is `reached`; None where the rows do not say."""
  found = []
  ours = [row for row in rows if row["ours"] and measured(row)]
  for target in TARGETS:
    values = [value for value in target.values(ours) if value is not None]
    value, bound = max(values, default=None), target.bounds[chip.name]
    found.append({"target": f"{chip.name}: {target.text}, at most {bound:,g}", "bound": bound, "value": value,
                  "reached": None if value is None else value <= bound})
  return found


# ---- who wins ---------------------------------------------------------------------------------------------------------
def with_ratios(rows: Sequence[Row]) -> list[Row]:
  """Adds `others`, the fastest other side's time over ours, to our rows; below 1 the other one wins."""
  found = []
  for row in rows:
    others = [other["time_cycles"] for other in rows
              if other["case"] == row["case"] and not other["ours"] and measured(other)]
    compared = row["ours"] and measured(row) and others
    found.append(row | {"others": min(others) / row["time_cycles"]} if compared else row)
  return found


def losses(rows: Sequence[Row]) -> str:
  """A sentence that names the rows in which another side is faster, and what the op takes there; empty if there is none."""
  lost = [f"{row['case']} ({row['others']:.2f}, taken: {row['taken']})" for row in rows if row.get("others", 1) < 1]
  return f"Slower than the fastest other side: {', '.join(lost)}." if lost else ""


def guesses(rows: Sequence[Row]) -> str:
  """A sentence that names the kernels whose executions are guessed; empty if there is none."""
  names = sorted({named(label) for row in rows for label, kernel in row.get("kernels", {}).items() if kernel["guessed"]})
  return (f"No plan fits {', '.join(names)} (launch/benchmarks/kernels/plans.py): how often its regions run is a guess."
          if names else "")


# ---- the table --------------------------------------------------------------------------------------------------------
_COLUMNS = (  # title, figure of a row, factor, format
    ("VMEM MiB", "vmem_bytes", 2**-20, ",.1f"), ("temp MiB", "temp_bytes", 2**-20, ",.0f"),
    ("HBM MB", "hbm_bytes", 1e-6, ",.0f"), ("least", "hbm_bytes_least", 1e-6, ",.0f"),
    ("matrix", "matrix_cycles", 1, ",.0f"), ("HBM", "hbm_cycles", 1, ",.0f"), ("vector", "vector_cycles", 1, ",.0f"),
    ("slots", "vector_slot_cycles", 1, ",.0f"),
    ("schedule", "schedule_cycles", 1, ",.0f"), ("serial", "serial_cycles", 1, ",.0f"),
    ("time", "time_cycles", 1, ",.0f"), ("ratio", "ratio", 1, ".2f"),
    ("tokens/s/chip", "tokens_per_second_per_chip", 1, ",.0f"), ("others", "others", 1, ".2f"))
_PER_TOKEN = {"matrix_cycles", "hbm_cycles", "vector_cycles", "vector_slot_cycles", "schedule_cycles", "serial_cycles",
              "time_cycles"}
_KERNEL_COLUMNS = (
    ("VMEM MiB", "vmem_mib", ",.1f"),
    ("hot bundles", "hot_bundles", ",.0f"), ("per unit", "unit_bundles", ",.0f"), ("spills", "spills", ",.0f"),
    ("fills", "fills", ",.0f"), ("fixed", "fixed_bundles", ",.0f"), ("x bound", "fixed_ratio", ".2f"),
    ("step", "mean_step_bundles", ",.0f"), ("empty step", "step_bundles", ",.0f"),
    ("times", "times", ",.0f"), ("HBM MB", "hbm_mb", ",.1f"), ("HBM", "hbm", ",.0f"), ("matrix", "matrix", ",.0f"),
    ("slots", "slots", ",.0f"), ("bundles", "per_token", ",.0f"))


def table(rows: Sequence[Row]) -> str:
  """The rows as text, cycles per token of one device; a figure that does not exist is a dash."""
  lines = [["case", "side", *(title for title, *_ in _COLUMNS)]]
  for row in rows:
    if not measured(row):
      lines.append([row["case"], row["side"], said(row)[:200]])
      continue
    lines.append([row["case"], row["side"], *(_cell(row, *column[1:]) for column in _COLUMNS)])
  return _aligned(lines)


def _cell(row: Row, figure: str, factor: float, form: str) -> str:
  if row.get(figure) is None:
    return "-"
  tokens = row["time_cycles"] / row["cycles_per_token"] if figure in _PER_TOKEN else 1
  return format(row[figure] * factor / tokens, form)


def kernel_table(rows: Sequence[Row]) -> str:
  """Our kernels' memory, hot loops and, over all that the row runs of them, traffic and cycles per token, as text."""
  lines = [["case", "kernel", *(title for title, *_ in _KERNEL_COLUMNS)]]
  for row in (row for row in rows if row["ours"] and measured(row)):
    per_token = row["cycles_per_token"] / row["time_cycles"]
    for name, kernel in row["kernels"].items():
      whole = kernel["times"] * per_token
      lines.append([row["case"], name + " (guess)" * kernel["guessed"], *_kernel_cells(
          kernel | _traffic(row, kernel["times"] * kernel["hbm_bytes"]) | {
              "vmem_mib": kernel["vmem_bytes"] / 2**20, "matrix": whole * kernel["matrix_cycles"],
              "slots": whole * kernel["vector_slot_cycles"], "per_token": whole * kernel["bundles"]})])
    for part in row["sparse_core"]:
      name = re.sub(r"(\.cloned(\.\d+)*|\.call-(start|update)(\.\d+)?|-start)+$", "", part["part"])
      lines.append([row["case"], f"{name} (SparseCore)", *_kernel_cells(
          {"times": part["times"]} | _traffic(row, part["hbm_bytes"]))])
  return _aligned(lines)


def _traffic(row: Row, size: float) -> Row:
  """`size` bytes as MB, and as cycles per token at the chip's rate."""
  per_token = row["cycles_per_token"] / row["time_cycles"]
  return {"hbm_mb": size * 1e-6, "hbm": size * per_token / CHIP[row["chip"]].bytes_per_cycle}


def _kernel_cells(figures: Row) -> list[str]:
  return ["-" if figures.get(figure) is None else format(figures[figure], form) for _, figure, form in _KERNEL_COLUMNS]


def _aligned(lines: Sequence[Sequence[str]]) -> str:
  whole = [line for line in lines if len(line) > 3]
  widths = [max(len(line[i]) for line in (lines if i < 2 else whole)) for i in range(len(lines[0]))]
  return "\n".join("  ".join(cell.ljust(width) if i < 2 or len(line) == 3 else cell.rjust(width)
                             for i, (cell, width) in enumerate(zip(line, widths))).rstrip() for line in lines)


EXPLANATION = """\
Nothing ran on a TPU: programs are compiled by libtpu and their final schedules read. Every row is one document (decode: 32
rows of one token each); segment ids and positions are arguments all the same. Cycles are per token of one device.
matrix, HBM, vector: the least by the formula (launch/benchmarks/kernels/bounds.py) at the chip's rates. vector: relu, weight
and sum over heads of the index scores, in select and kl_loss; the other ops have no such bound, since nobody has counted the
fewest slots of attention's exponentials, of Sinkhorn's rounds or of an activation. slots: the vector unit's in use.
schedule: all bundles of the program, XLA's parts included; time: per part the largest of its schedule, its HBM bytes and its
matmuls, summed; serial: the same where nothing overlaps. What the SparseCore does beside a kernel of the TensorCore takes
only its HBM bytes. ratio: time over the largest of the bounds. HBM MB: what the program moves; least: each
operand and result once. others: time of the fastest other side over ours. per unit: bundles per 8 tokens x 128 heads x 512
entries; fixed: what a block of queries costs before its tiles (all of it, where its entries are one tile or none), x bound:
over its matmuls; step: a grid step in the mean, and one that does nothing. times: how often a row runs the kernel, whose
HBM MB are those of all of them, and HBM, matrix, slots and bundles cycles per token of one device; the least bytes, the
bounds and the ratio are the whole row's. The SparseCore's own cycles are not known."""


def text(rows: Sequence[Row], found: Sequence[Row]) -> str:
  """Everything to print."""
  words = {True: "yes", False: "NO ", None: "not measured"}
  value = lambda target: "" if target["value"] is None else f": {target['value']:,.2f}"
  lines = [f"{words[target['reached']]}  {target['target']}{value(target)}" for target in found]
  parts = (table(rows), kernel_table(rows), EXPLANATION, "\n".join(lines), losses(rows), guesses(rows))
  return "\n\n".join(filter(None, parts))
