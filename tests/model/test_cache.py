"""The cache: any split into chunks gives the full forward pass, whatever else is in the batch; rewinding; unused memory."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deepseek_v4 as dsv4
from deepseek_v4.analysis.count import cache_bytes
from deepseek_v4.config import CSA, HCA, LEARNED, SLIDING
from tests.model.small import T0, abstract_variables, random_tokens, random_variables, variables

LENGTH, ROOM, REWIND, BATCH = 40, 43, 5, 13  # one batch size, so that few programs are compiled
IDS = random_tokens(1, LENGTH)
TOLERANCE = 1e-4  # logits of these weights reach 10; the sums of a chunk run in another order


def full(config=T0):
  """ids [1, S] -> logits [1, 40, V] without a cache: jitted for rows of 40."""
  return _full(config)


@functools.cache
def _full(config):
  run = jax.jit(lambda v, tokens: dsv4.DeepseekV4(config, "blockwise").apply(v, tokens).logits)
  weights = weights_of(config)
  return lambda ids: np.asarray(run(weights, np.pad(ids, ((0, 0), (0, LENGTH - ids.shape[1])))))


def weights_of(config):
  return variables() if config is T0 else random_variables(config)


def cached(kernels="blockwise", config=T0, cache_reach=None):
  """(cache, tokens, segment_ids) -> (logits, cache), jitted once per width of tokens."""
  return _cached(kernels, config, cache_reach)


@functools.cache  # by arguments as they are written: here always so
def _cached(kernels, config, cache_reach):
  run = jax.jit(lambda v, cache, tokens, segments: dsv4.DeepseekV4(config, kernels).apply(
    v, tokens, None, segments, cache, cache_reach=cache_reach))
  weights = weights_of(config)

  def step(cache, tokens, segments=None):
    out = run(weights, cache, tokens, segments)
    return np.asarray(out.logits), out.cache
  return step


def place(ids, width, side):
  """(tokens, segment_ids) int32 [width] with the ids at one side; padding holds an id that would matter."""
  tokens, segments = np.full(width, 7, np.int32), np.zeros(width, np.int32)
  where = slice(0, len(ids)) if side == "right" else slice(width - len(ids), width)
  tokens[where], segments[where] = ids, 1
  return tokens, segments


def empty(config=T0):
  return dsv4.init_cache(config, BATCH, ROOM, rewind=REWIND)


def feed(step, cache, rows, width, sides=("right",) * BATCH):
  """One call: each row's ids padded to `width` on its side; further rows get nothing. Returns the logits of each row's ids,
  and the cache."""
  idle = [IDS[0, :0]] * (BATCH - len(rows))
  tokens, segments = (np.stack(x) for x in zip(*(place(ids, width, side) for ids, side in zip([*rows, *idle], sides))))
  logits, cache = step(cache, tokens, segments)
  return [logits[i][segments[i] > 0] for i in range(len(rows))], cache


def in_chunks(step, cache, rows, sizes, width):
  """Feeds each row in chunks of its own size, padding left and right in turn; joined logits of each row, and the cache."""
  found, done, side = [[] for _ in rows], [0] * len(rows), ("right", "left")
  call = 0
  while any(done[i] < len(ids) for i, ids in enumerate(rows)):
    chunks = [ids[done[i]:done[i] + sizes[i]] for i, ids in enumerate(rows)]
    logits, cache = feed(step, cache, chunks, width, [side[(i + call) % 2] for i in range(BATCH)])
    for i, chunk in enumerate(chunks):
      found[i].append(logits[i])
      done[i] += len(chunk)
    call += 1
  return [np.concatenate(x) for x in found], cache


# ---- chunks -----------------------------------------------------------------------------------------------------------
SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 40)


def test_rows_in_chunks_of_any_size_in_one_batch():
  """A3.2: eleven rows, each in chunks of its own size, padded left and right in turn, equal the full pass."""
  rows = [IDS[0]] * len(SIZES)
  found, cache = in_chunks(cached(), empty(), rows, SIZES, LENGTH)
  for size, logits in zip(SIZES, found, strict=True):
    np.testing.assert_allclose(logits, full()(IDS)[0], atol=TOLERANCE, err_msg=f"chunks of {size}")
  np.testing.assert_array_equal(dsv4.cache_lengths(cache), [LENGTH] * len(rows) + [0] * (BATCH - len(rows)))


@pytest.mark.parametrize("width", [pytest.param(1, marks=pytest.mark.long), 7])
def test_plain_chunks(width):
  """A3.5: without segment ids; entries are counted as they close, in attention and indexer alike. Single tokens have a
  program of their own in `test_any_prefill_then_token_by_token`, too."""
  cache, logits = dsv4.init_cache(T0, 1, ROOM), []
  for start in range(0, LENGTH - LENGTH % width, width):
    out, cache = cached()(cache, IDS[:, start:start + width])
    logits.append(out[0])
    counts, seen = dsv4.cache_entries(cache), start + width
    assert jax.tree.map(lambda x: x.tolist(), counts) == {
      "layers/00": {}, "layers/01": {"attention": [seen // 4], "indexer": [seen // 4]},
      "layers/02": {"attention": [seen // 8]}}
    # what was written, not what was counted
    for layer, rate in (("layer_01", 4), ("layer_02", 8)):
      written = np.abs(cache.layers[layer].entries[0]).sum(-1) > 0
      np.testing.assert_array_equal(written, np.arange(len(written)) < seen // rate)
  found = np.concatenate(logits)
  np.testing.assert_allclose(found, full()(IDS)[0][:len(found)], atol=TOLERANCE)


def test_any_prefill_then_token_by_token():
  """A3.3."""
  sizes = (1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33)
  first, cache = feed(cached(), empty(), [IDS[0, :n] for n in sizes], LENGTH)
  rest, cache = in_chunks(cached(), cache, [IDS[0, n:] for n in sizes], [1] * len(sizes), 1)
  for n, a, b in zip(sizes, first, rest, strict=True):
    np.testing.assert_allclose(np.concatenate([a, b]), full()(IDS)[0], atol=TOLERANCE, err_msg=f"prefill of {n}")


def test_prompts_shorter_than_any_rate():
  """A3.4."""
  lengths = range(1, 10)
  found, _ = feed(cached(), empty(), [IDS[0, :n] for n in lengths], 9, ["left"] * BATCH)
  for n, logits in zip(lengths, found, strict=True):
    np.testing.assert_allclose(logits, full()(IDS)[0, :n], atol=TOLERANCE)


def test_rows_do_not_see_each_other():
  """Different prompts of different lengths together equal each alone in the same batch; picks cut by top-k."""
  rows = [random_tokens(n, seed=20 + n) for n in (33, 5, 18, 1)]
  together, _ = in_chunks(cached(), empty(), rows, (9, 2, 8, 1), 9)
  for ids, logits in zip(rows, together, strict=True):
    np.testing.assert_allclose(logits, full()(ids[None])[0, :len(ids)], atol=TOLERANCE)


# A layer that has everything: window, entries, indexer; and one that has other entries, all of them selected.
ONE_LAYER = dataclasses.replace(T0, num_hidden_layers=1, layer_types=(CSA,), mlp_layer_types=(LEARNED,),
                                num_nextn_predict_layers=0)
COMPRESSED = dataclasses.replace(T0, num_hidden_layers=2, layer_types=(CSA, HCA), mlp_layer_types=(LEARNED,) * 2,
                                 num_nextn_predict_layers=0)
IMPLEMENTATIONS = [("blockwise", T0), ("reference", ONE_LAYER), ("interpret", COMPRESSED),
                   *(pytest.param(kernels, T0, marks=pytest.mark.long) for kernels in ("reference", "interpret"))]
each_implementation = pytest.mark.parametrize(
  "kernels, config", IMPLEMENTATIONS, ids=["blockwise", "reference", "interpret", "reference, all", "interpret, all"])


def fed_in_chunks(kernels, config, cache):
  """Two rows in chunks through a cache equal the full pass, blockwise."""
  found, _ = in_chunks(cached(kernels, config), cache, [IDS[0, :27], IDS[0, :9]], (9, 4), 9)
  for logits in found:
    np.testing.assert_allclose(logits, full(config)(IDS)[0, :len(logits)], atol=TOLERANCE)


@each_implementation
def test_other_implementations(kernels, config):
  fed_in_chunks(kernels, config, empty(config))


# A scanned unit of two layers.
SCANNED = dataclasses.replace(
  T0, num_hidden_layers=4, layer_types=(HCA, CSA) * 2, mlp_layer_types=(LEARNED,) * 4, csa_compress_rate=3,
  hca_compress_rate=5, sliding_window=1, num_nextn_predict_layers=0)


def test_scanned_layers_other_rates_and_a_window_of_one():
  want = full(SCANNED)(IDS)[0]
  found, cache = in_chunks(cached(config=SCANNED), empty(SCANNED), [IDS[0], IDS[0, :23]], (9, 2), 9)
  np.testing.assert_allclose(found[0], want, atol=3 * TOLERANCE)
  np.testing.assert_allclose(found[1], want[:23], atol=3 * TOLERANCE)
  assert [cache.layers[name].entries.shape[0] for name in ("unit_0", "unit_1")] == [2, 2]
  assert dsv4.cache_entries(cache)["layers/03"]["indexer"].tolist()[:3] == [13, 7, 0]


def test_last_logits_hidden_and_experts_lie_where_the_tokens_lie():
  segments = np.array([[0, 0, 1, 1], [1, 1, 1, 0]], np.int32)
  tokens = np.array([[9, 9, *IDS[0, :2]], [*IDS[0, :3], 9]], np.int32)
  config = dataclasses.replace(T0, num_hidden_layers=2, layer_types=(SLIDING,) * 2, mlp_layer_types=(LEARNED,) * 2,
                               num_nextn_predict_layers=0)
  model, weights = dsv4.DeepseekV4(config, "reference"), random_variables(config)
  plain = jax.jit(lambda v: model.apply(v, IDS[:, :3]))(weights)
  out = jax.jit(lambda v, cache: model.apply(v, tokens, None, segments, cache, logits="last"))(
    weights, dsv4.init_cache(config, 2, ROOM))
  np.testing.assert_allclose(out.logits[:, 0], plain.logits[0, [1, 2]], atol=TOLERANCE)
  np.testing.assert_allclose(out.hidden[0, 2:], plain.hidden[0, :2], atol=TOLERANCE)
  np.testing.assert_array_equal(out.routing["experts"][:, 0, 2:], plain.routing["experts"][:, 0, :2])
  np.testing.assert_array_equal(out.routing["experts"][:, 1, :3], plain.routing["experts"][:, 0])
  assert out.routing["load"].sum() == 5 * config.num_experts_per_tok * config.num_hidden_layers


# ---- memory -----------------------------------------------------------------------------------------------------------
@each_implementation
def test_unused_memory_is_never_read(kernels, config):
  """A4.6: everything NaN before the first token, the same numbers, in every implementation that runs here."""
  clean = empty(config)
  fed_in_chunks(kernels, config, clean.replace(layers=jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), clean.layers)))


def test_a_row_without_tokens_keeps_its_bits():
  _, before = feed(cached(), empty(), [IDS[0, :9], IDS[0, :6]], 9, ["left"] * BATCH)
  _, after = feed(cached(), before, [IDS[0, 9:18]], 9)
  rows = lambda cache: [np.asarray(x[1]) for x in jax.tree.leaves(cache)]
  for a, b in zip(rows(before), rows(after), strict=True):
    np.testing.assert_array_equal(a, b)


def test_an_entry_mixes_its_window_and_the_one_before():
  """A3.6: CSA's entry w changes with any token of windows w - 1 and w and no other; HCA's with its own only."""
  _, base = feed(cached(), empty(), [IDS[0]], LENGTH)
  changed = IDS[0].copy()
  changed[9] = changed[9] % 96 + 1
  _, moved = feed(cached(), empty(), [changed], LENGTH)
  csa, hca = (np.abs(moved.layers[x].entries - base.layers[x].entries)[0].max(-1) for x in ("layer_01", "layer_02"))
  np.testing.assert_array_equal(np.flatnonzero(csa[:2]), [])  # windows of tokens 0-7: the change lies behind them
  assert csa[2] > 1e-3 and csa[3] > 1e-3
  assert hca[0] == 0 and hca[1] > 1e-3


@pytest.mark.parametrize("fields, dtype", [({}, None), ({"compute_dtype": "bfloat16"}, None), ({}, "bfloat16"),
                                           ({"csa_compress_rate": 3, "hca_compress_rate": 7}, None)])
def test_bytes_are_those_that_count_predicts(fields, dtype):
  for config in (dataclasses.replace(T0, **fields), dataclasses.replace(SCANNED, **fields)):
    for batch, room, back in ((1, 30, 0), (3, 64, 5)):
      cache = dsv4.init_cache(config, batch, room, rewind=back, dtype=dtype)
      allocated = sum(x.nbytes for x in jax.tree.leaves(cache.layers))
      counted = dataclasses.replace(config, compute_dtype=dtype or config.compute_dtype)
      predicted = cache_bytes(counted, room, "compute", rewind=back)
      assert cache.bytes_by_kind == {kind: batch * n for kind, n in predicted.items()}
      assert allocated == batch * sum(predicted.values())
      assert predicted == dict(dsv4.count(counted, room, rewind=back).cache_bytes["compute"])


def test_fewer_entries_are_read_within_reach():
  """The same numbers where fewer entries are read; NaN where a row has more tokens than the caller said."""
  step = cached(config=ONE_LAYER, cache_reach=16)
  logits, cache = step(dsv4.init_cache(ONE_LAYER, 1, ROOM), IDS[:, :9])
  np.testing.assert_allclose(logits[0], full(ONE_LAYER)(IDS)[0, :9], atol=TOLERANCE)
  logits, cache = step(cache, IDS[:, 9:18])
  assert np.isnan(logits).all()  # 18 tokens


# ---- rewind -----------------------------------------------------------------------------------------------------------
def test_rewind():
  """Rows taken back by 0 to 5 tokens and fed with others equal rows that never saw the first ones; again and again."""
  rng = np.random.default_rng(3)
  batch = BATCH
  truth = [list(IDS[0, :15 + i // 2]) for i in range(batch)]
  step = cached()
  _, cache = feed(step, empty(), truth, LENGTH)
  for turn in range(3):
    back = [(i + turn * 2) % (REWIND + 1) for i in range(batch)]
    truth = [ids[:len(ids) - n] for ids, n in zip(truth, back, strict=True)]
    cache = dsv4.rewind(cache, np.array([len(ids) for ids in truth]))
    np.testing.assert_array_equal(dsv4.cache_lengths(cache), [len(ids) for ids in truth])
    new = [list(rng.integers(1, T0.vocab_size, n)) for n in rng.integers(REWIND, 9, batch)]
    found, cache = feed(step, cache, new, 9)
    truth = [a + b for a, b in zip(truth, new, strict=True)]
    for ids, added, logits in zip(truth, new, found, strict=True):
      want = full()(np.array([ids], np.int32))[0, len(ids) - len(added):len(ids)]
      np.testing.assert_allclose(logits, want, atol=TOLERANCE)


def test_a_row_taken_back_to_nothing_serves_another_sequence():
  step = cached()
  _, cache = feed(step, empty(), [IDS[0, :33], IDS[0, :20]], LENGTH)
  cache = dsv4.rewind(cache, np.array([0, 20] + [0] * (BATCH - 2)))
  other = random_tokens(12, seed=5)
  found, _ = feed(step, cache, [other, IDS[0, 20:]], LENGTH)
  np.testing.assert_allclose(found[0], full()(other[None])[0, :12], atol=TOLERANCE)
  np.testing.assert_allclose(found[1], full()(IDS)[0, 20:], atol=TOLERANCE)


# ---- refusals ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("arguments, message", [
  (dict(batch_size=0), "batch_size = 0: expected a whole number, at least 1"),
  (dict(max_length=4097), "max_length = 4097: expected at most max_position_embeddings = 4096"),
  (dict(rewind=-1), "rewind = -1: expected a whole number, at least 0"),
  (dict(rewind=True), "rewind = True: expected a whole number, at least 0"),
  (dict(storage="fp8"), "storage = 'fp8': expected one of compute, mixed"),
])
def test_caches_that_cannot_be(arguments, message):
  with pytest.raises(ValueError, match=message):
    dsv4.init_cache(T0, **{"batch_size": 1, "max_length": 8, **arguments})


@pytest.mark.parametrize("arguments, message", [
  (dict(positions=np.ones((2, 4), np.int32)), "positions: expected None beside a cache"),
  (dict(targets=np.ones((2, 4), np.int32)), "cache: expected None with targets, mtp or in a trace"),
  (dict(mtp=True), "cache: expected None with targets, mtp or in a trace"),
  (dict(tokens=np.ones((3, 4), np.int32)), "cache: expected one of init_cache .* batch_size = 3"),
  (dict(cache_reach=0), "cache_reach = 0: expected None or a number of tokens"),
  (dict(segment_ids=np.ones((2, 3), np.int32)), r"segment_ids = int32\(2, 3\): expected integers of the tokens' shape"),
])
def test_what_does_not_go_with_a_cache(arguments, message):
  arguments = {"tokens": np.ones((2, 4), np.int32), "cache": dsv4.init_cache(T0, 2, 8), **arguments}
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(lambda v: dsv4.DeepseekV4(T0, "reference").apply(v, **arguments), abstract_variables(T0))


def test_rewinds_that_cannot_be():
  cache = dsv4.init_cache(T0, 2, 16, rewind=2).replace(lengths=jnp.array([9, 4]), furthest=jnp.array([9, 4]))
  for lengths in ([10, 4], [6, 4], [-1, 4]):
    with pytest.raises(ValueError, match=r"lengths = \[.*\]: expected at most \[9, 4\], and 0 or at least \[7, 2\]"):
      dsv4.rewind(cache, np.array(lengths))
  with pytest.raises(ValueError, match=r"at least \[7, 2\]"):  # not two tokens twice
    dsv4.rewind(dsv4.rewind(cache, np.array([7, 4])), np.array([6, 4]))
  with pytest.raises(ValueError, match=r"lengths = int\d+\(\): expected integers \(2,\)"):
    dsv4.rewind(cache, 3)
