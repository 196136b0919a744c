"""Compiles the cases of a topology one after another and makes their rows.

Ours come first, so that a bench whose time is over has them; last what takes the compiler longest.
"""

from __future__ import annotations

from typing import Any, Callable, Sequence

from launch.benchmarks.kernels import bounds, report
from launch.benchmarks.kernels.cases import BLOCKWISE, OURS, Case
from launch.benchmarks.kernels.chips import Chip, chip_of
from launch.benchmarks.kernels.compile import OTHERS_TIMEOUT, Compiler, Request
from launch.benchmarks.kernels.rows import row_of

BUILDER = "launch.benchmarks.kernels.build:program"


def request_of(case: Case) -> Request:
  """What a `Compiler` is asked for a case."""
  fields = {name: getattr(case, name) for name in ("op", "model", "length", "direction", "side")}
  return Request(f"{case.name}, {case.side}", BUILDER, fields, seconds=None if case.side == OURS else OTHERS_TIMEOUT)


def place_of(case: Case, chip: Chip) -> int:
  """In which of three groups a case is compiled: ours, others, and the one that the compiler takes longest for."""
  slow = (chip.name, case.op, case.side) == ("tpu7x", "attention_heavy", BLOCKWISE)
  return 0 if case.side == OURS else 1 + slow


def measure(topology: str, wanted: Sequence[Case], say: Callable[[str], None],
            minutes: float | None = None) -> list[dict[str, Any]]:
  """Rows of those of these cases whose arrays fit the chip's HBM, in their order; what does not fit is said.

  After `minutes` nothing more is compiled: {"case", ..., "left_out"} are the rows of the rest.

  Raises:
    ValueError: an unknown topology.
  """
  chip = chip_of(topology)
  left_out = sorted({case.name for case in wanted if not bounds.fits(case, chip)})
  if left_out:
    say(f"left out, more than the HBM of one {chip.name} device: {', '.join(left_out)}")
  wanted = [case for case in wanted if bounds.fits(case, chip)]
  with Compiler(topology) as compiler:
    ordered = sorted(wanted, key=lambda case: place_of(case, chip))
    answers = dict(zip(ordered, compiler.compile_all([request_of(case) for case in ordered], say, minutes)))
  return report.with_ratios([row_of(case, answers[case], chip) for case in wanted])
