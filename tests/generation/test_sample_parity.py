"""The filters against transformers' own, on random logits of a few hundred tokens."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
  LogitsProcessorList,
  MinPLogitsWarper,
  TemperatureLogitsWarper,
  TopKLogitsWarper,
  TopPLogitsWarper,
)

from deepseek_v4.generation.sample import Sampling, filtered, rows


@pytest.mark.parametrize("request_", [
  Sampling(0.7), Sampling(top_k=17), Sampling(top_p=0.6), Sampling(min_p=0.03), Sampling(1.4, 0.9, 50, 0.01),
  Sampling(0.5, 0.3, 5, 0.2)])
def test_the_same_tokens_are_left(request_):
  logits = (np.random.default_rng(5).normal(size=(64, 300)) * 2).astype(np.float32)
  chain = LogitsProcessorList([TemperatureLogitsWarper(request_.temperature)])
  if request_.top_k:
    chain.append(TopKLogitsWarper(request_.top_k))
  if request_.top_p < 1:
    chain.append(TopPLogitsWarper(request_.top_p))
  if request_.min_p:
    chain.append(MinPLogitsWarper(request_.min_p))
  theirs = chain(None, torch.tensor(logits)).numpy()
  theirs -= theirs.max(1, keepdims=True)  # ours are less than the largest of their row
  ours = np.asarray(filtered(jnp.asarray(logits), rows([request_] * len(logits))))
  assert np.array_equal(np.isfinite(ours), np.isfinite(theirs))
  kept = np.isfinite(theirs)
  # differences of numbers up to 20: half a unit in the last place of each
  np.testing.assert_allclose(ours[kept], theirs[kept], rtol=1e-6, atol=4e-6)
