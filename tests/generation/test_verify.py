"""The rule that accepts drafts, on tables instead of networks: 20,000 requests get the target's distribution."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from deepseek_v4.generation.sample import Sampling, log_probabilities, rows
from deepseek_v4.generation.speculative import place_keys, verify

V, N, DRAWS = 16, 2, 20_000
NONE = np.full((DRAWS, N + 1), -1, np.int32)
PLAIN = Sampling()
FILTERS = Sampling(temperature=0.8, top_p=0.93, top_k=12, min_p=0.02)


def table(seed, scale=1.5):
  """Logits [V + 1, V] of the next token after each token; the last row is the beginning's."""
  return np.random.default_rng(seed).normal(size=(V + 1, V)).astype(np.float32) * scale


TARGET = table(0)
# About a third, two thirds and nine tenths of the drafts are accepted.
REGIMES = {"low": table(5, 2), "middle": TARGET + table(4, 0.8), "high": TARGET + table(4, 0.2)}
SHARES = {"low": (0.1, 0.45), "middle": (0.45, 0.85), "high": (0.85, 1)}


@functools.cache
def one_round():
  """(keys, tokens said, last token, tables, settings) -> what `verify` finds, drafts from the second table; jitted."""

  @jax.jit
  def run(keys, numbers, last, target, draft, settings):
    parts = place_keys(keys, numbers, N + 1)
    drafts, guesses, token = [], [], last
    for i in range(N):
      guesses.append(log_probabilities(draft[token], settings))
      noise = jax.vmap(lambda key: jax.random.gumbel(key, (V,)))(parts[:, i, 0])
      token = jnp.argmax(guesses[-1] + noise, 1).astype(jnp.int32)
      drafts.append(token)
    logits = jnp.stack([target[token] for token in (last, *drafts)], 1)
    tokens, logprobs, accepted = verify(parts, logits, jnp.stack(drafts, 1), jnp.stack(guesses, 1),
                                        jnp.full(len(keys), N), jnp.asarray(NONE), settings)
    return tokens, logprobs, accepted

  return run


def simulate(draft, request, length=3):
  """(tokens [DRAWS, length], their log-probabilities, whether each request's first draft was accepted)."""
  keys = jax.random.split(jax.random.key(7), DRAWS)
  settings = rows([request] * DRAWS)
  said, logprobs = np.full((2, DRAWS, length + N), -1.0)
  numbers, first = np.zeros(DRAWS, np.int32), None
  while numbers.min() < length:
    last = np.where(numbers > 0, said[np.arange(DRAWS), numbers - 1], V).astype(np.int32)
    tokens, found, accepted = map(np.asarray, one_round()(keys, numbers, last, TARGET, draft, settings))
    first = accepted > 0 if first is None else first
    for i in range(N + 1):
      use = (i <= accepted) & (numbers < length)
      said[use, numbers[use] + i], logprobs[use, numbers[use] + i] = tokens[use, i], found[use, i]
    numbers = np.where(numbers < length, numbers + accepted + 1, numbers)
  return said[:, :length].astype(int), logprobs[:, :length], first


def distribution(logits, request):
  return np.exp(np.asarray(log_probabilities(jnp.asarray(logits), rows([request] * len(logits))), np.float64))


def assert_drawn_from(counts, probabilities):
  """Chi-square; cells that are rarer than five draws count as one."""
  counts, expected = counts.reshape(-1), probabilities.reshape(-1) * counts.sum() / probabilities.sum()
  assert not counts[expected == 0].any()
  rare = expected < 5
  pooled = lambda x: np.append(x[~rare], x[rare].sum()) if expected[rare].sum() > 5 else x[~rare]
  counts, expected = pooled(counts), pooled(expected)
  assert scipy.stats.chisquare(counts, expected * counts.sum() / expected.sum()).pvalue > 1e-3


@pytest.mark.parametrize("request_", [PLAIN, FILTERS], ids=["plain", "filters"])
@pytest.mark.parametrize("regime", REGIMES)
def test_tokens_are_drawn_from_the_target(regime, request_):
  """Three tokens of 20,000 requests, in one to three rounds each: the first by its frequencies, then pairs; keys are
  those of a token's number, so that a draft that was thrown away is drawn again with the same one."""
  said, logprobs, first = simulate(REGIMES[regime], request_)
  p, q = distribution(TARGET, request_), distribution(REGIMES[regime], request_)
  assert_drawn_from(np.bincount(said[:, 0], minlength=V), p[V])
  joint = p[V][:, None] * p[:V]
  for i, expected in ((0, joint), (1, (p[V] @ p[:V])[:, None] * p[:V])):
    assert_drawn_from(np.bincount(said[:, i] * V + said[:, i + 1], minlength=V * V), expected)
  np.testing.assert_allclose(np.exp(logprobs[:, 1]), p[said[:, 0], said[:, 1]], rtol=1e-5)
  # A first draft is accepted with the probability that p and q share; four standard deviations.
  share = np.minimum(p[V], q[V]).sum()
  assert abs(first.mean() - share) < 4 * np.sqrt(share * (1 - share) / DRAWS) + 1e-9
  assert SHARES[regime][0] < share < SHARES[regime][1]


