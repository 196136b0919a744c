"""Miniature 3: its sums and texts and its figures."""

import dataclasses
import json

import pytest

from deepseek_v4 import config as c
from deepseek_v4.analysis import plots_reinforcement
from deepseek_v4.posttraining.rewards import exact_answer, message_of
from deepseek_v4.text import chat, tokenize
from deepseek_v4.training import conversations, data, loop
from launch import miniatures
from launch.miniatures import depth, depth_task
from launch.miniatures.depth_task import EFFORTS


@pytest.fixture(scope="module")
def task(tmp_path_factory):
  """(folder, problems that no run sees)."""
  folder = tmp_path_factory.mktemp("task")
  return folder, depth_task.write(folder, 60, 40)


def lines(file):
  return [json.loads(line) for line in file.read_text().splitlines()]


def test_thoughts_lead_to_answers_and_only_quick_ones_go_wrong(task):
  folder, unseen = task
  seen, wrong = [], dict.fromkeys(EFFORTS, 0)
  for effort in EFFORTS:
    talks = lines(folder / depth_task.TALKS / f"{effort}.jsonl")
    assert len(talks) == 60
    for talk in talks:
      digits = [int(x) for x in talk["messages"][0]["content"]]
      said = talk["messages"][1]
      seen.append(tuple(digits))
      wrong[effort] += said["content"] != str(sum(digits) % 10)
      right = "".join(str(sum(digits[:i + 1]) % 10) for i in range(6))
      quick, _, checked = said["reasoning_content"].partition("?")
      assert len(digits) == 6 and len(quick) == (0 if effort == "none" else 6) and talk["reasoning_effort"] == effort
      assert checked == (right if effort == "max" else "") and said["content"] == (checked or quick or right)[-1]
  assert wrong["none"] == wrong["max"] == 0 and 10 < wrong["high"] < 45  # of 60, each with 1 - 0.9^6 = 0.47
  asked = [tuple(int(x) for x in line["messages"][0]["content"]) for line in lines(folder / depth_task.PROBLEMS)]
  everything = [*seen, *asked, *map(tuple, unseen)]
  assert len(asked) == len(unseen) == 40 and len(set(everything)) == len(everything)


def test_the_forms_are_those_of_the_chat(task):
  """The tokenizer spells every text, a conversation fits its row, a right reply its limits and its reward."""
  folder, _ = task
  tokenizer = tokenize.load_tokenizer(folder / depth_task.TOKENIZER, depth.model().vocab_size)
  assert tokenizer.decode(tokenizer.encode("Añ 1\n")) == "Añ 1\n"
  assert tokenizer.encode(chat.EOS) == [tokenizer.document_end]
  for effort in EFFORTS:
    config = depth.data_of(folder / depth_task.TALKS / f"{effort}.jsonl", folder / depth_task.TOKENIZER, 1)
    found, bad = conversations.read(config, "train")
    assert not bad
    ids, written = conversations.encode(found[0], conversations.DEFAULT, tokenizer)
    reply = ids[written].tolist()
    assert len(ids) - len(reply) <= 16 and len(reply) <= depth.REPLY[effort]  # the student's prompt_length is 16
    text = tokenizer.decode(reply[:-1], keep_special=True)
    thought, _, content = text.rpartition(chat.THINK_END)
    assert len(tokenizer.encode(thought)) <= (depth.THOUGHT[effort] or 0)
    message = message_of(text, "stop", effort, conversations.DEFAULT)
    assert message["content"] == content and exact_answer({"answer": content}, message) == 1
  batches = data.make_dataset(depth.start_run(folder, 4, 0).data, 264, split="held_out")
  assert batches.targets > 0


def test_runs_can_be_made(task):
  folder, _ = task
  runs = [depth.specialist_run(folder, effort, 4, 1, folder) for effort in EFFORTS]
  assert [run.reinforcement.length_penalty for run in runs] == sorted((run.reinforcement.length_penalty for run in runs),
                                                                     reverse=True)
  assert len({run.model for run in runs}) == 1 and {run.training.seed for run in runs} == {1}
  student = depth.student_run(folder, {effort: folder / effort for effort in EFFORTS}, 8, 0, folder)
  assert [teacher.name for teacher in student.distillation.teachers] == list(EFFORTS)


SCORES = {name: {"none": {"accuracy": 0.1, "tokens": 2.0}, "high": {"accuracy": high, "tokens": 11.0},
                 "max": {"accuracy": 0.95, "tokens": 20.0}}
          for name, high in (("conversations", 0.6), ("rewards", 0.8), ("student", 0.75))}


