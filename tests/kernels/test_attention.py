"""Attention where memory is unused or nothing is picked: -1 anywhere, NaN behind the picks, rows that see nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.selection import Selection
from pallas_kernels.sparse_attention import attend
from tests.kernels import oracles

ENTRIES, PICKS, QUERIES, HEADS, WIDTH = 64, 32, 8, 4, 16
USED = 60  # entries 60 to 62 are unused memory; entry 63 is huge and never picked


def pick_rows():
  """Name -> int32 [8, 32] of one row's picks."""
  rng = np.random.default_rng(0)
  distinct = lambda n: np.stack([rng.permutation(USED)[:n] for _ in range(QUERIES)])
  rows = {name: np.full((QUERIES, PICKS), -1) for name in ("back", "front", "interleaved", "nothing", "one")}
  rows["back"][:, :20] = distinct(20)
  rows["front"][:, -4:] = distinct(4)
  rows["interleaved"][:, ::3] = distinct(len(range(0, PICKS, 3)))
  rows["one"][:, 17] = distinct(1)[:, 0]
  return rows


@pytest.fixture(scope="module")
def inputs():
  rng = np.random.default_rng(1)
  rows = pick_rows()
  batch = len(rows)
  entries = rng.normal(size=(batch, ENTRIES, WIDTH)).astype(np.float32)
  entries[:, USED:-1], entries[:, -1] = np.nan, 1e6
  segment = np.ones((batch, ENTRIES), np.int32)
  segment[:, USED:-1] = 0
  return dict(
      q=rng.normal(size=(batch, QUERIES, HEADS, WIDTH)).astype(np.float32), entries=entries,
      window_kv=np.full((batch, QUERIES, WIDTH), np.nan, np.float32),  # unread: the window is 0
      sink=np.zeros(HEADS, np.float32), positions=np.tile(np.arange(1000, 1000 + QUERIES, dtype=np.int32), (batch, 1)),
      segment_ids=np.ones((batch, QUERIES), np.int32), entry_last=np.tile(np.arange(ENTRIES, dtype=np.int32), (batch, 1)),
      entry_segment=segment), np.stack(list(rows.values()))


@pytest.mark.parametrize("implementation", ["reference", "blockwise", "interpret"])
def test_minus_one_anywhere_and_unused_memory(inputs, implementation):
  """A4.1 to 4 and 6."""
  arrays, picks = inputs

  @jax.jit
  def both(moving, fixed, picks):
    run = lambda moving: attend(**moving, **fixed, selection=Selection.from_indices(picks), window=0, scale=0.25,
                                implementation=implementation)
    value, pull = jax.vjp(run, moving)
    return value, pull(jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), value))[0]

  moving = {name: arrays[name] for name in ("q", "window_kv", "entries", "sink")}
  fixed = {name: x for name, x in arrays.items() if name not in moving}
  (out, lse), gradients = both(moving, fixed, picks)
  want_out, want_lse = oracles.attend(**arrays, selection=Selection.from_indices(jnp.asarray(picks)), window=0, scale=0.25)
  np.testing.assert_allclose(out, want_out, atol=1e-5)
  np.testing.assert_allclose(lse, want_lse, atol=1e-5)
  nothing = list(pick_rows()).index("nothing")
  assert (np.asarray(out[nothing]) == 0).all() and (np.asarray(lse[nothing]) == 0).all()  # only the sink, whose logit is 0
  for name, gradient in gradients.items():
    assert np.isfinite(gradient).all(), name
  assert (np.asarray(gradients["q"][nothing]) == 0).all()
  assert (np.asarray(gradients["entries"][:, USED:]) == 0).all()
  assert (np.asarray(gradients["window_kv"]) == 0).all()
  # the order of the picks means nothing
  shuffled, _ = both(moving, fixed, picks[:, :, np.random.default_rng(2).permutation(PICKS)])[0]
  np.testing.assert_allclose(shuffled, out, atol=1e-6)


def test_one_query_with_minus_one_anywhere(inputs):
  """A4 as in decoding: so few entries are picked that only these are cleared, not all memory."""
  arrays, picks = inputs
  arrays = {name: x[:, 3:4] if x.shape[1:2] == (QUERIES,) else x for name, x in arrays.items()}
  run = jax.jit(lambda arrays, picks: attend(**arrays, selection=Selection.from_indices(picks), window=0, scale=0.25,
                                             implementation="blockwise"))
  want_out, want_lse = oracles.attend(**arrays, selection=Selection.from_indices(jnp.asarray(picks[:, 3:4])), window=0,
                                      scale=0.25)
  out, lse = run(arrays, picks[:, 3:4])
  np.testing.assert_allclose(out, want_out, atol=1e-5)
  np.testing.assert_allclose(lse, want_lse, atol=1e-5)


def test_selection_is_a_set_of_entries():
  picks = jnp.array([[[3, -1, 0]], [[-1, -1, -1]]])
  selection = Selection.from_indices(picks)
  np.testing.assert_array_equal(selection.indices(), picks)
  np.testing.assert_array_equal(selection.mask(4), [[[True, False, False, True]], [[False] * 4]])
  assert Selection.all(2, 3).mask(5).all() and Selection.all(2, 3).mask(5).shape == (2, 3, 5)
  with pytest.raises(ValueError, match="names no entries"):
    Selection.all(2, 3).indices()
  for bad in (jnp.zeros((2, 3), jnp.int32), jnp.zeros((2, 3, 4))):
    with pytest.raises(ValueError, match="picks = .*: expected integers"):
      Selection.from_indices(bad)


@pytest.mark.parametrize("implementation", ["reference", "blockwise", "interpret"])
def test_words_of_another_number_of_entries_are_refused(implementation):
  """Though as many words hold both."""
  zeros, places = jnp.zeros, lambda *n: jnp.zeros(n, jnp.int32)
  words = Selection.from_words(places(1, 4, 128), 300, 8)
  with pytest.raises(ValueError, match="selection.num_entries = 300: expected 400"):
    attend(zeros((1, 4, 2, 16)), zeros((1, 4, 16)), zeros((1, 400, 16)), words, zeros(2), positions=places(1, 4),
           segment_ids=places(1, 4), entry_last=places(1, 400), entry_segment=places(1, 400), window=2, scale=1.0,
           implementation=implementation)
