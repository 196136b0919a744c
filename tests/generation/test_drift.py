"""The drift of the mixed cache: the numbers that two networks in NumPy give, and how large they are."""

import dataclasses

import jax
import numpy as np
import pytest

import deepseek_v4 as dsv4
from deepseek_v4.config import CSA, HCA, LEARNED
from deepseek_v4.generation.drift import storage_drift
from tests.model import numpy_model
from tests.model.small import T0, random_tokens, random_variables

CONFIG = dataclasses.replace(
  T0, num_hidden_layers=2, layer_types=(CSA, HCA), mlp_layer_types=(LEARNED,) * 2, compute_dtype="float64",
  loss_chunk_size=7)  # logits of 7 tokens at a time, which does not divide a chunk of 4 times 8
SEQUENCES = [random_tokens(n, seed=n).tolist() for n in (40, 33, 21, 6)]


def numpy_logits(places):
  run = numpy_model.Network(CONFIG, random_variables(CONFIG), places)
  return np.concatenate([run(np.array([ids]))[0][0] for ids in SEQUENCES])


def log_softmax(x):
  x = x - x.max(-1, keepdims=True)
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_drift():
  """In chunks, of sequences of different lengths: what the cache keeps is rounded and nothing else is.

  The bound: all of DeepSeek's rounding together moved the logits of such a random network by 0.09 of a spread of 1.37, most
  of it where a key of four bits decides which two entries are read. A trained model has no such noise to choose among.
  """
  with jax.enable_x64(True):
    found = storage_drift(dsv4.DeepseekV4(CONFIG, "blockwise"), random_variables(CONFIG), SEQUENCES, chunk_size=8)
  exact, mixed = numpy_logits(()), numpy_logits(("window", "entries", "index_keys"))
  apart, p, q = np.abs(exact - mixed), log_softmax(exact), log_softmax(mixed)
  want = (len(exact), apart.mean(), apart.max(), exact.std(-1).mean(), (exact.argmax(-1) == mixed.argmax(-1)).mean(),
          (np.exp(p) * (p - q)).sum(-1).mean())
  np.testing.assert_allclose(dataclasses.astuple(found), want, rtol=1e-7)
  assert found.mean < found.spread / 10 and found.same_choice > 0.8


@pytest.mark.parametrize("sequences, chunk_size, message", [
  ([], 8, r"sequences = \[\]: expected at least one"),
  ([[1, 2], []], 8, r"sequences\[1\] = '0 tokens': expected 1 to max_position_embeddings = \d+"),
  ([[1] * (CONFIG.max_position_embeddings + 1)], 8, r"sequences\[0\] = '\d+ tokens': expected 1 to max_position_embeddings"),
  ([[1, CONFIG.vocab_size]], 8, r"sequences\[0\] = 'ids from 1 to \d+': expected ids below vocab_size = "),
  ([[-1]], 8, r"sequences\[0\] = 'ids from -1 to -1': expected ids below vocab_size = "),
  ([[1]], 0, r"chunk_size = 0: expected a whole number, at least 1"),
  ([[1]], True, r"chunk_size = True: expected a whole number, at least 1"),
])
def test_what_is_refused(sequences, chunk_size, message):
  with pytest.raises(ValueError, match=message):
    storage_drift(dsv4.DeepseekV4(CONFIG, "blockwise"), {}, sequences, chunk_size=chunk_size)


def test_a_model_that_the_mixed_storage_does_not_fit():
  config = dataclasses.replace(CONFIG, index_head_dim=12)
  with pytest.raises(ValueError, match="index_head_dim = 12: expected a power of two with storage_drift"):
    storage_drift(dsv4.DeepseekV4(config, "blockwise"), {}, [[1]])
