"""Rows that grow in the middle of an epoch: no token twice, none left out, whatever was read when."""

import collections
import dataclasses
import itertools
import json
import time

import numpy as np
import pytest

from deepseek_v4.config import DataConfig
from deepseek_v4.training import data, packing, row_order, sources
from deepseek_v4.training.row_order import Position, moved

VOCAB = 65_536
END = VOCAB - 1
EIGHT = [5, 7, 1, 3, 4, 6, 2, 0]  # the first epoch of a run with seed 0 and eight rows


@pytest.fixture(scope="module")
def path(tmp_path_factory):
  """Documents in which every id of the corpus is another one, of 1 to 400 tokens."""
  file = tmp_path_factory.mktemp("ids") / "all.array_record"
  lengths = np.random.default_rng(0).integers(1, 400, 60)
  ids = np.arange(lengths.sum())
  sources.write_array_record(file, np.split(ids, np.cumsum(lengths)[:-1]))
  return str(file)


def config(path, length, batch_size=4):
  return DataConfig(source="array_record", path=path, sequence_length=length, batch_size=batch_size, accumulation=1,
                    held_out_percent=10, seed=5)


def dataset(path, length, batch_size=4):
  return data.make_dataset(config(path, length, batch_size), VOCAB, document_end=END)


def tokens_of(batches):
  """All ids of batches but document ends, in order."""
  ids = np.concatenate([b["tokens"][b["segment_ids"] > 0] for b in batches])
  return ids[ids != END]


def read(base, parts):
  """(all batches, the last position) of parts (length, number of rows or None = to the end of the epoch), one by one."""
  found, state = [], None
  for length, count in parts:
    batches = base.reshaped(dataclasses.replace(base.config, sequence_length=length, batch_size=1))
    rows = iter(batches)
    if state is not None:
      rows.set_state(json.loads(json.dumps(moved(state, length))))
    found += list(itertools.islice(rows, count))
    state = rows.get_state()
    rows.close()
  return found, state


@pytest.mark.parametrize("parts", [
  [(16, 100), (64, 60), (256, None)], [(32, 1), (16, 50), (512, None)], [(512, 3), (512, 4), (40, None)],
  [(16, 37), (24, 11), (36, 8), (512, None)],
], ids=str)
def test_an_epoch_has_every_token_once_however_rows_change(path, parts):
  base = dataset(path, 16)
  *head, (last, _) = parts
  before, state = read(base, head)
  seen = tokens_of(before)
  assert len(set(seen.tolist())) == len(seen)
  everything = set(tokens_of(list(itertools.islice(base.reshaped(config(path, 16, 1)), base.rows))).tolist())
  # the rest of the epoch, row by row until its last token
  rest = iter(base.reshaped(config(path, last, 1)))
  rest.set_state(moved(state, last))
  found = collections.Counter(seen.tolist())
  while set(found) != everything:
    found.update(tokens_of([next(rest)]).tolist())
  assert set(found.values()) == {1}
  # the next epoch has everything once again, and documents that fit are whole again
  whole = base.reshaped(config(path, last, 1))
  again = [next(rest) for _ in range(whole.rows)]
  assert sorted(tokens_of(again).tolist()) == sorted(everything)


def test_the_rest_comes_in_longer_pieces(path):
  """What follows each other in a document is joined: far fewer pieces than in short rows, and full rows."""
  base = dataset(path, 16)
  rows = base.reshaped(config(path, 256, 1))
  iterator = iter(rows)
  iterator.set_state(moved({"row": 40, **base.identity}, 256))
  batch = next(iterator)
  pieces = [batch["tokens"][batch["segment_ids"] == s] for s in range(1, batch["segment_ids"].max() + 1)]
  assert (batch["segment_ids"] > 0).mean() > 0.9 and len(pieces) < 12
  for piece in pieces:
    ids = piece[piece != END]
    assert (np.diff(ids) == 1).all()  # a stretch of one document, in its order


def test_a_move_at_the_end_of_an_epoch_leaves_nothing(path):
  base = dataset(path, 16)
  rows = iter(base.reshaped(config(path, 64, 1)))
  rows.set_state(moved({"row": 2 * base.rows, **base.identity}, 64))
  fresh = iter(base.reshaped(config(path, 64, 1)))
  for _ in range(5):
    np.testing.assert_array_equal(next(rows)["tokens"], next(fresh)["tokens"])


