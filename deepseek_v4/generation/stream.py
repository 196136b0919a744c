"""Tokens of a reply to the text that a person reads, while they come."""

from __future__ import annotations

from typing import Any, Callable, Sequence


def text_of(tokenizer: Any, reply: Sequence[int]) -> str:
  """The text of a reply as `chat.parse` reads it: special tokens are spelled, but for the one that ends it
  (or a thought)."""
  return tokenizer.decode([token for token in reply if token != tokenizer.document_end], keep_special=True)


class Stream:
  """Tokens of one reply -> pieces of text, each as soon as its characters are whole.

  Only the last few tokens are decoded: those of an unfinished character and one before them, since a tokenizer may write a
  first token in another way. The first bytes of a character read as one U+FFFD, however many there are.

  Args:
    tokenizer: see `text.tokenize`.
    on_text: called with each piece.
  """

  def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
    self._tokenizer, self._on_text = tokenizer, on_text
    self._tokens: list[int] = []
    self._text, self._shown = "", 0  # of these tokens, and how many of its characters have been shown

  def __call__(self, _: int, token: int) -> None:
    """The next token; the first argument, which request it is of, is not needed."""
    alone, text = text_of(self._tokenizer, [token]), text_of(self._tokenizer, [*self._tokens, token])
    if not alone and text == self._text:
      return
    finished = not text.endswith("\ufffd")
    separate = bool(alone) and text == self._text + alone  # it does not go on with the character before
    self._tokens, self._text = [*self._tokens, token], text
    self._show(len(text) - (not finished))
    if finished or separate:
      self._tokens, self._text, self._shown = [token], alone, len(alone) - (not finished)

  def finish(self) -> None:
    """Shows what is left of a character that never became whole."""
    self._show(len(self._text))

  def _show(self, end: int) -> None:
    if end > self._shown:
      self._on_text(self._text[self._shown:end])
      self._shown = end
