"""Conversations as documents: JSON lines with messages, encoded as the model is talked to, and which tokens are learnt.

A line is an object with `messages` (see `text/chat.py`), perhaps `reasoning_effort` (a level of the template, or "none") and
`drop_thinking`; what else it holds, such as an answer, is kept for whoever asks for it. Training counts the tokens that the
assistant wrote, the end of each of its turns included; all others are only read. No conversation is cut: one that does not
fit a row is refused, since the rest of an answer teaches nothing without its question.
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from pathlib import Path
from typing import Any, Mapping

import numpy as np

from deepseek_v4.checkpoint.convert import RELEASE
from deepseek_v4.config import DataConfig
from deepseek_v4.config_checks import refuse
from deepseek_v4.text import chat
from deepseek_v4.text.chat_template import DEFAULT, ChatTemplate
from deepseek_v4.training import sources

_SHOWN = 20  # bad lines that one error lists


@dataclasses.dataclass(frozen=True)
class Conversation:
  """A line of a "chat" source.

  Attributes:
    name: file#line, which decides whether it is held out.
    place: file and line as errors name them.
    fields: the object on the line.
  """

  name: str
  place: str
  fields: Mapping[str, Any]

  @property
  def messages(self) -> list[Mapping[str, Any]]:
    """As `chat.encode` takes them."""
    return self.fields["messages"]


def template_of(config: DataConfig) -> ChatTemplate:
  """The wording of the run: that of the release in `data.chat_template`, or our own.

  Raises:
    FileNotFoundError, ValueError: see `ChatTemplate.from_checkpoint`.
  """
  if config.chat_template is None:
    return DEFAULT
  folder = Path(config.chat_template)
  return ChatTemplate.from_checkpoint(folder / RELEASE if (folder / RELEASE).is_dir() else folder)


def read(config: DataConfig, split: str) -> tuple[list[Conversation], list[str]]:
  """The conversations of one split of a "chat" source, in the order of files and lines; and what is wrong with lines that
  are no objects with messages, for `refuse_lines`.

  Raises:
    ValueError: no file, or an unreadable one.
  """
  root, files = sources.find_files(config)
  found, bad = [], []
  for file in files:
    for number, line in enumerate(sources.read_file(root / file).split(b"\n"), 1):
      place = f"{root / file}, line {number}"
      if not line.strip():
        continue
      try:
        fields = json.loads(line)
        if not isinstance(fields, dict) or not isinstance(fields.get("messages"), list):
          refuse("line", _start(line), "a JSON object with a list of messages")
      except (ValueError, RecursionError) as error:
        bad.append(f"{place}: {error}")
        continue
      name = f"{file}#{number}"
      if sources.in_split(name, split, config.held_out_percent):
        found.append(Conversation(name, place, fields))
  return found, bad


def bad_line(conversation: Conversation, error: Exception) -> str:
  """What `refuse_lines` says of a conversation in which something was wrong."""
  return f"{conversation.place}: {error if isinstance(error, ValueError) else f'{type(error).__name__}: {error}'}"


def refuse_lines(bad: list[str]) -> None:
  """Raises one ValueError with a line for each bad line of a source, if there are any."""
  if bad:
    more = [f"and {len(bad) - _SHOWN} more"] if len(bad) > _SHOWN else []
    raise ValueError("\n  ".join([f"data.path: {len(bad)} bad line{'s' if len(bad) > 1 else ''}", *bad[:_SHOWN], *more]))


def encode(conversation: Conversation, template: ChatTemplate, tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
  """Token ids int32 [n] of a conversation, and bool [n]: written by the assistant.

  Raises:
    ValueError: a message, level or flag that the encoding has no place for.
  """
  fields = conversation.fields
  drop = fields.get("drop_thinking", True)
  if not isinstance(drop, bool):
    refuse("drop_thinking", drop, "true or false")
  ids, written = [], []
  for text, by_assistant in chat.parts(fields["messages"], reasoning_effort=fields.get("reasoning_effort"),
                                       drop_thinking=drop, template=template):
    new = chat.to_ids(text, tokenizer)
    ids += new
    written += [by_assistant] * len(new)
  return np.array(ids, np.int32), np.array(written, bool)


class ChatDocuments:
  """Conversations as documents of ids, held in memory; see `data.py` for what documents are.

  Attributes:
    targets: tokens that the assistant wrote.
  """

  threads = 0
  text_bytes = None  # of a conversation only a part is predicted: its loss is no measure of text
  left_out = ()

  def __init__(self, config: DataConfig, split: str, vocab_size: int, tokenizer: Any) -> None:
    del vocab_size  # the tokenizer was checked against it
    template = template_of(config)
    found, bad = read(config, split)
    encoded = []
    for conversation in found:
      try:
        ids, written = encode(conversation, template, tokenizer)
        if not written.any():
          refuse("messages", f"{len(conversation.messages)} of them", "at least one of the assistant, to learn from")
        if len(ids) > config.sequence_length:
          refuse("conversation", f"{len(ids)} tokens", f"at most data.sequence_length = {config.sequence_length}")
        encoded.append((ids, written))
      except (ValueError, TypeError, KeyError, AttributeError) as error:  # messages are whatever JSON holds
        bad.append(bad_line(conversation, error))
    refuse_lines(bad)
    self.lengths = np.array([len(ids) for ids, _ in encoded], np.int64)
    self._first = np.cumsum(self.lengths) - self.lengths
    self._ids, self._written = (np.concatenate([np.zeros(0, dtype), *(x[i] for x in encoded)])
                                for i, dtype in enumerate((np.int32, bool)))
    self.targets = int(self._written.sum())
    self.checksum = zlib.crc32(self._written.tobytes(), zlib.crc32(self._ids.tobytes()))

  def read(self, document: int, start: int, length: int) -> np.ndarray:
    """Ids int32 [length] of a document, from `start` on."""
    at = self._first[document] + start
    return self._ids[at:at + length]

  def counted(self, document: int, start: int, length: int) -> np.ndarray:
    """bool [length]: tokens that training counts."""
    at = self._first[document] + start
    return self._written[at:at + length]


def _start(line: bytes) -> str:
  text = line.decode("utf-8", "replace")
  return text if len(text) <= 60 else text[:57] + "..."
