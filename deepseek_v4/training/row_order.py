"""Which row of which packing is read when, also where rows become longer in the middle of an epoch.

An epoch is a permutation of the rows of a packing of all documents. When rows of another length follow (`moved`), what lies
in the rows of the epoch that were not read yet is packed anew, pieces of a document that follow each other as one, and that
is read first: so every token is still read once in the epoch. The next epoch is packed from whole documents. All of it
follows from how many rows of which lengths were read, in that order, and nothing else is remembered.

Orders are permutations in memory, a number for each row, beside the packing's own four and more; an epoch's is made when its
first row is read. They come from sorting random 64-bit words, whose stream NumPy promises never to change.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from typing import Any, Callable, Mapping, Protocol, Sequence

import numpy as np

from deepseek_v4.config import DataConfig
from deepseek_v4.training import packing

Batch = dict[str, np.ndarray]
IDENTITY = ("split", "sequence_length", "seed", "fim_rate", "documents", "order")  # of the data that a position is one in
ORDER = 2  # changes with the permutation, so that no position is taken for a place in another one


class Documents(Protocol):
  """What rows are made of: lengths int64 [N], the ids [length] of a part of a document, and which of its tokens are learnt,
  bool [length] (None: all)."""

  lengths: np.ndarray
  counted: Callable[[int, int, int], np.ndarray] | None

  def read(self, document: int, start: int, length: int) -> np.ndarray:
    """Ids int32 [length] of a document, from `start` on."""


@dataclasses.dataclass(frozen=True)
class Position:
  """A place in the data.

  Attributes:
    row: how many rows were read in the whole run.
    earlier: of those, (length, number) of the ones that had other lengths than now, one length after the other.
  """

  row: int = 0
  earlier: tuple[tuple[int, int], ...] = ()

  @property
  def begin(self) -> int:
    """How many rows were read before those of the present length."""
    return sum(rows for _, rows in self.earlier)

  @staticmethod
  def of_state(state: Any) -> "Position":
    """That of `BatchIterator.get_state`.

    Raises:
      ValueError: the state is none.
    """
    found: tuple[Any, Any] = (state.get("row"), state.get("earlier", [])) if isinstance(state, dict) else (None, None)
    row, earlier = found
    whole = lambda x, least: type(x) is int and x >= least
    if not whole(row, 0) or not isinstance(earlier, (list, tuple)) or not all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 and whole(pair[0], 2) and whole(pair[1], 1) for pair in earlier):
      raise ValueError(f"data position = {state!r}: expected a dictionary with 'row' and {', '.join(IDENTITY)}")
    position = Position(row, tuple(map(tuple, earlier)))
    if position.begin > row:
      raise ValueError(f"data position: row = {row}: expected at least {position.begin}, the rows of other lengths before")
    return position


def moved(state: Mapping[str, Any], sequence_length: int) -> Mapping[str, Any]:
  """The same place in the documents, to go on from in rows of another length; the state itself where it is the same one.

  Args:
    state: of `BatchIterator.get_state`.
    sequence_length: of the rows to come.
  """
  if state.get("sequence_length", sequence_length) == sequence_length:
    return state
  position = Position.of_state(state)
  read = position.row - position.begin
  earlier = [list(pair) for pair in position.earlier] + ([[state["sequence_length"], read]] if read else [])
  return {**state, "sequence_length": sequence_length, "earlier": earlier}


class RowOrder:
  """The rows of one split, in the order in which they are read.

  Attributes:
    packing: of all documents, in rows of `config.sequence_length`.
  """

  def __init__(self, documents: Documents, config: DataConfig, split: str) -> None:
    self._documents, self._config, self._split = documents, config, split
    self.packing = packing.pack(documents.lengths, config.sequence_length)

  def rows_from(self, position: Position) -> Callable[[int], Batch]:
    """Row number -> row, int32 [S] by name, for numbers from `position.row` on; behind the one epoch of held-out text rows
    without tokens."""
    begin, rest = position.begin, self._left(position.earlier)
    count = rest.rows if rest else 0
    first: Any = self._of_rest(count, begin)
    of_epoch = functools.lru_cache(maxsize=2)(functools.partial(self._of_epoch, self.packing.rows))

    def row_at(row: int) -> Batch:
      if self._split == "held_out" and row >= self.packing.rows:
        return packing.build_row(self.packing, None, self._documents.read)
      if rest is not None and row - begin < count:
        return packing.build_row(rest, first[row - begin], self._documents.read, self._documents.counted)
      epoch, place = divmod(row - begin - count, self.packing.rows)
      return packing.build_row(self.packing, of_epoch(epoch)[place], self._documents.read, self._documents.counted)
    return row_at

  def _of_epoch(self, rows: int, epoch: int) -> np.ndarray:
    """The order of an epoch of so many rows; that of held-out rows is one for all runs."""
    if self._split == "train":
      return _order(rows, f"rows {self._config.seed} {epoch}")
    # Shuffled, because an evaluation may stop early and rows of a long file lie together.
    return _order(rows, "held_out")

  def _of_rest(self, rows: int, begin: int) -> np.ndarray:
    """The order of what an epoch has left, of which the reading begins after so many rows of the run."""
    return _order(rows, f"rest {self._config.seed} {begin}")

  def _left(self, earlier: Sequence[tuple[int, int]]) -> packing.Packing | None:
    """What an epoch begun in rows of other lengths has left, in rows of this length; None = nothing."""
    rest, begin = None, 0
    following = [length for length, _ in earlier[1:]] + [self._config.sequence_length]
    for (length, read), next_length in zip(earlier, following):
      if rest is not None and read < rest.rows:
        source, rows = rest, self._of_rest(rest.rows, begin)[read:]
      else:
        source = packing.pack(self._documents.lengths, length)
        epoch, done = divmod(read - (rest.rows if rest else 0), source.rows)
        rows = self._of_epoch(source.rows, epoch)[done:] if done else np.zeros(0, np.int64)
      rest = packing.repack(source, rows, next_length) if len(rows) else None
      begin += read
    return rest


def _order(rows: int, purpose: str) -> np.ndarray:
  """A permutation of so many rows, int64 [rows], always the same for a purpose."""
  words = np.random.PCG64(int.from_bytes(hashlib.sha256(purpose.encode()).digest(), "little")).random_raw(rows)
  return np.argsort(words, kind="stable")
