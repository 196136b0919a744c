"""Muon's parts in closed form, against optax.contrib.muon where they agree, and as well-behaved transformations."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deepseek_v4.optim import MatrixAxes, muon, orthogonalize, scale_by_adam, scale_by_muon, scale_by_shape
from deepseek_v4.optim.newton_schulz import COEFFICIENTS


def normal(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def update_of(transform, gradients, params=None):
  """The first update, compiled."""
  return jax.jit(lambda g, p: transform.update(g, transform.init(g), p)[0])(gradients, params)


def orthogonal(x):
  """U V^T of every matrix in float64; Newton-Schulz is within 0.002 of it for random matrices."""
  u, _, vt = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
  return u @ vt


def rms(x):
  return float(jnp.sqrt(jnp.mean(jnp.square(x))))


@pytest.fixture(scope="module")
def experts():
  return normal(0, 3, 8, 5)


# ---- the parts ---------------------------------------------------------------------------------------------------------
def test_momentum_is_a_plain_sum_with_a_nesterov_direction():
  g1, g2 = normal(1, 6, 4), normal(2, 6, 4)
  transform = scale_by_muon(momentum=0.9)
  update = jax.jit(transform.update)
  first, state = update(g1, transform.init(g1))
  second, state = update(g2, state)
  np.testing.assert_allclose(jax.tree.leaves(state)[0], 0.9 * g1 + g2, rtol=1e-6)
  scale = 0.18 * np.sqrt(6)
  np.testing.assert_allclose(first, scale * orthogonal(g1), atol=1e-3)
  np.testing.assert_allclose(second, scale * orthogonal(0.9 * (0.9 * g1 + g2) + g2), atol=1e-3)
  assert np.abs(second - scale * orthogonal(0.9 * g1 + g2)).max() > 0.01


def test_a_bfloat16_momentum_is_rounded_where_it_is_kept_and_nowhere_else():
  """Two steps by hand: the state is the rounded sum, the direction uses the sum of the step before it is rounded."""
  g1, g2 = normal(1, 6, 4), normal(2, 6, 4)
  transform = scale_by_muon(momentum=0.9, momentum_dtype="bfloat16")
  update = jax.jit(transform.update)
  first, state = update(g1, transform.init(g1))
  second, state = update(g2, state)
  (kept,) = jax.tree.leaves(state)
  sums = np.float32(0.9) * np.asarray(g1.astype(jnp.bfloat16), np.float32) + g2
  assert kept.dtype == jnp.bfloat16 and first.dtype == second.dtype == jnp.float32
  np.testing.assert_allclose(kept.astype(jnp.float32), sums, rtol=2**-8)
  np.testing.assert_array_equal(first, update_of(scale_by_muon(momentum=0.9), g1))
  np.testing.assert_allclose(second, 0.18 * np.sqrt(6) * orthogonal(0.9 * sums + g2), atol=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rms_of_the_update_is_018_for_any_shape(dtype):
  gradients = {"square": normal(0, 48, 48), "wide": normal(1, 24, 96), "tall": normal(2, 96, 24), "flat": normal(3, 6, 256)}
  update = update_of(scale_by_muon(dtype=dtype), gradients)
  for name, x in update.items():
    assert abs(rms(x) / 0.18 - 1) < 0.01, name


def test_scale_is_the_same_for_a_matrix_and_its_transpose():
  ones = {"tall": jnp.ones((4096, 1024)), "wide": jnp.ones((1024, 4096)), "heads": jnp.ones((12, 4, 16))}
  axes = {"tall": MatrixAxes((0,), (1,)), "wide": MatrixAxes((0,), (1,)), "heads": MatrixAxes((0,), (1, 2))}
  scaled = update_of(scale_by_shape(0.2, axes=axes), ones)
  assert rms(scaled["tall"]) / rms(scaled["wide"]) == 1
  np.testing.assert_allclose(scaled["tall"][0, 0], 0.2 * 64, rtol=1e-6)
  np.testing.assert_allclose(scaled["heads"][0, 0, 0], 0.2 * 8, rtol=1e-6)


def test_decay_is_decoupled_and_an_idle_expert_only_decays(experts):
  params = normal(1, 3, 8, 5)
  idle = experts.at[1].set(0)
  update = update_of(muon(0.1, momentum=0.0, weight_decay=0.3), idle, params)
  direction = update_of(scale_by_muon(momentum=0.0), idle)
  assert not np.any(direction[1])
  np.testing.assert_allclose(params + update, params * (1 - 0.1 * 0.3) - 0.1 * direction, atol=1e-6)
  np.testing.assert_array_equal(update[1], -0.1 * (0.3 * params[1]))


def test_permuted_experts_permute_the_update(experts):
  order = np.array([2, 0, 1])
  transform = scale_by_muon()
  np.testing.assert_array_equal(update_of(transform, experts[order]), update_of(transform, experts)[order])


# ---- which axes are the matrix -----------------------------------------------------------------------------------------
def test_leaves_of_equal_and_other_shapes_are_each_orthogonalised_alone(experts):
  """Two leaves share a batch with a transposed one; the scan axis, experts, series and groups are batch axes."""
  tree = {"gate": normal(1, 2, 3, 8, 5), "down": normal(2, 2, 3, 5, 8), "lone": normal(3, 8, 5), "other": normal(4, 4, 4)}
  got = update_of(orthogonalize(), tree)
  for name, x in tree.items():
    np.testing.assert_allclose(got[name], orthogonal(x), atol=2e-3, err_msg=name)


def test_direction_of_stacked_experts_is_the_polynomial_of_their_singular_values(experts):
  """The transformation that the optimizer uses, step by step: each Newton-Schulz step's own polynomial on s / ||G_e||."""
  u, s, vt = np.linalg.svd(np.asarray(experts, np.float64), full_matrices=False)
  t = s / np.linalg.norm(s, axis=-1, keepdims=True)
  for a, b, c in COEFFICIENTS:
    t = a * t + b * t**3 + c * t**5
  tree = {"experts": experts}
  got = update_of(orthogonalize(), tree)["experts"]
  np.testing.assert_allclose(got, u * t[:, None] @ vt, atol=1e-5)
  order = jnp.array([2, 0, 1])
  np.testing.assert_allclose(update_of(orthogonalize(), {"experts": experts[order]})["experts"], got[order], atol=1e-6)


