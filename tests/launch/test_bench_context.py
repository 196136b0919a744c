"""The bench of a long context: what it reads and predicts with known numbers, and a short one for real."""

import dataclasses
import functools
import json
import subprocess
import sys

import numpy as np
import pytest

import launch.bench
from deepseek_v4.analysis.count import cache_bytes
from deepseek_v4.config import CSA, HASH, HCA, LEARNED
from launch.benchmarks import context, context_rows, report
from tests.model.small import random_variables


def test_what_a_token_reads():
  seen = lambda position: context_rows.entries_seen(context.CONFIG, position)
  assert seen(1000) == 250 + 250 + 1000 / 128  # all index keys are selected
  assert seen(1_048_576) == 262_144 + 512 + 8192
  read = lambda start, end: context_rows.reading_of(context.CONFIG, start, end, 1_048_576)
  assert read(0, 1024) == (0, 256 + 8)  # a reach of 1,024 tokens: all of its entries, and no keys
  # A reach of 4,096: 1,024 keys, which are one tile. Of 262,144: one tile of 8,192 keys up to token 32,768, then two, and
  # the 2,048 heavily compressed entries of the reach from its first quarter on.
  assert read(1024, 4096) == (1024, 512 + 32)
  assert read(65_536, 69_632) == (3 * 8192, 512 + 2048)
  assert read(94_208, 102_400) == ((4096 * 3 + 4096 * 4) / 8192 * 8192, 512 + 2048)
  assert sum(read(1_044_480, 1_048_576)) == seen(1_048_576)  # at the end nothing is masked
  assert context_rows.Reading(10, 3).multiply_adds(context.CONFIG) == 10 * 2 * 16 + 3 * 2 * 4 * 32


def test_the_line_through_disturbed_points():
  x = np.arange(20.0)
  y = 3 + 0.5 * x
  y[[1, 7, 8, 19]] *= (4, 2, 9, 30)
  assert context_rows.line(x, y) == (pytest.approx(3), pytest.approx(0.5))
  assert context_rows.line(x, 3 - x)[1] == 0  # reading more is never cheaper


def clock_of(cost, tokens=1_048_576, size=4096, disturbed=0):
  """A clock after a prefill whose tokens cost what `cost` says of the multiply-adds of what they read; every
  `disturbed`-th chunk took longer."""
  clock = context.Clock(tokens, "test", 0, lambda text: None)
  for number, start in enumerate(range(0, tokens, size)):
    read = context_rows.reading_of(context.CONFIG, start, start + size, tokens)
    seconds = size * cost(read.multiply_adds(context.CONFIG))
    more = 1 + 5 * (disturbed and number % disturbed == 0)
    clock.steady.append(context_rows.Chunk(start, start + size, seconds * more, 2 * seconds))
  clock.chunks = list(clock.steady)
  return clock


WHOLE = {"case": "whole", "chunk_sizes": [4096], "seconds": 600.0, "logits_apart": 1e-5, "logits_apart_after_decoding": 2e-3,
         "logits_standard_deviation": 1.0, "cache_bytes": 500, "cache_bytes_predicted": 500, "cache_resident_bytes": 600,
         "temporary_bytes": 110, "temporary_bytes_most": 200, "temporary_bytes_predicted": 100, "peak_bytes": 900,
         "decode_seconds_per_token": 0.01}


@pytest.mark.parametrize("disturbed", [0, 4])
def test_predictions_follow_the_entries(disturbed):
  """A line over the entries is predicted, whatever disturbs single chunks; a cost that grows faster shows."""
  tokens = 1_048_576
  clock = clock_of(lambda work: 1e-4 + 6e-11 * work, disturbed=disturbed)
  rows = context_rows.place_rows(context.CONFIG, clock.steady, tokens, 4096)
  assert [row["case"] for row in rows] == ["very first chunk", "first chunks", "at 0.0625", "at 0.125", "at 0.25", "at 0.5",
                                           "at 0.75", "last chunks"]
  assert [row["chunks"] for row in rows] == [1] + [context_rows.NEIGHBOURS] * 7
  assert rows[0]["position"] == 4096 and rows[-1]["position"] == tokens
  # A row's median may be that of a neighbouring chunk, which reads one tile more: near the start a sixth of the cost.
  assert all(row["over_predicted_seconds_per_token"] == pytest.approx(1, rel=0.16 if disturbed else 1e-9)
             for row in rows[1:])
  assert all(row["over_predicted_processor_seconds_per_token"] == pytest.approx(1) for row in rows)
  assert rows[0]["over_predicted_seconds_per_token"] == pytest.approx(6 if disturbed else 1)
  growth = context_rows.growths([*rows, WHOLE])[4096]
  assert growth["predicted_seconds_per_token"] == pytest.approx(growth["processor_seconds_per_token"], rel=0.02)
  assert [target["reached"] for target in context_rows.targets([*rows, WHOLE])] == [True, True, True, False, True, True]
  assert f"(predicted {growth['predicted_seconds_per_token']:.2f})" in context_rows.table([*rows, WHOLE])


def test_what_grows_faster_than_the_entries_shows():
  clock = clock_of(lambda work: 1e-4 + 1e-17 * work**2)
  rows = context_rows.place_rows(context.CONFIG, clock.steady, 1_048_576, 4096)
  assert rows[-1]["over_predicted_seconds_per_token"] > 1.5
  whole = WHOLE | {"temporary_bytes": 500, "cache_bytes": 501}
  assert [target["reached"] for target in context_rows.targets([*rows, whole])] == [False, False, True, False, False, False]


