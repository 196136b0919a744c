"""What the checks A3 and A4 ask of the cache beside tests/model/test_cache.py: nothing cut, double precision, no jit, slots
that are not written."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deepseek_v4 as dsv4
from deepseek_v4.config import CSA, LEARNED
from deepseek_v4.model.cache import write_entries, write_ring
from tests.model.small import T0, random_tokens, random_variables, variables

IDS = random_tokens(1, 40)
SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 40)


def test_chunks_of_any_size_where_top_k_cuts_nothing():
  """A3.1 and 2: k = 64, float64, one batch whose rows are fed in chunks of their own sizes; and 5, counts. Of a layer
  that chooses; HCA in float64 is in test_mixed_cache.py, all of the model in float32 in test_cache.py."""
  config = dataclasses.replace(T0, num_hidden_layers=1, layer_types=(CSA,), mlp_layer_types=(LEARNED,),
                               num_nextn_predict_layers=0, index_topk=64, compute_dtype="float64")
  with jax.enable_x64(True):
    model, weights = dsv4.DeepseekV4(config, "blockwise"), random_variables(config)
    want = np.asarray(jax.jit(lambda v: model.apply(v, IDS).logits)(weights))[0]
    step = jax.jit(lambda v, cache, tokens, segments: model.apply(v, tokens, None, segments, cache))
    cache, found = dsv4.init_cache(config, len(SIZES), 40), np.zeros((len(SIZES), *want.shape))
    done = np.zeros(len(SIZES), int)
    while (done < 40).any():
      counts = np.minimum(SIZES, 40 - done)
      places = done[:, None] + np.arange(40)
      out = step(weights, cache, IDS[0, places % 40], (np.arange(40) < counts[:, None]).astype(np.int32))
      cache = out.cache
      for row, (start, count) in enumerate(zip(done, counts)):
        found[row, start:start + count] = out.logits[row, :count]
      done = done + counts
      for kinds in dsv4.cache_entries(cache).values():
        for number in kinds.values():
          assert number.tolist() == (done // 4).tolist()
  assert want.dtype == np.float64 and 1 < want.std() < 10
  np.testing.assert_allclose(found, np.broadcast_to(want, found.shape), atol=1e-9)


@pytest.mark.long
def test_without_jit():
  """A3.2 and 3, operation by operation: a chunk, then a single token."""
  model = dsv4.DeepseekV4(T0, "blockwise")
  want = np.asarray(jax.jit(lambda v: model.apply(v, IDS).logits)(variables()))[0]
  cache, start = dsv4.init_cache(T0, 1, 40), 0
  for width in (9, 1):
    out = model.apply(variables(), IDS[:, start:start + width], cache=cache)
    np.testing.assert_allclose(out.logits[0], want[start:start + width], atol=1e-4)
    cache, start = out.cache, start + width


@pytest.mark.parametrize("first", [0, 3, 6, 7, 8, 9])
def test_what_is_not_written_keeps_its_bits(first):
  """A4.5: entries without a use, in front of the last slot, at it and beyond it; slots that are not used stay."""
  old = np.random.default_rng(0).normal(size=(2, 8, 3)).astype(np.float32)
  old[:, -1] = np.nan
  new = np.ones((2, 4, 3), np.float32)
  write = jax.jit(write_entries)
  for used in ([0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0]):
    used = np.array([used, [0, 0, 0, 0]], bool)
    want = old.copy()
    for number in range(4):
      if used[0, number] and first + number < 8:
        want[0, first + number] = 1
    got = np.asarray(write(old, new, jnp.array([first, first]), used))
    np.testing.assert_array_equal(got.view(np.uint32), want.view(np.uint32))


def test_a_ring_without_new_tokens_keeps_its_bits():
  """A4.5 of the windows: zero tokens move nothing, wherever the ring stands."""
  old = np.random.default_rng(0).normal(size=(3, 5, 2)).astype(np.float32)
  got = jax.jit(write_ring)(old, np.full((3, 4, 2), np.nan, np.float32), jnp.array([0, 3, 12]), jnp.zeros(3, jnp.int32))
  np.testing.assert_array_equal(got, old)
