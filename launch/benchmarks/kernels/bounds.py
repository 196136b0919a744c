"""The least work of a case by the formula: matmul FLOPs, and HBM bytes with every operand and result once.

Rows are one document. Query t sees min(t + 1, window) keys of the window and (t + 1) // rate entries, of which at most
`top_k` are selected. A backward pass multiplies five times where the forward pass of attention multiplies twice.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from launch.benchmarks.kernels.cases import GRADIENT, Case
from launch.benchmarks.kernels.chips import Chip

# Cycles of the vector unit for relu, weight and sum over heads of one index score and one head: 270 for 8 queries x 512
# entries x 64 heads, four slots a cycle.
SCORE_SLOTS = 270 / (8 * 512 * 64)


@dataclasses.dataclass(frozen=True)
class Least:
  """Of one device, all its tokens.

  Attributes:
    flops: of the matmuls.
    bytes: read from and written to HBM.
    row_bytes: the same if every query reads its selected entries for itself, as the sparse form of attention must.
    vector: cycles of one core's vector unit for what needs no matmul, where that is known: index scores; else 0.
  """

  flops: float
  bytes: float
  row_bytes: float
  vector: float = 0.0


def _positions(case: Case) -> np.ndarray:
  """Of a row's queries, which are the last tokens of its context."""
  return case.length - case.queries + np.arange(case.queries)


def visible(case: Case) -> np.ndarray:
  """Entries that each query of a row sees, float64 [S]."""
  if not case.rate:
    return np.zeros(case.queries)
  if not case.length:
    return np.array([float(case.entries)])
  return np.minimum((_positions(case) + 1.0) // case.rate, case.entries)


def selected(case: Case) -> np.ndarray:
  """Entries that each query of a row attends to, [S]."""
  return visible(case) if case.op == "attention_heavy" else np.minimum(visible(case), case.shapes.top_k)


def _total(numbers: np.ndarray) -> float:
  return float(numbers.sum())


def word_bytes(case: Case) -> float:
  """A bit per query and entry, in words of 32 and whole groups of 128 words."""
  return case.tokens * 512.0 * -(-case.entries // 4096)


def _window(case: Case) -> float:
  """Keys of the window that all queries of a row see, summed."""
  seen = _positions(case) + 1 if case.length else case.past + 1 + np.arange(case.queries)
  return _total(np.minimum(seen, case.shapes.window))


def least(case: Case) -> Least:
  """See `Least`."""
  return {"select": _select, "kl_loss": _kl_loss, "collapse": _mixing, "expand": _mixing, "expand_collapse": _mixing,
          "experts": _experts}.get(case.op, _attention)(case)


def fits(case: Case, chip: Chip) -> bool:
  """Whether queries, outputs and their gradients, the largest arrays by far, leave room in the chip's HBM; of experts their
  rows, inner ones too."""
  s, gradient = case.shapes, case.direction == GRADIENT
  if case.op == "experts":  # in and out; gate, up and their product
    return case.rows * (2 * s.hidden + 3 * s.expert_width) * (1 + gradient) * 2 < 0.8 * chip.hbm_bytes
  arrays = {"attention": 2, "attention_sparse": 2, "attention_heavy": 2, "attention_window": 2, "kl_loss": 1}.get(case.op, 0)
  if gradient and case.op != "kl_loss":
    arrays *= 2
  return arrays * case.tokens * s.heads * s.width * 2 < 0.8 * chip.hbm_bytes


def _attention(case: Case) -> Least:
  s, gradient = case.shapes, case.direction == GRADIENT
  pairs = case.batch * (_window(case) + _total(selected(case)))
  rows, statistics = case.tokens * s.heads * s.width * 2, case.tokens * s.heads * 4
  entries = min(case.entries, _total(selected(case)))  # that anybody reads
  keys = (case.tokens + case.batch * (case.past + entries)) * s.width * 2
  words = _selection_bytes(case)
  moved = 2 * rows + statistics + keys + words
  if gradient:  # q, out, d out and lse in, dq out; keys in, their gradients out
    moved += 4 * rows + 2 * statistics + 2 * keys + words
  gathered = case.batch * (_total(selected(case)) - entries) * s.width * 2
  row_bytes = moved + gathered * (2 if gradient else 1)  # both passes read; gradients of rows may add up on the chip
  moved = row_bytes if case.op == "attention_sparse" else moved
  return Least((14 if gradient else 4) * s.heads * s.width * pairs, moved, row_bytes)


def _selection_bytes(case: Case) -> float:
  everything = case.op not in ("attention", "attention_sparse", "kl_loss") or case.entries <= case.shapes.top_k
  return 0.0 if everything else word_bytes(case)


def _index_bytes(case: Case) -> float:
  s = case.shapes
  return case.tokens * s.index_heads * (s.index_width * 2 + 4) + case.batch * case.entries * s.index_width * 2


def _select(case: Case) -> Least:
  s = case.shapes
  moved = _index_bytes(case) + word_bytes(case)
  pairs = case.batch * _total(visible(case))
  return Least(2 * s.index_heads * s.index_width * pairs, moved, moved, pairs * SCORE_SLOTS * s.index_heads)


def _kl_loss(case: Case) -> Least:
  """Forward: scores of both. Backward: attention's again, the indexer's again, and the gradients of queries and keys."""
  s, gradient = case.shapes, case.direction == GRADIENT
  pairs = case.batch * _total(selected(case))
  attention, index = 2 * s.heads * s.width, 2 * s.index_heads * s.index_width
  teacher = case.tokens * s.heads * (s.width * 2 + 4) + case.batch * case.entries * s.width * 2 + _selection_bytes(case)
  moved = teacher + _index_bytes(case) + case.tokens * 4
  flops = attention + index
  if gradient:
    moved, flops = moved + teacher + 2 * _index_bytes(case), flops + attention + 3 * index
  return Least(flops * pairs, moved, moved, (1 + gradient) * pairs * SCORE_SLOTS * s.index_heads)  # each pass scores


def _mixing(case: Case) -> Least:
  """Streams and updates once per pass; the coefficients are a few numbers per token."""
  s, gradient = case.shapes, case.direction == GRADIENT
  n, stream = s.streams, case.tokens * s.hidden * 2
  coefficients = case.tokens * (n + n * n) * 4
  projection = n * s.hidden * (2 + n) * n * 4
  collapses, expands = "collapse" in case.op, "expand" in case.op
  moved = stream * n + coefficients * (collapses + expands)  # the streams in
  moved += stream * ((1 + n) * expands + collapses) + projection * collapses  # the update in, new streams and input out
  flops = 2 * case.tokens * projection / 4 * collapses
  if gradient:
    # Streams in, their gradient out; expand: the update and the new streams' gradient in, the update's out; collapse: the
    # input's gradient in, and of `collapse` alone nothing more; fn in and its gradient out.
    moved += stream * (2 * n + (2 + n) * expands + collapses) + 2 * coefficients * (collapses + expands)
    moved += 2 * projection * collapses
    flops *= 3  # the gradients of streams and fn
  return Least(flops, moved, moved)


def _experts(case: Case) -> Least:
  s, gradient = case.shapes, case.direction == GRADIENT
  weights = 3 * case.experts * s.hidden * s.expert_width
  rows = 2 * case.rows * s.hidden * 2
  moved = rows + 2 * weights
  if gradient:  # x, dy and weights in, dx and the weights' gradients out
    moved += 1.5 * rows + 4 * weights
  return Least((3 if gradient else 1) * 6 * case.rows * s.hidden * s.expert_width, moved, moved)