def test_queries_are_one_matrix_or_one_for_every_head():
  q_b = normal(0, 2, 12, 4, 6)  # [layers, ql, H, d]
  whole = update_of(orthogonalize(axes={"q": MatrixAxes((1,), (2, 3))}), {"q": q_b})["q"]
  np.testing.assert_allclose(whole, orthogonal(q_b.reshape(2, 12, 24)).reshape(q_b.shape), atol=2e-3)
  heads = update_of(orthogonalize(axes={"q": MatrixAxes((1,), (3,))}), {"q": q_b})["q"]
  np.testing.assert_allclose(heads, orthogonal(q_b.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3), atol=2e-3)
  assert np.abs(whole - heads).max() > 0.05


def test_missing_axes_and_vectors_are_refused():
  with pytest.raises(ValueError, match="axes has no entry for b"):
    update_of(orthogonalize(axes={"a": MatrixAxes((0,), (1,)), "b": None}), {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2))})
  with pytest.raises(ValueError, match=r"v has shape \[3\]: expected a matrix"):
    update_of(orthogonalize(), {"v": jnp.ones(3)})


# ---- against Optax -----------------------------------------------------------------------------------------------------
def optax_muon(beta):
  return optax.contrib.muon(
      0.02, ns_coeffs=COEFFICIENTS, ns_steps=10, beta=beta, weight_decay=0.1, consistent_rms=0.18,
      muon_weight_dimension_numbers={"w": optax.contrib.MuonDimensionNumbers(1, 2)})


