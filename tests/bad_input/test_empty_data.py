"""Data that are not there, empty, too few, or of another kind."""

import json

import pytest

import deepseek_v4 as dsv4
from deepseek_v4.analysis import gains
from deepseek_v4.config import DataConfig
from deepseek_v4.generation.drift import storage_drift
from deepseek_v4.posttraining.journal import Journal
from deepseek_v4.posttraining.problems import Problems
from deepseek_v4.posttraining.rollout import Request, sample_replies
from deepseek_v4.text.chat_template import DEFAULT
from deepseek_v4.text.tokenize import load_tokenizer
from deepseek_v4.training import baselines, data, sources
from tests.bad_input.table import check, table
from tests.bad_input.test_dtypes import MODEL, reply

TEXT = {"x.txt": "some text " * 50, "y.txt": "more text " * 50}


def read(files, source="text", split="train", path=".", **changes):
  """Reads data of these files: names and what is in them, text or bytes."""
  def call(folder):
    for name, content in files.items():
      (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    config = {"sequence_length": 16, "batch_size": 2, "held_out_percent": 0, **changes}
    data.make_dataset(DataConfig(source=source, path=str(folder / path), **config), 320, split=split)
  return call


def problems(*lines):
  """Reads problems to learn from, for replies of few tokens."""
  def call(folder):
    (folder / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = DataConfig(source="chat", path=str(folder), held_out_percent=0)
    Problems(config, "train", "none", DEFAULT, load_tokenizer(None, 320), 100)
  return call


def ids(*documents, **changes):
  """Reads documents of token ids."""
  def call(folder):
    sources.write_array_record(folder / "a.array_record", documents)
    read({}, "array_record", **changes)(folder)
  return call


USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
talk = lambda *messages, **more: json.dumps({"messages": messages, "reasoning_effort": "none"} | more) + "\n"
WRONG = table(
  ("data.path", "nowhere", "a file, a glob or a folder with files", read({}, path="nowhere")),
  ("data.path", "*.md", "found none", read(TEXT, path="*.md")),
  ("data.path", "'", "a folder with files; found none", read({})),
  ("data.path", "'", ".jsonl or .ndjson files; found none", read(TEXT, "jsonl")),
  ("data.path", "'", ".array_record files; found none", read(TEXT, "array_record")),
  ("data.path", "'", "training text, found no document", read({"a": "", "b": ""})),
  ("data.path", "'", "is UTF-8", read({"a": b"\x80\x81", "b": b"\xff" * 99})),
  ("data.held_out_percent", "0", "at least 1, since a run is scored", read(TEXT, split="held_out")),
  ("data.held_out_percent", "1", "that holds out at least one document", read(TEXT, split="held_out", held_out_percent=1)),
  ("data.path", "x.txt", "two files or more", read(TEXT, split="held_out", path="x.txt", held_out_percent=1)),
  ("data.batch_size", "900", "at most", read(TEXT, batch_size=900)),
  ("data.path", "a.jsonl, line 1", "data.text_field = 'text'", read({"a.jsonl": "{"}, "jsonl")),
  ("data.path", "a.jsonl, line 2", "data.text_field = 'body'", read(
    {"a.jsonl": '{"body": "x"}\n{"text": "x"}'}, "jsonl", text_field="body")),
  ("data.path", "", "training text, found no document", read({"a.jsonl": ""}, "jsonl")),
  ("data.path", "a.array_record", "an ArrayRecord file", read({"a.array_record": b""}, "array_record")),
  ("data.path", "a.array_record", "an ArrayRecord file", read({"a.array_record": b"text " * 99}, "array_record")),
  ("data.batch_size", "2", "at most 1", ids([1, 2, 3])),
  ("data.path", "1 bad line", "a JSON object with a list of messages", read({"a.jsonl": "[]\n"}, "chat")),
  ("data.path", "a.jsonl, line 1", "at least one of the assistant", read({"a.jsonl": talk(USER)}, "chat")),
  ("messages", "[]", "at least one message", read({"a.jsonl": talk()}, "chat")),
  ("conversation", "tokens", "at most data.sequence_length = 16", read({"a.jsonl": talk(USER, ANSWER)}, "chat")),
  ("drop_thinking", "'no'", "true or false", read(
    {"a.jsonl": talk(USER, ANSWER, drop_thinking="no")}, "chat", sequence_length=512)),
  ("data.path", "", "found no document", read({"a.jsonl": "\n"}, "chat")),
  ("data.path", "'train'", "found none", problems()),
  ("messages", "2, the last from 'assistant'", "end with the user's", problems({"messages": [USER, ANSWER]})),
  ("messages", "tokens", "at most data.sequence_length - max_new_tokens = 100", problems(
    {"messages": [{"role": "user", "content": "x" * 200}]})),
  ("prompts", "[]", "at least one", reply(prompts=[])),
  ("begun", "0 replies", "one for each of the 1 requests", reply(begun=[])),
  ("sequences", "[]", "at least one", lambda _: storage_drift(MODEL, {}, [])),
  ("combs", "empty", "a map of every sublayer", lambda _: gains.composite_gains([])),
  ("held_out", "at least one byte", "expected at least one byte of text",
   lambda _: baselines.bigram_bits_per_byte([b"ab"], [])),
  ("texts", "at least one byte", "expected at least one byte of text", lambda _: baselines.zlib_bits_per_byte([])),
  ("requests", "0", "at least 1", lambda p: Journal(p, 0, None, 0)),
  ("requests[0].seed", "()", "at least one whole number", lambda _: sample_replies(
    MODEL, {}, [Request((1,), ())], batch_size=1, max_new_tokens=2, stop_tokens=())),
  ("layer_types", "0 entries", "num_hidden_layers", lambda _: dsv4.ModelConfig(layer_types=())),
)


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_refused(wrong, tmp_path, compiled):
  check(wrong, tmp_path, compiled)
