"""Documents into rows of equal length, without losing or repeating a token; NumPy only.

A document longer than a row is cut into pieces of S tokens and a remainder; remainders and short documents share rows. Every
piece is a segment of its own with positions from 0, and the model keeps segments apart, so it does not matter to the
result which pieces share a row: rows are packed once, and an epoch is an order of the rows.

Axes: S tokens of a row, P pieces, R rows.
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
from typing import Callable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Packing:
  """Which piece of which document lies in which row.

  Attributes:
    document, start, length: int64 [P], the piece's document, its first token there and its number of tokens; row by row.
    offset: int64 [R+1]; row r holds the pieces offset[r] ... offset[r+1] - 1.
    sequence_length: S.
  """

  document: np.ndarray
  start: np.ndarray
  length: np.ndarray
  offset: np.ndarray
  sequence_length: int

  @property
  def rows(self) -> int:
    """How many rows there are."""
    return len(self.offset) - 1

  @property
  def tokens(self) -> int:
    """Of all pieces."""
    return int(self.length.sum())

  @property
  def targets(self) -> int:
    """Tokens that are predicted: all but the first of each piece."""
    return self.tokens - len(self.length)

  @property
  def fill(self) -> float:
    """Share of the rows' places that hold a token."""
    return self.tokens / max(self.rows * self.sequence_length, 1)


def pack(lengths: np.ndarray, sequence_length: int) -> Packing:
  """Best-fit-decreasing packing: no document is cut that fits a row (Ding et al. 2024, "Fewer truncations improve language
  modeling", which V3's report names as its source).

  Args:
    lengths: int [N], tokens of each document.
    sequence_length: S.
  """
  lengths = np.asarray(lengths, np.int64)
  whole, rest = np.divmod(lengths, sequence_length)
  document = np.repeat(np.arange(len(lengths)), whole)
  start = (np.arange(len(document)) - np.repeat(np.cumsum(whole) - whole, whole)) * sequence_length
  tails = np.flatnonzero(rest)
  tails = tails[np.argsort(-rest[tails], kind="stable")]
  row = np.concatenate([np.arange(len(document)), len(document) + _best_fit(rest[tails], sequence_length)])
  length = np.concatenate([np.full(len(document), sequence_length, np.int64), rest[tails]])
  start = np.concatenate([start, whole[tails] * sequence_length])
  document = np.concatenate([document, tails])
  order = np.argsort(row, kind="stable")
  rows = int(row.max()) + 1 if len(row) else 0
  offset = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=rows))]).astype(np.int64)
  return Packing(document[order], start[order], length[order], offset, sequence_length)


def repack(packing: Packing, rows: np.ndarray, sequence_length: int) -> Packing:
  """What lies in some rows of a packing, in rows of another length; pieces of a document that follow each other become one.

  Args:
    rows: int [N], their numbers.
    sequence_length: S of the new rows.
  """
  counts = packing.offset[rows + 1] - packing.offset[rows]
  pieces = np.repeat(packing.offset[rows] - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())
  pieces = pieces[np.lexsort((packing.start[pieces], packing.document[pieces]))]
  document, start, length = (x[pieces] for x in (packing.document, packing.start, packing.length))
  follows = (document[1:] == document[:-1]) & (start[1:] == start[:-1] + length[:-1])
  first = np.flatnonzero(np.concatenate([np.ones(min(len(pieces), 1), bool), ~follows]))
  whole = pack(np.add.reduceat(length, first) if len(first) else length, sequence_length)
  here = first[whole.document]
  return dataclasses.replace(whole, document=document[here], start=start[here] + whole.start)


def _best_fit(needs: np.ndarray, capacity: int) -> np.ndarray:
  """Bin of each need (in descending order): the fullest one that still has room, else a new one."""
  spaces: list[int] = []  # distinct free spaces of open bins, ascending
  open_bins: dict[int, list[int]] = {}
  bins = np.empty(len(needs), np.int64)
  count = 0
  for i, need in enumerate(needs.tolist()):
    at = bisect.bisect_left(spaces, need)
    if at == len(spaces):
      space, chosen, count = capacity, count, count + 1
    else:
      space = spaces[at]
      chosen = open_bins[space].pop()
      if not open_bins[space]:
        del open_bins[space], spaces[at]
    bins[i] = chosen
    space -= need
    if space:
      if space not in open_bins:
        open_bins[space] = []
        bisect.insort(spaces, space)
      open_bins[space].append(chosen)
  return bins


def build_row(packing: Packing, row: int | None, read: Callable[[int, int, int], np.ndarray],
              counted: Callable[[int, int, int], np.ndarray] | None = None) -> dict[str, np.ndarray]:
  """The four int32 [S] arrays of a row: tokens, segment_ids, positions, loss_mask.

  Args:
    row: its number; None = a row without tokens.
    read: (document, start, length) -> ids [length].
    counted: the same of which tokens are learnt, bool [length]; None = all.
  """
  names = ("tokens", "segment_ids", "positions", "loss_mask")
  arrays = {name: np.zeros(packing.sequence_length, np.int32) for name in names}
  at = 0
  pieces = range(packing.offset[row], packing.offset[row + 1]) if row is not None else ()
  for segment, piece in enumerate(pieces, 1):
    n = int(packing.length[piece])
    where = int(packing.document[piece]), int(packing.start[piece]), n
    arrays["tokens"][at:at + n] = read(*where)
    arrays["segment_ids"][at:at + n] = segment
    arrays["positions"][at:at + n] = np.arange(n)
    # The first token of a piece has nothing before it that could predict it.
    arrays["loss_mask"][at + 1:at + n] = 1 if counted is None else counted(*where)[1:]
    at += n
  return arrays


# ---- fill in the middle -------------------------------------------------------------------------------------------------
def _fim_numbers(name: str, seed: int) -> list[int]:
  """Three uniform 64-bit integers."""
  digest = hashlib.sha256(f"fim {seed} {name}".encode("utf-8", "surrogateescape")).digest()
  return [int.from_bytes(digest[i:i + 8], "little") for i in (0, 8, 16)]


def fim_chosen(name: str, rate: float, seed: int) -> bool:
  """Whether the document of this name is rearranged: a fixed function of name and seed."""
  return _fim_numbers(name, seed)[0] < rate * 2**64


def fill_in_the_middle(tokens: np.ndarray, sentinels: tuple[int, int, int], name: str, seed: int) -> np.ndarray:
  """Cuts `tokens` [n], integers of any dtype, in three and puts the middle last: begin prefix hole suffix end middle (V3's
  PSM order), [n + 3].

  The two cuts are uniform over the n + 1 places and a fixed function of name and seed.
  """
  first, second = sorted(number % (len(tokens) + 1) for number in _fim_numbers(name, seed)[1:])
  begin, hole, end = (np.array([i], tokens.dtype) for i in sentinels)
  return np.concatenate([begin, tokens[:first], hole, tokens[second:], end, tokens[first:second]])
