"""What a student is asked, and how what it says becomes rows for training.

A prompt is the beginning of a piece of one of the teacher's training documents, which are cut into pieces of the length of
the longest prompt. Prompt number i is always the same, whoever asks for it and whenever.

Axes: R rows, S tokens of a row.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from typing import Any, Sequence

import numpy as np

from deepseek_v4.config import DataConfig, RunConfig, TeacherConfig
from deepseek_v4.training import packing
from deepseek_v4.training.data import make_dataset


class Prompts:
  """The endless sequence of a teacher's prompts.

  Raises:
    ValueError: data that cannot be used.
  """

  def __init__(self, run_config: RunConfig, teacher: TeacherConfig):
    distillation = run_config.distillation
    config = dataclasses.replace(teacher.data, sequence_length=distillation.prompt_length, batch_size=1, accumulation=1)
    model = run_config.model
    self._batches = make_dataset(config, model.vocab_size, document_end=model.eos_token_id)
    self._end = self._batches.tokenizer.document_end
    self._shortest, self._longest = distillation.shortest_prompt, distillation.prompt_length
    self._seed = config.seed

  def take(self, first: int, count: int) -> list[tuple[int, ...]]:
    """Prompts number `first` to `first + count - 1`, token ids."""
    with contextlib.closing(iter(self._batches)) as rows:
      rows.set_state({"row": first, **self._batches.identity})
      return [self._prompt(first + i, next(rows)) for i in range(count)]

  def describe(self) -> str:
    """What they are made of, in a line."""
    return self._batches.describe()

  def _prompt(self, number: int, row: dict[str, np.ndarray]) -> tuple[int, ...]:
    tokens, segments = row["tokens"][0, 0], row["segment_ids"][0, 0]
    piece = tokens[segments == np.bincount(segments[segments > 0]).argmax()]  # the longest of the row
    piece = piece[piece != self._end] if (piece != self._end).any() else piece
    digest = hashlib.sha256(f"prompt {self._seed} {number}".encode()).digest()
    length = self._shortest + int.from_bytes(digest[:8], "little") % (self._longest - self._shortest + 1)
    return tuple(piece[:length].tolist())


def rows_of(samples: Sequence[tuple[Sequence[int], Sequence[int]]], sequence_length: int) -> dict[str, np.ndarray]:
  """Samples, packed into rows for training.

  Args:
    samples: (prompt, reply) of each, token ids, together at most `sequence_length`.

  Returns:
    {"tokens", "segment_ids", "positions", "loss_mask"}, int32 [R, S]; the mask is 1 on the tokens of replies.
  """
  texts = [np.array([*prompt, *reply], np.int32) for prompt, reply in samples]
  asked = [len(prompt) for prompt, _ in samples]
  packed = packing.pack(np.array([len(text) for text in texts]), sequence_length)
  read = lambda i, start, length: texts[i][start:start + length]
  said = lambda i, start, length: np.arange(start, start + length) >= asked[i]
  rows = [packing.build_row(packed, r, read) | {"loss_mask": packing.build_row(packed, r, said)["tokens"]}
          for r in range(packed.rows)]
  return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def text_rows(run_config: RunConfig, data: DataConfig, first: int, count: int) -> dict[str, np.ndarray]:
  """Rows number `first` to `first + count - 1` of the packed training text of a data source, as `rows_of` makes them."""
  data = dataclasses.replace(data, sequence_length=run_config.data.sequence_length, batch_size=count, accumulation=1)
  batches = make_dataset(data, run_config.model.vocab_size, document_end=run_config.model.eos_token_id)
  with contextlib.closing(iter(batches)) as rows:
    rows.set_state({"row": first, **batches.identity})
    return {name: x[0] for name, x in next(rows).items()}


def in_passes(rows: dict[str, np.ndarray], size: int) -> list[dict[str, np.ndarray]]:
  """Rows [R, S] in passes of `size` rows; the last one is filled up with rows that hold nothing."""
  missing = -len(rows["tokens"]) % size
  filled: dict[str, Any] = {name: np.pad(x, ((0, missing), (0, 0))) for name, x in rows.items()}
  return [{name: x[i:i + size] for name, x in filled.items()} for i in range(0, len(filled["tokens"]), size)]
