"""What must hold of the kernels whatever they compute: nothing comes from the future, from another document, or from how the
queries are cut into calls; for all kinds of layers. The chips' own tiles are in `test_chips_tiles`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import bits
from pallas_kernels.cases import packed
from pallas_kernels.indexer import kl_loss, select
from pallas_kernels.selection import Selection
from pallas_kernels.sparse_attention import attend
from tests.kernels.arrays import nan_where_unused, random_normals

HEADS, WIDTH, PICKS, ROW = 4, 16, 3, 64  # one length of a row, so that few programs are compiled
CSA, HCA, SLIDING = "csa", "hca", "sliding"
RATES = {CSA: 4, HCA: 8, SLIDING: 1000}  # tokens per entry
all_kinds = pytest.mark.parametrize("kind", RATES)


def entries_of(length, kind):
  """Entries that a row has room for."""
  return -(-length // RATES[kind]) if kind != SLIDING else 0


def inputs(documents, kind=CSA):
  """Arguments of a layer for one row: attention's, and the indexer's by names with `index_` in front."""
  num_entries = entries_of(ROW, kind)
  places = packed([documents], ROW, RATES[kind], num_entries)
  arrays = random_normals(q=(1, ROW, HEADS, WIDTH), window_kv=(1, ROW, WIDTH), entries=(1, num_entries, WIDTH),
                          sink=(HEADS,), index_queries=(1, ROW, 2, 8), index_weights=(1, ROW, 2),
                          index_keys=(1, num_entries, 8))
  for name in ("entries", "index_keys"):
    arrays[name] = nan_where_unused(arrays[name], places["entry_segment"])
  return arrays | {name: np.asarray(x) for name, x in places.items()}


def layer(arrays, kind=CSA, window=8):
  """(out, words of the selection): the indexer of a CSA layer selects, attention reads."""
  return _layer(arrays, kind, window)  # traced once, however the arguments are given


@functools.partial(jax.jit, static_argnums=(1, 2))
def _layer(arrays, kind, window):
  index = {name.removeprefix("index_"): x for name, x in arrays.items() if name.startswith("index_")}
  arrays = {name: x for name, x in arrays.items() if not name.startswith("index_")}
  places = {name: arrays[name] for name in ("positions", "segment_ids", "entry_last", "entry_segment")}
  chosen = Selection.all(*arrays["positions"].shape)
  if kind == CSA:
    chosen = select(**index, top_k=PICKS, implementation="interpret", **places)
  out, _ = attend(**arrays, selection=chosen, window=window, scale=0.25, implementation="interpret")
  return out, chosen.mask(arrays["entries"].shape[1])


def negated(x, places):
  """A copy of [1, n, ...] with the sign of these places turned."""
  moved = x.copy()
  moved[:, places] *= -1
  return moved


def changed_at(arrays, place, kind):
  """Everything that token `place` of row 0 brings in: its query, its key, and the entries of its window and the next."""
  entry = place // RATES[kind]
  return arrays | {name: negated(arrays[name], slice(place, place + 1)) for name in (
    "q", "window_kv", "index_queries", "index_weights")} | {
      name: negated(arrays[name], slice(entry, entry + 2)) for name in ("entries", "index_keys")}


@all_kinds
def test_a_token_moves_nothing_before_itself(kind):
  """Bit for bit; and far behind it, where no window reaches, entries carry the change, if there are any."""
  arrays = inputs((64,), kind)
  base = layer(arrays, kind)[0]
  for place in (0, 3, 4, 7, 8, 20, 63):
    moved = layer(changed_at(arrays, place, kind), kind)[0]
    np.testing.assert_array_equal(moved[0, :place], base[0, :place])
    assert np.abs(moved[0, place] - base[0, place]).max() > 1e-3
    if place == 20:
      assert (np.abs(moved[0, 28:] - base[0, 28:]).max() > 1e-3) == (kind != SLIDING)
      assert np.abs(moved[0, 27] - base[0, 27]).max() > 1e-3  # the last token with this one in its window


def test_an_entry_is_seen_when_its_window_is_closed():
  """By all tokens from there on, where all entries are read; of those that an indexer picks, by which are picked."""
  arrays, rate = inputs((64,), HCA), RATES[HCA]
  base = np.asarray(layer(arrays, HCA)[0])
  for entry in (0, 1, 7):
    moved = layer(arrays | {"entries": negated(arrays["entries"], slice(entry, entry + 1))}, HCA)[0]
    assert (np.asarray(moved) != base).any((2, 3))[0].nonzero()[0].tolist() == list(range((entry + 1) * rate - 1, 64))
  chosen = np.asarray(layer(inputs((64,)))[1])[0]
  assert not chosen[2].any() and chosen[3].nonzero()[0].tolist() == [0] and chosen[7].nonzero()[0].tolist() == [0, 1]
  np.testing.assert_array_equal(chosen.sum(1), np.minimum((np.arange(64) + 1) // RATES[CSA], PICKS))


@all_kinds
@pytest.mark.parametrize("documents", [(14, 16), (1, 3, 5, 7, 9, 7)], ids=str)
def test_a_packed_row_equals_its_documents_alone(documents, kind):
  """Each document alone at the start of a row of its own; unused memory is NaN; padding gives finite numbers."""
  arrays, entries = inputs(documents, kind), entries_of(ROW, kind)
  together, _ = layer(arrays, kind)
  assert np.isfinite(together).all()
  start, first = 0, 0
  for length in documents:
    alone = dict(arrays, **packed([(length,)], ROW, RATES[kind], entries))
    for name in ("q", "window_kv", "index_queries", "index_weights"):
      alone[name] = np.roll(arrays[name], -start, 1)
    for name in ("entries", "index_keys"):
      alone[name] = nan_where_unused(np.roll(arrays[name], -first, 1), alone["entry_segment"])
    np.testing.assert_allclose(layer(alone, kind)[0][0, :length], together[0, start:start + length], atol=1e-5)
    start, first = start + length, first + length // RATES[kind]


@all_kinds
def test_changing_a_document_moves_no_other(kind):
  """Bit for bit, whichever of the documents changes."""
  arrays = inputs((14, 1, 16), kind)
  base = np.asarray(layer(arrays, kind)[0])
  for number in (1, 2, 3):
    own = {name: np.asarray(arrays["segment_ids" if x.shape[1] == ROW else "entry_segment"] == number).reshape(
        1, -1, *(1,) * (x.ndim - 2)) for name, x in arrays.items() if x.ndim > 2}
    changed = {name: np.where(mask, -arrays[name], arrays[name]) for name, mask in own.items()}
    moved = np.asarray(layer(arrays | changed, kind)[0])
    others = np.asarray(arrays["segment_ids"]) != number
    np.testing.assert_array_equal(moved[others], base[others])
    assert (moved[~others] != base[~others]).any(-1).all()


def of_kinds(values, usual):
  """Every kind of layer with every value, all but the `usual` ones of a kind in the long tier only."""
  return [pytest.param(kind, value, marks=() if value in usual.get(kind, ()) else pytest.mark.long)
          for kind in RATES for value in values]


def with_past(part, arrays, start, window):
  """The calls' arrays with the keys of the window - 1 tokens before `start`, as a cache hands them over: where the row has
  no such token the memory is NaN and belongs to no document."""
  front = lambda x, value: np.pad(x, ((0, 0), (window - 1, 0)) + ((0, 0),) * (x.ndim - 2), constant_values=value)
  past = slice(start, start + window - 1)
  return part | {"past_kv": front(arrays["window_kv"], np.nan)[:, past],
                 "past_segment": front(arrays["segment_ids"], 0)[:, past]}


def agrees_with_one_call(parts, kind=CSA, window=8):
  """Calls with so many of the queries each, against all entries and their own past keys, give the rows of one call."""
  arrays = inputs((40,), kind)
  want, chosen = layer(arrays, kind, window=window)
  per_query = ("q", "window_kv", "index_queries", "index_weights", "positions", "segment_ids")
  outs, words, start = [], [], 0
  for number in parts:
    part = {name: x[:, start:start + number] if name in per_query else x for name, x in arrays.items()}
    out, mask = layer(with_past(part, arrays, start, window), kind, window=window)
    outs.append(out)
    words.append(mask)
    start += number
  np.testing.assert_array_equal(np.concatenate(words, 1), chosen[:, :40])
  np.testing.assert_allclose(np.concatenate(outs, 1), want[:, :40], atol=1e-5)


CHUNKS = (1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 40)


@pytest.mark.parametrize("kind, chunk", of_kinds(CHUNKS, {CSA: (1, 17), HCA: (1,), SLIDING: (1,)}))
def test_any_cut_of_the_queries_gives_the_same_rows(kind, chunk):
  """Calls as a decoder makes them; the window of 8 keys is shorter than the row and longer than most calls."""
  agrees_with_one_call([min(chunk, 40 - start) for start in range(0, 40, chunk)], kind)


@pytest.mark.parametrize("kind, first", of_kinds((1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33), {}))
def test_tokens_one_by_one_behind_a_first_call(kind, first):
  agrees_with_one_call([first] + [1] * (40 - first), kind)


@jax.jit
def index_loss(arrays):
  """[B, S]: what the indexer of a CSA layer loses, with attention's own log-sum-exp as the teacher's."""
  index = {name: arrays[f"index_{name}"] for name in ("queries", "weights", "keys")}
  places = {name: arrays[name] for name in ("positions", "segment_ids", "entry_last", "entry_segment")}
  chosen = select(**index, top_k=PICKS, implementation="interpret", **places)
  return kl_loss(**index, attention_queries=arrays["q"], entries=arrays["entries"], lse=arrays["lse"], selection=chosen,
                 scale=0.25, implementation="interpret", **places)


def with_lse(documents):
  """`inputs` and any log-sum-exp."""
  return inputs(documents) | {"lse": 3 + np.random.default_rng(1).normal(size=(1, ROW, HEADS)).astype(np.float32)}


def test_what_an_indexer_loses_by_a_token_depends_on_no_later_one_and_no_other_document():
  """Bit for bit; a token's own loss moves when it does."""
  arrays = with_lse((30, 34))
  base = np.asarray(index_loss(arrays))
  assert (base > 1e-3).sum() > 40
  for place in (8, 20, 40, 63):  # behind a document's first three tokens, which see no entry
    moved = np.asarray(index_loss(changed_at(arrays, place, CSA)))
    last = 29 if place < 30 else 63
    np.testing.assert_array_equal(moved[0, :place], base[0, :place])
    np.testing.assert_array_equal(moved[0, last + 1:], base[0, last + 1:])
    assert moved[0, place] != base[0, place]


