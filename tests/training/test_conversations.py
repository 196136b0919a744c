"""Conversations as documents: what is learnt, against a scan of the encoded text; packing, positions, and bad lines."""

import collections
import itertools
import json

import numpy as np
import pytest

from deepseek_v4.config import DataConfig
from deepseek_v4.text import chat, tokenize
from deepseek_v4.text.chat_template import THINK, THINK_END
from deepseek_v4.training import conversations, data

VOCAB = 320
BYTES = tokenize.load_tokenizer(None, VOCAB)
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
CALL = {"id": "c", "function": {"name": "f", "arguments": '{"x": 1}'}}


def user(text):
  return {"role": "user", "content": text}


def assistant(text, thought=None, **more):
  return {"role": "assistant", "content": text, **({} if thought is None else {"reasoning_content": thought}), **more}


LINES = [
  {"messages": [user("2+3"), assistant("5")], "reasoning_effort": "none"},
  {"messages": [user("2+4"), assistant("6", "count up")]},
  {"messages": [user("2+5"), assistant("7", "count up, twice")], "reasoning_effort": "max", "answer": "7"},
  {"messages": [{"role": "system", "content": "Sums."}, user("é+1"), assistant("?", "a"), user("1+1"), assistant("2", "b")]},
  {"messages": [user("1"), assistant("one", "I"), user("2"), assistant("two", "II")], "drop_thinking": False},
  {"messages": [{"role": "system", "content": "", "tools": [TOOL]}, user("call"), assistant("", "t", tool_calls=[CALL]),
                {"role": "tool", "tool_call_id": "c", "content": "4"}, assistant("four", "u")]},
  {"messages": [user("go on"), assistant("half", "w", wo_eos=True)]},
]


def scan(line):
  """(ids, learnt) of a conversation from its text alone: what follows an opened or closed thought up to the end of the turn,
  the end included, is the assistant's."""
  text = chat.encode(line["messages"], reasoning_effort=line.get("reasoning_effort"),
                     drop_thinking=line.get("drop_thinking", True))
  ids, learnt, at, inside = [], [], 0, False
  while at < len(text):
    opening = next((chat.ASSISTANT + tag for tag in (THINK, THINK_END) if text.startswith(chat.ASSISTANT + tag, at)), None)
    if text.startswith(chat.EOS, at):
      piece, new = chat.EOS, [1]
    else:
      piece = opening or text[at]
      new = [3 + byte for byte in piece.encode()]
    ids += new
    learnt += [inside] * len(new)
    inside = (inside or opening is not None) and piece != chat.EOS
    at += len(piece)
  return tuple(ids), tuple(learnt)


@pytest.fixture()
def source(tmp_path):
  def write(lines=LINES, copies=40, **changes):
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines] * copies
    (tmp_path / "talk.jsonl").write_text("\n".join(texts) + "\n")
    return DataConfig(**{"source": "chat", "path": str(tmp_path), "sequence_length": 1024, "batch_size": 4,
                         "held_out_percent": 20, **changes})
  return write


