"""The figures of either side's compiled step, from its text by the same rules."""

from __future__ import annotations

import math
from typing import Any

from deepseek_v4.planning import collectives, dots, read
from launch.benchmarks.maxtext.cases import HIDDEN, PICKS, Case

Figures = dict[str, Any]


def of_program(case: Case, text: str, memory: dict[str, int], hbm_bytes: int) -> Figures:
  """"fits" and "all" as `launch.plan` says them, TFLOP of matmuls outside kernels, GB that travel."""
  found = collectives.collectives(text)
  parts = {name: memory[name] for name in ("arguments", "outputs", "temporaries", "code")}
  whole = sum(parts.values()) - memory["aliased"]
  return {**memory, "all": whole, "fits": read.fits({"all": whole}, hbm_bytes),
          "matmuls": float(dots.flops(text)["dots"]), "travels": float(sum(once(case, one) for one in found)),
          "collectives": {kind: row["count"] for kind, row in collectives.traffic(found).items()}}


def once(case: Case, one: collectives.Collective) -> float:
  """Bytes that a chip receives in all runs of a collective; of a ragged exchange the rows that come when experts are picked
  evenly, whatever room there is. One in a loop of unknown length does not run then."""
  runs = one.runs or 0
  if one.kind != "ragged-all-to-all":
    return runs * one.bytes
  shape = one.arrays[1 if one.named else 0][1]
  return runs * one.bytes * min(1.0, rows_of(case, shape) / shape[0])


def rows_of(case: Case, shape: tuple[int, ...]) -> float:
  """Rows of a ragged exchange of a whole pass, however a row is cut; what is not rows of the model counts in full."""
  return case.tokens * PICKS if math.prod(shape[1:]) == HIDDEN else shape[0]