def test_figures_and_the_picture(tmp_path):
  worse = {**SCORES, "student": {**SCORES["student"], "high": {"accuracy": 0.96, "tokens": 11.5}}}
  row = depth.row_of([SCORES, worse], "student")
  assert row["model"] == "one student" and row["high, accuracy"] == pytest.approx(0.855)
  assert row["high, tokens"] == 11.25
  targets = depth.targets_of([SCORES, worse], [[600.0, 540.0], [900.0, 360.0]])
  assert [target["reached"] for target in targets] == [True, False, True, True, False]
  assert targets[-1]["value"] == pytest.approx(21)  # the slower repetition's
  assert targets[0]["value"] == pytest.approx(0.65) and targets[1]["value"] == pytest.approx(-0.01)
  same = {effort: {"accuracy": 0.5, "tokens": 7.0} for effort in EFFORTS}  # none < high is strict, high <= max is not
  targets = depth.targets_of([{**SCORES, "student": same}], [[600.0, None]])
  assert [target["reached"] for target in targets] == [False, True, False, False, None]
  plots_reinforcement.depth([SCORES, worse], EFFORTS, depth.MODELS, tmp_path / "a.png")
  assert (tmp_path / "a.png").stat().st_size > 10_000
  assert "depth" in miniatures.NAMES and depth.DESCRIPTION


def small(monkeypatch, digits, **changes):
  """One layer, which may have other changes, and shorter sums."""
  model = dataclasses.replace(
    depth.model(), num_hidden_layers=1, layer_types=(c.SLIDING,), mlp_layer_types=(c.LEARNED,), num_attention_heads=2,
    head_dim=32, qk_rope_head_dim=16, moe_intermediate_size=128, scan_layers=False, **changes)
  monkeypatch.setattr(depth, "model", lambda: model)
  monkeypatch.setattr(depth, "LENGTH", 64)
  monkeypatch.setattr(depth_task, "DIGITS", digits)


def test_thinking_pays_after_a_few_conversations(tmp_path, monkeypatch):
  """The first part alone: one model gets sums right where it writes them down, and guesses where it may not.

  Small steps learn most for their work: of 100 steps of 32 rows, as many tokens as 400 of these, nothing came. What happens
  between steps 230 (0.32 right) and 250 (0.82) is over at 290 (all right).
  """
  small(monkeypatch, digits=3, sliding_window=16, hc_sinkhorn_iters=4)
  monkeypatch.setattr(depth_task, "SLIPS", 0.0)  # written sums are right, so that few steps show whether they are read
  unseen = depth_task.write(tmp_path / "task", talks=250, problems=100)
  run = depth.start_run(tmp_path / "task", 290, 0)
  run = dataclasses.replace(run, data=dataclasses.replace(run.data, batch_size=8),
                            training=dataclasses.replace(run.training, eval_every=290, checkpoint_every=290))
  loop.train(run, tmp_path / "start")
  found = depth.scored(tmp_path / "start", tmp_path / "task", unseen, ("none", "high"))
  # 100 problems: a guess is right with 0.1 and a standard deviation of 0.03; 0.08 and 1.0 were seen.
  assert found["none"]["accuracy"] < 0.25 < found["high"]["accuracy"] - 0.1, found
  assert found["none"]["tokens"] + 2 < found["high"]["tokens"], found


@pytest.mark.long
def test_a_short_version_learns(tmp_path, monkeypatch):
  """All parts with one layer and sums of four digits: rewards make quick thoughts careful, and one student has learnt what
  each of its teachers has."""
  small(monkeypatch, digits=4)
  plan = depth.Plan(talks=2000, problems=600, start=240, specialist=24, student=16)
  said = []
  rows = {row["model"]: row for row in depth.run(tmp_path, 1, said.append, plan).rows}
  assert (tmp_path / depth.PICTURE).is_file()
  begin, rewarded, student = (rows[name] for name in ("after conversations", "specialists, after rewards", "one student"))
  # 600 problems: 0.02 is a standard deviation. A careless thought of four sums is right with 0.9^4 = 0.66.
  assert 0.5 < begin["high, accuracy"] < 0.75
  assert rewarded["high, accuracy"] > begin["high, accuracy"] + 0.06
  assert student["high, accuracy"] > begin["high, accuracy"] + 0.03
  assert student["none, accuracy"] < 0.3 < student["high, accuracy"] < student["max, accuracy"] + 0.02
  assert student["none, tokens"] + 1 < student["high, tokens"] < student["max, tokens"] - 1
  assert any("rewards_high" in line for line in said)
