"""Rows of a bench: figures, ratios, the table, which targets are reached, the JSON file."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
from pathlib import Path
from typing import Any, Sequence

from launch.benchmarks import flops
from launch.benchmarks.cases import DECODE, NEW_TOKENS, OURS, PREFILL, THREADS, Case, Target, model_config, targets_of
from launch.benchmarks.missing import measured, said

Row = dict[str, Any]
_UNDISTURBED = 0.75  # matmul rates of a quiet machine stay above this share of the best
_PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "numpy", "torch", "transformers")


# ---- rows -------------------------------------------------------------------------------------------------------------
def _head(case: Case) -> Row:
  return {"case": case.name, "side": case.label, "kind": case.kind, "length": case.length, "ours": case.side == OURS,
          "variant": case.variant}


def failed_row(case: Case, reason: str) -> Row:
  """The row of a case that could not be measured."""
  return _head(case) | {"failed": reason}


def left_out_row(case: Case, reason: str) -> Row:
  """The row of a case that nobody waited for."""
  return _head(case) | {"left_out": reason}


def speed(case: Case, sample: dict[str, Any]) -> str:
  """What is said of one pass while others follow."""
  if case.kind != DECODE:
    return f"{case.length / sample['seconds']:,.0f} tokens/s"
  return (f"{case.length / sample['prefill_seconds']:,.0f} tokens/s prefill, "
          f"{NEW_TOKENS / sample['decode_seconds']:,.1f} decode")


def make_rows(case: Case, ready: dict[str, Any], samples: Sequence[dict[str, Any]]) -> list[Row]:
  """The row of a case; of decode: one of its prefill and one of its decoding, whose bytes are none of its own."""
  if case.kind != DECODE:
    return [make_row(case, ready, samples)]
  prefill, decode = (make_row(dataclasses.replace(case, kind=kind), ready,
                              [sample | {"seconds": sample[f"{kind}_seconds"]} for sample in samples], tokens)
                     for kind, tokens in ((PREFILL, case.length), (DECODE, NEW_TOKENS)))
  entries = flops.entries_per_token(model_config(), case.length)
  decode |= {"entries_per_token": entries, "seconds_per_entry": decode["seconds_per_token"] / entries,
             "peak_bytes": None, "activation_bytes_per_token": None, "compile_seconds": None}
  return [prefill, decode]


def make_row(case: Case, ready: dict[str, Any], samples: Sequence[dict[str, Any]], tokens: int | None = None) -> Row:
  """The figures of a case from what its worker said when it was ready and after each pass over `tokens`, default its length.

  Seconds are the median over the passes; the share of the matmul rate is the median of the shares pass by pass, each with
  the rate measured right behind it. Activation memory is the peak less what was resident before the first pass (weights,
  moments, compiled code).
  """
  tokens = case.length if tokens is None else tokens
  seconds = statistics.median(s["seconds"] for s in samples)
  work = flops.per_token(model_config(), case.length, case.kind)
  row = _head(case) | {
      "tokens_per_second": tokens / seconds, "seconds_per_token": seconds / tokens, "seconds_median": seconds,
      "seconds_min": min(s["seconds"] for s in samples), "repeats": len(samples),
      "compile_seconds": ready["compile_seconds"], "resident_bytes": ready["resident_bytes"], "peak_bytes": None,
      "activation_bytes_per_token": None, "flops_per_token": work,
      "matmul_flops_per_second": statistics.median(s["matmul_flops_per_second"] for s in samples),
      "matmul_flops_per_second_min": min(s["matmul_flops_per_second"] for s in samples),
      "matmul_share": statistics.median(work * tokens / s["seconds"] / s["matmul_flops_per_second"] for s in samples)}
  if ready["resident_bytes"] is not None:
    row["peak_bytes"] = max(s["peak_bytes"] for s in samples)
    row["activation_bytes_per_token"] = (row["peak_bytes"] - ready["resident_bytes"]) / tokens
  return row


def with_ratios(rows: Sequence[Row]) -> list[Row]:
  """Adds `ratio`, the other side's median seconds over ours for the same case, to our rows.

  The other side stands for itself with the faster of its ways that could be measured. The full step with Muon has no
  counterpart there, and so no ratio.
  """
  theirs = collections.defaultdict(list)
  for row in rows:
    if not row["ours"] and measured(row):
      theirs[row["case"]].append(row["seconds_median"])
  comparable = lambda row: row["ours"] and measured(row) and row["variant"] != "muon" and theirs[row["case"]]
  return [row | {"ratio": min(theirs[row["case"]]) / row["seconds_median"]} if comparable(row) else row for row in rows]


# ---- the table --------------------------------------------------------------------------------------------------------
_COLUMNS = (  # title, figure, unit's factor, format
    ("tokens/s", "tokens_per_second", 1, ",.0f"), ("us/token", "seconds_per_token", 1e6, ",.0f"),
    ("s", "seconds_median", 1, ".2f"), ("fastest", "seconds_min", 1, ".2f"),
    ("KiB/token", "activation_bytes_per_token", 2**-10, ",.0f"), ("compile s", "compile_seconds", 1, ".1f"),
    ("entries/token", "entries_per_token", 1, ",.0f"), ("MFLOP/token", "flops_per_token", 1e-6, ",.1f"),
    ("GF/s matmul", "matmul_flops_per_second", 1e-9, ",.0f"), ("share", "matmul_share", 100, ".0f"),
    ("ratio", "ratio", 1, ".2f"))


def table(rows: Sequence[Row]) -> str:
  """The rows as text; a figure that does not exist is a dash, one that no row has is left out."""
  columns = [column for column in _COLUMNS if any(row.get(column[1]) is not None for row in rows)]
  lines = [["case", "side", *(title for title, *_ in columns)]]
  for row in rows:
    cells = ["-" if row.get(figure) is None else format(row[figure] * factor, form) for _, figure, factor, form in columns]
    lines.append([row["case"], row["side"], *cells] if measured(row) else [row["case"], row["side"], said(row)])
  whole = [line for line in lines if len(line) > 3] or lines
  widths = [max(len(line[i]) for line in whole) for i in range(len(lines[0]))]
  widths[:2] = [max(len(line[i]) for line in lines) for i in range(2)]
  widths += [0] * (3 - len(widths))  # where no row has a figure, the reasons have no title
  text = []
  for line in lines:
    cells = [cell.ljust(width) if i < 2 or len(line) == 3 else cell.rjust(width)
             for i, (cell, width) in enumerate(zip(line, widths))]
    text.append("  ".join(cells).rstrip())
  return "\n".join(text)


EXPLANATION = """\
s and us/token: median over the passes; fastest: the fastest pass. KiB/token: peak of resident memory less what was resident
before the first pass (weights, moments, program). MFLOP/token: matmuls by the formula (launch/benchmarks/flops.py).
GF/s matmul: the machine's own float32 matmul, same library and process; share: what the case reaches of it, in percent.
ratio: the other side's time (the faster of its ways) over ours."""

