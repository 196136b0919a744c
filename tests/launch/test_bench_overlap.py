"""How neighbours' selections are compared, where the answer is known; and what the command says about mistakes."""

import numpy as np
import pytest

from launch.benchmarks import overlap


def test_unions_and_overlaps_of_known_selections():
  """Query i selects entries i, i + 1, ... i + 7 in any order: two neighbours share 7 of 8, g of them have 8 + g - 1."""
  picks, queries = 8, 48
  selected = (np.arange(queries)[:, None] + np.random.default_rng(0).permutation(picks))[None]
  visible, segments = np.full((1, queries), 100), np.ones((1, queries), int)
  for group in overlap.GROUPS:
    found = overlap.shared(selected, visible, segments, group)
    assert found["groups"] == queries // group and found["overlap"] == pytest.approx(7 / 8)
    assert found["union"] == pytest.approx((picks + group - 1) / picks)
    assert found["chance"] == pytest.approx(100 / 8 * (1 - 0.92**group))


def test_blind_draws_reach_what_chance_gives():
  rng, picks, entries = np.random.default_rng(1), 16, 128
  selected = np.argsort(rng.random((1, 4096, entries)), -1)[..., :picks]
  found = overlap.shared(selected, np.full((1, 4096), entries), np.ones((1, 4096), int), 4)
  assert found["union"] == pytest.approx(found["chance"], rel=0.01) and found["overlap"] == pytest.approx(1 / 8, abs=0.005)


def test_groups_that_say_nothing_are_left_out():
  """Another document, padding, or a query that sees less than twice what it selects."""
  selected = np.tile(np.arange(4), (1, 16, 1))
  visible, segments = np.full((1, 16), 8), np.repeat([1, 2, 2, 0], 4)[None]
  visible[0, 5] = 7
  for group, groups in ((2, 5), (4, 2), (8, 0)):
    assert overlap.shared(selected, visible, segments, group)["groups"] == groups
  assert overlap.shared(selected, visible, segments, 8)["union"] is None


def test_a_folder_that_is_none_is_refused(tmp_path):
  with pytest.raises(ValueError, match="--checkpoint = None: expected the checkpoints of a run"):
    overlap.measure(None, (512,), print)
  with pytest.raises(FileNotFoundError, match="no checkpoint there"):
    overlap.measure(str(tmp_path), (512,), print)


def test_the_table_has_a_line_per_layer_and_length():
  rows = [{"layer": layer, "length": 512, "picks": 4, "group": group, "groups": 1, "union": 1.5, "chance": 2.0,
           "overlap": 0.5} for layer in (1, 3) for group in overlap.GROUPS]
  rows[-1] |= {"union": None, "chance": None, "overlap": None}
  lines = overlap.table(rows).splitlines()
  assert len(lines) == 3 and lines[1].split()[:3] == ["1", "512", "0.50"] and lines[2].split()[-1] == "-"
