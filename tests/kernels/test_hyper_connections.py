"""mHC where its numbers are known: closed forms of Sinkhorn, the direction of the mix, extreme logits, zero rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.hyper_connections import collapse, expand
from tests.kernels import oracles

all_implementations = pytest.mark.parametrize("implementation", ["reference", "blockwise", "interpret"])


@functools.cache
def jitted(implementation):
  """collapse with 20 rounds, jitted."""
  return jax.jit(functools.partial(collapse, norm_eps=1e-6, eps=1e-6, iterations=20, implementation=implementation))


def from_logits(logits, implementation, streams=None):
  """collapse for fixed mixing logits [N, N]: no input-dependent part, pre and post logits 0."""
  n = logits.shape[0]
  streams = np.ones((1, 1, n, 8), np.float32) if streams is None else streams
  base = np.concatenate([np.zeros(2 * n), logits.reshape(-1)]).astype(np.float32)
  fn = np.zeros((n * streams.shape[-1], (2 + n) * n), np.float32)
  return jitted(implementation)(streams, fn, base, np.ones(3, np.float32))


@all_implementations
def test_two_streams_have_a_closed_form(implementation):
  """The limit of a 2 x 2 Sinkhorn iteration is sigmoid((a + d - b - c) / 2) on the diagonal."""
  _, _, comb = from_logits(np.array([[0.3, -1.1], [0.7, 0.2]]), implementation)
  np.testing.assert_allclose(comb[0, 0], [[0.610639, 0.389361], [0.389361, 0.610639]], atol=2e-6)


@all_implementations
def test_zero_coefficients_average(implementation):
  rng = np.random.default_rng(0)
  x = np.repeat(rng.normal(size=(1, 1, 1, 8)), 4, 2).astype(np.float32)
  z, post, comb = from_logits(np.zeros((4, 4)), implementation, x)
  np.testing.assert_allclose(comb, 0.25, atol=1e-6)
  np.testing.assert_allclose(post, 1, atol=1e-6)
  np.testing.assert_allclose(z, 2.000004 * x[:, :, 0], rtol=1e-6)  # pre = 1/2 + 1e-6, four equal streams
  update = rng.normal(size=(1, 1, 8)).astype(np.float32)
  new = expand(x, update, post, comb, implementation=implementation)
  np.testing.assert_allclose(new, np.repeat(update[:, :, None], 4, 2) + x, atol=1e-5)


@all_implementations
def test_streams_move_forwards(implementation):
  """A large logit at (i, j) sends stream i to stream j, not the other way."""
  cycle = [1, 2, 3, 0]
  logits = np.zeros((4, 4))
  logits[range(4), cycle] = 30
  x = np.random.default_rng(0).normal(size=(1, 1, 4, 8)).astype(np.float32)
  _, post, comb = from_logits(logits, implementation, x)
  moved = expand(x, np.zeros((1, 1, 8), np.float32), post, comb, implementation=implementation)
  np.testing.assert_allclose(moved[0, 0, cycle], x[0, 0], atol=2e-5)


@all_implementations
def test_columns_sum_to_one_however_large_the_logits(implementation):
  """The last step normalises columns. Rows follow only as far as 20 rounds get them."""
  logits = np.random.default_rng(0).normal(size=(4, 4))
  for strength in (1, 50, 1e4):
    _, _, comb = from_logits(strength * logits, implementation)
    np.testing.assert_allclose(comb[0, 0].sum(0), 1, atol=2e-6)
    np.testing.assert_allclose(comb[0, 0], oracles.sinkhorn(strength * logits.astype(np.float32), 20, 1e-6), atol=1e-4)


@pytest.mark.parametrize("implementation, both", [
    ("reference", False), ("blockwise", True), ("interpret", False),
    pytest.param("interpret", True, marks=pytest.mark.long)])
def test_gradient_through_all_rounds(implementation, both):
  """Upstream gradients of 1e4 through 20 rounds: finite, equal to float64 differences, the same without jit."""
  rng = np.random.default_rng(1)
  logits, weight = rng.normal(size=(4, 4)), 1e4 * rng.normal(size=(4, 4))

  def total(base, fn, streams):
    return (collapse(streams, fn, base, jnp.ones(3), norm_eps=1e-6, eps=1e-6, iterations=20,
                     implementation=implementation)[2] * weight).sum()

  fn, streams = np.zeros((32, 24), np.float32), np.ones((1, 1, 4, 8), np.float32)
  gradient = jax.jit(jax.grad(total))
  for strength in (1.0, 10.0):
    base = np.concatenate([np.zeros(8), strength * logits.reshape(-1)]).astype(np.float32)
    got = gradient(base, fn, streams)
    assert np.isfinite(got).all()
    exact, step = base[8:].astype(np.float64), 1e-5
    value = lambda x: (oracles.sinkhorn(x.reshape(4, 4), 20, 1e-6) * weight).sum()
    want = np.array([(value(exact + step * e) - value(exact - step * e)) / (2 * step) for e in np.eye(16)])
    np.testing.assert_allclose(got[8:], want, atol=1e-3 * np.abs(want).max())
    np.testing.assert_allclose(got[:8], 0)
  if both:
    np.testing.assert_allclose(jax.grad(total)(base, fn, streams), got, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("implementation", [
    "reference", "blockwise", pytest.param("interpret", marks=pytest.mark.long)])
def test_zero_token_and_narrow_streams(implementation):
  rng = np.random.default_rng(0)
  fn, base = rng.normal(size=(32, 24)).astype(np.float32), rng.normal(size=24).astype(np.float32)
  x = rng.normal(size=(1, 2, 4, 8)).astype(np.float32)
  x[:, 1] = 0
  run = jitted(implementation)
  value, pull = jax.vjp(lambda x: run(x, fn, base, np.ones(3, np.float32)), x)
  (gradient,) = pull(jax.tree.map(jnp.ones_like, value))
  assert all(np.isfinite(v).all() for v in (*value, gradient))
  z, post, comb = jax.eval_shape(run, x.astype(jnp.bfloat16), fn, base, np.ones(3, np.float32))
  assert (z.dtype, post.dtype, comb.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
  new = jax.eval_shape(functools.partial(expand, implementation=implementation), x.astype(jnp.bfloat16), z, post, comb)
  assert new.dtype == jnp.bfloat16
