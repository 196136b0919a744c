"""Compiles the cases of a topology one after another and makes their rows."""

from __future__ import annotations

from typing import Any, Callable, Sequence

from launch.benchmarks.kernels import report
from launch.benchmarks.kernels.cases import Case
from launch.benchmarks.kernels.chips import chip_of
from launch.benchmarks.kernels.compile import Compiler, Request
from launch.benchmarks.kernels.rows import row_of

BUILDER = "launch.benchmarks.kernels.build:program"


def request_of(case: Case) -> Request:
  """What a `Compiler` is asked for a case."""
  fields = {name: getattr(case, name) for name in ("op", "model", "length", "direction", "side")}
  return Request(f"{case.name}, {case.side}", BUILDER, fields)


def measure(topology: str, wanted: Sequence[Case], say: Callable[[str], None]) -> list[dict[str, Any]]:
  """Rows of these cases.

  Raises:
    ValueError: an unknown topology.
  """
  chip = chip_of(topology)
  with Compiler(topology) as compiler:
    answers = compiler.compile_all([request_of(case) for case in wanted], say)
  return report.with_ratios([row_of(case, answer, chip) for case, answer in zip(wanted, answers)])
