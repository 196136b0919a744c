"""Filters by closed forms, frequencies by chi-square, and tokens that do not depend on the batch around them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from deepseek_v4.generation.sample import Sampling, filtered, log_probabilities, rows, sample, token_keys

draw, distribution = jax.jit(sample), jax.jit(log_probabilities)
HALVES = np.log([0.5, 0.25, 0.125, 0.0625, 0.0625])[None]  # exact sums


def probabilities(logits, *requests):
  return np.exp(np.asarray(distribution(jnp.asarray(logits, jnp.float32), rows(requests)), np.float64))


@pytest.mark.parametrize("request_, expected", [
  (Sampling(), [8, 4, 2, 1, 1]),
  (Sampling(top_k=3), [4, 2, 1, 0, 0]),
  (Sampling(top_k=4), [8, 4, 2, 1, 0]),  # of two equals the lower id
  (Sampling(top_k=9), [8, 4, 2, 1, 1]),
  (Sampling(top_p=0.75), [2, 1, 0, 0, 0]),  # reached exactly: the next is not needed
  (Sampling(top_p=0.76), [4, 2, 1, 0, 0]),
  (Sampling(top_p=0.01), [1, 0, 0, 0, 0]),
  (Sampling(min_p=0.24), [4, 2, 1, 0, 0]),
  (Sampling(min_p=1.0), [1, 0, 0, 0, 0]),
  (Sampling(top_k=2, top_p=0.66), [1, 0, 0, 0, 0]),  # two thirds of what top-k left
  (Sampling(top_k=2, top_p=0.67), [2, 1, 0, 0, 0]),
  (Sampling(temperature=0.5), [64, 16, 4, 1, 1]),
  (Sampling(temperature=0.5, min_p=0.05), [16, 4, 1, 0, 0]),  # after the temperature
  (Sampling(temperature=0.0, top_k=3), [1, 0, 0, 0, 0]),
])
def test_filters(request_, expected):
  expected = np.array(expected) / np.sum(expected)
  found = probabilities(HALVES, request_)[0]
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  assert ((found == 0) == (expected == 0)).all()
  mirrored = probabilities(HALVES[:, ::-1], request_)[0]
  if request_.top_k != 4:
    np.testing.assert_allclose(mirrored[::-1], expected, rtol=1e-6)


def test_rows_have_their_own_settings():
  requests = [Sampling(), Sampling(top_k=2), Sampling(temperature=0.0), Sampling(temperature=2.0, top_p=0.6, min_p=0.1)]
  logits = np.random.default_rng(0).normal(size=(4, 300)) * 3
  together = probabilities(logits, *requests)
  for i, request_ in enumerate(requests):
    np.testing.assert_allclose(together[i], probabilities(logits[i:i + 1], request_)[0], rtol=1e-6)
  np.testing.assert_allclose(together[0], np.exp(logits[0]) / np.exp(logits[0]).sum(), rtol=1e-5)


def test_temperatures_near_zero():
  """Logits over 1e-40 are beyond float32: the largest is chosen, equal ones evenly, and nothing is infinite or no number.
  1e-40 is below float32's normal numbers, which XLA's CPU would take for 0."""
  logits = [[3.0, 800.0, -2.0, 799.0], [5.0, 1.0, 5.0, 0.0], [-900.0, -901.0, -1e4, -2e4]]
  for temperature in (1e-40, 1e-37, 1e-30):
    found = probabilities(logits, *[Sampling(temperature, top_p=0.9)] * 3)
    assert np.isfinite(found).all() and (found[0] == [0, 1, 0, 0]).all() and (found[2] == [1, 0, 0, 0]).all()
    np.testing.assert_allclose(found[1], [0.5, 0, 0.5, 0], rtol=1e-6)  # the exponential of a float32 logarithm
    keys = jax.random.split(jax.random.key(0), 3)
    tokens = draw(keys, jnp.asarray(logits, jnp.float32), rows([Sampling(temperature)] * 3))
    assert tokens[0] == 1 and tokens[1] in (0, 2) and tokens[2] == 0


def test_a_flat_row_keeps_its_tail():
  """Sums in float32 reach 1 before the end of 130,000 equal probabilities."""
  flat = jnp.zeros((1, 130_000))
  assert jnp.isfinite(filtered(flat, rows([Sampling(top_k=129_999)]))).sum() == 129_999
  assert jnp.isfinite(filtered(flat, rows([Sampling(top_p=0.5)]))).sum() == pytest.approx(65_000, rel=1e-2)


def test_greedy_takes_the_first_of_the_largest():
  logits = jnp.array([[0, 3, 3, 1], [-5, -7, -6, -5.0]], jnp.bfloat16)
  keys = jax.random.split(jax.random.key(0), 2)
  assert draw(keys, logits, rows([Sampling(temperature=0.0)] * 2)).tolist() == [1, 0]
  assert filtered(logits, rows([Sampling()] * 2)).dtype == jnp.float32


@pytest.mark.parametrize("request_", [Sampling(), Sampling(temperature=0.7, top_k=9), Sampling(temperature=1.5, top_p=0.8),
                                      Sampling(min_p=0.05)])
@pytest.mark.parametrize("by", ["keys", "numbers"])
def test_frequencies(request_, by):
  """20,000 draws, from as many requests or as the tokens of one request."""
  draws = 20_000
  logits = jnp.broadcast_to(jnp.asarray(np.random.default_rng(1).normal(size=16) * 1.5, jnp.float32), (draws, 16))
  key = jax.random.key(2)
  keys = jax.random.split(key, draws) if by == "keys" else jnp.broadcast_to(key, (draws,))
  numbers = jnp.zeros(draws, int) if by == "keys" else jnp.arange(draws)
  tokens = np.asarray(draw(token_keys(keys, numbers), logits, rows([request_] * draws)))
  expected = probabilities(logits[:1], request_)[0] * draws
  counts = np.bincount(tokens, minlength=16)
  assert not counts[expected == 0].any()
  kept = expected > 0
  assert scipy.stats.chisquare(counts[kept], expected[kept] * draws / expected[kept].sum()).pvalue > 1e-3


def test_a_request_gets_its_tokens_in_any_row_of_any_batch():
  rng = np.random.default_rng(3)
  requests = [Sampling(), Sampling(0.8, 0.9), Sampling(1.2, top_k=40), Sampling(min_p=0.02), Sampling(0.0)] * 4
  logits = jnp.asarray(rng.normal(size=(20, 500)) * 2, jnp.float32)
  keys, numbers = jax.random.split(jax.random.key(4), 20), jnp.arange(20) * 7
  alone = [int(draw(token_keys(keys[i:i + 1], numbers[i:i + 1]), logits[i:i + 1], rows(requests[i:i + 1]))[0])
           for i in range(20)]
  for order in (np.arange(20), rng.permutation(20), rng.permutation(20)[:7]):
    found = draw(token_keys(keys[order], numbers[order]), logits[order], rows([requests[i] for i in order]))
    assert found.tolist() == [alone[i] for i in order]


def test_other_settings_compile_nothing():
  traced = []

  @jax.jit
  def run(keys, logits, settings):
    traced.append(logits.shape)
    return sample(keys, logits, settings)

  keys, logits = jax.random.split(jax.random.key(0), 2), jnp.zeros((2, 8))
  for request_ in (Sampling(), Sampling(0.0), Sampling(top_k=3), Sampling(0.3, 0.5, 2, 0.1)):
    run(keys, logits, rows([request_, Sampling()]))
  assert traced == [(2, 8)]


@pytest.mark.parametrize("fields, said", [
  (dict(temperature=-1.0), "temperature = -1.0: expected at least 0"),
  (dict(temperature=float("nan")), "temperature = nan"), (dict(top_p=0.0), "top_p = 0.0: expected a number above 0"),
  (dict(top_p=1.5), "top_p = 1.5"), (dict(top_k=-1), "top_k = -1: expected at least 0"), (dict(top_k=1.5), "top_k = 1.5"),
  (dict(min_p=2.0), "min_p = 2.0: expected a number from 0 to 1")])
def test_refusals(fields, said):
  with pytest.raises(ValueError, match=said):
    Sampling(**fields)