DECODE_EXPLANATION = f"""\
prefill: a prompt in chunks; decode: {NEW_TOKENS} tokens after it, greedily, one after another. entries/token: what the
layers read of the cache for a token, by the formula: keys of windows, entries, index keys."""


# ---- targets ----------------------------------------------------------------------------------------------------------
def _value(target: Target, kind: str, rows: Sequence[Row]) -> float | None:
  """What was reached. A growth compares rows of the same variant: a longer row is not excused by recomputing less, nor
  blamed for recomputing more."""
  ours = [row for row in rows if row["ours"] and measured(row) and row["variant"] != "muon"]
  at = {(row["length"], row["variant"]): row.get(target.figure) for row in ours if row["kind"] == (target.kind or kind)}
  if not target.base_length:
    found = [value for (length, _), value in at.items() if length == target.length and value is not None]
    return max(found, default=None)
  for variant in ("", "remat"):
    long, short = at.get((target.length, variant)), at.get((target.base_length, variant))
    if long is not None and short:
      return long / short
  return None


def targets(kind: str, rows: Sequence[Row]) -> list[Row]:
  """Each target with its `value` and whether it is `reached`; None where the rows do not say."""
  found = []
  for target in targets_of(kind):
    value = _value(target, kind, rows)
    reached = value if value is None else value <= target.bound if target.base_length else value >= target.bound
    found.append({"target": f"{kind}: {target.text}", "bound": target.bound, "value": value, "reached": reached})
  return found


def target_lines(found: Sequence[Row]) -> str:
  """The targets as text."""
  words = {True: "yes", False: "NO ", None: "not measured"}
  return "\n".join(f"{words[t['reached']]}  {t['target']}" + (f": {t['value']:.2f}" if t["value"] is not None else "")
                   for t in found)


def losses(rows: Sequence[Row]) -> str:
  """A sentence that names the rows in which the other side is faster; empty if there is none."""
  lost = [f"{row['case']} {row['side']} ({row['ratio']:.2f})" for row in rows if row.get("ratio", 1) < 1]
  return f"Slower than the other side: {', '.join(lost)}." if lost else ""


def disturbances(rows: Sequence[Row]) -> str:
  """A sentence that names the rows during which the machine was busy otherwise; empty if there is none.

  The matmul rate behind some pass was then well below the best median of the same library.
  """
  rows = [row for row in rows if measured(row)]
  best = {ours: max((row["matmul_flops_per_second"] for row in rows if row["ours"] == ours), default=0)
          for ours in (True, False)}
  slow = [f"{row['case']} {row['side']}" for row in rows
          if row["matmul_flops_per_second_min"] < _UNDISTURBED * best[row["ours"]]]
  return f"The machine was busy otherwise, measure again: {', '.join(slow)}." if slow else ""


# ---- the file ---------------------------------------------------------------------------------------------------------
def machine() -> Row:
  """Processor, cores and memory of this machine."""
  found = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(), "threads": THREADS,
           "system": platform.platform()}
  for file, key, field in (("/proc/cpuinfo", "processor", "model name"), ("/proc/meminfo", "memory_bytes", "MemTotal")):
    try:
      line = next(line for line in Path(file).read_text().splitlines() if line.startswith(field))
    except (OSError, StopIteration):
      continue
    value = line.split(":", 1)[1].strip()
    found[key] = int(value.split()[0]) * 1024 if key == "memory_bytes" else value
  return found


def versions() -> dict[str, str]:
  """Versions of Python and of the libraries that are installed."""
  found = {"python": platform.python_version()}
  for name in _PACKAGES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


def origin() -> Row:
  """{"machine", "versions", "date"}: where figures come from."""
  date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
  return {"machine": machine(), "versions": versions(), "date": date}


def head() -> str:
  """The same in a line, for the top of whatever is printed."""
  found = origin()
  known = [f"{name} {version}" for name, version in found["versions"].items()]
  return ", ".join([found["machine"]["processor"], f"{found['machine']['cores']} cores", *known, found["date"]])


def write_json(path: str | Path, rows: Sequence[Row], found: Sequence[Row]) -> None:
  """{"machine", "versions", "date", "rows", "targets"}; the folder must exist."""
  content = {**origin(), "rows": list(rows), "targets": list(found)}
  Path(path).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
