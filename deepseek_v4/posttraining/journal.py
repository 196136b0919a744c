"""What was sampled, on disk as soon as it is there, so that no token is sampled twice (report 5.2.4).

One append-only file per round of sampling. Its first line says what the round asks for, every other one holds the tokens
that came together from the decoder: which requests, the number of the first token in each reply, token ids, log-
probabilities. A line begins with the checksum of its JSON and is on the disk (fsync) before anybody uses what it says. A
request's tokens depend on its prompt, its settings and its key only (up to rounding: the begun part is fed in chunks, not
token by token), so a reply that was cut off is gone on with behind its last token: nothing favours short replies, as
beginning them anew would.
"""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
import zlib
from pathlib import Path
from typing import Any, Callable, Sequence

from deepseek_v4.generation.decode import Drawn
from deepseek_v4.generation.requests import Thought
from deepseek_v4.posttraining.rollout import Request

_SUFFIX = ".jsonl"


class Journal:
  """The tokens of one round: those that are on disk, and those that are added.

  Attributes:
    tokens, logprobs: of each request so far.

  Args:
    folder: of the journal of a run; made if it is not there.
    number: of the round.
    asked: what the round asks for (prompts, settings, weights), as JSON holds it.
    requests: how many.
    whole: nothing may be missing or asked for otherwise; the file stays as it is if something is.

  Raises:
    ValueError: a number of requests that is none.
    FileNotFoundError: not all replies are there that `whole` wants.
    OSError: the file cannot be written.
  """

  def __init__(self, folder: str | Path, number: int, asked: Any, requests: int, whole: bool = False) -> None:
    if requests < 1:
      raise ValueError(f"requests = {requests}: expected at least 1")
    self.tokens: list[list[int]] = [[] for _ in range(requests)]
    self.logprobs: list[list[float]] = [[] for _ in range(requests)]
    self._path = file_of(folder, number)
    Path(folder).mkdir(parents=True, exist_ok=True)
    head = json.loads(json.dumps({"asked": asked, "requests": requests}))
    sound = self._read(head) if self._path.exists() else 0
    if whole and (not sound or sound < self._path.stat().st_size):
      raise FileNotFoundError(f"{self._path}: expected the replies of round {number} as the run left them, and the settings "
                              f"that it had: the weights that drew them are gone")
    self._file = self._path.open("r+b" if sound else "wb")
    self._file.seek(sound)
    self._file.truncate()
    if not sound:
      self._write(head)
      _sync_folder(Path(folder))

  def __enter__(self) -> "Journal":
    return self

  def __exit__(self, *exception: Any) -> None:
    self._file.close()

  def add(self, drawn: Sequence[Drawn]) -> None:
    """Appends tokens that came together, by the number of their request; they are on disk when this returns."""
    line = {"request": [d.request for d in drawn], "first": [len(self.tokens[d.request]) for d in drawn],
            "tokens": [d.tokens for d in drawn], "logprobs": [d.logprobs for d in drawn]}
    self._write(line)
    self._take(json.loads(json.dumps(line)))

  @property
  def count(self) -> int:
    """Tokens in all."""
    return sum(map(len, self.tokens))

  def _write(self, value: Any) -> None:
    text = json.dumps(value, separators=(",", ":")).encode()
    self._file.write(b"%08x %s\n" % (zlib.crc32(text), text))
    self._file.flush()
    os.fsync(self._file.fileno())

  def _take(self, line: dict[str, Any]) -> None:
    """Takes the tokens of a line; one that does not go on where its replies end raises ValueError."""
    parts = list(zip(*(line[name] for name in ("request", "first", "tokens", "logprobs")), strict=True))
    for request, first, tokens, logprobs in parts:
      if first != len(self.tokens[request]) or len(tokens) != len(logprobs):
        raise ValueError(f"token {first} of request {request} behind {len(self.tokens[request])} tokens")
    for request, _, tokens, logprobs in parts:
      self.tokens[request] += tokens
      self.logprobs[request] += logprobs

  def _read(self, head: dict[str, Any]) -> int:
    """Takes what the file says and returns how many of its bytes are sound: 0 if it asks for something else."""
    content, sound = self._path.read_bytes(), 0
    for number, line in enumerate(content.splitlines(keepends=True), 1):
      try:
        found = _parse(line)
        if number > 1:
          self._take(found)
      except (ValueError, KeyError, TypeError, IndexError) as error:
        warnings.warn(f"{self._path}, line {number}: damaged ({error}); what stands there and behind it, "
                      f"{len(content) - sound:,} bytes, is sampled again", stacklevel=3)
        return sound
      if number == 1 and found != head:
        warnings.warn(f"{self._path}: its tokens come from other prompts, settings or weights; all are sampled again",
                      stacklevel=3)
        return 0
      sound += len(line)
    return sound


def draw_missing(journal: Journal, requests: Sequence[Request], draw: Callable[..., Any], *, max_new_tokens: int,
                 stop_tokens: Sequence[int], on_saved: Callable[[], None] = lambda: None) -> list[list[int]]:
  """The replies to all requests, token ids: those of the journal, and what is missing there, drawn now and written down.

  Args:
    requests: of the journal's round, without a beginning of their own.
    draw: `sample_replies`, but for the arguments that are given here.
    max_new_tokens, stop_tokens: see there.
    on_saved: called whenever new tokens are on disk; what it raises ends the drawing.
  """
  def ended(request: Request, reply: list[int]) -> bool:
    thought = Thought(request.budget, stop_tokens)  # a stop token inside it ends no reply
    return len(reply) >= max_new_tokens or any([thought.add(token) for token in reply])

  missing = [i for i, reply in enumerate(journal.tokens) if not ended(requests[i], reply)]

  def on_drawn(new: list[Drawn]) -> None:
    journal.add([dataclasses.replace(drawn, request=missing[drawn.request]) for drawn in new])
    on_saved()

  if missing:
    begun = [dataclasses.replace(requests[i], begun=tuple(journal.tokens[i]), begun_logprobs=tuple(journal.logprobs[i]))
             for i in missing]
    draw(begun, max_new_tokens=max_new_tokens, stop_tokens=stop_tokens, on_drawn=on_drawn)
  return journal.tokens


def _parse(line: bytes) -> dict[str, Any]:
  """The JSON of a line.

  Raises:
    ValueError: cut off, or not what was written.
  """
  checksum, text = line[:8], line[9:-1]
  if not line.endswith(b"\n") or line[8:9] != b" ":
    raise ValueError("cut off")
  if b"%08x" % zlib.crc32(text) != checksum:
    raise ValueError("its checksum does not fit")
  return json.loads(text)


def file_of(folder: str | Path, number: int) -> Path:
  """The file of a round."""
  return Path(folder) / f"{number:06d}{_SUFFIX}"


def forget(folder: str | Path, before: int) -> None:
  """Deletes the rounds before this one."""
  for path in Path(folder).glob(f"*{_SUFFIX}"):
    if path.stem.isdigit() and int(path.stem) < before:
      path.unlink()


def _sync_folder(folder: Path) -> None:
  """A new file is found after a crash only when its folder is on the disk."""
  handle = os.open(folder, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)
