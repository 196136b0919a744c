"""Prompts are fixed by their numbers, and rows hold every token of every sample once, with the mask on what was said."""

import dataclasses
import json

import numpy as np
import pytest

from deepseek_v4.config import DataConfig, TeacherConfig
from deepseek_v4.posttraining.prompts import ChatPrompts, Prompts, Text, in_passes, rows_of
from deepseek_v4.text import chat
from deepseek_v4.training import sources
from tests.posttraining.small import run_config


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  folder = tmp_path_factory.mktemp("text")
  for i in range(40):
    (folder / f"{i:02d}.txt").write_text("".join(chr(97 + (i * 7 + j * j) % 26) for j in range(1 + 3 * i)))
  return folder


def prompts(text, **settings):
  run = run_config([("t", "a", text, 1.0)], **settings)
  return Prompts(run, run.distillation.teachers[0])


def test_prompts_begin_pieces_of_training_documents(text):
  found = prompts(text).take(0, 60)
  training = sources.read_texts(DataConfig(source="text", path=str(text), held_out_percent=20), "train").texts
  # a piece begins at a multiple of the longest prompt; byte b is token b + 3
  starts = [document[i:i + 8] for document in training for i in range(0, len(document), 8)]
  for prompt in found:
    spelled = bytes(token - 3 for token in prompt)
    assert 1 <= len(spelled) <= 8 and any(start.startswith(spelled) for start in starts), spelled
  assert {len(prompt) for prompt in found if len(prompt) >= 4} == {4, 5, 6, 7, 8}
  assert len(set(found)) > 30


def test_a_prompt_is_fixed_by_its_number(text):
  whole = prompts(text).take(0, 300)  # several epochs
  assert prompts(text).take(250, 50) == whole[250:] and prompts(text).take(7, 1) == whole[7:8]
  other = run_config([("t", "a", text, 1.0)])
  data = DataConfig(source="text", path=str(text), held_out_percent=20, seed=1)
  assert Prompts(other, TeacherConfig("t", "a", data)).take(0, 300) != whole


def test_no_prompt_ends_a_document(text):
  assert all(prompts(text).document_end not in prompt for prompt in prompts(text).take(0, 200))


def test_prompts_of_conversations_end_where_the_assistant_begins(tmp_path):
  """Each with the effort of its line; every one once an epoch."""
  reply = {"role": "assistant", "content": "x", "reasoning_content": "y"}
  talks = [{"messages": [{"role": "user", "content": f"{i}"}, reply], "reasoning_effort": ("none", "max")[i % 2]}
           for i in range(12)]
  file = tmp_path / "talk.jsonl"
  file.write_text("\n".join(map(json.dumps, talks)))
  run = run_config([("t", "a", file, 1.0)])
  wide = dataclasses.replace(run.distillation, prompt_length=200)
  run = dataclasses.replace(run, distillation=wide, data=dataclasses.replace(run.data, sequence_length=256),
                            model=dataclasses.replace(run.model, vocab_size=320, max_position_embeddings=512))
  data = DataConfig(source="chat", path=str(file), held_out_percent=0)
  prompts = ChatPrompts(run, TeacherConfig("t", "a", data))
  texts = [chat.encode(talk["messages"][:1], reasoning_effort=talk["reasoning_effort"]) for talk in talks]
  expected = [tuple(3 + byte for byte in text.encode()) for text in texts]
  found = prompts.take(0, 24)
  assert sorted(found[:12]) == sorted(found[12:]) == sorted(expected) and found[:12] != found[12:]
  assert prompts.take(5, 3) == found[5:8] and prompts.describe() == "prompts of 12 conversations"
  short = dataclasses.replace(run, distillation=dataclasses.replace(wide, prompt_length=70))
  with pytest.raises(ValueError, match="6 bad lines\n.*line 2: prompt = '.* tokens': expected 1 to distillation.prompt_len"):
    ChatPrompts(short, TeacherConfig("t", "a", data))


def test_rows_of_samples():
  samples = [([5, 6], [7, 8, 9]), ([4], list(range(10, 19))), ([3, 3, 3], [2]), ([9], [8])]
  rows = rows_of(samples, 10)
  assert {x.dtype for x in rows.values()} == {np.dtype(np.int32)} and {x.shape for x in rows.values()} == {(3, 10)}
  found = []
  for tokens, segments, positions, mask in zip(*(rows[n] for n in ("tokens", "segment_ids", "positions", "loss_mask"))):
    for segment in range(1, segments.max() + 1):
      at = segments == segment
      assert positions[at].tolist() == list(range(at.sum()))
      found.append((tokens[at & (mask == 0)].tolist(), tokens[at & (mask == 1)].tolist()))
    assert not mask[segments == 0].any()
  assert sorted(found) == sorted(samples)


def test_passes_are_filled_with_rows_that_hold_nothing():
  rows = rows_of([([5], [6] * 9)] * 5, 10)
  passes = in_passes(rows, 2)
  assert [x["segment_ids"].max(1).tolist() for x in passes] == [[1, 1], [1, 1], [1, 0]]
  assert all(set(x) == set(rows) for x in passes)


def test_text_rows_are_those_of_the_training_data(text):
  source = Text(run_config([("t", "a", text, 1.0)]), DataConfig(source="text", path=str(text), held_out_percent=20), 48)
  rows, later = source.take(0, 10), source.take(6, 4)
  for name, x in rows.items():
    np.testing.assert_array_equal(x[6:], later[name])
  assert rows["tokens"].shape == (10, 48) and (rows["loss_mask"].sum(1) > 0).all()
