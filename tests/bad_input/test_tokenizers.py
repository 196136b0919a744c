"""Tokenizers that are none, do not fit the vocabulary or lack a token; wordings of conversations; messages."""

import json

import pytest

from deepseek_v4.config import DataConfig
from deepseek_v4.text import chat
from deepseek_v4.text.chat_template import DEFAULT, ChatTemplate
from deepseek_v4.text.tokenize import load_tokenizer
from deepseek_v4.training import data
from tests.bad_input.table import check, table

WORDS = {"a": 0, "b": 1, "<｜end▁of▁sentence｜>": 2}


def file_of(words=WORDS, **changes):
  """The smallest tokenizer.json: whole words."""
  model = {"type": "WordLevel", "vocab": words, "unk_token": "a"}
  return json.dumps({"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
                     "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None,
                     "model": model} | changes)


def load(text, vocab_size=100, settings=None):
  """Loads a tokenizer.json with this text."""
  def call(folder):
    (folder / "tokenizer.json").write_text(text)
    if settings is not None:
      (folder / "tokenizer_config.json").write_text(settings)
    load_tokenizer(folder, vocab_size)
  return call


def encode(*messages, **options):
  return lambda _: chat.encode(list(messages), **options)


def encoder(text):
  """Reads the wording of a release whose encoder file is this."""
  def call(folder):
    (folder / "encoding").mkdir()
    (folder / "encoding" / "encoding_dsv4.py").write_text(text)
    ChatTemplate.from_checkpoint(folder)
  return call


def with_fim(folder):
  (folder / "tokenizer.json").write_text(file_of())
  (folder / "x.txt").write_text("a b " * 50)
  data.make_dataset(DataConfig(source="text", path=str(folder / "x.txt"), tokenizer=str(folder / "tokenizer.json"),
                               sequence_length=8, batch_size=1, held_out_percent=0, fim_rate=0.5), 100)


USER = {"role": "user", "content": "hi"}
WRONG = table(
  ("model.vocab_size", "258", "at least 259 for bytes", lambda _: load_tokenizer(None, 258)),
  ("data.tokenizer", "nowhere", "a tokenizer.json file or a folder", lambda p: load_tokenizer(p / "nowhere", 100)),
  ("data.tokenizer", "tokenizer.json", "a folder that holds one", lambda p: load_tokenizer(p, 100)),
  ("data.tokenizer", "tokenizer", "a tokenizer.json of the tokenizers library", load("no JSON")),
  ("data.tokenizer", "tokenizer", "a tokenizer.json of the tokenizers library", load("{}")),
  ("data.tokenizer", "tokenizer", "a tokenizer.json of the tokenizers library", load("")),
  ("data.tokenizer", "tokenizer", "a tokenizer.json of the tokenizers library", load(file_of()[:40])),
  ("data.tokenizer", "tokenizer", "a tokenizer.json of the tokenizers library", load(json.dumps({"model": {"type": "X"}}))),
  ("data.tokenizer", "tokenizer", "with at least one token", load(file_of({}))),
  ("data.tokenizer", "has id 2", "below model.vocab_size = 2", load(file_of(), 2)),
  ("data.tokenizer", "has id 5000", "below model.vocab_size = 100", load(file_of(WORDS | {"z": 5000}))),
  ("data.tokenizer", "tokenizer.json", "a token that ends a document", load(file_of({"a": 0, "b": 1}))),
  ("data.tokenizer", "tokenizer.json", "a token that ends a document", load(
    file_of({"a": 0}), settings='{"eos_token": "b"}')),
  ("data.tokenizer", "tokenizer_config.json", "a JSON object", load(file_of(), settings="no JSON")),
  ("data.tokenizer", "tokenizer_config.json", "a JSON object", load(file_of(), settings="[1]")),
  ("data.fim_rate", "0.5", "no fill-in-the-middle tokens are known", with_fim),
  ("reasoning_effort", "'huge'", "one of none, high", encode(USER, reasoning_effort="huge")),
  ("messages", "[]", "at least one message", encode()),
  ("messages[0].role", "'robot'", "one of", encode({"role": "robot", "content": "x"})),
  ("messages[0].role", "'hi'", "one of", encode("hi")),
  ("messages[0].content", "3", "a string", encode({"role": "user", "content": 3})),
  ("messages[1].reasoning_content", "3", "a string", encode(
    USER, {"role": "assistant", "content": "x", "reasoning_content": 3})),
  ("messages[1].tool_calls[0]", "'f'", "'arguments': a JSON string", encode(
    USER, {"role": "assistant", "content": "", "tool_calls": ["f"]})),
  ("text", "I wonder", "a thought closed by </think>", lambda _: chat.parse("I wonder", reasoning_effort="high")),
  ("encoding", "nowhere", "the release's encoder file", lambda p: ChatTemplate.from_checkpoint(p / "nowhere")),
  ("encoding", "encoding", "the wording as literals in one file", encoder("A = 1\n")),
  ("default_effort", "'huge'", "one of none", lambda _: ChatTemplate(
    DEFAULT.effort_prefix, DEFAULT.tools_template, DEFAULT.format_template, default_effort="huge")),
  ("tools_template", "'none'", "a text with {", lambda _: ChatTemplate(
    DEFAULT.effort_prefix, "none", DEFAULT.format_template)),
  ("effort_prefix['high']", "3", "a string", lambda _: ChatTemplate(
    {"none": "", "high": 3}, DEFAULT.tools_template, DEFAULT.format_template)),
)


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_refused(wrong, tmp_path, compiled):
  check(wrong, tmp_path, compiled)