def rows_of(config, split):
  batches = data.make_dataset(config, VOCAB, split=split)
  taken = list(itertools.islice(batches, -(-batches.rows // batches.batch_size)))
  return batches, {name: np.concatenate([b[name].reshape(-1, config.sequence_length) for b in taken])[:batches.rows]
                   for name in taken[0]}


@pytest.mark.parametrize("line", LINES, ids=range(len(LINES)))
def test_the_assistants_tokens_are_learnt(line):
  conversation = conversations.Conversation("a#1", "a, line 1", line)
  ids, written = conversations.encode(conversation, conversations.DEFAULT, BYTES)
  assert (tuple(ids), tuple(written)) == scan(line)
  assert written.any() and not written[0]


def test_every_conversation_once_packed_and_masked(source):
  config = source()
  seen = collections.Counter()
  for split in ("train", "held_out"):
    batches, rows = rows_of(config, split)
    assert batches.targets == rows["loss_mask"].sum() and batches.text_bytes is None
    assert batches.tokens == (rows["segment_ids"] > 0).sum() and batches.rows < batches.documents
    for row in range(batches.rows):
      for segment in range(1, rows["segment_ids"][row].max() + 1):
        at = rows["segment_ids"][row] == segment
        seen[tuple(rows["tokens"][row][at]), tuple(rows["loss_mask"][row][at] > 0)] += 1
        np.testing.assert_array_equal(rows["positions"][row][at], np.arange(at.sum()))
  assert seen == collections.Counter({scan(line): 40 for line in LINES})


def test_positions_can_be_gone_back_to(source):
  batches = data.make_dataset(source(), VOCAB)
  rows = iter(batches)
  next(rows)
  state = json.loads(json.dumps(rows.get_state()))
  expected = next(rows)
  again = iter(data.make_dataset(source(), VOCAB))
  again.set_state(state)
  found = next(again)
  assert all((found[name] == expected[name]).all() for name in expected)
  other = iter(data.make_dataset(source([*LINES[1:], LINES[0]]), VOCAB))
  with pytest.raises(ValueError, match="data position: documents"):
    other.set_state(state)


def test_every_bad_line_is_named_with_its_cause(source, tmp_path):
  bad = [LINES[0], "{", "[]", {"messages": 3}, {"messages": []}, {"messages": [{"role": "robot", "content": "x"}]},
         {"messages": [user("a"), assistant("b")], "reasoning_effort": "huge"}, {"messages": [user("a")]},
         {"messages": [user("a" * 1200), assistant("b")]}, {"messages": [user("a"), assistant("b")], "drop_thinking": 1},
         {"messages": [{"role": "system", "content": "", "tools": 3}, user("a"), assistant("b")]}, LINES[1]]
  causes = {2: "Expecting property name", 3: "expected a JSON object with a list of messages", 4: "a list of messages",
            5: "at least one message", 6: "messages[0].role = 'robot'", 7: "reasoning_effort = 'huge': expected one of none",
            8: "at least one of the assistant", 9: "expected at most data.sequence_length = 1024",
            10: "drop_thinking = 1: expected true or false", 11: "TypeError"}
  with pytest.raises(ValueError, match="data.path: 10 bad lines") as refused:
    data.make_dataset(source(bad, copies=1, held_out_percent=0), VOCAB)
  found = {}
  for line in str(refused.value).splitlines()[1:]:
    place, _, cause = line.strip().removeprefix(f"{tmp_path / 'talk.jsonl'}, line ").partition(": ")
    found[int(place)] = cause
  assert found.keys() == causes.keys()
  for number, cause in causes.items():
    assert cause in found[number], (number, found[number])


@pytest.mark.parametrize("changes, message", [
  (dict(fim_rate=0.5), r"fim_rate = 0.5: expected 0 for source 'chat'"),
  (dict(source="jsonl", chat_template="somewhere"), r"chat_template = 'somewhere': expected None for source 'jsonl'"),
  (dict(path=None), r"path = None: expected a folder, file or glob for source 'chat'"),
])
def test_refused_settings(source, changes, message):
  with pytest.raises(ValueError, match=message):
    source(**changes)


def test_the_wording_of_a_release(source, tmp_path):
  folder = tmp_path / "release" / "encoding"
  folder.mkdir(parents=True)
  (folder / "encoding_dsv4.py").write_text('REASONING_EFFORT_MAX = "All of it. "\nTOOLS_TEMPLATE = "{tool_schemas}"\n'
                                           'response_format_template = "{schema}"\n')
  template = conversations.template_of(source(chat_template=str(tmp_path)))
  assert template.effort_prefix == {"high": "", "max": "All of it. "}
  assert template == conversations.template_of(source(chat_template=str(tmp_path / "release")))
  with pytest.raises(FileNotFoundError, match="expected the release's encoder file"):
    conversations.template_of(source(chat_template=str(tmp_path / "nothing")))
  config = source(LINES[2:3], chat_template=str(tmp_path), path=str(tmp_path / "talk.jsonl"))
  ids = data.make_dataset(config, VOCAB).pipeline(data.Position())
  assert "All of it. " in BYTES.decode(next(iter(ids))["tokens"][0, 0])
