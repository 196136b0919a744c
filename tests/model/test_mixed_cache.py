"""The mixed cache: the published bytes for real, and the same numbers however tokens are cut into chunks.

In float64, because a number between two codes is rounded one way or the other by the last bit of a sum, and chunks sum in
another order. The truth is the network in NumPy with the rounding put in.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deepseek_v4 as dsv4
from deepseek_v4.analysis.count import cache_bytes
from deepseek_v4.config import CSA, HASH, HCA, LEARNED, SLIDING
from deepseek_v4.model.quantize import PackedIndex, PackedKV
from tests.analysis.test_count import FLASH, MILLION, PRO
from tests.model import numpy_model
from tests.model.small import T0, abstract_variables, equations, random_tokens, random_variables

LENGTH, ROOM, REWIND, BATCH = 40, 43, 5, 13
ROUNDED = dataclasses.replace(
  T0, num_hidden_layers=2, layer_types=(CSA, HCA), mlp_layer_types=(LEARNED,) * 2, compute_dtype="float64",
  inference_rounding=True)
IDS = random_tokens(4, LENGTH)
TOLERANCE = 1e-9


@functools.cache
def numpy_logits(ids):
  return numpy_model.Network(ROUNDED, random_variables(ROUNDED), numpy_model.PLACES)(np.array([ids]))[0][0]


def truth(ids):
  """Logits [S, V] of the full pass."""
  return numpy_logits(tuple(map(int, ids)))


@jax.jit
def step(weights, cache, tokens, segment_ids):
  out = dsv4.DeepseekV4(ROUNDED, "blockwise").apply(weights, tokens, None, segment_ids, cache)
  return out.logits, out.cache


def empty():
  """A cache without tokens whose unused memory is everything that is no number."""
  cache = dsv4.init_cache(ROUNDED, BATCH, ROOM, rewind=REWIND, storage="mixed")
  none = lambda x: jnp.full_like(x, 255 if x.dtype == jnp.uint8 else jnp.nan)
  return cache.replace(layers=jax.tree.map(none, cache.layers))


def feed(cache, rows, width):
  """One call: the ids of the first rows at the left or the right end in turn; logits of each row's ids, and the cache."""
  tokens, segments = np.full((BATCH, width), 7, np.int32), np.zeros((BATCH, width), np.int32)
  for i, ids in enumerate(rows):
    where = slice(0, len(ids)) if i % 2 else slice(width - len(ids), width)
    tokens[i, where], segments[i, where] = ids, 1
  logits, cache = step(random_variables(ROUNDED), cache, tokens, segments)
  return [np.asarray(logits)[i][segments[i] > 0] for i in range(len(rows))], cache


def in_chunks(cache, rows, sizes, width):
  """Each row in chunks of its own size; joined logits of each row, and the cache."""
  found, done = [[] for _ in rows], 0
  while any(done * size < len(ids) for ids, size in zip(rows, sizes)):
    logits, cache = feed(cache, [ids[done * n:done * n + n] for ids, n in zip(rows, sizes)], width)
    for parts, part in zip(found, logits):
      parts.append(part)
    done += 1
  return [np.concatenate(parts) for parts in found], cache


# ---- numbers ----------------------------------------------------------------------------------------------------------
def test_chunks_of_any_size_equal_the_full_pass():
  """Eleven rows in chunks of 1 to 40 tokens, with DeepSeek's rounding of all else: the full pass of the flag."""
  sizes = (1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 40)
  with jax.enable_x64(True):
    found, _ = in_chunks(empty(), [IDS[0]] * len(sizes), sizes, LENGTH)
  for size, logits in zip(sizes, found):
    np.testing.assert_allclose(logits, truth(IDS[0]), atol=TOLERANCE, err_msg=f"chunks of {size}")


@pytest.mark.parametrize("width", [LENGTH, pytest.param(1, marks=pytest.mark.long)])
def test_prefill_then_token_by_token_then_back_and_on(width):
  """Rows of different lengths; taken back by up to five tokens and fed others, they never saw the first. Single tokens go
  through the program of whole rows; in the long tests, through one of their own."""
  prefix = (1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33)
  with jax.enable_x64(True):
    first, cache = feed(empty(), [IDS[0, :n] for n in prefix], LENGTH)
    rest, cache = in_chunks(cache, [IDS[0, n:n + 7] for n in prefix], [1] * BATCH, width)
    back = [n + 7 - i % (REWIND + 1) for i, n in enumerate(prefix)]
    cache = dsv4.rewind(cache, np.array(back))
    last, _ = feed(cache, [IDS[1 + i % 3, :3] for i in range(BATCH)], LENGTH)
  full = truth(IDS[0])
  for i, n in enumerate(prefix):
    np.testing.assert_allclose(np.concatenate([first[i], rest[i]]), full[:n + 7], atol=TOLERANCE, err_msg=f"prefill of {n}")
    ids = [*IDS[0, :back[i]], *IDS[1 + i % 3, :3]]
    np.testing.assert_allclose(last[i], truth(ids)[-3:], atol=TOLERANCE)


