"""The masked attention kernel where its tiles end: lengths around every tile size, whole tiles that nobody sees, lists that
several blocks share, documents cut anywhere. Small tiles stand in for the chips' own.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch.benchmarks.kernels import program
from pallas_kernels import bits, tpu
from pallas_kernels.cases import packed
from pallas_kernels.selection import Selection
from pallas_kernels.sparse_attention import attend, kernel, kernel_backward, tiles
from tests.kernels.arrays import nan_where_unused, random_normals

WIDTH, SCALE = 16, 0.25
MOVING = ("q", "window_kv", "entries", "sink")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
  """16 queries of 8 heads against 128 entries, so that a few hundred tokens are many blocks and tiles."""
  monkeypatch.setitem(kernel.TILE, "v5p", (128, 128))
  monkeypatch.setitem(kernel_backward.TILE, "v5p", (128, 256))


def inputs(rows, length, num_entries, *, heads=8, rate=1, seed=0):
  """Packed rows with NaN in unused entries; every visible entry is selected."""
  places = packed(rows, length, rate, num_entries)
  batch = len(rows)
  arrays = random_normals(seed, q=(batch, length, heads, WIDTH), window_kv=(batch, length, WIDTH),
                          entries=(batch, num_entries, WIDTH), sink=(heads,))
  arrays["entries"] = nan_where_unused(arrays["entries"], places["entry_segment"])
  return {**arrays, "selection": Selection.all(batch, length), **places}


def weights_of(arrays):
  """Of the sum of (out, lse) whose gradients are taken."""
  shape = arrays["q"].shape
  return tuple(random_normals(1, out=shape, lse=shape[:3]).values())


@functools.partial(jax.jit, static_argnames=("window", "implementation", "_sizes"))
def _both(moving, fixed, weights, window, implementation, _sizes):
  values, pull = jax.vjp(
      lambda moving: attend(**moving, **fixed, window=window, scale=SCALE, implementation=implementation), moving)
  return values, pull(weights)[0]


def run(arrays, window, implementation):
  """(out, lse) and the gradients of a fixed weighted sum of both. Compiled once per shape and sizes that tests change."""
  moving = {name: arrays[name] for name in MOVING}
  fixed = {name: x for name, x in arrays.items() if name not in MOVING}
  sizes = tiles._LIST_BYTES if implementation == "interpret" else None
  return _both(moving, fixed, weights_of(arrays), window, implementation, sizes)


def agree(arrays, window, tolerance=2e-5):
  """The kernel equals the formula; returns the kernel's results."""
  got, want = run(arrays, window, "interpret"), run(arrays, window, "reference")
  for name, g, w in zip(("out", "lse", *MOVING), jax.tree.leaves(got[0]) + [got[1][n] for n in MOVING],
                        jax.tree.leaves(want[0]) + [want[1][n] for n in MOVING], strict=True):
    assert g.shape == w.shape and g.dtype == w.dtype
    np.testing.assert_allclose(g, w, atol=tolerance * max(np.abs(np.asarray(w)).max(initial=0), 1), rtol=0, err_msg=name)
  return got


# 16 queries a block, 128 window keys a block, 128 (forward) and 256 (backward) entries a tile
@pytest.mark.parametrize("length, num_entries, window", [
    (15, 129, 127), (128, 256, 128), (257, 300, 129),
    *(pytest.param(*case, marks=pytest.mark.long) for case in ((15, 127, 1), (17, 129, 127)))])
def test_lengths_around_the_tiles(length, num_entries, window):
  agree(inputs([(length,)], length, num_entries), window)


def test_any_number_of_heads():
  """24 heads are padded to no power of two; an even batch is dealt to the cores by rows."""
  agree(inputs([(33, 20), (40, 20)], 70, 70, heads=21), 24)


@pytest.mark.parametrize("offsets", [(1, 63, 127)] + [
    pytest.param(range(first, first + 16), marks=pytest.mark.long) for first in range(0, 128, 16)], ids=str)
def test_a_document_begins_anywhere(offsets):
  """A row per offset: a packed row equals its documents, and the padding behind them belongs to nobody."""
  agree(inputs([(128 + offset, 60) for offset in offsets], 330, 320), 128)


def test_keys_of_earlier_tokens_bring_no_queries():
  """One token of each of two rows behind 127 others is one block of queries a row."""
  arrays = inputs([(1,), (1,)], 1, 40)
  past = dict(past_kv=np.zeros((2, 127, WIDTH), np.float32), past_segment=np.ones((2, 127), np.int32))
  run = lambda arrays: attend(**arrays, **past, window=128, scale=SCALE, implementation="interpret")
  (call,) = program.calls(jax.make_jaxpr(run)(arrays).jaxpr)
  assert call.name == "masked_attention" and call.grid[:2] == (2, 1)


