"""What the TPU's compiler says of a layer's routed experts on several devices, in both ways of `model/experts.py`.

One device's part of V4-Pro's or Flash's experts, bfloat16, forward and backward as a training step runs them once: the
program's HBM beside weights and tokens, and the collectives by kind.

Axis letters: B rows, one for each device   S tokens of a device   D hidden size   E experts   F expert width
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from deepseek_v4 import sharding
from deepseek_v4.model import exchange
from deepseek_v4.model.experts import GATHERED, SENT, num_waves, routed
from deepseek_v4.training.step import COMPILER_OPTIONS
from launch.benchmarks import missing
from launch.benchmarks.kernels.compile import Compiler, Request
from launch.benchmarks.memory.run import AXES, devices_of
from pallas_kernels.grouped_matmul import padded_rows, row_tile
from pallas_kernels.shapes import MODELS

FORMS = ("gather", "all_to_all")
LENGTH = 4096  # tokens of a device
_TOKENS, _GATE, _DOWN = ("batch", "sequence"), ("expert", None, "mlp"), ("expert", "mlp", None)

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Case:
  """One program: `form` of the exchange, `tokens` of each of `devices` devices, `model` whose experts they share."""

  form: str
  tokens: int
  devices: int
  model: str = "pro"

  @property
  def name(self) -> str:
    return f"{self.model} {self.tokens:,}, {self.form}"

  @property
  def rows(self) -> int:
    """Rows that a device has room for at a time: of all tokens that are gathered, or of a pass of the exchange."""
    shapes = MODELS[self.model]
    experts = shapes.experts // self.devices
    wave = {"gather": GATHERED, "all_to_all": SENT * self.devices}[self.form]
    tokens = -(-self.tokens // num_waves(self.tokens, self.devices, wave))
    tile = row_tile(tokens * shapes.picks, experts, "pallas")
    if self.form == "gather":
      return padded_rows(tokens * self.devices * shapes.picks, experts, tile)
    return exchange.room_for(tokens * shapes.picks, experts, tile)


def program(**fields: Any) -> tuple[Callable[..., Any], tuple[Any, ...], Any, Any]:
  """(fn, operands, their PartitionSpecs, those of the results) of the case with these fields."""
  case = Case(**fields)
  shapes = MODELS[case.model]
  array = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
  x = array(case.devices, case.tokens, shapes.hidden)
  picks = (case.devices, case.tokens, shapes.picks)
  matrix = (shapes.experts, shapes.hidden, shapes.expert_width)
  matrices = array(*matrix), array(*matrix), array(shapes.experts, shapes.expert_width, shapes.hidden)
  axes = (_TOKENS, _TOKENS, _GATE, _GATE, _DOWN)

  def both(experts_BSk, moving, d_BSD):
    run = functools.partial(routed, limit=shapes.expert_limit, kernels="pallas", exchange=case.form,
                            expert_axis=sharding.weight_axes("expert", shapes.experts) or None,
                            width_axis=sharding.axis_name("mlp"))
    run = sharding.per_shard(run, (_TOKENS, *axes), _TOKENS)
    y_BSD, pull = jax.vjp(lambda x, *rest: run(x, experts_BSk, *rest), *moving)
    return y_BSD, pull(d_BSD)

  tokens, specs = sharding.spec(_TOKENS), tuple(map(sharding.spec, axes))
  operands = array(*picks, dtype=jnp.int32), (x, array(*picks, dtype=jnp.float32), *matrices), x
  return both, operands, (tokens, specs, tokens), (tokens, specs)


def row_of(case: Case, answer: Mapping[str, Any]) -> Row:
  """Figures of one device, bytes; a ragged exchange counts as if its room were filled."""
  row = {"case": case.name, **dataclasses.asdict(case), "rows": case.rows}
  if not answer["ok"]:
    return row | missing.of_answer(answer)
  return row | {"temporaries": answer["memory"]["temp"], "traffic": answer["traffic"], "seconds": answer["seconds"]}


def measure(topology: str, lengths: Sequence[int], models: Sequence[str], say: Callable[[str], None],
            minutes: float | None = None) -> list[Row]:
  """Rows of both forms at each length, experts over all devices of the topology; `minutes`: see `Compiler.compile_all`."""
  devices = devices_of(topology)
  wanted = [Case(form, length, devices, model) for model in models for length in lengths for form in FORMS]
  mesh = dict.fromkeys(AXES, 1) | {"expert": devices}
  requests = [Request(case.name, f"{__name__}:program", dataclasses.asdict(case), mesh, COMPILER_OPTIONS["tpu"])
              for case in wanted]
  with Compiler(topology, schedules=False) as compiler:
    return [row_of(case, answer) for case, answer in zip(wanted, compiler.compile_all(requests, say, minutes))]


def table(rows: Sequence[Row]) -> str:
  """The rows as text."""
  lines = [["experts of", "tokens", "devices", "form", "rows' room", "temporaries", "moved (+ by each further pass)"]]
  for row in rows:
    head = [row["model"], f"{row['tokens']:,}", str(row["devices"]), row["form"], f"{row['rows']:,}"]
    if not missing.measured(row):
      lines.append([*head, missing.said(row)[:160], ""])
      continue
    gib = lambda size: f"{size / 2**30:.2f}"
    moved = ", ".join(f"{kind} {gib(found['bytes'])} GiB" + f" (+ {gib(found['more'])})" * bool(found["more"]) +
                      f", {found['started']} of {found['count']} beside other work"
                      for kind, found in row["traffic"].items() if found["bytes"] + found["more"] >= 2**20)
    lines.append([*head, f"{row['temporaries'] / 2**30:.2f} GiB", moved])
  widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
  return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)
