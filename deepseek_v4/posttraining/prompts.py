"""What a student is asked, and how what it says becomes rows for training.

A prompt is the beginning of a piece of one of the teacher's training documents, which are cut into pieces of the length of
the longest prompt; or of a conversation, what comes before the assistant's first word. Prompt number i is always the same,
whoever asks for it and whenever.

Axes: R rows, S tokens of a row.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from typing import Any, Sequence

import numpy as np

from deepseek_v4.config import DataConfig, RunConfig, TeacherConfig
from deepseek_v4.config_checks import refuse
from deepseek_v4.text import tokenize
from deepseek_v4.training import conversations, packing
from deepseek_v4.training.data import make_dataset


class Text:
  """The endless sequence of packed rows of a data source's training text.

  Args:
    run_config: of the student, whose token ids they are.
    data: the source.
    sequence_length: tokens of a row.

  Raises:
    ValueError: data that cannot be used.
  """

  def __init__(self, run_config: RunConfig, data: DataConfig, sequence_length: int) -> None:
    config = dataclasses.replace(data, sequence_length=sequence_length, batch_size=1, accumulation=1)
    model = run_config.model
    self._batches = make_dataset(config, model.vocab_size, document_end=model.eos_token_id)
    self.document_end = self._batches.tokenizer.document_end

  def take(self, first: int, count: int) -> dict[str, np.ndarray]:
    """Rows number `first` to `first + count - 1`: {"tokens", "segment_ids", "positions", "loss_mask"}, int32 [R, S]."""
    with contextlib.closing(iter(self._batches)) as rows:
      rows.set_state({"row": first, **self._batches.identity})
      found = [next(rows) for _ in range(count)]
    return {name: np.concatenate([row[name][0] for row in found]) for name in found[0]}

  def describe(self) -> str:
    """What an epoch holds, in a line."""
    return self._batches.describe()


class Prompts:
  """The endless sequence of a teacher's prompts.

  Raises:
    ValueError: data that cannot be used.
  """

  def __init__(self, run_config: RunConfig, teacher: TeacherConfig) -> None:
    distillation = run_config.distillation
    self._text = Text(run_config, teacher.data, distillation.prompt_length)
    self._shortest, self._longest = distillation.shortest_prompt, distillation.prompt_length
    self._seed = teacher.data.seed
    self.document_end, self.describe = self._text.document_end, self._text.describe

  def take(self, first: int, count: int) -> list[tuple[int, ...]]:
    """Prompts number `first` to `first + count - 1`, token ids."""
    rows = self._text.take(first, count)
    return [self._prompt(first + i, *row) for i, row in enumerate(zip(rows["tokens"], rows["segment_ids"]))]

  def _prompt(self, number: int, tokens_S: np.ndarray, segment_ids_S: np.ndarray) -> tuple[int, ...]:
    longest = np.bincount(segment_ids_S[segment_ids_S > 0]).argmax()
    piece, end = tokens_S[segment_ids_S == longest], self.document_end
    piece = piece[piece != end] if (piece != end).any() else piece
    digest = hashlib.sha256(f"prompt {self._seed} {number}".encode()).digest()
    length = self._shortest + int.from_bytes(digest[:8], "little") % (self._longest - self._shortest + 1)
    return tuple(piece[:length].tolist())


class ChatPrompts:
  """The endless sequence of a teacher's prompts, from conversations; each epoch has another order.

  Raises:
    ValueError: data that cannot be used; each bad line with its cause.
  """

  def __init__(self, run_config: RunConfig, teacher: TeacherConfig) -> None:
    data, longest = teacher.data, run_config.distillation.prompt_length
    tokenizer = tokenize.load_tokenizer(data.tokenizer, run_config.model.vocab_size)
    found, bad = conversations.read(data, "train")
    template, self._prompts = conversations.template_of(data), []
    for conversation in found:
      try:
        ids, written = conversations.encode(conversation, template, tokenizer)
        first = int(np.argmax(written)) if written.any() else 0
        if not 1 <= first <= longest:
          refuse("prompt", f"{first} tokens", f"1 to distillation.prompt_length = {longest}, and a reply of the assistant")
        self._prompts.append(tuple(ids[:first].tolist()))
      except (ValueError, TypeError, KeyError, AttributeError) as error:  # messages are whatever JSON holds
        bad.append(conversations.bad_line(conversation, error))
    conversations.refuse_lines(bad)
    if not self._prompts:
      refuse("data.path", data.path, f"conversations to train on with data.held_out_percent = {data.held_out_percent}")
    self._seed, self.document_end = data.seed, tokenizer.document_end

  def take(self, first: int, count: int) -> list[tuple[int, ...]]:
    """Prompts number `first` to `first + count - 1`, token ids."""
    found, orders = [], {}
    for number in range(first, first + count):
      epoch, place = divmod(number, len(self._prompts))
      if epoch not in orders:
        orders[epoch] = np.random.default_rng([self._seed, epoch]).permutation(len(self._prompts))
      found.append(self._prompts[orders[epoch][place]])
    return found

  def describe(self) -> str:
    """What an epoch holds, in a line."""
    return f"prompts of {len(self._prompts):,} conversations"


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


def in_passes(rows: dict[str, np.ndarray], size: int) -> list[dict[str, np.ndarray]]:
  """Rows, int32 [R, S] by name, in passes of `size` rows; the last one is filled up with rows that hold nothing."""
  missing = -len(rows["tokens"]) % size
  filled: dict[str, Any] = {name: np.pad(x, ((0, missing), (0, 0))) for name, x in rows.items()}
  return [{name: x[i:i + size] for name, x in filled.items()} for i in range(0, len(filled["tokens"]), size)]
