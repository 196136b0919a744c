"""What `python -m launch.bench memory` compiles: attention of one layer, forward and backward, heads split over a mesh."""

from __future__ import annotations

import dataclasses
from typing import Sequence

from pallas_kernels.shapes import MODELS, Shapes

OURS, BLOCKWISE, SPLASH, FORMULA = "ours", "blockwise", "splash, dense mask", "jnp, dense mask"
SIDES = (OURS, BLOCKWISE, SPLASH, FORMULA)
CSA, HCA, SLIDING = "compressed_sparse_attention", "heavily_compressed_attention", "sliding_attention"
KINDS = (CSA, HCA, SLIDING)
LENGTH = 65536
LIMIT = 1.5 * 2**30  # bytes of a chip that ours may take


@dataclasses.dataclass(frozen=True)
class Case:
  """One program.

  Attributes:
    kind: of the layer.
    side: whose attention.
    length: tokens of the one row.
    devices: over which the heads are split.
    model: whose widths.
  """

  kind: str
  side: str
  length: int
  devices: int
  model: str = "pro"

  @property
  def shapes(self) -> Shapes:
    return MODELS[self.model]

  @property
  def entries(self) -> int:
    rate = {CSA: self.shapes.light_rate, HCA: self.shapes.heavy_rate}.get(self.kind)
    return self.length // rate if rate else 0

  @property
  def name(self) -> str:
    return f"{self.kind} {self.length:,}"

  @property
  def operand_bytes(self) -> int:
    """q, the output and their gradients on one device, bfloat16."""
    return 4 * self.length * self.shapes.heads // self.devices * self.shapes.width * 2


def all_cases(lengths: Sequence[int], devices: int) -> list[Case]:
  """Every kind of layer and every side at these lengths."""
  return [Case(kind, side, length, devices) for length in lengths for kind in KINDS for side in SIDES]
