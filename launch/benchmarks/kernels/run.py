"""Compiles the cases of a topology one after another and makes their rows."""

from __future__ import annotations

from typing import Any, Callable, Sequence

from launch.benchmarks.kernels import bounds, report
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
  """Rows of those of these cases whose arrays fit the chip's HBM; what does not is said.

  Raises:
    ValueError: an unknown topology.
  """
  chip = chip_of(topology)
  left_out = sorted({case.name for case in wanted if not bounds.fits(case, chip)})
  if left_out:
    say(f"left out, more than the HBM of one {chip.name} device: {', '.join(left_out)}")
  wanted = [case for case in wanted if bounds.fits(case, chip)]
  with Compiler(topology) as compiler:
    answers = compiler.compile_all([request_of(case) for case in wanted], say)
  return report.with_ratios([row_of(case, answer, chip) for case, answer in zip(wanted, answers)])
