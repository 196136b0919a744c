"""Ops that read packed keys or round between their matmuls: the same as with what was unpacked, in every implementation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_matmul import expert_mlp
from pallas_kernels.indexer import blockwise, select
from pallas_kernels.selection import Selection
from pallas_kernels.sparse_attention import attend
from tests.kernels import oracles


def packed_like(rng, *shape):
  """Some packed form: signed bytes and a factor a row."""
  factor = rng.random(shape[:-1])
  return {"bytes": jnp.asarray(rng.integers(-9, 10, shape), jnp.int8), "factor": jnp.asarray(factor, jnp.float32)}


def unpack(packed):
  assert packed["bytes"].dtype == jnp.int8
  return packed["bytes"].astype(jnp.float32) * packed["factor"][..., None]


def places(rng, batch, length, entries):
  """Two rows that continue a cache; the last entries of one are unused memory."""
  positions = np.tile(np.arange(100, 100 + length), (batch, 1))
  last = np.sort(rng.integers(0, 100 + length, (batch, entries)), 1)
  segment = np.ones((batch, entries), int)
  segment[-1, entries // 2:] = 0
  names = ("positions", "segment_ids", "entry_last", "entry_segment")
  return dict(zip(names, map(jnp.asarray, (positions, np.ones_like(positions), last, segment))))


@pytest.mark.parametrize("num_entries", [7, 64, 100])
def test_selection_from_packed_keys(num_entries, monkeypatch):
  """Tiles of 32 keys: fewer than a tile, whole tiles, a last one that is filled up. Only plain XLA unpacks by tiles."""
  monkeypatch.setattr(blockwise, "_LARGEST_TILE", 32)
  rng = np.random.default_rng(num_entries)
  keys, where = packed_like(rng, 2, num_entries, 16), places(rng, 2, 9, num_entries)
  queries, weights = rng.normal(size=(2, 9, 4, 16)).astype(np.float32), rng.normal(size=(2, 9, 4)).astype(np.float32)
  sets = lambda found: np.sort(np.asarray(found.indices()), -1)
  want = oracles.select(queries, weights, unpack(keys), top_k=5, **where)[0]
  for kernels in ("blockwise", "reference", "interpret") if num_entries == 100 else ("blockwise",):
    run = jax.jit(lambda keys, kernels=kernels: select(queries, weights, keys, top_k=5, unpack=unpack,
                                                       implementation=kernels, **where))
    np.testing.assert_array_equal(sets(run(keys)), want, err_msg=kernels)
  assert select(queries, weights, keys, top_k=num_entries, unpack=unpack, **where).kind == "all"


@pytest.mark.parametrize("kind", ["all", "indices"])
def test_attention_over_packed_entries(kind):
  rng = np.random.default_rng(5)
  entries, where = packed_like(rng, 2, 40, 16), places(rng, 2, 3, 40)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  q, window_kv, sink, past = normal(2, 3, 2, 16), normal(2, 3, 16), normal(2), normal(2, 3, 16)
  picks = np.stack([[rng.permutation(40)[:6] for _ in range(3)] for _ in range(2)])
  picks[0, 1, 2] = -1
  selection = Selection.all(2, 3) if kind == "all" else Selection.from_indices(jnp.asarray(picks))
  more = dict(window=3, scale=0.25, past_kv=past, past_segment=np.ones((2, 3), int), **where)
  want = oracles.attend(q, window_kv, unpack(entries), selection, sink, **more)
  for kernels in ("blockwise", "reference", "interpret"):
    run = jax.jit(lambda entries, kernels=kernels: attend(q, window_kv, entries, selection, sink, unpack=unpack,
                                                          implementation=kernels, **more))
    for found, truth in zip(run(entries), want):
      np.testing.assert_allclose(found, truth, atol=2e-5, err_msg=kernels)


@pytest.mark.parametrize("sizes", [(9, 0, 4), (33, 8, 17)])  # fewer tiles than two an expert, and more
def test_rounding_between_the_matmuls_of_experts(sizes):
  """With a smooth function in place of a rounding: one bit of a sum decides a rounded number."""
  rng, tile = np.random.default_rng(1), 8
  rows = sum(-(-n // tile) * tile for n in sizes) + tile
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  x, gate, up, down = normal(rows, 6), normal(3, 6, 10), normal(3, 6, 10), normal(3, 10, 6)
  weights = rng.random(rows).astype(np.float32)
  function = lambda h: jnp.tanh(h) + 0.1 * h
  used, want, start = np.zeros(rows, bool), np.zeros((rows, 6)), 0
  for e, n in enumerate(sizes):
    own = slice(start, start + n)
    g, u = np.minimum(x[own] @ gate[e], 0.7), np.clip(x[own] @ up[e], -0.7, 0.7)
    h = g / (1 + np.exp(-g)) * u * weights[own, None]
    want[own], used[own] = (np.tanh(h) + 0.1 * h) @ down[e], True
    start += -(-n // tile) * tile
  for kernels in ("blockwise", "reference", "interpret"):
    run = jax.jit(lambda *arrays, kernels=kernels: expert_mlp(
      *arrays[:4], jnp.array(sizes), tile=tile, limit=0.7, rounding=(function, arrays[4]), implementation=kernels))
    found = np.asarray(run(x, gate, up, down, weights))
    np.testing.assert_allclose(found[used], want[used], atol=1e-5, err_msg=kernels)
