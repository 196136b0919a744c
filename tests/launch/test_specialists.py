"""Miniature 2: its text, its figures, and a short version of the whole that has to show learning."""

import itertools
import json

import numpy as np
import pytest

from deepseek_v4 import config as c
from deepseek_v4.analysis import plots_distillation
from deepseek_v4.optim import make_schedule
from deepseek_v4.training import packing
from launch import miniatures
from launch.miniatures import specialists, specialists_text
from launch.miniatures.specialists_text import KINDS

SCORES = {"start": dict(python=3.0, c=2.5, english=4.0), "python": dict(python=2.0, c=2.6, english=4.1),
          "c": dict(python=3.1, c=2.0, english=4.0), "english": dict(python=3.0, c=2.5, english=3.0),
          "student": dict(python=2.1, c=2.1, english=3.15), "off_policy": dict(python=2.5, c=2.25, english=3.5),
          "mixed": dict(python=3.0, c=2.6, english=2.9)}


def test_it_is_one_of_the_miniatures():
  assert "specialists" in miniatures.NAMES and specialists.DESCRIPTION


def test_shares_of_a_gain():
  share = lambda name, kind: pytest.approx(specialists.share(SCORES, name, kind))
  assert share("student", "python") == 0.9 and share("student", "c") == 0.8 and share("student", "english") == 0.85
  assert share("python", "python") == 1 and share("start", "c") == 0 and share("mixed", "c") == -0.2
  row = specialists.row_of([SCORES, SCORES], "off_policy")
  assert row["model"] == "off-policy distillation" and list(row.values())[1:] == pytest.approx([2.5, 2.25, 3.5, .5, .5, .5])


def test_a_specialist_without_a_gain_has_no_shares(tmp_path):
  """Neither infinite nor NaN: it is said, in the table, the targets and the picture."""
  none = {**SCORES, "c": {**SCORES["c"], "c": 2.5}}
  assert specialists.share(none, "student", "c") is None
  assert specialists.share(none, "student", "python") == pytest.approx(0.9)
  row = specialists.row_of([SCORES, none], "student")
  assert row["c, share"] is None and row["python, share"] == pytest.approx(0.9)
  python, c_, english, goal, minutes = specialists.targets_of([none], [dict.fromkeys(none, 60.0)])
  assert (c_["value"], c_["reached"], goal["value"], goal["reached"]) == (None,) * 4
  assert "gained nothing over the start" in c_["target"] and python["reached"] and english["reached"]
  assert minutes["value"] == 3 and minutes["reached"]
  lines = [{"split": "held_out", "step": s, **{f"bits_per_byte/{kind}": 3 - s / 10 for kind in KINDS}} for s in (0, 2)]
  plots_distillation.shares(lines, none, KINDS, specialists.METHODS, tmp_path / "a.png")
  json.dumps(specialists.targets_of([none], [dict.fromkeys(none)]), allow_nan=False)


def test_targets_are_for_the_worst_repetition():
  worse = {**SCORES, "student": {**SCORES["student"], "c": 2.11}, "mixed": {**SCORES["mixed"], "c": 2.4}}
  seconds = [dict.fromkeys(SCORES, 100.0), {**dict.fromkeys(SCORES, 100.0), "off_policy": 1000.0}]
  python, c_, english, goal, minutes = specialists.targets_of([SCORES, worse], seconds)
  assert [x["value"] for x in (python, c_, english, goal)] == pytest.approx([0.9, 0.78, 0.85, 0.78])
  assert [x["reached"] for x in (python, c_, english, goal)] == [True, False, True, False]
  assert "off-policy distillation 0.50, plain, mixed text -0.20" in c_["target"]
  assert minutes["value"] == 20 and not minutes["reached"]
  unknown = specialists.targets_of([SCORES], [{**seconds[0], "mixed": None}])[-1]
  assert unknown["value"] is None and unknown["reached"] is None


def test_paragraphs_are_kept_once_and_long_texts_cut(monkeypatch):
  paragraph = lambda i: f"Paragraph number {i} " * 30
  texts = ["\n\n".join([paragraph(1), paragraph(2)]), "\n \n".join([paragraph(3), paragraph(1).upper()]), paragraph(2),
           "short", "\n\n".join(paragraph(10 + i) for i in range(30))]
  found = specialists_text.chosen(iter(texts))
  assert sorted(map(len, found)) == sorted([len(paragraph(3).rstrip()), 2 * len(paragraph(1).rstrip()) + 2, 10_000])
  assert sum("number 1 " in text.lower() for text in found) == 1 and found == specialists_text.chosen(iter(texts))
  monkeypatch.setattr(specialists_text, "MAX_BYTES", 1000)
  assert len(specialists_text.chosen(iter(texts))) < 3


