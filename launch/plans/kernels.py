"""What the Pallas kernels of a traced program cost one device, from the shapes of each call.

A kernel takes the longest of: its matmuls at the chip's rate, masked pairs and padded rows included; its HBM bytes; of the
indexer's selection the vector unit's work; and the bundles of the compiler's schedule where they were asked for
(`bundles.py`). How often a tile is visited depends on the data; here a row is one document, a device has the last of a row's
queries, who see most and whom the others wait for, and every expert gets as many rows as any other.

Axis letters of shapes: B rows   S queries   H heads   d width   T entries   E experts   D hidden size   F expert width
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Iterator, Mapping, Sequence

from deepseek_v4 import sharding
from deepseek_v4.config import CSA, HCA, ModelConfig
from deepseek_v4.model import experts as routed
from launch.benchmarks.kernels import bounds, plans, program
from launch.benchmarks.kernels.chips import Chip
from pallas_kernels.shapes import Shapes

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Pass:
  """What all devices compute at a time: `rows` of `tokens` each, the last ones of a context of `length`."""

  model: ModelConfig
  rows: int
  tokens: int
  length: int
  attention_mode: str
  mesh: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Traced:
  """A Pallas call of a program.

  Attributes:
    call: its grid and windows.
    operands: their shapes.
    flops: what its author declares; 0 = nothing.
    matmuls: in its body, as written.
    times: executions, scans multiplied out; None inside a loop whose length is known at run time only.
    equation: of the jaxpr.
  """

  call: program.Call
  operands: tuple[Shape, ...]
  flops: int
  matmuls: int
  times: int | None
  equation: Any = dataclasses.field(default=None, compare=False, repr=False)

  @property
  def signature(self) -> str:
    """The same for calls that the compiler makes the same code of."""
    return f"{self.call.name} {self.call.grid} {self.operands} {self.matmuls}"


@dataclasses.dataclass(frozen=True)
class Local:
  """The part of an op that one device does, with the fields of a bench's `Case` that bounds and plans read."""

  op: str
  batch: int
  queries: int
  length: int
  rate: int
  entries: int
  shapes: Shapes
  rows: int = 0
  experts: int = 1
  direction: str = "forward"
  past: int = 0

  @property
  def tokens(self) -> int:
    return self.batch * self.queries


@dataclasses.dataclass(frozen=True)
class Cost:
  """Of one execution on one device: FLOPs that it multiplies, HBM bytes, and the least seconds."""

  flops: float
  bytes: float
  seconds: float


# ---- finding them -----------------------------------------------------------------------------------------------------
def traced_calls(jaxpr: Any, times: int | None = 1) -> Iterator[Traced]:
  """The Pallas calls of a jaxpr in program order."""
  for equation in jaxpr.eqns:
    name, params = equation.primitive.name, equation.params
    if name == "pallas_call":
      estimate = params.get("cost_estimate")
      (call,) = program.calls(_Alone([equation]))
      yield Traced(call, tuple(tuple(x.aval.shape) for x in equation.invars), int(estimate.flops) if estimate else 0,
                   _matmuls(params["jaxpr"]), times, equation)
      continue
    inner = times
    if name == "scan" and times is not None:
      inner = times * params["length"]
    elif name == "while":
      inner = None
    for other in inner_jaxprs(params):
      yield from traced_calls(other, inner)


@dataclasses.dataclass(frozen=True)
class _Alone:
  """What looks like a jaxpr with these equations."""

  eqns: list[Any]


def inner_jaxprs(params: Mapping[str, Any]) -> Iterator[Any]:
  """The jaxprs among an equation's parameters."""
  for value in params.values():
    for inner in value if isinstance(value, (tuple, list)) else (value,):
      inner = getattr(inner, "jaxpr", inner)
      if hasattr(inner, "eqns"):
        yield inner


def _matmuls(jaxpr: Any) -> int:
  return sum((equation.primitive.name == "dot_general") + sum(map(_matmuls, inner_jaxprs(equation.params)))
             for equation in jaxpr.eqns)


# ---- which op ---------------------------------------------------------------------------------------------------------
def local_of(traced: Traced, one: Pass) -> Local | None:
  """The op of a call on one device of a mesh; None for a kernel whose cost follows from its grid alone."""
  name = traced.call.name
  if name.startswith("experts_"):
    return _experts(name, one)
  heads, batch, entries = _sizes(traced)
  if heads is None:
    return None
  rate = _rate(one, entries) if entries else 0
  op = {"index_select": "select"}.get(name, "kl_loss" if name.startswith("index_loss") else "attention")
  if op == "attention" and rate != one.model.csa_compress_rate:
    op = "attention_heavy" if rate else "attention_window"
  # Keys of the tokens before a part of a sequence come from its neighbour, or from the cache.
  past = one.model.sliding_window - 1 if one.tokens < one.length or one.mesh["context"] > 1 else 0
  return Local(op, batch, one.tokens // one.mesh["context"], one.length, rate, one.length // rate if rate else 0,
               _shapes(one, heads), past=past if op.startswith("attention") else 0)


