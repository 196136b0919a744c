"""The recipe in miniature: each file trains small models on two CPU cores and shows a stage of V4's training at work.

A miniature is a module with
  DESCRIPTION            one line for the help text
  run(workdir, seeds, say) -> Result     trains, writes its picture into `workdir`, returns figures and targets
and stands in `NAMES`; `launch/miniature.py` calls it. What a miniature trains goes on from its own checkpoints when the same
command is given again. What may not live here: the recipe itself; a miniature puts parts of the libraries together.
"""

from __future__ import annotations

import dataclasses
from typing import Any

NAMES: tuple[str, ...] = ("depth", "optimizers", "specialists", "stability", "stages")


@dataclasses.dataclass(frozen=True)
class Result:
  """What a miniature found.

  Attributes:
    rows: of its table, column -> text or number; all rows have the same columns.
    targets: {"target": sentence, "bound": number, "value": number or None, "reached": bool or None} each.
    picture: file name inside the workdir.
  """

  rows: list[dict[str, Any]]
  targets: list[dict[str, Any]]
  picture: str