def test_judged_documents_are_no_taught_ones(tmp_path, monkeypatch):
  texts = [f"{i} " * 2000 for i in range(30)]
  monkeypatch.setattr(specialists_text, "documents", lambda kind: iter(texts))
  specialists_text.write(tmp_path)
  for kind in KINDS:
    taught, judged = ([json.loads(line)["text"] for line in (tmp_path / part / f"{kind}.jsonl").read_text().splitlines()]
                      for part in (specialists_text.TAUGHT, specialists_text.JUDGED))
    assert len(taught) + len(judged) == 30 and not set(taught) & set(judged)
    assert sum(map(len, judged)) >= 70_000 > sum(map(len, judged[1:]))
    read = specialists.judged_run(tmp_path, kind).data
    assert read.path == str(tmp_path / "judged" / f"{kind}.jsonl") and read.held_out_percent == 99
    assert specialists.data_of(tmp_path, kind).path == str(tmp_path / "taught" / f"{kind}.jsonl")
  assert specialists.data_of(tmp_path, None).path == str(tmp_path / "taught")


@pytest.mark.parametrize("kind", KINDS)
def test_every_machine_has_these_texts(kind):
  some = [text for text in itertools.islice(specialists_text.documents(kind), 60) if len(text) > 400]
  assert len(some) > 10
  sign = {"python": "def ", "c": "#define", "english": " the "}[kind]
  assert sum(sign in text for text in some) > 0.5 * len(some)


def test_passes_are_nearly_full(tmp_path):
  """Of the places that the passes of a step have over 70% hold a token, and over a quarter is learnt from."""
  run = specialists.distillation_run(tmp_path, dict.fromkeys(KINDS, tmp_path), 40, c.STUDENT, 0, tmp_path)
  asked, rng = run.distillation, np.random.default_rng(0)
  each, size = run.data.batch_size // len(KINDS), run.data.batch_size // run.data.accumulation
  rows = [packing.pack(rng.integers(asked.shortest_prompt, asked.prompt_length + 1, each) + asked.reply_length,
                       specialists.LENGTH).rows for _ in range(200)]
  places = np.mean(-(-np.array(rows) // size) * size) * specialists.LENGTH
  mean = (asked.shortest_prompt + asked.prompt_length) / 2 + asked.reply_length
  assert each * mean > 0.7 * places and each * asked.reply_length > places / 4
  assert mean < asked.prompt_length + asked.reply_length <= specialists.LENGTH


def test_rates_decay_from_a_start_on_and_a_specialist_is_short(tmp_path):
  plan = specialists.Plan()
  parts = specialists.parts_of(tmp_path, tmp_path / "text", 0, plan)
  for name, share in (("start", 1.0), ("python", 0.15), ("student", 0.1)):  # of the rate at the third is left at the end
    run = parts[name][0]
    third, last = (float(make_schedule(run.optimizer, run.training.steps)(n)) for n in (run.training.steps // 3,
                                                                                     run.training.steps - 1))
    assert last == third if name == "start" else last < share * third
  assert [parts[name][0].training.steps for name in ("start", *KINDS)] == [plan.start, *3 * [plan.specialist]]
  assert {parts[name][0].training.steps for name in specialists.METHODS} == {plan.student}
  assert all(run.training.checkpoint_every <= run.training.steps / 4 for run, _ in parts.values())  # for who is killed


def test_the_picture(tmp_path):
  lines = [{"split": "held_out", "step": s, **{f"bits_per_byte/{kind}": 3 - s / 10 for kind in KINDS}} for s in (0, 2, 4)]
  plots_distillation.shares(lines, SCORES, KINDS, specialists.METHODS, tmp_path / "a.png")
  assert (tmp_path / "a.png").stat().st_size > 10_000


def test_all_ways_have_as_many_updates_of_as_many_tokens(tmp_path):
  """As many tokens that are learnt from: the student's replies, all tokens of the others' rows."""
  runs = [specialists.distillation_run(tmp_path, dict.fromkeys(KINDS, tmp_path), 40, samples, 0, tmp_path)
          for samples in (c.STUDENT, c.TEXT)]
  runs.append(specialists.student_run(tmp_path, 40, 0, tmp_path))
  assert len({(run.training.steps, run.data.sequence_length, run.optimizer) for run in runs}) == 1
  asked = runs[0].distillation
  assert runs[0].data.batch_size * asked.reply_length == runs[1].data.batch_size * specialists.LENGTH
  assert runs[1].data.batch_size == runs[2].data.batch_size
  kinds = {(spec.attention, spec.router) for spec in specialists.model().layer_specs}
  assert {a for a, _ in kinds} == set(c.ATTENTION_KINDS) and {r for _, r in kinds} == set(c.ROUTER_KINDS)


@pytest.mark.long
def test_a_short_version_learns(tmp_path):
  said = []
  plan = specialists.Plan(start=40, specialist=10, student=24)
  result = specialists.run(tmp_path, 1, said.append, plan)
  rows = {row["model"]: row for row in result.rows}
  assert (tmp_path / result.picture).is_file() and len(result.targets) == 5
  for kind in KINDS:
    assert rows[f"specialist: {kind}"][f"{kind}, bits/byte"] < rows["common start"][f"{kind}, bits/byte"] - 0.05
    assert rows["on-policy distillation"][f"{kind}, share"] > 0.1
  # the same command again finds everything done, and another plan is refused
  assert specialists.run(tmp_path, 1, said.append, plan).rows == result.rows
  with pytest.raises(ValueError, match="plan.student: 24 -> 32"):
    specialists.run(tmp_path, 1, said.append, specialists.Plan(start=40, specialist=10, student=32))
