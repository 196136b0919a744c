"""Where compressed entries lie, against loops over the rule: whole windows of one document, counted from its start."""

import jax
import numpy as np
import pytest

from deepseek_v4.config import CSA, HCA
from deepseek_v4.model.compression import entry_layout, sees_an_entry
from deepseek_v4.model.context import document_positions, make_context
from tests.model.small import T0

ROWS, LENGTH = 200, 29


def random_rows():
  """(segment_ids, positions): documents of random lengths, some starting in the middle, with padding anywhere between."""
  rng = np.random.default_rng(0)
  segments, positions = np.zeros((2, ROWS, LENGTH), np.int32)
  for row in range(ROWS):
    place, number = int(rng.integers(0, 3)), 0
    while place < LENGTH:
      length = min(int(rng.integers(1, 24)), LENGTH - place)
      start = int(rng.integers(0, 12)) if row % 2 else 0
      number += 1
      segments[row, place:place + length] = number
      positions[row, place:place + length] = start + np.arange(length)
      place += length + int(rng.integers(0, 3)) * (row % 3 == 0)
  return segments, positions


def entries_by_the_rule(segments, positions, rate):
  """[(closing place, segment, last position, has previous)] of one row."""
  def whole(closing, count):  # the `count` tokens that end at `closing` are one stretch of one document
    first = closing - count + 1
    return first >= 0 and all(segments[p] == segments[closing] and positions[p] == positions[closing] - (closing - p)
                              for p in range(first, closing + 1))
  return [(p, segments[p], positions[p], whole(p, 2 * rate)) for p in range(LENGTH)
          if segments[p] > 0 and (positions[p] + 1) % rate == 0 and whole(p, rate)]


@pytest.mark.parametrize("kind", [CSA, HCA])
def test_entries_are_the_whole_windows_of_each_document(kind):
  segments, positions = random_rows()
  rate = T0.compress_rate(kind)
  layout = jax.jit(lambda p, s: entry_layout(T0, kind, p, s, contiguous=False))(positions, segments)
  assert layout.closing.shape == (ROWS, LENGTH // rate)
  seen = 0
  for row in range(ROWS):
    want = entries_by_the_rule(segments[row], positions[row], rate)
    fields = (layout.closing, layout.segment, layout.last, layout.has_previous)
    got = list(zip(*(np.asarray(x[row])[:len(want)] for x in fields)))
    assert got == want, (segments[row], positions[row])
    assert (np.asarray(layout.segment[row])[len(want):] == 0).all()
    seen += sum(w[3] for w in want)
  assert seen > 20


@pytest.mark.parametrize("rate", [2, 4, 7])
def test_queries_that_see_an_entry(rate):
  """Against the list of entries; documents that start in the middle see none before a whole window is inside the row."""
  segments, positions = random_rows()
  got = np.asarray(jax.jit(lambda p, s: sees_an_entry(p, s, rate))(positions, segments))
  for row in range(ROWS):
    entries = entries_by_the_rule(segments[row], positions[row], rate)
    want = [segments[row, i] > 0 and any(place <= i and segment == segments[row, i] for place, segment, *_ in entries)
            for i in range(LENGTH)]
    assert got[row].tolist() == want


def test_positions_restart_where_the_segment_changes():
  segments = np.array([[1, 1, 1, 2, 5, 5, 0, 0], [0, 0, 3, 3, 3, 3, 3, 3]], np.int32)
  np.testing.assert_array_equal(document_positions(segments), [[0, 1, 2, 0, 0, 1, 0, 1], [0, 1, 0, 1, 2, 3, 4, 5]])


def test_restarting_positions_alone_separate_documents():
  """Positions without segment ids: a document ends where they do not go on by one, so that nothing sees across."""
  positions = np.array([[0, 1, 2, 0, 1, 2, 3, 4], [5, 6, 7, 8, 9, 0, 0, 1]], np.int32)
  context = lambda p: make_context(T0, np.ones((2, 8), np.int32), p, None, "sparse", with_losses=False)
  segments, kept = jax.jit(lambda p: (context(p).segment_ids, context(p).positions))(positions)
  np.testing.assert_array_equal(segments, [[1, 1, 1, 2, 2, 2, 2, 2], [1, 1, 1, 1, 1, 2, 3, 3]])
  np.testing.assert_array_equal(kept, positions)