# ---- bytes ------------------------------------------------------------------------------------------------------------
def allocated(cache):
  """Bytes by kind of a cache's arrays, or of their shapes."""
  total = dict.fromkeys(("window", "entries", "index_keys", "scales", "pending"), 0)
  for layer in cache.layers.values():
    for name in ("window", "entries", "pending", "index_keys", "index_pending"):
      part = getattr(layer, name)
      for path, leaf in jax.tree_util.tree_leaves_with_path(part):
        kind = "scales" if path and path[-1].name == "scales" else "pending" if "pending" in name else name
        total[kind] += math.prod(leaf.shape) * leaf.dtype.itemsize
  return total


SCANNED = dataclasses.replace(
  T0, num_hidden_layers=7, layer_types=(SLIDING, HCA, CSA, HCA, CSA, HCA, CSA), mlp_layer_types=(HASH, *(LEARNED,) * 6),
  csa_compress_rate=3, hca_compress_rate=5, head_dim=80, index_head_dim=64, compute_dtype="bfloat16")


def test_bytes_are_those_that_count_predicts():
  for config in (T0, SCANNED):
    for batch, room, back in ((1, 30, 0), (3, 64, 5)):
      cache = dsv4.init_cache(config, batch, room, rewind=back, storage="mixed")
      predicted = cache_bytes(config, room, "mixed", rewind=back)
      assert cache.bytes_by_kind == allocated(cache) == {kind: batch * n for kind, n in predicted.items()}
      assert sum(x.nbytes for x in jax.tree.leaves(cache.layers)) == batch * sum(predicted.values())
      assert predicted == dict(dsv4.count(config, room, rewind=back).cache_bytes["mixed"])


@pytest.mark.parametrize("config, growth, window, percent", [(PRO, 4939.5, 4.5, 10.5), (FLASH, 3450, 3.2, 7.3)],
                         ids=["pro", "flash"])
def test_bytes_of_the_releases(config, growth, window, percent):
  """The published rows: bytes per token, of the windows (MB), of V3.2's cache at a million tokens; shapes, not memory."""
  full, half = (allocated(jax.eval_shape(lambda n=n: dsv4.init_cache(config, 1, n, storage="mixed")))
                for n in (MILLION, MILLION // 2))
  assert full == cache_bytes(config, MILLION, "mixed")
  assert (full["entries"] + full["index_keys"] - half["entries"] - half["index_keys"]) / (MILLION // 2) == growth
  assert full["window"] / 1e6 == pytest.approx(window, abs=0.05) and full["pending"] == half["pending"]
  kept = sum(full.values()) - full["pending"]
  assert 100 * kept / (788 * 61 * MILLION) == pytest.approx(percent, abs=0.05)
  compute = jax.eval_shape(lambda: dsv4.init_cache(config, 1, MILLION))
  assert allocated(compute) == cache_bytes(config, MILLION, "compute")


def test_what_a_layer_keeps():
  layers = dsv4.init_cache(SCANNED, 2, 60, storage="mixed").layers
  assert layers["layer_00"].packed and layers["layer_00"].entries is None
  csa = layers["unit_1"]  # three layers
  assert isinstance(csa.entries, PackedKV) and isinstance(csa.index_keys, PackedIndex)
  shapes = jax.tree.map(lambda x: (x.shape, str(x.dtype)), (csa.entries, csa.index_keys))
  assert shapes == (PackedKV(((3, 2, 20, 72), "uint8"), ((3, 2, 20, 8), "bfloat16"), ((3, 2, 20, 2), "uint8")),
                    PackedIndex(((3, 2, 20, 32), "uint8"), ((3, 2, 20, 2), "uint8")))
  assert csa.pending.dtype == "float32"


# ---- memory while it is read ------------------------------------------------------------------------------------------
def test_a_decoded_token_unpacks_what_it_reads_and_no_more():
  """Of 16,384 entries and index keys of a CSA layer no floating-point copy exists at any time, only tiles and picks."""
  config = dataclasses.replace(T0, max_position_embeddings=2**16, hca_compress_rate=128, head_dim=64, index_head_dim=64)
  entries = 2**16 // 4

  def step(v, cache, tokens):
    return dsv4.DeepseekV4(config, "blockwise").apply(v, tokens, None, None, cache, logits="last").cache

  found = {}
  for storage in ("compute", "mixed"):
    cache = jax.eval_shape(lambda storage=storage: dsv4.init_cache(config, 1, 2**16, storage=storage))
    program = jax.make_jaxpr(step)(abstract_variables(config), cache, jax.ShapeDtypeStruct((1, 1), jnp.int32))
    floats = [x.aval for equation in equations(program.jaxpr) for x in equation.outvars
              if jnp.issubdtype(x.aval.dtype, jnp.floating) and x.aval.dtype != jnp.bfloat16]
    found[storage] = max(math.prod(aval.shape) for aval in floats)
  assert found["compute"] == entries * 64
  assert found["mixed"] <= entries * 64 / 2  # a tile of 8,192 keys


# ---- refusals ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("config, arguments, message", [
  (T0, dict(storage="fp8"), "storage = 'fp8': expected one of compute, mixed"),
  (T0, dict(storage="mixed", dtype="bfloat16"), "dtype = 'bfloat16': expected None with storage = 'mixed'"),
  (dataclasses.replace(T0, index_head_dim=12), dict(storage="mixed"),
   "index_head_dim = 12: expected a power of two with storage = 'mixed'"),
])
def test_caches_that_cannot_be(config, arguments, message):
  with pytest.raises(ValueError, match=message):
    dsv4.init_cache(config, 1, 8, **arguments)
