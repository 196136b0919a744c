"""Problems that a model is asked, and how its replies become rows for training.

A problem is a line of a "chat" source whose messages end where the assistant's turn begins. Problem number i of the endless
sequence (each epoch in another order) is always the same, so that a run's position is one number.

Axis letters: R rows   S places of a row   L layers   k experts per token   b bytes with a bit for each token id
"""

from __future__ import annotations

import dataclasses
from typing import Any, Mapping, Sequence

import numpy as np

from deepseek_v4.config import DataConfig
from deepseek_v4.config_checks import refuse
from deepseek_v4.posttraining.rollout import Sample
from deepseek_v4.text import chat
from deepseek_v4.text.chat_template import ChatTemplate
from deepseek_v4.training import conversations, packing

INTEGERS, FLOATS = ("tokens", "segment_ids", "positions", "targets"), ("old", "advantage", "weight")


@dataclasses.dataclass(frozen=True)
class Problem:
  """What a model is asked.

  Attributes:
    prompt: token ids, up to where it replies.
    place: file and line, for errors.
    fields: the object on the line.
  """

  prompt: tuple[int, ...]
  place: str
  fields: Mapping[str, Any]


class Problems:
  """The problems of one split of a "chat" source.

  Args:
    config: of the data.
    split: "train" or "held_out".
    effort: reasoning effort that is asked for, whatever a line says.
    template: wording of the chat.
    tokenizer: see `text.tokenize`.
    longest: tokens that a prompt may have.

  Raises:
    ValueError: lines that are no problems, each with its cause, or none that is one.
  """

  def __init__(self, config: DataConfig, split: str, effort: str, template: ChatTemplate, tokenizer: Any, longest: int
               ) -> None:
    lines, bad = conversations.read(config, split)
    self.all: list[Problem] = []
    for line in lines:
      try:
        self.all.append(Problem(_prompt(line.fields, effort, template, tokenizer, longest), line.place, line.fields))
      except (ValueError, TypeError, KeyError, AttributeError) as error:  # messages are whatever JSON holds
        bad.append(conversations.bad_line(line, error))
    conversations.refuse_lines(bad)
    if not self.all:
      refuse("data.path", config.path, f"problems of the split {split!r} with data.held_out_percent = "
             f"{config.held_out_percent}; found none")
    self._seed = config.seed

  def take(self, first: int, count: int) -> list[Problem]:
    """Problems number `first` to `first + count - 1` of the endless sequence."""
    found, orders = [], {}
    for number in range(first, first + count):
      epoch, place = divmod(number, len(self.all))
      if epoch not in orders:
        orders[epoch] = np.random.default_rng([self._seed, epoch]).permutation(len(self.all))
      found.append(self.all[orders[epoch][place]])
    return found


def _prompt(fields: Mapping[str, Any], effort: str, template: ChatTemplate, tokenizer: Any, longest: int) -> tuple[int, ...]:
  parts = chat.parts(fields["messages"], reasoning_effort=effort, template=template)
  text, by_assistant = parts[-1]
  if by_assistant or not text.startswith(chat.ASSISTANT):
    refuse("messages", f"{len(fields['messages'])}, the last from {fields['messages'][-1].get('role')!r}",
           "messages that end with the user's, for the assistant to reply to")
  ids = tuple(chat.to_ids("".join(text for text, _ in parts), tokenizer))
  if len(ids) > longest:
    refuse("messages", f"{len(ids)} tokens", f"at most data.sequence_length - max_new_tokens = {longest}")
  return ids


def rows_of(samples: Sequence[Sample], advantages: Sequence[float], sequence_length: int) -> dict[str, np.ndarray]:
  """Samples, packed into rows for training; what `grpo.objective` (V3.2's report 3.1) and the model read.

  The last token of a reply is predicted and not fed. A sample's tokens that a budget put there are fed and not predicted.

  Args:
    samples: of one minibatch, each of at most `sequence_length` + 1 tokens.
    advantages: of each.
    sequence_length: S.

  Returns:
    int32 [R, S] "tokens", "segment_ids", "positions", "targets" (-1 = none); float32 [R, S] "old", "advantage", "weight";
    if the samples have them, uint16 "experts" [R, S, L, k] and uint8 "kept" [R, S, b].
  """
  packed = packing.pack(np.array([len(sample.tokens) - 1 for sample in samples]), sequence_length)
  shape = packed.rows, sequence_length
  rows = {name: np.zeros(shape, np.int32) for name in INTEGERS} | {name: np.zeros(shape, np.float32) for name in FLOATS}
  rows["targets"] -= 1
  if samples[0].experts is not None:
    layers, _, k = samples[0].experts.shape
    # Where no token is, experts must still be different ones.
    rows["experts"] = np.broadcast_to(np.arange(k, dtype=np.uint16), (*shape, layers, k)).copy()
  if samples[0].kept is not None:
    rows["kept"] = np.zeros((*shape, samples[0].kept.shape[1]), np.uint8)
  for row in range(packed.rows):
    at = 0
    for segment, piece in enumerate(range(packed.offset[row], packed.offset[row + 1]), 1):
      number = int(packed.document[piece])
      at += _put(rows, row, at, segment, samples[number], advantages[number], 1 / len(samples))
  return rows


def _put(rows: dict[str, np.ndarray], row: int, at: int, segment: int, sample: Sample, advantage: float,
         share: float) -> int:
  """Writes a sample into a row from place `at` on; returns how many places it takes."""
  fed, first = len(sample.tokens) - 1, len(sample.prompt) - 1
  here, replied = slice(at, at + fed), slice(at + first, at + fed)
  drawn = np.array(sample.drawn, bool)
  rows["tokens"][row, here] = sample.tokens[:-1]
  rows["segment_ids"][row, here] = segment
  rows["positions"][row, here] = np.arange(fed)
  rows["targets"][row, replied] = np.where(drawn, sample.reply, -1)
  rows["old"][row, replied] = np.where(drawn, sample.logprobs, 0)
  rows["advantage"][row, here] = advantage
  rows["weight"][row, replied] = np.where(drawn, share / max(1, drawn.sum()), 0)
  if "experts" in rows:
    rows["experts"][row, here] = np.moveaxis(sample.experts, 0, 1)
  if "kept" in rows:
    rows["kept"][row, replied] = np.where(drawn[:, None], sample.kept, 0)
  return fed


def in_passes(rows: Mapping[str, np.ndarray], size: int) -> list[dict[str, np.ndarray]]:
  """Rows [R, ...] in passes of `size` rows, dtypes kept; the last one is filled up with rows that hold nothing."""
  missing = -len(rows["tokens"]) % size

  def filled(name, x):
    edge = {"targets": -1}.get(name, 0)
    if name == "experts":
      return np.concatenate([x, np.broadcast_to(np.arange(x.shape[-1], dtype=x.dtype), (missing, *x.shape[1:]))])
    return np.pad(x, ((0, missing), *((0, 0),) * (x.ndim - 1)), constant_values=edge)

  padded = {name: filled(name, x) for name, x in rows.items()}
  return [{name: x[i:i + size] for name, x in padded.items()} for i in range(0, len(padded["tokens"]), size)]
