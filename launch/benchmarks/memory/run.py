"""Compiles the cases for a mesh over all devices of a topology and makes their rows and the table."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any, Callable, Mapping, Sequence

from deepseek_v4.config import MeshConfig
from launch.benchmarks import missing
from launch.benchmarks.kernels.compile import OTHERS_TIMEOUT, Compiler, Request
from launch.benchmarks.memory.cases import KINDS, LIMIT, OURS, Case, all_cases

BUILDER = "launch.benchmarks.memory.build:program"
AXES = MeshConfig.axis_names
# The compiler's words for a program that does not fit.
_TOO_LARGE = re.compile(r"memory required for HLO temporaries \(([\d.]+)([KMGT])\)")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}

Row = dict[str, Any]


def devices_of(topology: str) -> int:
  """JAX devices of a topology whose devices are chips or halves of one."""
  name, shape = topology.lower().split(":")
  return math.prod(map(int, shape.split("x"))) * (2 if name == "tpu7x" else 1)


def row_of(case: Case, answer: Mapping[str, Any]) -> Row:
  """Bytes of one device; `beside` is what the program takes beside q, the output and their gradients.

  Of a program that does not fit `needed` is what the compiler says that it needs.
  """
  row = {"case": case.name, "side": case.side, "ours": case.side == OURS, "operand_bytes": case.operand_bytes}
  if "left_out" in answer:
    return row | missing.of_answer(answer)
  if answer["ok"]:
    memory = answer["memory"]
    return row | {"beside": memory["temp"], "total": memory["total"], "compile_seconds": answer["seconds"]}
  needed = _TOO_LARGE.search(answer["error"])
  return row | {"failed": answer["error"]} | ({"needed": float(needed[1]) * _UNITS[needed[2]]} if needed else {})


def compiled(topology: str, lengths: Sequence[int], sides: Sequence[str], say: Callable[[str], None],
             kinds: Sequence[str] = KINDS, minutes: float | None = None) -> list[tuple[Case, dict[str, Any]]]:
  """The cases of these kinds of layers and sides, heads over all devices of the topology, with the compiler's answers.

  Ours are compiled first; after `minutes` nothing more is.
  """
  devices = devices_of(topology)
  wanted = [case for case in all_cases(lengths, devices) if case.side in sides and case.kind in kinds]
  mesh = dict.fromkeys(AXES, 1) | {"tensor": devices}
  ordered = sorted(wanted, key=lambda case: case.side != OURS)
  requests = [Request(f"{case.name}, {case.side}", BUILDER, dataclasses.asdict(case), mesh,
                      seconds=None if case.side == OURS else OTHERS_TIMEOUT) for case in ordered]
  with Compiler(topology, schedules=False) as compiler:
    answers = dict(zip(ordered, compiler.compile_all(requests, say, minutes)))
  return [(case, answers[case]) for case in wanted]


def measure(topology: str, lengths: Sequence[int], sides: Sequence[str], say: Callable[[str], None],
            kinds: Sequence[str] = KINDS, minutes: float | None = None) -> list[Row]:
  """The rows of what `compiled` compiles."""
  return [row_of(*pair) for pair in compiled(topology, lengths, sides, say, kinds, minutes)]


def table(rows: Sequence[Row]) -> str:
  """The rows as text, GiB of one device."""
  lines = [["case", "side", "q, out and gradients", "beside them"]]
  for row in rows:
    if "beside" in row:
      beside = f"{row['beside'] / 2**30:.2f}"
    elif "needed" in row:
      beside = f"does not fit: {row['needed'] / 2**30:,.0f}"
    else:
      beside = missing.said(row)[:160]
    lines.append([row["case"], row["side"], f"{row['operand_bytes'] / 2**30:.2f}", beside])
  widths = [max(len(line[column]) for line in lines) for column in range(4)]
  return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def targets(rows: Sequence[Row]) -> list[Row]:
  """The one target, as those of the kernels; GiB."""
  values = [row["beside"] / 2**30 for row in rows if row["ours"] and "beside" in row]
  value, bound = max(values, default=None), LIMIT / 2**30
  return [{"target": f"ours, at most {bound:g} GiB beside q, out and their gradients", "bound": bound, "value": value,
           "reached": None if value is None else value <= bound}]