def test_what_an_indexer_loses_does_not_depend_on_how_queries_are_cut():
  arrays = with_lse((40,))
  want = np.asarray(index_loss(arrays))
  per_query = ("q", "lse", "index_queries", "index_weights", "positions", "segment_ids")
  for start, end in ((0, 17), (17, 34)):  # one program for both
    part = {name: x[:, start:end] if name in per_query else x for name, x in arrays.items()}
    np.testing.assert_allclose(index_loss(part)[0], want[0, start:end], atol=1e-5)


LENGTHS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 31, 32, 33)


@pytest.mark.parametrize("kind, length", of_kinds(LENGTHS, {CSA: (3, 33)}))
def test_a_prefix_gives_the_prefix_of_the_outputs(kind, length):
  """Also of fewer tokens than an entry takes, when there is no entry at all."""
  arrays = inputs((40,), kind)
  want, _ = layer(arrays, kind)
  entries, whole = entries_of(length, kind), arrays["entries"].shape[1]
  cut = {name: x if x.ndim == 1 else x[:, :entries if x.shape[1] == whole else length] for name, x in arrays.items()}
  cut |= packed([(length,)], length, RATES[kind], entries)
  for name in ("entries", "index_keys"):
    cut[name] = nan_where_unused(cut[name], cut["entry_segment"])
  np.testing.assert_allclose(layer(cut, kind)[0], want[:, :length], atol=1e-5)


@pytest.mark.parametrize("entries", [100, 4096, 9000])
def test_picks_and_words_say_the_same(entries):
  """From bits to numbers and back: rows that are empty, nearly empty, half full and full."""
  share = np.array([0, 0.001, 0.1, 0.5, 1])[:, None]
  mask = np.random.default_rng(0).random((2, 5, entries)) < share
  words = bits.pack(jnp.asarray(mask))
  picks = jax.jit(lambda words: bits.to_picks(words, entries))(words)
  for row, got in zip(mask.reshape(10, -1), np.asarray(picks).reshape(10, -1)):
    count = row.sum()
    assert sorted(got[:count]) == np.flatnonzero(row).tolist() and (got[count:] == -1).all()
  np.testing.assert_array_equal(jax.jit(lambda picks: bits.from_picks(picks, entries))(picks), words)