def test_orders_are_permutations_and_never_change():
  orders = [row_order._order(1000, name) for name in ("rows 0 0", "rows 0 1", "rows 1 0", "rest 0 0")]
  assert all(sorted(order.tolist()) == list(range(1000)) for order in orders)
  assert len({tuple(order) for order in orders}) == 4
  assert all(abs(np.corrcoef(x, y)[0, 1]) < 0.15 for x, y in itertools.combinations(orders, 2))  # deviation 0.03 by chance
  # What a run has read follows from this: another order would repeat some rows and leave out others.
  assert row_order._order(8, "rows 0 0").tolist() == EIGHT and row_order._order(0, "rows 0 0").tolist() == []


def test_a_million_rows_left_are_listed_at_once():
  """Each row read by a Python function took tens of microseconds; an hour for a corpus of a hundred million."""
  class Documents:
    lengths, counted = np.full(500_000, 32), None

  order = row_order.RowOrder(Documents(), DataConfig(sequence_length=32), "train")
  started = time.process_time()
  rest = order._left(((16, 3),))
  assert time.process_time() - started < 10 and rest.tokens == 500_000 * 32 - 3 * 16


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_position_goes_on_where_it_was_whatever_the_batch(path, batch_size):
  base = dataset(path, 16)
  whole, _ = read(base, [(16, 40), (48, 30)])
  _, state = read(base, [(16, 40), (48, 9)])
  assert state["row"] == 49 and state["earlier"] == [[16, 40]] and state["sequence_length"] == 48
  rows = iter(base.reshaped(config(path, 48, batch_size)))
  rows.set_state(json.loads(json.dumps(state)))
  found = np.concatenate([next(rows)["tokens"].reshape(-1, 48) for _ in range(6)])
  np.testing.assert_array_equal(found, np.concatenate([b["tokens"][0] for b in whole[49:49 + len(found)]]))


def test_places_without_a_move_are_as_they_always_were(path):
  rows = iter(dataset(path, 16))
  next(rows)
  assert set(rows.get_state()) == {"row", "split", "sequence_length", "seed", "fim_rate", "documents", "order"}
  state = rows.get_state()
  assert moved(state, 16) is state
  assert moved(moved({**state, "row": 0}, 64), 32)["earlier"] == []


@pytest.mark.parametrize("state, said", [
  ({"row": 3, "earlier": [[16, 5]]}, "row = 3: expected at least 5"), ({"row": -1}, "expected a dictionary"),
  ({"row": 3, "earlier": [[16]]}, "expected a dictionary"), ({"row": 3, "earlier": 4}, "expected a dictionary"),
  ([], "expected a dictionary")])
def test_positions_that_are_none_are_refused(state, said):
  with pytest.raises(ValueError, match=said):
    Position.of_state(state)


def test_another_length_without_a_move_is_refused(path):
  base = dataset(path, 16)
  rows = iter(base.reshaped(config(path, 64, 1)))
  with pytest.raises(ValueError, match="sequence_length = 16; expected 64"):
    rows.set_state({"row": 4, **base.identity})


def test_only_sizes_may_change(path):
  base = dataset(path, 16)
  with pytest.raises(ValueError, match="expected .* with another sequence_length, batch_size, accumulation"):
    base.reshaped(dataclasses.replace(base.config, seed=6))
  with pytest.raises(ValueError, match="data.batch_size = 4000: expected at most"):
    base.reshaped(config(path, 16, 4000))


def test_repacking_joins_only_what_follows():
  """Documents of 10 and 7 tokens in rows of 4; rows 1 and 2 hold the second and third piece of the first."""
  rows = packing.pack(np.array([10, 7]), 4)
  pieces = list(zip(rows.document.tolist(), rows.start.tolist(), rows.length.tolist()))
  at = {piece: int(np.searchsorted(rows.offset, i, side="right")) - 1 for i, piece in enumerate(pieces)}
  chosen = np.array([at[(0, 4, 4)], at[(0, 8, 2)], at[(1, 4, 3)]])
  new = packing.repack(rows, chosen, 8)
  assert sorted(zip(new.document.tolist(), new.start.tolist(), new.length.tolist())) == [(0, 4, 6), (1, 4, 3)]
  assert packing.repack(rows, np.array([at[(0, 0, 4)], at[(0, 8, 2)]]), 8).rows == 1  # two pieces that do not meet
