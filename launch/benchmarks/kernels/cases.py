"""What the bench of the kernels compiles: op x model x length x direction, ours and what else a user could run. No JAX.

An op is named as on the command line. Lengths are tokens of one row, one document; segment ids and positions are arguments
like everything else, so the compiler cannot know that. Where the row is "decode", it is one token for each of a batch of
conversations at 64K tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Sequence

from pallas_kernels.shapes import DECODE_BATCH, DECODE_ENTRIES, LENGTHS, MODELS, Shapes

OURS, BLOCKWISE, SPLASH, RAGGED = "ours", "blockwise", "splash, dense mask", "ragged_dot"
SPLASH_RULE = "splash, rule"  # who sees which key is known when the program is traced; see `launch.benchmarks.splash`
FORWARD, GRADIENT = "forward", "gradient"  # the latter is forward and backward in one program
DECODE = 0  # in place of a length
EXPERT_PARALLEL = 64  # devices over which the experts of a layer are spread
# Queries of a sparse case, and of any beyond 64K tokens, the last ones of its context: all of a million have no room on one
# device.
SHARE = 16384
SPLASH_BLOCK = 512  # queries, keys of a step with a dense mask
SPLASH_LENGTHS = (4096, 16384)  # the dense mask [S, 1.25 S] of longer rows takes gigabytes


@dataclasses.dataclass(frozen=True)
class Op:
  """An operation of the bench.

  Attributes:
    name: on the command line.
    sides: who can run it, ours first.
    directions: FORWARD, and GRADIENT where it is differentiable.
    lengths: those that make sense; None = all.
    decode: whether there is a decode shape.
    fixed: the lengths are compiled whichever are asked for.
  """

  name: str
  sides: tuple[str, ...]
  directions: tuple[str, ...] = (FORWARD, GRADIENT)
  lengths: tuple[int, ...] | None = None
  decode: bool = False
  fixed: bool = False


OPS = (
    Op("attention", (OURS, BLOCKWISE, SPLASH), decode=True),  # selected entries, one per 4 tokens
    Op("attention_sparse", (OURS,), lengths=(2**16, 2**20), fixed=True),  # the same, each query reads its entries alone
    Op("attention_heavy", (OURS, BLOCKWISE, SPLASH, SPLASH_RULE), decode=True),  # every entry, one per 128 tokens
    Op("attention_window", (OURS, BLOCKWISE, SPLASH, SPLASH_RULE), lengths=(4096,)),  # no entries
    Op("select", (OURS, BLOCKWISE), directions=(FORWARD,), decode=True),
    Op("kl_loss", (OURS, BLOCKWISE)),
    Op("collapse", (OURS, BLOCKWISE), lengths=(4096,), decode=True),
    Op("expand", (OURS, BLOCKWISE), lengths=(4096,), decode=True),
    Op("expand_collapse", (OURS, BLOCKWISE), lengths=(4096,), decode=True),
    Op("experts", (OURS, BLOCKWISE, RAGGED), lengths=(4096,), decode=True),
)
BY_NAME = {op.name: op for op in OPS}


@dataclasses.dataclass(frozen=True)
class Case:
  """One program.

  Attributes:
    op: name of an `Op`.
    model: "flash" or "pro".
    length: tokens, or DECODE.
    direction: FORWARD or GRADIENT.
    side: whose.
  """

  op: str
  model: str
  length: int
  direction: str
  side: str = OURS

  @property
  def shapes(self) -> Shapes:
    return MODELS[self.model]

  @property
  def batch(self) -> int:
    return 1 if self.length else DECODE_BATCH

  @property
  def queries(self) -> int:
    """Tokens of a row that ask."""
    part = self.op == "attention_sparse" or self.length > LENGTHS[-1]
    return min(self.length, SHARE) if part else self.length or 1

  @property
  def past(self) -> int:
    """Keys of earlier tokens that a row's queries are given, as the model gives them in decoding."""
    return 0 if self.length else self.shapes.window - 1

  @property
  def tokens(self) -> int:
    """Tokens of all rows."""
    return self.batch * self.queries

  @property
  def rate(self) -> int:
    """Tokens per entry; 0 = no entries."""
    return {"attention_heavy": self.shapes.heavy_rate, "attention_window": 0}.get(self.op, self.shapes.light_rate)

  @property
  def entries(self) -> int:
    """Entries of a row."""
    context = self.length or DECODE_ENTRIES * self.shapes.light_rate
    return context // self.rate if self.rate else 0

  @property
  def experts(self) -> int:
    """Routed experts on one device."""
    return self.shapes.experts // EXPERT_PARALLEL

  @property
  def rows(self) -> int:
    """Routed rows on one device: as many as its own tokens ask for."""
    return self.tokens * self.shapes.picks

  @property
  def name(self) -> str:
    size = f"{self.length:,}" if self.length else f"decode {DECODE_BATCH}"
    return f"{self.op} {self.direction} {self.model} {size}"


def all_cases(ops: Sequence[str], lengths: Sequence[int], models: Sequence[str] = tuple(MODELS)) -> list[Case]:
  """The cases of these ops at these lengths, the sides of a program behind each other, decode shapes behind the lengths."""
  found = []
  for op in (BY_NAME[name] for name in ops):
    wanted = [length for length in lengths if op.lengths is None or length in op.lengths] or [*(op.lengths or ())][:1]
    wanted = [*op.lengths] if op.fixed else wanted
    for model in models:
      for direction in op.directions:
        for length in wanted + [DECODE] * (op.decode and direction == FORWARD):
          sides = [side for side in op.sides if side not in (SPLASH, SPLASH_RULE) or length in SPLASH_LENGTHS]
          found += [Case(op.name, model, length, direction, side) for side in sides]
  return [case for case in found if case.op != "select" or case.entries > case.shapes.top_k]  # else nothing is selected


def ops_from(texts: Sequence[str]) -> tuple[str, ...]:
  """Ops as given on the command line.

  Raises:
    ValueError: one that does not exist.
  """
  for text in texts:
    if text not in BY_NAME:
      raise ValueError(f"--ops = {text!r}: expected some of {', '.join(BY_NAME)}, with commas between them")
  return tuple(op.name for op in OPS if op.name in texts)


def lengths_from(texts: Sequence[str]) -> tuple[int, ...]:
  """Lengths as given on the command line.

  Raises:
    ValueError: one of them is no multiple of 128 from 512 to 1,048,576.
  """
  for text in texts:
    if not text.strip().isdecimal() or not 512 <= int(text) <= 2**20 or int(text) % 128:
      raise ValueError(f"--lengths = {text!r}: expected multiples of 128 from 512 to {2**20}, with commas between them")
  return tuple(sorted({int(text) for text in texts})) or LENGTHS


def models_from(texts: Sequence[str]) -> list[str]:
  """Models as given on the command line.

  Raises:
    ValueError: one that does not exist.
  """
  for text in texts:
    if text not in MODELS:
      raise ValueError(f"--models = {text!r}: expected some of {', '.join(MODELS)}, with commas between them")
  return [name for name in MODELS if name in texts]
