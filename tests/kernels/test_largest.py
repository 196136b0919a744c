"""The largest numbers of rows against NumPy's stable sort, and the selection that is made of them tile by tile."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import blocks
from pallas_kernels.cases import packed
from pallas_kernels.indexer import blockwise, reference
from pallas_kernels.indexer.largest import group_maxima, largest
from tests.kernels.arrays import nan_where_unused, random_normals


def rows_of(kind, length, dtype):
  """Rows [6, T] of one kind."""
  rng = np.random.default_rng(length)
  x = rng.normal(size=(6, length))
  if kind == "equal":
    x = np.round(x)
  elif kind == "zeros":  # as scores: half of them exactly zero, of either sign
    x = np.where(rng.random(x.shape) < 0.5, np.copysign(0, x), x)
  elif kind == "few":  # fewer numbers than are wanted
    x[rng.random(x.shape) < 0.98] = -np.inf
  elif kind == "extreme":
    x = x * 10.0 ** rng.integers(-30, 30, x.shape)
    x[:, ::7], x[:, 3::11] = np.finfo(dtype).max, np.finfo(dtype).tiny
  return x.astype(dtype) + dtype(0)  # -0 becomes 0: these two are equal for NumPy


@pytest.mark.parametrize("length, k", [(40, 7), (64, 64), (513, 60), (4096, 3), (4096, 33), (5000, 33)])
def test_the_largest_of_a_row(length, k):
  """Direct, grouped once and grouped several times; of equal numbers the first ones."""
  run = jax.jit(lambda x: largest(x, k))
  for kind in ("normal", "equal", "zeros", "few", "extreme"):
    x = rows_of(kind, length, np.float32)
    found, places = run(x)
    want = np.sort(np.argsort(-x, axis=1, kind="stable")[:, :k])
    np.testing.assert_array_equal(places, want, err_msg=kind)
    np.testing.assert_array_equal(found, np.take_along_axis(x, want, 1), err_msg=kind)


def test_the_largest_of_a_row_in_double_precision():
  with jax.enable_x64(True):
    x = 1 + rows_of("normal", 1000, np.float64) * 1e-12  # all the same in float32
    places = jax.jit(lambda x: largest(x, 9)[1])(x)
    assert places.dtype == jnp.int32
  np.testing.assert_array_equal(places, np.sort(np.argsort(-x, axis=1, kind="stable")[:, :9]))


@pytest.mark.parametrize("length, k", [(64, 20), (1024, 20)])
def test_groups_with_a_maximum_of_minus_infinity_are_not_read(length, k):
  """Whatever they hold: such memory is an earlier block's."""
  x = rows_of("normal", length, np.float32)
  hidden = np.repeat(np.random.default_rng(0).random((6, length // 8)) < 0.5, 8, axis=1)
  clean = np.where(hidden, -np.inf, x)
  found, want = jax.jit(lambda x, clean: (largest(x, k, group_maxima(clean)), largest(clean, k)))(
    np.where(hidden, np.float32(1e9), x), clean)
  np.testing.assert_array_equal(found, want)


@pytest.mark.parametrize("rows, rate", [([(300,), (120, 1, 90, 60)], 1), ([(130, 150)], 2)], ids=str)
def test_a_selection_in_many_tiles(monkeypatch, rows, rate):
  """Blocks of queries that see other tiles than the blocks before them, documents that begin inside a tile, entries that do
  not fill the last one, unused memory of NaN: the picks of the formula."""
  monkeypatch.setattr(blockwise, "_LARGEST_TILE", 16)
  monkeypatch.setattr(blockwise, "_SMALLEST_TILE", 16)
  monkeypatch.setattr(blocks, "_BYTES_PER_BLOCK", 0)  # 16 queries a block
  length, entries, top_k = 300, 300 // rate + 3, 9
  places = packed(rows, length, rate, entries)
  normal = random_normals(queries=(len(rows), length, 2, 4), weights=(len(rows), length, 2), keys=(len(rows), entries, 4))
  picks = [jax.jit(lambda *index, run=run: run.select(*index, **places, top_k=top_k)) for run in (blockwise, reference)]
  for kind, change in (("normal", lambda x: x), ("equal", np.round)):
    arrays = {name: change(x) for name, x in normal.items()}
    arrays["keys"] = nan_where_unused(arrays["keys"], places["entry_segment"])
    found, want = (np.sort(run(*arrays.values())) for run in picks)
    np.testing.assert_array_equal(found, want, err_msg=kind)
    assert (want >= 0).all(-1).any() and (want < 0).any()
