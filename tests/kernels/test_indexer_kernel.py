"""The indexer's interpreted kernels where tiles begin and end: lengths around every tile size, documents cut anywhere.

Interpreted kernels have the v5p's tiles: 32 queries x 1,024 entries (select), 1,024 rows x 512 entries (loss), 2 cores.
Where a test names a chip, that one's: v6e and TPU7x have one core, and larger tiles of the loss.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import bits, tpu
from pallas_kernels.cases import packed, unused_to_nan
from pallas_kernels.indexer import kernel_loss, kl_loss, select
from pallas_kernels.indexer.tiles import Sizes, visible_range
from pallas_kernels.selection import Selection

CHIPS = {chip.name: chip for chip in (tpu.V5P, tpu.V6E, tpu.TPU7X)}


def long(cases):
  return [pytest.param(*case, marks=pytest.mark.long) for case in cases]


def places(queries, entries, documents, rng):
  """Some tokens of a row of documents of these lengths, and an entry for every one of its tokens; then padding."""
  position = np.concatenate([np.arange(n) for n in documents])
  segment = np.repeat(np.arange(1, len(documents) + 1), documents)
  pad = lambda x, n: np.pad(x, (0, n - len(x)))[None].astype(np.int32)
  # As on a device that holds a part of the sequence; the last three are no tokens.
  chosen = np.sort(rng.choice(len(position), queries - 3))
  return dict(positions=pad(position[chosen], queries), segment_ids=pad(segment[chosen], queries),
              entry_last=pad(position, entries), entry_segment=pad(segment, entries))


def seen_by(p):
  """bool [B, S, T]."""
  same = (p["segment_ids"][:, :, None] == p["entry_segment"][:, None]) & (p["segment_ids"][:, :, None] > 0)
  return same & (p["entry_last"][:, None] <= p["positions"][:, :, None])


@pytest.mark.parametrize("chip, queries, entries, documents, top_k", [
    ("tpu7x", 33, 1025, (1025,), 300), ("v5p", 65, 4097, (2500, 1590), 100),
    *long([("v5p", 31, 1023, (600, 1, 419), 40)]),
    *long((chip, queries, entries, (entries // 2 + 100, entries // 3), 100) for chip in CHIPS for queries in (31, 32, 33)
          for entries in (1023, 1024, 1025, 4095, 4096, 4097))])
def test_selection_around_tile_edges(monkeypatch, chip, queries, entries, documents, top_k):
  """Small integers: many equal scores, zeros of either sign; equal to a stable sort, with NaN in unused memory."""
  monkeypatch.setattr(tpu, "current_chip", lambda interpret: CHIPS[chip])
  rng = np.random.default_rng(entries)
  p = places(queries, entries, documents, rng)
  q, w, k = (rng.integers(-2, 3, size=shape).astype(np.float32)
             for shape in ((1, queries, 3, 4), (1, queries, 3), (1, entries, 4)))
  w[0, 5] = -0.0  # all scores of this query are equal
  scores = (np.maximum(np.einsum("bshc,btc->bsht", q, k), 0) * w[..., None]).sum(2)
  k = np.where(p["entry_segment"][..., None] > 0, k, np.nan)
  run = jax.jit(lambda q, w, k, p: select(q, w, k, top_k=top_k, implementation="interpret", **p))
  got = run(q, w, k, p)
  seen = seen_by(p)
  order = np.argsort(np.where(seen, -scores, np.inf), -1, kind="stable")
  rank = np.empty_like(order)
  np.put_along_axis(rank, order, np.broadcast_to(np.arange(entries), order.shape), -1)
  np.testing.assert_array_equal(bits.unpack(got.words, entries), seen & (rank < top_k))
  assert got.kind == "bits" and (got.num_entries, got.top_k) == (entries, top_k)
  assert not np.asarray(got.words[0, -3:]).any()  # what is no token selects nothing


@functools.cache
def selection(implementation):
  """Jitted: arrays and places -> bool [B, S, T], which of 17 picks of each query are taken."""
  return jax.jit(lambda arrays, p: select(**arrays, top_k=17, implementation=implementation, **p).mask(
      arrays["keys"].shape[1]))


@pytest.mark.parametrize("offsets", [(1, 31, 127)] + [
    pytest.param(range(first, first + 16), marks=pytest.mark.long) for first in range(0, 128, 16)], ids=str)
def test_a_document_begins_anywhere(offsets):
  """A row per offset, two documents and padding: selection and loss are those of the formula, which takes every document
  by itself; changing the first document moves nothing of the second one, to the last bit."""
  queries, rows = 330, [(128 + offset, 60) for offset in offsets]
  p = packed(rows, queries, 1, queries)
  batch, rng = len(rows), np.random.default_rng(0)
  normal = lambda *shape: rng.normal(size=(batch, *shape)).astype(np.float32)
  arrays = dict(queries=normal(queries, 2, 8), weights=normal(queries, 2), keys=unused_to_nan(
      jnp.asarray(normal(queries, 8)), p["entry_segment"]))
  got, want = selection("interpret")(arrays, p), selection("reference")(arrays, p)
  np.testing.assert_array_equal(got & seen_by(p), want & seen_by(p))
  assert not (got & ~seen_by(p)).any()

  entries = unused_to_nan(jnp.asarray(normal(queries, 16)), p["entry_segment"])
  teacher = dict(attention_queries=normal(queries, 2, 16), entries=entries, lse=3 + normal(queries, 2))
  words = bits.pack(got)
  loss = {name: value_and_gradients(name)(arrays, teacher, Selection.from_words(words, queries, 17), p)
          for name in ("interpret", "reference")}
  for a, b in zip(*map(jax.tree.leaves, loss.values()), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max())

  second = np.asarray(p["segment_ids"]) == 2
  first_of = {"queries": p["segment_ids"], "weights": p["segment_ids"], "keys": p["entry_segment"]}
  changed = {name: jnp.where((first_of[name] == 1).reshape(*first_of[name].shape, *(1,) * (x.ndim - 2)), -x, x)
             for name, x in arrays.items()}
  np.testing.assert_array_equal(np.asarray(selection("interpret")(changed, p))[second], np.asarray(got)[second])
  moved, _ = value_and_gradients("interpret")(changed, teacher, Selection.from_words(words, queries, 17), p)
  np.testing.assert_array_equal(np.asarray(moved)[second], np.asarray(loss["interpret"][0])[second])


@functools.cache
def value_and_gradients(implementation, chip="v5p"):
  """Jitted: index, teacher, selection, places -> (loss of each query, gradients of its sum weighted with cosines). A program
  for each chip: which one it is, `tpu.current_chip` says while the program is traced."""
  @jax.jit
  def run(index, teacher, selection, p):
    value, pull = jax.vjp(lambda index: kl_loss(**index, **teacher, selection=selection, scale=0.25,
                                                implementation=implementation, **p), index)
    return value, pull(jnp.cos(jnp.arange(value.size, dtype=value.dtype)).reshape(value.shape))[0]
  return run


def awkward_scores(entries):
  """Rows [R, T] that a search between the smallest and the largest score could go wrong on."""
  rng = np.random.default_rng(5)
  n, i = rng.normal(size=(4, entries)), np.arange(entries)
  spread = 2.0**np.linspace(-120, 120, entries)
  return np.stack([np.exp(20 * n[0]) * np.sign(n[1]), n[0] * 1e-37, np.where(i == 100, 1e38, n[0]),
                   np.where(i == 100, -3e38, n[1]), np.where(n[2] > 0, 0.0, -0.0), np.where(n[2] > 0, 3.4e38, -3.4e38),
                   1 + i % 7 * 2.0**-23, spread, spread * np.where(i % 2, 1, -1),
                   np.round(10 * n[3])]).astype(np.float32)


def test_selection_whatever_the_scores_are():
  """Two heads give any score exactly: relu(s) - relu(-s) = s."""
  entries, top_k = 1100, 90
  scores = awkward_scores(entries)
  rows = len(scores)
  positions = np.array([3, 89, 90, 600, 1099], np.int32)
  shape = (rows, len(positions))
  p = dict(positions=np.broadcast_to(positions, shape), segment_ids=np.ones(shape, np.int32),
           entry_last=np.broadcast_to(np.arange(entries, dtype=np.int32), scores.shape),
           entry_segment=np.ones(scores.shape, np.int32))
  q = np.broadcast_to(np.eye(2, dtype=np.float32), (*shape, 2, 2))
  w = np.broadcast_to(np.array([1, -1], np.float32), (*shape, 2))
  k = np.stack([np.maximum(scores, 0), np.maximum(-scores, 0)], -1)
  got = jax.jit(lambda *a: select(*a, top_k=top_k, implementation="interpret", **p).words)(q, w, k)
  want = np.zeros((*shape, entries), bool)
  for row in range(rows):
    for i, position in enumerate(positions):
      want[row, i, np.argsort(-scores[row, :position + 1], kind="stable")[:top_k]] = True
  np.testing.assert_array_equal(bits.unpack(got, entries), want)


def test_no_visible_entry_lies_outside_the_range_of_its_block():
  rng = np.random.default_rng(0)
  sizes = Sizes.of(96, 1300, (16, 128), 2)
  for documents in ((1300,), (5, 600, 1, 1, 200, 493), (128, 128, 1000), tuple([13] * 100)):
    p = places(sizes.all_queries, sizes.all_entries, documents, rng)
    packed = np.asarray(visible_range(p["positions"], p["segment_ids"], p["entry_last"], p["entry_segment"], sizes))
    seen = seen_by(p).reshape(-1, sizes.queries, sizes.steps, sizes.entries).any((1, 3))
    for tiles, number in zip(seen, packed, strict=True):
      want = np.flatnonzero(tiles)
      first, count = number & 0xffff, number >> 16
      assert (first, first + count) == ((want[0], want[-1] + 1) if len(want) else (0, 0))


def loss_tile(chip):
  """(queries, entries) of a tile: five attention heads are padded to 16."""
  rows, entries = kernel_loss.TILE[chip]
  return rows // 16, entries


@pytest.mark.parametrize("chip, queries, entries, picks", [
    ("tpu7x", 68, 1025, None), ("v6e", 200, 1025, 24),  # v5p's tile is the default's, in test_cases.py
    *long([("v5p", 68, 513, None)]),
    *long((chip, loss_tile(chip)[0] + more, loss_tile(chip)[1] + longer, 24 if longer else None) for chip in CHIPS
          for more in (-1, 0, 1, 70) for longer in (-1, 0, 1))])
def test_loss_around_tile_edges(monkeypatch, chip, queries, entries, picks):
  """Value and gradients against the formula; a first tile without entries, rows without any, NaN in unused memory."""
  monkeypatch.setattr(tpu, "current_chip", lambda interpret: CHIPS[chip])
  rng = np.random.default_rng(entries)
  p = places(queries, entries, (entries // 2 + 100, entries // 4), rng)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  used = p["entry_segment"][..., None] > 0
  index = dict(queries=normal(1, queries, 3, 8), weights=normal(1, queries, 3),
               keys=np.where(used, normal(1, entries, 8), np.nan))
  teacher = dict(attention_queries=normal(1, queries, 5, 16), lse=3 + normal(1, queries, 5),
                 entries=np.where(used, normal(1, entries, 16), np.nan))
  kinds = [Selection.all(1, queries)]
  if picks:
    chosen = rng.permuted(np.broadcast_to(np.arange(entries), (1, queries, entries)), axis=-1)[..., :picks]
    chosen[:, :, ::5] = -1
    block, tile = loss_tile(chip)
    if block + 6 < queries - 3:  # the first tile is nobody's in the first block, and there are tokens behind it
      chosen[:, :block + 6] = np.where(chosen[:, :block + 6] < tile, -1, chosen[:, :block + 6])
    chosen[:, 7] = -1
    packed = bits.pack(Selection.from_indices(jnp.asarray(chosen)).mask(entries) & seen_by(p))
    kinds = [Selection.from_indices(jnp.asarray(chosen)), Selection.from_words(packed, entries, picks)]

  want, want_gradients = value_and_gradients("reference")(index, teacher, kinds[0], p)
  assert (np.asarray(want) == 0).any() and np.asarray(want).max() > 0.1
  for selection in kinds:
    value, gradients = value_and_gradients("interpret", chip)(index, teacher, selection, p)
    np.testing.assert_allclose(value, want, atol=1e-5 * np.abs(want).max())
    for name, gradient in gradients.items():
      np.testing.assert_allclose(gradient, want_gradients[name], atol=1e-5 * np.abs(want_gradients[name]).max())
