"""Batches of packed rows for training and evaluation, on Grain.

    documents (sources.py) -> ids, fill-in-the-middle, document end -> packed rows (packing.py) -> order -> batches

Rows are packed once. An epoch of the training split is a permutation of its rows (`row_order.py`: another one each epoch,
8 bytes a row), and batch n is made of rows n * batch_size ... of the endless sequence of epochs. So any
batch can be made alone: the position in the data is one number, which means the same whatever the number of processes or the
batch size, and each process makes only the rows it needs. Of files of ids it reads only those rows; text, for which all
lengths must be known, is read and encoded by every process once, at the start.

Rows may become longer in the middle of an epoch: see `row_order.py`.

Axes: A accumulation passes, B rows of a pass (those that are made here), S tokens of a row.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
import zlib
from typing import Any, Iterator, Mapping, Sequence

import grain
import numpy as np

from deepseek_v4.config import DataConfig
from deepseek_v4.text import tokenize
from deepseek_v4.training import packing, sources
from deepseek_v4.training.conversations import ChatDocuments
from deepseek_v4.training.row_order import IDENTITY, ORDER, Batch, Position, RowOrder

SIZES = ("sequence_length", "batch_size", "accumulation")  # what does not change how a document is encoded


# ---- documents as ids ---------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class _Ids:
  """In place of a tokenizer where the files hold ids: all that is known of them is which one ends a document."""

  document_end: int
  fim: None = None


class _Finish:
  """What turns the ids of a text into a document of the corpus: maybe a rearrangement, and the document end."""

  def __init__(self, config: DataConfig, split: str, tokenizer: Any) -> None:
    # Held-out documents stay as they are: their loss is compared between runs.
    self._rate = config.fim_rate if split == "train" else 0.0
    self._seed, self._longest = config.seed, config.sequence_length - 4
    self._fim = tokenizer.fim
    self._end = tokenizer.document_end

  def __call__(self, ids: np.ndarray, name: str) -> np.ndarray:
    """[n] -> [n + extra(n, name)], same dtype."""
    if self._rearranged(len(ids), name):
      ids = packing.fill_in_the_middle(ids, self._fim, name, self._seed)
    return np.append(ids, np.asarray(self._end, ids.dtype))

  def extra(self, length: int, name: str) -> int:
    """How many ids are added."""
    return 4 if self._rearranged(length, name) else 1

  def _rearranged(self, length: int, name: str) -> bool:
    # A longer document is cut into rows, and a middle that does not see its prefix and suffix teaches nothing.
    return self._rate > 0 and length <= self._longest and packing.fim_chosen(name, self._rate, self._seed)


class _TextDocuments:
  """Documents of text, encoded once and held as one array of ids."""

  threads = 0  # everything is in memory: reading takes microseconds
  counted = targets = None  # all tokens are learnt

  def __init__(self, config: DataConfig, split: str, vocab_size: int, tokenizer: Any) -> None:
    found = sources.read_texts(config, split)
    finish = _Finish(config, split, tokenizer)
    encoded = tokenizer.encode_documents(found.texts)
    self.text_bytes = sum(map(len, found.texts))
    self.left_out = found.left_out
    extra = np.array([finish.extra(len(ids), name) for ids, name in zip(encoded, found.names, strict=True)], np.int64)
    self.lengths = np.array([len(ids) for ids in encoded], np.int64) + extra
    self._first = np.cumsum(self.lengths) - self.lengths
    self._ids = np.empty(self.lengths.sum(), np.uint16 if vocab_size <= 1 << 16 else np.int32)
    for ids, name, first, length in zip(encoded, found.names, self._first, self.lengths, strict=True):
      self._ids[first:first + length] = finish(ids.astype(self._ids.dtype, copy=False), name)
    self.checksum = zlib.crc32(self._ids.data)

  def read(self, document: int, start: int, length: int) -> np.ndarray:
    at = self._first[document] + start
    return self._ids[at:at + length]


class _RecordDocuments:
  """Documents of ids in ArrayRecord files, read when a row needs them.

  A record is read as a whole for each of its pieces, so records should not be much longer than a row.
  """

  threads = 4  # reads wait for a disk or for the network
  counted = targets = None
  text_bytes = None
  left_out = ()

  def __init__(self, config: DataConfig, split: str, vocab_size: int, tokenizer: Any) -> None:
    self._files = sources.open_records(config, vocab_size)
    self._finish = _Finish(config, split, tokenizer)
    files, records, lengths = [], [], []
    for f, file in enumerate(self._files):
      chosen = [r for r in np.flatnonzero(file.lengths).tolist()
                if sources.in_split(self._name(f, r), split, config.held_out_percent)]
      files.append(np.full(len(chosen), f, np.int64))
      records.append(np.array(chosen, np.int64))
      extra = [self._finish.extra(int(file.lengths[r]), self._name(f, r)) for r in chosen]
      lengths.append(file.lengths[records[-1]] + np.array(extra, np.int64))
    self._file, self._record, self.lengths = (np.concatenate(parts) for parts in (files, records, lengths))
    self.checksum = zlib.crc32("\n".join(file.name for file in self._files).encode("utf-8", "surrogateescape"))

  def _name(self, file: int, record: int) -> str:
    return f"{self._files[file].name}#{record}"

  def read(self, document: int, start: int, length: int) -> np.ndarray:
    file, record = int(self._file[document]), int(self._record[document])
    return self._finish(self._files[file].read(record), self._name(file, record))[start:start + length]


# ---- batches ------------------------------------------------------------------------------------------------------------
class Batches:
  """What `make_dataset` returns: `iter()` of it gives a `BatchIterator` at the start of the data.

  Attributes:
    tokenizer: how the text was encoded.
    documents, tokens, targets: number of them in one epoch (`tokens` counts document ends and FIM sentinels; `targets` are
      the tokens whose prediction counts).
    text_bytes: bytes of text behind them; None for files of ids and for conversations.
    left_out: names of files of this split that are no UTF-8.
    rows, fill: rows of one epoch, and the share of their places that hold a token.
    batch_size: rows of a batch over all processes and accumulation passes; rows / batch_size batches are an epoch.
    config: the settings that they come from.
  """

  def __init__(self, config: DataConfig, split: str, documents: Any, tokenizer: Any, rows: Sequence[int],
               order: RowOrder | None = None) -> None:
    self.config, self._split, self._source = config, split, documents
    self._order = order or RowOrder(documents, config, split)
    self.tokenizer = tokenizer
    self.batch_size = config.batch_size
    self.documents = len(documents.lengths)
    self.text_bytes, self.left_out = documents.text_bytes, documents.left_out
    rows_of_epoch = self._order.packing
    self.rows, self.fill, self.tokens = rows_of_epoch.rows, rows_of_epoch.fill, rows_of_epoch.tokens
    self.targets = rows_of_epoch.targets if documents.targets is None else documents.targets
    # Places in the batch of the rows that are made here: columns of the [A, B of all processes] grid.
    self._places_AB = np.arange(config.batch_size).reshape(config.accumulation, -1)[:, list(rows)]
    digest = hashlib.sha256(documents.lengths.astype("<i8").tobytes() + documents.checksum.to_bytes(4, "little"))
    self._identity = dict(zip(IDENTITY, (split, config.sequence_length, config.seed, config.fim_rate,
                                         digest.hexdigest()[:16], ORDER), strict=True))

  def __iter__(self) -> "BatchIterator":
    return BatchIterator(self)

  @property
  def tokens_per_byte(self) -> float | None:
    """Turns a mean loss per token into one per byte of text (1 + one document end per document, for bytes)."""
    return self.tokens / self.text_bytes if self.text_bytes else None

  def describe(self) -> str:
    """What an epoch holds, in a line."""
    missing = f"; left out, no UTF-8: {', '.join(self.left_out[:3])}{', ...' if len(self.left_out) > 3 else ''}"
    return (f"{self._split.replace('_', '-')} data: {self.documents:,} documents, {self.tokens:,} tokens, "
            f"{self.rows:,} rows ({self.fill:.1%} full){missing if self.left_out else ''}")

  def reshaped(self, config: DataConfig, rows: Sequence[int] | None = None) -> "Batches":
    """The same documents, as they are encoded, in rows and batches of other sizes; `config` and `rows` as in `make_dataset`.

    Raises:
      ValueError: settings that differ in more than sizes; fewer rows than a batch.
    """
    sizes = {name: getattr(config, name) for name in SIZES}
    if config != dataclasses.replace(self.config, **sizes):
      raise ValueError(f"data = {config}: expected {self.config} with another {', '.join(SIZES)}")
    order = self._order if config.sequence_length == self.config.sequence_length else None
    found = Batches(config, self._split, self._source, self.tokenizer, _rows_of_a_pass(config, rows), order)
    _check_enough(config, self._split, found)
    return found

  @property
  def identity(self) -> dict[str, Any]:
    """What a position refers to: with another value of any of these, the same number would be another place."""
    return dict(self._identity)

  def pipeline(self, position: Position) -> grain.IterDataset[Batch]:
    """The batches, int32 [A, B, S] by name, from a place in the endless (held-out: finite) sequence of rows on, as a Grain
    dataset."""
    row_at = self._order.rows_from(position)
    stop = self.rows if self._split == "held_out" else sys.maxsize

    def make_batch(first: int) -> Batch:
      rows_AB = [[row_at(int(r)) for r in line] for line in first + self._places_AB]
      return {name: np.stack([np.stack([row[name] for row in line]) for line in rows_AB]) for name in rows_AB[0][0]}

    threads = self._source.threads
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    return grain.MapDataset.range(position.row, stop, self.batch_size).map(make_batch).to_iter_dataset(options)


class BatchIterator:
  """Batches {"tokens", "segment_ids", "positions", "loss_mask"}, each int32 [A, B, S], with a position that can be saved."""

  def __init__(self, batches: Batches) -> None:
    self._batches = batches
    self._place = Position()
    self._iterator = iter(batches.pipeline(self._place))

  def __iter__(self) -> Iterator[Batch]:
    return self

  def __next__(self) -> Batch:
    batch = next(self._iterator)
    self._place = dataclasses.replace(self._place, row=self._place.row + self._batches.batch_size)
    return batch

  def get_state(self) -> dict[str, Any]:
    """The position after the last batch, for JSON (about 130 bytes).

    It is the same in every process, and stays valid for another batch size and another number of processes.
    """
    earlier = {"earlier": [list(pair) for pair in self._place.earlier]} if self._place.earlier else {}
    return {"row": self._place.row, **self._batches.identity, **earlier}

  def set_state(self, state: Mapping[str, Any]) -> None:
    """Goes to a position of `get_state`: the next batch is the one that would have followed there.

    Raises:
      ValueError: the state is none, or comes from other documents, tokenizer, split, sequence length, seed or fim_rate.
    """
    place = Position.of_state(state)
    for name, value in self._batches.identity.items():
      if state.get(name) != value:
        hint = " (the text files, their tokenizer or data.held_out_percent have changed)" if name == "documents" else ""
        raise ValueError(f"data position: {name} = {state.get(name)!r}; expected {value!r}, that of this run's data{hint}")
    self._iterator.close()
    self._place = place
    self._iterator = iter(self._batches.pipeline(place))

  def close(self) -> None:
    """Stops reading ahead."""
    self._iterator.close()


def make_dataset(config: DataConfig, vocab_size: int, *, split: str = "train", rows: Sequence[int] | None = None,
                 document_end: int | None = tokenize.EOS) -> Batches:
  """The packed batches of one split.

  Training goes on without end, in another order each epoch; "held_out" is one pass in a fixed order, whose last batch is
  filled up with empty rows. Every token of every document is in exactly one row of an epoch.

  Args:
    config: source, packing, seed.
    vocab_size: the model's; every id is below it.
    split: "train" or "held_out".
    rows: which rows of each accumulation pass are made, of 0 ... batch_size / accumulation - 1 (axis 1 of the batch), in
      this order; None = all. A process of several makes those that its devices hold; the position in the data is the same
      whatever is made.
    document_end: id behind each document of a source of ids without a tokenizer; others have an id of their own.

  Raises:
    ValueError: wrong settings, unreadable or empty data, ids outside the vocabulary, less data than a batch.
  """
  if split not in sources.SPLITS:
    raise ValueError(f"split = {split!r}: expected one of {', '.join(map(repr, sources.SPLITS))}")
  rows = _rows_of_a_pass(config, rows)
  tokenizer = _tokenizer_of(config, vocab_size, document_end)
  if config.fim_rate and tokenizer.fim is None:
    raise ValueError(f"data.fim_rate = {config.fim_rate}: expected 0, since no fill-in-the-middle tokens are known (bytes: "
                     f"model.vocab_size of {tokenize.BYTE_FIM[-1] + 1} or more; ids: a data.tokenizer that has them)")
  kind = {"array_record": _RecordDocuments, "chat": ChatDocuments}.get(config.source, _TextDocuments)
  batches = Batches(config, split, kind(config, split, vocab_size, tokenizer), tokenizer, rows)
  _check_enough(config, split, batches)
  return batches


def _rows_of_a_pass(config: DataConfig, rows: Sequence[int] | None) -> Sequence[int]:
  """The rows of each pass that are made; None = all."""
  there = config.batch_size // config.accumulation
  rows = range(there) if rows is None else rows
  if not len(rows) or len(set(rows)) < len(rows) or not 0 <= min(rows) <= max(rows) < there:
    raise ValueError(f"rows = {list(rows)}: expected different ones, from 0 to data.batch_size / data.accumulation - 1 = "
                     f"{there - 1}")
  return rows


def _tokenizer_of(config: DataConfig, vocab_size: int, document_end: int | None) -> Any:
  if config.source != "array_record" or config.tokenizer is not None:
    return tokenize.load_tokenizer(config.tokenizer, vocab_size)
  if document_end is None or not 0 <= document_end < vocab_size:
    raise ValueError(f"model.eos_token_id = {document_end}: expected an id below model.vocab_size = {vocab_size}, since it "
                     f"ends each document of data.source = 'array_record' (or a data.tokenizer)")
  return _Ids(document_end)


def _check_enough(config: DataConfig, split: str, batches: Batches) -> None:
  where = sources.describe(config)
  if split == "held_out" and config.held_out_percent == 0:
    raise ValueError("data.held_out_percent = 0: expected at least 1, since a run is scored on held-out text")
  if not batches.targets and config.source == "text" and len(sources.find_files(config)[1]) == 1:
    raise ValueError(f"{where}: expected two files or more, since a file is training or held-out text as a whole; of one "
                     f"file make several, or JSON lines, where every line is a document")
  if not batches.targets and split == "held_out":
    raise ValueError(f"data.held_out_percent = {config.held_out_percent}: expected a percentage that holds out at least one "
                     f"document of {where}; a hash of each file's or record's name decides: take a higher one or more files")
  if not batches.targets:
    raise ValueError(f"{where}: expected training text, found no document that is not empty, is UTF-8 and is not among the "
                     f"data.held_out_percent = {config.held_out_percent} held out")
  if split == "train" and batches.rows < config.batch_size:
    raise ValueError(f"data.batch_size = {config.batch_size}: expected at most {batches.rows}, the rows that the "
                     f"{batches.tokens} tokens of {where} fill with data.sequence_length = {config.sequence_length}")