def test_time_left_counts_that_tokens_get_dearer():
  """Half of the tokens are read; their cost has grown and will go on so, though in steps where the reach grows."""
  cost = lambda work: 1e-4 + 6e-11 * work
  clock = clock_of(cost)
  whole = sum(chunk.seconds for chunk in clock.chunks)
  clock.steady = clock.chunks = clock.chunks[:128]
  left = whole - sum(chunk.seconds for chunk in clock.chunks)
  assert clock.seconds_left() == pytest.approx(left, rel=0.12)


@functools.cache
def text():
  """What the bench reads, which takes seconds to find."""
  return context.text(5000)


def test_text_is_the_standard_library():
  ids = text()
  assert ids.shape == (5000,) and ids.dtype == np.int32 and 0 <= ids.min() and ids.max() < context.CONFIG.vocab_size
  assert b"import" in bytes((ids[ids >= 3] - 3).astype(np.uint8))


def checked(rows, tokens):
  """What must hold of every run; returns the row of the whole."""
  whole = rows[-1]
  assert whole["cache_bytes_by_kind"] == cache_bytes(context.CONFIG, tokens, "compute")
  assert 0.3 < whole["logits_standard_deviation"] < 5
  # Sums in another order; a pick that a near tie exchanges moves one of 512 weights a little.
  assert max(whole["logits_apart"], whole["logits_apart_after_decoding"]) < 1e-3
  assert whole["decode_seconds_per_token"] > 0
  return whole


def test_a_short_context(tmp_path, monkeypatch):
  """2,048 tokens, at once and in three chunks; then 32 more tokens one by one. A quarter of the shortest that a user may
  ask for, with a quarter of the picks, and one layer of each kind that keeps entries."""
  monkeypatch.setattr(context, "SHORTEST", 2048)
  monkeypatch.setattr(context, "CONFIG", dataclasses.replace(
    context.CONFIG, num_hidden_layers=2, layer_types=(CSA, HCA), mlp_layer_types=(HASH, LEARNED), index_topk=128))
  ids = text()
  monkeypatch.setattr(context, "text", lambda tokens: ids[:tokens])
  monkeypatch.setattr(context.ours, "random_variables", random_variables)  # nothing to compile
  said = []
  rows = context.measure(2048, (2016, 672), said.append)
  checked(rows, 2048)
  assert "2,048 tokens, cache 0.2 MiB by the formula" in said[0]
  assert said[-1].startswith("chunks of 672: 2,016/2,016 tokens  ") and said[-1].endswith(" left")
  # The very first chunk of each run waited for no compilation, and of the three one more.
  assert [(row["case"], row["chunk_size"], row["chunks"], row["position"]) for row in rows[:-1]] == [
      ("very first chunk", 2016, 1, 2016), ("first chunks", 2016, 1, 2016), ("last chunks", 2016, 1, 2016),
      ("very first chunk", 672, 1, 672), ("first chunks", 672, 2, 2016), ("at 0.5", 672, 1, 672),
      ("at 0.75", 672, 1, 672), ("last chunks", 672, 2, 2016)]
  assert all(row["processor_seconds_per_token"] > 0 and row["seconds_per_token"] > 0 for row in rows[:-1])
  assert rows[-1]["temporary_bytes_predicted"] > 2**20
  found = context_rows.targets(rows)
  assert found[0]["value"] is None  # two chunks are no line
  report.write_json(tmp_path / "figures.json", rows, found)
  assert json.loads((tmp_path / "figures.json").read_text())["rows"][-1]["chunk_sizes"] == [2016, 672]
  assert "logits at most" in context_rows.table(rows)


@pytest.mark.long
def test_a_context_of_64k(tmp_path):
  """In chunks that are no multiples of a window; a token at the end costs what the entries predict, in processor time, and
  the memory is what is counted and planned."""
  command = (sys.executable, "-m", "launch.bench", "context", "--tokens", "65536", "--chunks", "1024,750", "--json")
  subprocess.run([*command, tmp_path / "figures.json"], check=True)  # a process whose memory is its own
  found = json.loads((tmp_path / "figures.json").read_text())
  checked(found["rows"], 65536)
  ends = [row for row in found["rows"] if row["case"] == "last chunks"]
  assert [(row["chunk_size"], row["chunks"]) for row in ends] == [(1024, 7), (750, 7)]
  assert max(row["over_predicted_processor_seconds_per_token"] for row in ends) < context_rows.GROWTH
  reached = {target["target"]: target["reached"] for target in found["targets"]}
  assert [value for name, value in reached.items() if "bytes" in name] == [True, True]


@pytest.mark.parametrize("arguments, message", [
  ((4096, [4096, 3000]), "--tokens = 4096: expected 8192 to 1048576"),
  ((2**20 + 1, [4096, 3000]), "--tokens = 1048577: expected 8192 to 1048576"),
  ((8192, [4096]), "--chunks = 4096: expected two different numbers of tokens"),
  ((8192, [4096, 4096]), "--chunks = 4096,4096: expected two different"),
  ((8192, [4096, 9000]), "--chunks = 4096,9000: expected two different"),
])
def test_what_cannot_be_measured(arguments, message):
  with pytest.raises(ValueError, match=message):
    context.measure(*arguments, print)


def test_the_command_line():
  assert launch.bench.check(["context"], None, None, None)[0] == "context"
  with pytest.raises(ValueError, match="--chunks = 4k,3000: expected two different numbers of tokens"):
    launch.bench.bench_context(8192, ["4k", "3000"], None)