def _sizes(traced: Traced) -> tuple[int | None, int, int]:
  """(heads, rows of the batch, entries of a row, padded) of a call that attends or scores."""
  name, call, shapes = traced.call.name, traced.call, traced.operands
  if name.startswith("masked_attention"):
    queries, tile = call.blocks[1][1], call.blocks[2][1]
    entries = shapes[5][1]
    # Where all entries are one tile a block meets them together with its window, else there is a pair of matmuls for each.
    lone = entries == tile and traced.matmuls > (5 if name.endswith("backward") else 2)
    return call.blocks[0][1] // queries, shapes[3][0], 0 if lone else entries
  if name.startswith("index_loss"):
    return shapes[4][2], shapes[1][0], shapes[3][1]
  if name == "index_select":
    return shapes[1][2], shapes[1][0], shapes[4][1]
  return None, 0, 0


def _rate(one: Pass, entries: int) -> int:
  """The rate of which a whole row has about so many entries."""
  distance = lambda rate: abs(math.log(entries * rate / one.length))
  return min((one.model.compress_rate(kind) for kind in (CSA, HCA)), key=distance)


def _shapes(one: Pass, heads: int, width: int = 0) -> Shapes:
  c = one.model
  top_k = c.index_topk if one.attention_mode == "sparse" else c.max_position_embeddings
  return Shapes(heads, top_k, c.hidden_size, c.n_routed_experts, width or c.moe_intermediate_size, c.head_dim,
                c.sliding_window, c.index_n_heads, c.index_head_dim, c.csa_compress_rate, c.hca_compress_rate, c.hc_mult,
                c.num_experts_per_tok, c.swiglu_limit)


def _experts(name: str, one: Pass) -> Local:
  """Rows that a device works on at a time: its share of all picks."""
  c, mesh = one.model, one.mesh
  shards = math.prod(mesh[axis] for axis in sharding.split_over("expert", c.n_routed_experts, mesh))
  tokens = one.rows // math.prod(mesh[axis] for axis in sharding.BATCH_AXES) * one.tokens // mesh["context"]
  way = c.expert_exchange
  if way == "auto" or shards == 1:
    way = routed.cheaper_exchange(tokens, c.num_experts_per_tok, c.n_routed_experts // shards, shards, c.compute_dtype,
                                  False)
  waves = routed.num_waves(tokens, shards, {"gather": routed.GATHERED, "all_to_all": routed.SENT * shards}[way])
  return Local(name, 1, 1, 1, 0, 0, _shapes(one, 1, c.moe_intermediate_size // mesh["tensor"]),
               rows=-(-tokens // waves) * c.num_experts_per_tok, experts=c.n_routed_experts // shards)


# ---- what they cost ---------------------------------------------------------------------------------------------------
def cost(traced: Traced, local: Local | None, chip: Chip, bundles: float = 0.0) -> Cost:
  """One execution's cost; without a plan of how often its regions run, a kernel does what its author declares.

  Args:
    bundles: of a core's schedule; 0 = not known.
  """
  plan = plans.plan_of(traced.call.name, local, traced.call, chip)
  if plan is None:
    steps = float(plans.grid_steps(traced.call))
    plan = plans.Plan((), "", steps, steps)
  flops = plan.flops or traced.flops
  cores = min(chip.cores, traced.call.parallel)
  size = program.window_bytes(traced.call, plan.steps, plan.visits, cores=cores) + plan.copied
  vector = bounds.least(local).vector / chip.cores if local and local.op == "select" else 0.0
  return Cost(flops, size, max(flops / chip.flops_per_cycle, size / chip.bytes_per_cycle, vector, bundles) / chip.clock)


def total(calls: Sequence[Traced], executed: Mapping[str, int], one: Pass, chip: Chip,
          bundles: Mapping[str, float]) -> dict[str, dict[str, float]]:
  """By kernel: "calls" of a step, "flops", "bytes" and "seconds" of all of them together.

  Args:
    executed: calls of each kernel in the compiled program, loops multiplied out; what the compiler left out or made twice is
      as dear as the mean call.
    bundles: by signature.
  """
  found: dict[str, list[tuple[int, Cost]]] = {}
  for traced in calls:
    if traced.times:
      price = cost(traced, local_of(traced, one), chip, bundles.get(traced.signature, 0.0))
      found.setdefault(traced.call.name, []).append((traced.times, price))
  table = {}
  for name, costs in sorted(found.items()):
    share = executed.get(name, 0) / sum(times for times, _ in costs)
    table[name] = {"calls": executed.get(name, 0)}
    for field in ("flops", "bytes", "seconds"):
      table[name][field] = share * sum(times * getattr(one, field) for times, one in costs)
  return table