def test_the_check_notices_a_wrong_rule():
  """Tokens drawn anew from p, instead of from what is left of it, fail the chi-square."""
  said, _, first = simulate(REGIMES["middle"], PLAIN, length=1)
  rng = np.random.default_rng(0)
  p = distribution(TARGET, PLAIN)[V]
  wrong = np.where(first, said[:, 0], rng.choice(V, DRAWS, p=p / p.sum()))
  with pytest.raises(AssertionError):
    assert_drawn_from(np.bincount(wrong, minlength=V), p)


# ---- single rows ---------------------------------------------------------------------------------------------------
ROWS = 300


@functools.cache
def verifying():
  """(keys, logits, drafts, the drafts' own logits, offered, forced, settings) -> what `verify` finds; jitted."""

  @jax.jit
  def run(keys, logits, drafts, guesses, offered, forced, settings):
    guesses = jax.vmap(log_probabilities, (1, None), 1)(guesses, settings)
    return verify(place_keys(keys, jnp.arange(ROWS), N + 1), logits, drafts, guesses, offered, forced, settings)

  return run


def run(logits, drafts, guesses, *, offered=N, forced=-1, request=PLAIN):
  """(tokens, log-probabilities, accepted) of a few rows, each up to its last token; the last one fills the batch."""
  count = len(logits)
  fill = lambda x: np.pad(np.asarray(x), [(0, ROWS - count)] + [(0, 0)] * (np.ndim(x) - 1), mode="edge")
  offered, forced = np.broadcast_to(offered, count), np.broadcast_to(forced, (count, N + 1))
  ints = lambda x: fill(x).astype(np.int32)
  found = verifying()(jax.random.split(jax.random.key(0), ROWS), fill(logits).astype(np.float32), ints(drafts),
                      fill(guesses).astype(np.float32), ints(offered), ints(forced), rows([request] * ROWS))
  tokens, logprobs, accepted = (np.asarray(x)[:count].tolist() for x in found)
  cut = lambda x: [row[:a + 1] for row, a in zip(x, accepted)]
  return cut(tokens), cut(logprobs), accepted


def peaks(*rows_):
  """Logits [B, P, V] that are largest at these tokens."""
  return np.random.default_rng(5).uniform(size=(len(rows_), len(rows_[0]), V)) + 2 * np.eye(V)[np.array(rows_)]


def test_greedy_rows_keep_the_drafts_that_are_the_largest():
  drafts = [[3, 1], [3, 2], [5, 1], [3, 1], [3, 1]]
  tokens, logprobs, accepted = run(peaks(*[[3, 1, 4]] * 5), drafts, peaks(*drafts), offered=[2, 2, 2, 1, 0],
                                   request=Sampling(0.0))
  assert accepted == [2, 1, 0, 1, 0]
  assert tokens == [[3, 1, 4], [3, 1], [3], [3, 1], [3]]
  assert logprobs == [[0.0] * len(row) for row in tokens]


def test_forced_tokens_come_instead():
  target, drafts = peaks(*[[3, 1, 4]] * 3), [[3, 1], [3, 1], [7, 1]]
  forced = [[-1, 6, -1], [-1, -1, 6], [7, -1, -1]]
  tokens, _, accepted = run(target, drafts, peaks(*drafts), forced=forced, request=Sampling(0.0))
  assert accepted == [1, 2, 2]  # a draft that is the forced token is as good as any
  assert tokens == [[3, 6], [3, 1, 6], [7, 1, 4]]
  _, logprobs, _ = run(target, drafts, target[:, :2], forced=forced)
  assert logprobs[0][1] == logprobs[1][2] == logprobs[2][0] == 0
  assert logprobs[0][0] < 0 and max(logprobs[1][:2]) < 0


def test_equal_distributions_accept_everything():
  rng = np.random.default_rng(6)
  logits, drafts = rng.normal(size=(ROWS, 3, V)), rng.integers(0, V, (ROWS, 2))
  tokens, _, accepted = run(logits, drafts, logits[:, :2])
  assert accepted == [2] * ROWS and [row[:2] for row in tokens] == drafts.tolist()


def test_a_draft_outside_the_filters_is_never_accepted():
  logits = np.random.default_rng(8).normal(size=(ROWS, 3, V))
  tokens, logprobs, accepted = run(logits, logits[:, :2].argmin(-1), -logits[:, :2], request=Sampling(top_k=3))
  assert accepted == [0] * ROWS and np.isfinite(logprobs).all()
  assert all(token in np.argsort(row[0])[-3:] for (token,), row in zip(tokens, logits))


def test_a_row_does_not_depend_on_its_batch():
  rng = np.random.default_rng(9)
  logits, guesses, drafts = rng.normal(size=(9, 3, V)), rng.normal(size=(9, 2, V)), rng.integers(0, V, (9, 2))
  together = run(logits, drafts, guesses)
  assert set(together[2]) == {0, 1, 2}
  # same keys, other neighbours and other numbers of them
  for count in (1, 4):
    assert run(logits[:count], drafts[:count], guesses[:count])[0] == together[0][:count]
