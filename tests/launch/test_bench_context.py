"""The bench of a long context: what it reads and predicts with known numbers, and a short one for real."""

import json

import numpy as np
import pytest

import launch.bench
from deepseek_v4.analysis.count import cache_bytes
from launch.benchmarks import context, report


def test_what_a_token_reads():
  read = lambda position: context.entries_read(context.CONFIG, position)
  assert read(1000) == 250 + 250 + 1000 / 128  # all index keys are selected
  assert read(1_048_576) == 262_144 + 512 + 8192


def clock_of(cost, tokens=1_048_576, size=4096):
  """A clock after a prefill whose tokens cost what `cost` says of the entries they read; a chunk in three was disturbed."""
  clock = context.Clock(tokens, "test", 0, lambda text: None)
  for number, start in enumerate(range(0, tokens, size)):
    seconds = size * cost(context.entries_read(context.CONFIG, start + size / 2))
    clock.steady.append(context.Chunk(start, start + size, seconds, seconds * (1 + 5 * (number % 3 == 0))))
  clock.chunks = list(clock.steady)
  return clock


def test_predictions_follow_the_entries():
  """A line over the entries is predicted exactly, whatever disturbs single chunks; a cost that grows faster shows."""
  tokens = 1_048_576
  rows = context.place_rows(context.CONFIG, clock_of(lambda read: 1e-4 + 2e-9 * read), tokens, 4096)
  assert [row["share"] for row in rows] == list(context.PLACES)
  assert all(row["over_prediction"] == pytest.approx(1) for row in rows)
  assert rows[-1]["position"] > tokens - 8 * 4096
  faster = context.place_rows(context.CONFIG, clock_of(lambda read: 1e-4 + 1e-14 * read**2), tokens, 4096)
  assert faster[-1]["over_prediction"] > 1.5
  whole = {"seconds": 600.0, "logits_apart": 1e-5, "logits_apart_after_decoding": 2e-3, "logits_standard_deviation": 1.0,
           "cache_bytes": 5, "cache_bytes_predicted": 5}
  assert [target["reached"] for target in context.targets([*rows, whole])] == [True, True, False, True]
  assert [target["reached"] for target in context.targets([*faster, whole])] == [False, True, False, True]


def test_time_left_counts_that_tokens_get_dearer():
  """Half of the tokens are read; their cost has grown in a line and will go on so."""
  cost = lambda read: 1e-4 + 2e-9 * read
  clock = clock_of(cost)
  whole = sum(chunk.seconds for chunk in clock.chunks)
  clock.steady = clock.chunks = clock.chunks[:128]
  left = whole - sum(chunk.seconds for chunk in clock.chunks)
  assert clock.seconds_left() == pytest.approx(left, rel=0.05)


def test_text_is_the_standard_library():
  ids = context.text(5000)
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


def test_a_short_context(tmp_path):
  """8,192 tokens, at once and in three chunks; then 32 more tokens one by one."""
  said = []
  rows = context.measure(8192, (8160, 2720), said.append)
  checked(rows, 8192)
  assert "8,192 tokens, cache 0.5 MiB by the formula" in said[0]
  assert said[-1].startswith("chunks of 2,720: 8,160/8,160 tokens  ") and said[-1].endswith(" left")
  found = context.targets(rows)
  assert found[0]["value"] is None  # every chunk waited for a compilation
  report.write_json(tmp_path / "figures.json", rows, found)
  assert json.loads((tmp_path / "figures.json").read_text())["rows"][-1]["chunk_sizes"] == [8160, 2720]
  assert "logits at most" in context.table(rows)


@pytest.mark.long
def test_a_context_of_64k():
  """In chunks that are no multiples of a window; a token at the end costs what the entries predict, in processor time."""
  tokens = 65536
  rows = context.measure(tokens, (1024, 750), print)
  checked(rows, tokens)
  ends = [row for row in rows if row.get("share") == 1]
  assert [row["chunk_size"] for row in ends] == [1024, 750]
  assert max(row["over_prediction"] for row in ends) < context.GROWTH


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
