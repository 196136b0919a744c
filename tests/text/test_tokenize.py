"""Bytes and tokenizer.json: round trips, reserved ids, and what is refused before a run starts."""

import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from deepseek_v4.text import chat, tokenize


# ---- bytes --------------------------------------------------------------------------------------------------------------
@given(st.text())
def test_bytes_round_trip(text):
  tokenizer = tokenize.load_tokenizer(None, 320)
  ids = tokenizer.encode(text)
  assert len(ids) == len(text.encode())
  assert tokenizer.decode(ids) == text


def test_bytes_layout():
  tokenizer = tokenize.load_tokenizer(None, 262)
  assert tokenizer.encode(bytes(range(256))) == list(range(3, 259))
  assert (tokenizer.document_end, tokenizer.fim, tokenizer.vocab_size, tokenizer.name) == (1, (259, 260, 261), 262, "bytes")
  assert tokenizer.encode("") == [] and tokenizer.decode([]) == ""
  # Ids that are no bytes vanish, broken UTF-8 shows.
  assert tokenizer.decode([0, *tokenizer.encode("é"), 1, 2, 259, 319]) == "é"
  assert tokenizer.decode(tokenizer.encode("é")[:1]) == "\ufffd"


def test_bytes_need_room():
  small = tokenize.load_tokenizer(None, 259)
  assert small.fim is None and small.vocab_size == 259
  with pytest.raises(ValueError, match=r"model.vocab_size = 258: expected at least 259 .* 262 with fill-in-the-middle"):
    tokenize.load_tokenizer(None, 258)


# ---- tokenizer.json -------------------------------------------------------------------------------------------------------
TEXTS = ["def spam(eggs):\n  return eggs + 1\n", "naïve café: 日本語\n", "the cat and the hat and the bat\n"] * 4


SPECIAL = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>")


def _save(folder, special=SPECIAL, truncate=False):
  """A byte-level BPE tokenizer with about 300 ids; returns its file."""
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=list(special), show_progress=False,
                                           initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
  tokenizer.train_from_iterator(TEXTS, trainer)
  if truncate:
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
  tokenizer.save(str(folder / "tokenizer.json"))
  return folder / "tokenizer.json"


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
  return _save(tmp_path_factory.mktemp("bpe"))


def test_json_round_trip(bpe):
  tokenizer = tokenize.load_tokenizer(bpe, 320)
  for text in TEXTS + ["", "\x00 unseen ☃"]:
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(text.encode()) == tokenizer.encode(text)
  assert len(tokenizer.encode(TEXTS[2])) < len(TEXTS[2])
  assert (tokenizer.document_end, tokenizer.fim, tokenizer.name) == (1, (2, 3, 4), str(bpe))
  assert tokenizer.vocab_size == tokenizers.Tokenizer.from_file(str(bpe)).get_vocab_size()
  # A folder that holds the file will do; text that spells a special token is that token.
  assert tokenize.load_tokenizer(bpe.parent, 320).encode("<｜end▁of▁sentence｜>") == [1]


CHAT = ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "｜DSML｜")


@pytest.mark.parametrize("special", [True, False])
def test_json_special_tokens_of_a_chat_come_back(tmp_path, special):
  """What a model writes is parsed whether the file calls the tokens of the format special or only added."""
  file = _save(tmp_path)
  plain = tokenizers.Tokenizer.from_file(str(file))
  plain.add_tokens([tokenizers.AddedToken(token, special=special, normalized=False) for token in CHAT])
  plain.save(str(file))
  tokenizer = tokenize.load_tokenizer(file, 320)
  assert all(len(tokenizer.encode(token)) == 1 for token in CHAT)
  call = {"id": "call_0", "type": "function", "function": {"name": "look", "arguments": '{"where": "up, ☃", "n": 3}'}}
  message = {"role": "assistant", "content": "I look.", "reasoning_content": "hm, where?", "tool_calls": [call]}
  asked = [{"role": "user", "content": "the cat"}]
  question = chat.encode(asked, reasoning_effort="high")
  written = chat.encode([*asked, message], reasoning_effort="high").removeprefix(question)
  ids = tokenizer.encode(written)
  assert ids[-1] == tokenizer.document_end and tokenizer.encode(question) + ids == tokenizer.encode(question + written)
  assert tokenizer.decode(ids, keep_special=True) == written
  assert chat.parse(tokenizer.decode(ids, keep_special=True), reasoning_effort="high") == message
  assert (tokenizer.decode(ids) == written.removesuffix(chat.EOS)) == (not special)


def test_json_documents_are_those_of_encode(bpe, monkeypatch):
  tokenizer = tokenize.load_tokenizer(bpe, 320)
  monkeypatch.setattr(tokenize.JsonTokenizer, "_CHUNK", 40)  # several calls of the library
  arrays = tokenizer.encode_documents([t.encode() for t in TEXTS])
  assert [a.tolist() for a in arrays] == [tokenizer.encode(t) for t in TEXTS]
  assert all(a.dtype == np.int32 for a in arrays) and tokenizer.encode_documents([]) == []


def test_json_stored_truncation_loses_nothing(tmp_path, bpe):
  truncating = tokenize.load_tokenizer(_save(tmp_path, truncate=True), 320)
  assert truncating.encode(TEXTS[0]) == tokenize.load_tokenizer(bpe, 320).encode(TEXTS[0])


def test_json_document_end_of_the_neighbouring_config(tmp_path):
  file = _save(tmp_path, special=("[STOP]", "[GO]"))
  with pytest.raises(ValueError, match="expected a token that ends a document: eos_token in a tokenizer_config.json"):
    tokenize.load_tokenizer(file, 320)
  for entry in ("[GO]", {"content": "[GO]", "special": True}):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": entry}))
    assert tokenize.load_tokenizer(file, 320).document_end == 1
  assert tokenize.load_tokenizer(file, 320).fim is None
  (tmp_path / "tokenizer_config.json").write_text("[1")
  with pytest.raises(ValueError, match="expected a JSON object in .*tokenizer_config.json"):
    tokenize.load_tokenizer(file, 320)


def test_json_refused(tmp_path, bpe):
  with pytest.raises(ValueError, match=r"data.tokenizer = '.*nowhere.json': expected a tokenizer.json file .* no file"):
    tokenize.load_tokenizer(tmp_path / "nowhere.json", 320)
  with pytest.raises(ValueError, match="there is no file .*tokenizer.json"):
    tokenize.load_tokenizer(tmp_path, 320)
  for name, content in (("empty.json", ""), ("other.json", '{"a": 1}'), ("binary.json", "\x00\x01")):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"data.tokenizer = '.*{name}': expected a tokenizer.json of the"):
      tokenize.load_tokenizer(tmp_path / name, 320)
  size = tokenize.load_tokenizer(bpe, 320).vocab_size
  assert tokenize.load_tokenizer(bpe, size).vocab_size == size
  with pytest.raises(ValueError, match=f"has id {size - 1}; expected ids below model.vocab_size = {size - 1}"):
    tokenize.load_tokenizer(bpe, size - 1)