def test_equals_optax_muon_without_momentum(experts):
  params, gradients = {"w": normal(1, 3, 8, 5)}, {"w": experts}
  want = update_of(optax_muon(0.0), gradients, params)["w"]
  np.testing.assert_allclose(update_of(muon(0.02, momentum=0.0), gradients, params)["w"], want, atol=1e-6)


def test_equals_optax_muon_after_many_steps(experts):
  """Optax's momentum is a bias-corrected mean: directions differ at first and agree in the long run."""
  params = {"w": jnp.zeros((3, 8, 5))}
  ours, theirs = muon(0.02), optax_muon(0.95)
  steps = normal(3, 150, 3, 8, 5)

  @jax.jit
  def run(gradients):
    def step(states, gradient):
      a, states_a = ours.update({"w": gradient}, states[0], params)
      b, states_b = theirs.update({"w": gradient}, states[1], params)
      return (states_a, states_b), jnp.abs(a["w"] - b["w"]).max()
    return jax.lax.scan(step, (ours.init(params), theirs.init(params)), gradients)[1]

  difference = run(steps)
  assert difference[1] > 1e-5
  assert difference[-1] < 1e-5


# ---- Adam's part -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("gradient, size", [(1e-18, 0.99), (1e-19, 10.0), (1e-20, 1.0), (0.0, 0.0)])
def test_eps_1e_20_where_squares_underflow(gradient, size):
  """Not wanted, but what the report's numbers do in float32: a gradient of 1e-19 moves ten times as far as others."""
  update = jax.jit(lambda g: update_of(scale_by_adam(), g))(jnp.full(2, gradient, jnp.float32))
  np.testing.assert_allclose(update, size, rtol=0.02)


def test_floor_of_the_second_moment():
  floored, plain = scale_by_adam(v_floor=1e-36), scale_by_adam()
  tiny = jnp.asarray([1e-19, 1e-20, 0.0], jnp.float32)
  np.testing.assert_allclose(update_of(floored, tiny), [0.099, 0.0099, 0.0], rtol=0.02)
  np.testing.assert_allclose(update_of(scale_by_adam(v_floor=0.25), jnp.asarray([1.0, 0.1])), [1.0, 0.2], rtol=1e-5)
  # Elsewhere nothing changes, and the state is the same, so that a run can switch.
  g = normal(0, 5, 7)
  state_a, state_b = floored.init(g), plain.init(g)
  for i in range(3):
    a, state_a = floored.update(g * (i + 1), state_a)
    b, state_b = plain.update(g * (i + 1), state_b)
  np.testing.assert_allclose(a, b, rtol=1e-6)
  assert jax.tree.structure(state_a) == jax.tree.structure(state_b)
  jax.tree.map(np.testing.assert_array_equal, state_a, state_b)


# ---- the contract of every transformation ------------------------------------------------------------------------------
@pytest.mark.parametrize("name, make", [
    ("muon", lambda: muon(optax.linear_schedule(0.1, 0.0, 5))),
    ("adam with a floor", lambda: scale_by_adam(v_floor=1e-30)),
])
def test_contract(name, make):
  """jit changes nothing, the state keeps its structure and dtypes, updates look like parameters, zeros give zeros."""
  transform = make()
  params = {"a": {"b": normal(0, 2, 6, 4)}}
  gradients = jax.tree.map(lambda p: 0.1 * p + 1, params)
  zeros = jax.tree.map(jnp.zeros_like, params)
  state = transform.init(params)
  for function in (transform.init, lambda p: transform.update(p, state, p)[1]):
    assert jax.eval_shape(function, params) == jax.eval_shape(lambda: state)
  jitted = jax.jit(transform.update)
  update, _ = jitted(gradients, state, params)
  eager, _ = transform.update(gradients, state, params)
  assert jax.eval_shape(lambda: update) == jax.eval_shape(lambda: params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), update, eager)
  still, _ = jitted(zeros, transform.init(zeros), zeros)
  assert not np.any(still["a"]["b"])
