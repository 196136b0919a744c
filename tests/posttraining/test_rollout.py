"""Samples against full forward passes: log-probabilities, experts, kept sets; batches change nothing."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

import deepseek_v4 as dsv4
from deepseek_v4 import sharding
from deepseek_v4.config import MeshConfig
from deepseek_v4.generation.requests import ThinkingBudget
from deepseek_v4.posttraining import rollout
from deepseek_v4.posttraining.rollout import Request
from tests.model.small import T0, random_tokens, random_variables

# A hashed layer and a learned one, a window and picked entries; no prediction block, as nobody asks it.
SMALL = dataclasses.replace(T0.cut_layers(2), num_nextn_predict_layers=0)
MODEL = dsv4.DeepseekV4(SMALL, "blockwise")
CLOSE = (90, 91)
# Every longest prompt of a batch is more than one chunk of eight, and its rest more than four: one width to compile.
REQUESTS = [Request(tuple(random_tokens(n, seed=n).tolist()), (7, n), ThinkingBudget(3, CLOSE) if n == 5 else None, {"n": n})
            for n in (4, 14, 5, 13)]
OPTIONS = dict(max_new_tokens=10, batch_size=2, stop_tokens=(), temperature=1.3, top_p=0.8, top_k=40, chunk_size=8)


@functools.cache
def variables():
  return random_variables(SMALL)


@functools.cache
def samples():
  return rollout.sample_replies(MODEL, variables(), REQUESTS, record=("experts", "kept"), **OPTIONS)


@functools.cache
def full():
  """Of each sample (logits [n, V] float64, experts [L, n, k]) of its fed tokens, in one forward pass without a cache: a
  row each, filled up behind with what no token before it can see."""
  fed = [sample.tokens[:-1] for sample in samples()]
  rows = np.zeros((len(fed), max(map(len, fed))), np.int32)
  for row, tokens in zip(rows, fed):
    row[:len(tokens)] = tokens
  out = jax.device_get(jax.jit(lambda *x: MODEL.apply(*x))(variables(), rows))
  return [(np.float64(out.logits[i, :len(tokens)]), out.routing["experts"][:, i, :len(tokens)])
          for i, tokens in enumerate(fed)]


def kept_set(logits):
  """The tokens that top-k and then top-p leave of logits over the temperature, by their definitions."""
  order = np.argsort(-logits, kind="stable")[:OPTIONS["top_k"]]
  p = np.exp(logits[order] - logits[order].max())
  p /= p.sum()
  return set(order[:np.searchsorted(np.cumsum(p), OPTIONS["top_p"]) + 1].tolist())


@pytest.mark.parametrize("i", range(4))
def test_a_sample_is_what_the_model_says(i):
  sample, (logits, experts) = samples()[i], full()[i]
  assert (sample.prompt, sample.seed, sample.metadata) == (REQUESTS[i].prompt, REQUESTS[i].seed, REQUESTS[i].metadata)
  assert len(sample.reply) == 10 and sample.finish == "length"
  assert sample.experts.shape == experts.shape and sample.experts.dtype == np.uint16
  np.testing.assert_array_equal(np.sort(sample.experts), np.sort(experts))
  bits = np.unpackbits(sample.kept, axis=1, count=SMALL.vocab_size)
  for j, (token, drawn) in enumerate(zip(sample.reply, sample.drawn, strict=True)):
    if not drawn:
      assert sample.logprobs[j] == 0
      continue
    scaled = logits[len(sample.prompt) - 1 + j] / OPTIONS["temperature"]
    kept = kept_set(scaled)
    assert set(np.flatnonzero(bits[j]).tolist()) == kept
    left = scaled[sorted(kept)]
    expected = scaled[token] - left.max() - np.log(np.exp(left - left.max()).sum())
    # float32 sums of a cached and of a full pass, in another order
    assert abs(sample.logprobs[j] - expected) < 1e-5


def test_tokens_of_a_budget_are_not_drawn():
  forced = [j for j, drawn in enumerate(samples()[2].drawn) if not drawn]
  assert forced == [3, 4] and samples()[2].reply[3:5] == CLOSE
  assert all(all(samples()[i].drawn) for i in (0, 1, 3))


# budgets go together: each row has its own
@pytest.mark.parametrize("size, batches", [(3, [[4, 14, 5], [13]]),
                                           pytest.param(1, [[4], [14], [5], [13]], marks=pytest.mark.long)])
def test_batches_change_nothing_and_are_handed_out(size, batches):
  seen = []
  stop = (samples()[0].reply[2],)
  found = rollout.sample_replies(MODEL, variables(), REQUESTS, **{**OPTIONS, "batch_size": size, "stop_tokens": stop},
                                 on_batch=seen.append)
  assert all(x.experts is None and x.kept is None for x in found)
  assert [x.metadata["n"] for x in found] == [4, 14, 5, 13]
  for one, before in zip(found, samples(), strict=True):
    cut = next((j + 1 for j, token in enumerate(before.reply) if token in stop), len(before.reply))
    assert one.reply == before.reply[:cut] and one.finish == ("stop" if before.reply[cut - 1] in stop else "length")
    np.testing.assert_allclose(one.logprobs, before.logprobs[:cut], atol=1e-5)
  assert [[x.metadata["n"] for x in batch] for batch in seen] == batches


@pytest.mark.long
def test_a_mesh_changes_nothing():
  """Rows, experts and vocabulary split: the same replies."""
  config = dataclasses.replace(T0, vocab_size=96)
  model, weights = dsv4.DeepseekV4(config, "blockwise"), random_variables(config)
  requests = [Request(tuple(token % 96 for token in request.prompt), request.seed) for request in REQUESTS]
  options = {**OPTIONS, "batch_size": 4, "record": ("experts", "kept")}
  alone = rollout.sample_replies(model, weights, requests, **options)
  mesh = sharding.make_mesh(MeshConfig(data=2, expert=2, tensor=2))
  spread = {name: jax.device_put(tree, sharding.parameter_shardings(tree, mesh)) for name, tree in weights.items()}
  together = rollout.sample_replies(model, spread, requests, mesh=mesh, **options)
  for one, other in zip(together, alone, strict=True):
    assert one.reply == other.reply
    np.testing.assert_array_equal(np.sort(one.experts), np.sort(other.experts))
    np.testing.assert_array_equal(one.kept, other.kept)
    np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)
  with pytest.raises(ValueError, match="batch_size = 3: expected a multiple of dcn_data x data x fsdp x expert = 4"):
    rollout.sample_replies(model, spread, requests, mesh=mesh, **{**options, "batch_size": 3})


@pytest.mark.parametrize("changes, message", [
  (dict(batch_size=0), "batch_size = 0: expected a whole number, at least 1"),
  (dict(record=("logits",)), "record = .*: expected some of experts, kept"),
  (dict(requests=[Request((1,), ())]), r"requests\[0\].seed = \(\): expected at least one"),
  (dict(top_p=2.0), "top_p = 2.0"),
])
def test_refusals(changes, message):
  arguments = {"requests": REQUESTS, **OPTIONS, **changes}
  with pytest.raises(ValueError, match=message):
    rollout.sample_replies(MODEL, variables(), arguments.pop("requests"), **arguments)
