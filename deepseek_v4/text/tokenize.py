"""Text to token ids and back: plain bytes, or a tokenizer.json; no JAX here.

The byte vocabulary (ids 0, 1, 2 are DeepSeek's own for begin, end and padding):

    0 begin of sentence   1 end of sentence (closes every document)   2 padding
    3 ... 258             byte 0 ... byte 255
    259 260 261           fill-in-the-middle begin, hole, end (only where the model's vocabulary holds them)

so the smallest byte model has vocab_size = 259, and 262 with fill-in-the-middle.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Sequence

import numpy as np

BOS, EOS, PAD = 0, 1, 2
FIRST_BYTE = 3
BYTE_VOCABULARY = FIRST_BYTE + 256
BYTE_FIM = (BYTE_VOCABULARY, BYTE_VOCABULARY + 1, BYTE_VOCABULARY + 2)
# Spellings under which tokenizer files of released models hold these tokens.
END_NAMES = ("<｜end▁of▁sentence｜>", "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
FIM_NAMES = (("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"), ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"))


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
  """Every byte is a token: id = byte + 3.

  Attributes:
    document_end: id that closes a document.
    fim: ids of (begin, hole, end), or None where the model's vocabulary is too small for them.
    vocab_size: number of ids it can produce.
  """

  fim: tuple[int, int, int] | None = BYTE_FIM
  name: str = "bytes"
  document_end: int = EOS

  @property
  def vocab_size(self) -> int:
    """Ids that it gives: those of bytes, of begin, end and padding, and of fill-in-the-middle where there is room."""
    return BYTE_VOCABULARY if self.fim is None else BYTE_VOCABULARY + len(self.fim)

  def encode(self, text: str | bytes) -> list[int]:
    """Ids of `text`; a string goes through UTF-8 first. No special ids are added."""
    return self.encode_documents([text.encode("utf-8") if isinstance(text, str) else text])[0].tolist()

  def encode_documents(self, texts: Sequence[bytes]) -> list[np.ndarray]:
    """One uint16 array [bytes] of ids per text."""
    return [np.frombuffer(text, np.uint8).astype(np.uint16) + np.uint16(FIRST_BYTE) for text in texts]

  def decode(self, ids: Sequence[int], *, keep_special: bool = False) -> str:
    """The text of `ids`; bytes that are no UTF-8 become U+FFFD. Ids that are no bytes have no text, whatever is kept."""
    values = np.asarray(ids, np.int64).reshape(-1) - FIRST_BYTE
    return values[(values >= 0) & (values < 256)].astype(np.uint8).tobytes().decode("utf-8", errors="replace")


class JsonTokenizer:
  """A tokenizer.json of the `tokenizers` library; same members as `ByteTokenizer`.

  Text that spells a special token becomes that token, as the chat format needs.
  """

  _CHUNK = 1 << 20  # bytes encoded in one call: the library's results are much larger than the ids

  def __init__(self, tokenizer: Any, name: str, document_end: int, fim: tuple[int, int, int] | None) -> None:
    self._tokenizer = tokenizer
    self.name = name
    self.document_end = document_end
    self.fim = fim
    self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1

  def encode(self, text: str | bytes) -> list[int]:
    """Ids of `text` (bytes must be UTF-8). No special ids are added."""
    text = text.decode("utf-8") if isinstance(text, bytes) else text
    return self._tokenizer.encode(text, add_special_tokens=False).ids

  def encode_documents(self, texts: Sequence[bytes]) -> list[np.ndarray]:
    """One int32 array [tokens] of ids per text."""
    arrays, chunk, size = [], [], 0
    for i, text in enumerate(texts):
      chunk.append(text.decode("utf-8"))
      size += len(text)
      if size >= self._CHUNK or i == len(texts) - 1:
        encodings = self._tokenizer.encode_batch_fast(chunk, add_special_tokens=False)
        arrays += [np.asarray(encoding.ids, np.int32) for encoding in encodings]
        chunk, size = [], 0
    return arrays

  def decode(self, ids: Sequence[int], *, keep_special: bool = False) -> str:
    """The text of `ids` without special tokens; or, as the chat format needs it, with them as they are spelled."""
    return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=not keep_special)


def load_tokenizer(path: str | Path | None, vocab_size: int) -> ByteTokenizer | JsonTokenizer:
  """The tokenizer of a run.

  Args:
    path: a tokenizer.json, a folder that holds one, or None for bytes.
    vocab_size: rows of the model's embedding; no id may reach it.

  Raises:
    ValueError: no such file, a file that is no tokenizer, no token that ends a document, or ids beyond the vocabulary.
  """
  if path is None:
    if vocab_size < BYTE_VOCABULARY:
      raise ValueError(f"model.vocab_size = {vocab_size}: expected at least {BYTE_VOCABULARY} for bytes (256 of them, "
                       f"begin, end, padding), {BYTE_FIM[-1] + 1} with fill-in-the-middle")
    return ByteTokenizer(fim=BYTE_FIM if vocab_size > BYTE_FIM[-1] else None)
  file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
  field = f"data.tokenizer = {str(path)!r}"
  if not file.is_file():
    raise ValueError(f"{field}: expected a tokenizer.json file or a folder that holds one; there is no file {file}")
  import tokenizers  # the byte tokenizer does without it
  try:
    tokenizer = tokenizers.Tokenizer.from_file(str(file))
  except Exception as error:  # the library raises bare Exception for whatever it cannot read
    raise ValueError(f"{field}: expected a tokenizer.json of the tokenizers library; {error}") from error
  # A stored truncation or padding would drop or invent tokens without a word.
  tokenizer.no_truncation()
  tokenizer.no_padding()
  vocabulary = tokenizer.get_vocab(with_added_tokens=True)
  largest = max(vocabulary, key=lambda token: vocabulary[token], default=None)
  if largest is None:
    raise ValueError(f"{field}: expected a tokenizer with at least one token")
  if vocabulary[largest] >= vocab_size:
    raise ValueError(f"{field}: token {largest!r} has id {vocabulary[largest]}; expected ids below model.vocab_size = "
                     f"{vocab_size}")
  fim = next(((vocabulary[begin], vocabulary[hole], vocabulary[end]) for begin, hole, end in FIM_NAMES
              if {begin, hole, end} <= set(vocabulary)), None)
  return JsonTokenizer(tokenizer, str(file), _document_end(file, vocabulary), fim)


def _document_end(file: Path, vocabulary: dict[str, int]) -> int:
  """Id of the token that ends a document: the neighbouring tokenizer_config.json's eos_token, else a well-known name."""
  names: tuple[str, ...] = END_NAMES
  neighbour = file.with_name("tokenizer_config.json")
  if neighbour.is_file():
    try:
      entry = json.loads(neighbour.read_text("utf-8")).get("eos_token")
    except (ValueError, AttributeError) as error:
      raise ValueError(f"data.tokenizer: expected a JSON object in {neighbour}; {error}") from error
    entry = entry.get("content") if isinstance(entry, dict) else entry
    names = (entry, *names) if entry else names
  for name in names:
    if name in vocabulary:
      return vocabulary[name]
  raise ValueError(f"data.tokenizer = {str(file)!r}: expected a token that ends a document: eos_token in a "
                   f"tokenizer_config.json beside it, or one of {', '.join(names)}")