@pytest.mark.parametrize("window", [24, pytest.param(0, marks=pytest.mark.long)])
def test_tiles_that_nobody_selects(window):
  """The first tile and one in the middle are empty for all; some queries select nothing; a block has one entry."""
  arrays = inputs([(520,)], 520, 520)
  chosen = np.random.default_rng(0).random((1, 520, 520)) < 0.02
  chosen[:, :, :128] = chosen[:, :, 256:384] = False
  chosen[:, 400:440] = False
  chosen[:, 420, 200] = True
  seen = np.tril(np.ones((520, 520), bool))
  words = jax.jit(bits.pack)(chosen & seen)
  arrays["selection"] = Selection.from_words(words, 520, 64)
  (out, lse), gradients = agree(arrays, window)
  assert (np.asarray(gradients["entries"])[:, :128] == 0).all()
  if window:
    return
  alone = ~(chosen & seen).any(-1)[0]
  assert alone.sum() > 100 and (np.asarray(out)[0, alone] == 0).all()
  np.testing.assert_allclose(lse[0, alone], jnp.broadcast_to(arrays["sink"], (alone.sum(), 8)), rtol=1e-6)
  assert (np.asarray(gradients["q"])[0, alone] == 0).all()


@pytest.mark.parametrize("sink", [-1e30, -3e38, -np.inf])
def test_sinks_that_weigh_nothing(sink):
  arrays = inputs([(20, 13)], 40, 40)
  arrays["sink"] = np.full(8, sink, np.float32)
  (out, lse), gradients = run(arrays, 8, "interpret")
  (want_out, want_lse), want = run({**arrays, "sink": np.full(8, -1e4, np.float32)}, 8, "reference")
  np.testing.assert_allclose(out, want_out, atol=1e-5)
  assert (np.asarray(out)[0, 33:] == 0).all()  # not a token: sees nothing
  np.testing.assert_allclose(lse[:, :33], want_lse[:, :33], atol=1e-5)
  for name in ("q", "window_kv", "entries"):
    np.testing.assert_allclose(gradients[name], want[name], atol=2e-5, err_msg=name)
  # Nothing from any token. What is none sees only the sink, which then is its lse.
  weights = weights_of(arrays)[1]
  np.testing.assert_allclose(gradients["sink"], weights[0, 33:].sum(0), atol=1e-6)


def test_lists_that_blocks_share(monkeypatch):
  """Short of scalar memory, blocks read the union of their lists; with many tiles, numbers take 16 bits."""
  monkeypatch.setattr(tiles, "_LIST_BYTES", 48)
  monkeypatch.setattr(tiles.Plan, "id_bits", property(lambda plan: 16))
  arrays = inputs([(150, 140), (320,), (1, 300)], 330, 320)  # the shape of `test_a_document_begins_anywhere`
  plan = tiles.make_plan(arrays["q"].shape, 320, 4, tiles.Options(128, SCALE, tpu.V5P, True), *kernel.TILE["v5p"], False)
  assert 1 < plan.shared < plan.blocks and plan.tiles > 2
  agree(arrays, 128)


def test_lists_name_every_selected_tile():
  words = jax.jit(bits.pack)(np.random.default_rng(0).random((1, 64, 70_000)) < 3e-5)
  options = tiles.Options(128, SCALE, tpu.V5P, True)
  plan = dataclasses.replace(tiles.make_plan((1, 64, 8, WIDTH), 70_000, 2, options, 128, 128, False), shared=2)
  assert plan.tiles == 547 and plan.id_bits == 16
  counts, ids = jax.jit(lambda words: tiles.tile_lists(tpu.pad_axis(words, 2, bits.num_words(547 * 128)), plan))(words)
  selected = np.asarray(jax.jit(lambda words: bits.unpack(words, 547 * 128))(words)).reshape(2, 32, 547, 128).any((1, 3))
  for number, want in enumerate(selected):
    got = tiles.tile_id(counts, ids, number, jnp.arange(547), plan)
    np.testing.assert_array_equal(got[:counts[number]], np.flatnonzero(want))
    assert want.any() and (got[counts[number]:] == got[counts[number] - 1]).all()


def test_what_is_too_much_is_said():
  arrays = inputs([(600,)], 600, 600)
  with pytest.raises(ValueError, match="window = 600"):
    attend(**arrays, window=600, scale=SCALE, implementation="interpret")
  shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
  with pytest.raises(NotImplementedError, match="gradient of 65536 entries"):
    kernel_backward._plan(shape((1, 8, 128, 512)), shape((1, 65536, 512)), tiles.Options(128, SCALE, tpu.V5P, True))
