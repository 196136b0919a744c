"""Metrics files, progress and the closing table; event files are read back byte by byte, not with the writer."""

import json
import math
import struct

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto import event_pb2

from deepseek_v4.analysis import plots
from deepseek_v4.training import metrics


def read_events(folder):
  """{(tag, step): value} of TFRecord files: u64 length, u32 checksum, message, u32 checksum. Later files win."""
  found = {}
  for path in sorted(folder.glob("events*")):
    data, place = path.read_bytes(), 0
    while place < len(data):
      (length,) = struct.unpack_from("<Q", data, place)
      event = event_pb2.Event.FromString(data[place + 12:place + 12 + length])
      place += 16 + length
      found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
  return found


def test_lines_and_events_hold_what_was_written(tmp_path):
  writer = metrics.MetricsWriter(tmp_path)
  writer.write("train", 1, {"loss": np.float32(2.5), "tokens": np.int32(7)})
  writer.write("held_out", 1, {"next_token": 2.0})
  writer.write("train", 2, {"loss": math.nan, "tokens": 8})
  writer.close()
  text = (tmp_path / metrics.LINES).read_text()
  assert [json.loads(line) for line in text.splitlines()] == metrics.read_lines(tmp_path / metrics.LINES) == [
    {"split": "train", "step": 1, "loss": 2.5, "tokens": 7}, {"split": "held_out", "step": 1, "next_token": 2.0},
    {"split": "train", "step": 2, "loss": None, "tokens": 8}]
  assert read_events(tmp_path / metrics.EVENTS) == {("train/loss", 1): 2.5, ("train/tokens", 1): 7.0,
                                                    ("held_out/next_token", 1): 2.0, ("train/tokens", 2): 8.0}


def test_going_on_drops_later_lines_and_repeats_none(tmp_path):
  writer = metrics.MetricsWriter(tmp_path)
  for step in (1, 2, 3, 4):
    writer.write("train", step, {"loss": float(step)})
  writer.close()
  with (tmp_path / metrics.LINES).open("a") as file:
    file.write('{"split": "train", "step": 5, "lo')  # killed while writing
  writer = metrics.MetricsWriter(tmp_path, last_step=2)
  writer.write("train", 2, {"loss": 20.0})
  writer.write("train", 3, {"loss": 30.0})
  writer.close()
  found = [(line["step"], line["loss"]) for line in metrics.read_lines(tmp_path / metrics.LINES)]
  assert found == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_other_processes_write_nothing(tmp_path):
  writer = metrics.MetricsWriter(tmp_path, active=False)
  writer.write("train", 1, {"loss": 1.0})
  writer.close()
  assert not list(tmp_path.iterdir())


def test_of_steps_that_are_done_again_only_anomalies_stay(tmp_path):
  writer = metrics.MetricsWriter(tmp_path)
  for step in (1, 2, 3):
    writer.write("train", step, {"loss": float(step)})
  writer.write("held_out", 2, {"loss": 2.5})
  writer.add("anomaly", 3, {"loss": 9.0})
  writer.back_to(1)
  writer.write("train", 2, {"loss": 2.25})
  writer.write("train", 2, {"loss": 0.0})
  writer.close()
  assert [(x["split"], x["step"], x["loss"]) for x in metrics.read_lines(tmp_path / metrics.LINES)] == [
    ("train", 1, 1.0), ("anomaly", 3, 9.0), ("train", 2, 2.25)]
  metrics.MetricsWriter(tmp_path / "never", active=False).back_to(0)


def test_a_damaged_line_is_named_and_a_cut_one_left_out(tmp_path):
  path = tmp_path / "lines"
  path.write_text('{"a": 1}\n{"a": 2')
  assert metrics.read_lines(path) == [{"a": 1}]
  path.write_text('{"a": 1\n{"a": 2}\n')
  with pytest.raises(ValueError, match="lines, line 1: expected one JSON object"):
    metrics.read_lines(path)
  assert metrics.read_lines(tmp_path / "nothing") == []


def test_json_has_no_nan(tmp_path):
  value = {"a": math.inf, "b": [np.float32(1.5), math.nan], "c": {"d": np.int32(3)}, "e": True}
  metrics.write_json(tmp_path / "x.json", value)
  strict = json.loads((tmp_path / "x.json").read_text(), parse_constant=lambda name: pytest.fail(name))
  assert strict == {"a": None, "b": [1.5, None], "c": {"d": 3}, "e": True}
  assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_rates_count_only_the_time_of_steps(monkeypatch, capsys):
  now = [0.0]
  monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
  progress = metrics.Progress(first_step=10, steps=20)

  def work(seconds):
    now[0] += seconds

  work(2.0)
  progress.step(100)
  work(2.0)
  progress.step(300)
  assert progress.report(12, 1.25) == pytest.approx(400 / 4)
  work(50.0)  # an evaluation
  progress.restart_clock()
  work(1.0)
  progress.step(100)
  assert progress.report(13, 1.0) == pytest.approx(100)
  assert progress.tokens_per_second == pytest.approx(500 / 5)
  progress.report(13, 0.25, name="KL")
  progress.close()
  printed = capsys.readouterr().out.splitlines()
  # 2 s a step over the first two steps and 8 steps left; 5/3 s a step and 7 left
  assert printed == ["step 12/20  loss 1.2500  100 tokens/s  00:16 left",
                     "step 13/20  loss 1.0000  100 tokens/s  00:11 left", printed[2]]
  assert printed[2].startswith("step 13/20  KL 0.2500  ")


def test_the_table_says_who_wins():
  assert metrics.held_out_table(2.5, {"bigram": 3.5, "zlib": 2.25, "zlib_by_file": 2.75}).splitlines() == [
    "held-out text  bits per byte",
    "zlib           2.250",
    "this model     2.500",
    "zlib by file   2.750",
    "bigram         3.500",
    "The model is 0.250 WORSE than zlib, 0.250 better than zlib by file, 1.000 better than bigram."]
  assert metrics.held_out_table(2.5, {}, "bits per token").splitlines()[1:] == ["this model     2.500"]


def test_loss_curves_draw_a_picture(tmp_path):
  lines = [{"split": "train", "step": n, "next_token": 5.0 / n, "mtp": 6.0 / n, "indexer": 0.5, "balance": 0.0,
            "grad_norm": None if n == 3 else 1.0, "learning_rate": 1e-3, "max_load_violation": 0.5} for n in range(1, 9)]
  plots.loss_curves(lines, tmp_path / "empty.png")  # no held-out lines yet
  lines.append({"split": "held_out", "step": 8, "next_token": 1.0, "bits_per_token": 1.4427, "bits_per_byte": 1.6})
  plots.loss_curves(lines, tmp_path / "whole.png", {"bigram": 3.5, "zlib": 2.0})
  plots.loss_curves([], tmp_path / "nothing.png")
  pictures = [np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB")) for name in ("nothing", "empty", "whole")]
  red = [int(((x[..., 0] > 150) & (x[..., 1] < 90) & (x[..., 2] < 90)).sum()) for x in pictures]
  dark = [int((x.max(axis=-1) < 200).sum()) for x in pictures]
  assert red[0] == red[1] == 0 and red[2] > 500  # the level lines of the baselines
  assert dark[0] < dark[1] < dark[2]
