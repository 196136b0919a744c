"""Newton-Schulz against a float64 SVD with the scalar polynomial, at the extremes, and as a loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from deepseek_v4.optim.newton_schulz import COEFFICIENTS, newton_schulz

compiled = jax.jit(newton_schulz, static_argnames=("dtype", "coefficients"))


def scalar_polynomial(t, coefficients=COEFFICIENTS):
  for a, b, c in coefficients:
    t = a * t + b * t**3 + c * t**5
  return t


def oracle(x):
  """U diag(p(s / frobenius)) V^T in float64, matrix by matrix."""
  u, s, vt = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
  t = scalar_polynomial(s / np.linalg.norm(s, axis=-1, keepdims=True))
  return (u * t[..., None, :]) @ vt


def conditioned(seed, rows, columns, condition):
  """A random matrix with singular values from 1 down to 1 / condition."""
  rng = np.random.default_rng(seed)
  k = min(rows, columns)
  u, _ = np.linalg.qr(rng.normal(size=(rows, k)))
  v, _ = np.linalg.qr(rng.normal(size=(columns, k)))
  return ((u * np.geomspace(1, 1 / condition, k)) @ v.T).astype(np.float32)


def singular_values(y):
  return np.linalg.svd(np.asarray(y, np.float64), compute_uv=False)


@pytest.fixture(scope="module")
def gradients():
  return np.random.default_rng(0).normal(size=(3, 8, 5))


def test_each_matrix_of_a_batch_is_the_polynomial_of_its_singular_values(gradients):
  want = oracle(gradients)
  got = compiled(jnp.asarray(gradients, jnp.float32))
  np.testing.assert_allclose(got, want, atol=1e-5)
  rough = compiled(jnp.asarray(gradients, jnp.float32), dtype=jnp.bfloat16)
  assert rough.dtype == jnp.float32
  assert np.abs(rough - want).max() < 0.1
  assert 0.98 <= singular_values(rough).min() and singular_values(rough).max() <= 1.02
  wide = jnp.asarray(gradients.swapaxes(1, 2), jnp.float32)
  np.testing.assert_allclose(compiled(wide).swapaxes(1, 2), got, atol=1e-6)
  order = np.array([2, 0, 1])
  np.testing.assert_array_equal(compiled(jnp.asarray(gradients[order], jnp.float32)), got[order])


def test_float64_input_is_computed_in_float64(gradients):
  with jax.enable_x64(True):
    got = compiled(jnp.asarray(gradients, jnp.float64))
    assert got.dtype == jnp.float64
    np.testing.assert_allclose(got, oracle(gradients), atol=1e-12)


@pytest.mark.parametrize("shape", [(48, 48), (24, 96), (96, 24)])
def test_singular_values_are_one(shape):
  x = jnp.stack([conditioned(seed, *shape, condition) for seed, condition in enumerate((3, 30, 300))])
  exact = singular_values(compiled(x))
  assert 0.999 <= exact.min() and exact.max() <= 1.003
  rough = singular_values(compiled(x, dtype=jnp.bfloat16))
  assert 0.98 <= rough.min() and rough.max() <= 1.02


def test_condition_number_1e4_still_converges_in_float32():
  values = singular_values(compiled(jnp.asarray(conditioned(0, 8, 12, 1e4))[None].repeat(3, 0)))
  assert 0.999 <= values.min() and values.max() <= 1.003


@pytest.mark.parametrize("name, coefficients, low, high", [
    ("the first kind alone", COEFFICIENTS[:8], 0.72, 1.12),
    ("swapped", COEFFICIENTS[8:] + COEFFICIENTS[:8], 0.72, 1.12),
    ("five steps", COEFFICIENTS[:5], 0.72, 1.12),
])
def test_order_and_number_of_steps_matter(name, coefficients, low, high):
  x = jnp.asarray(np.random.default_rng(1).normal(size=(96, 96)), jnp.float32)
  values = singular_values(compiled(x, coefficients=coefficients))
  assert values.min() < low and values.max() > high, name


@pytest.mark.parametrize("scale", [1e-37, 1e-30, 1e-19, 1e30])
def test_tiny_and_huge_gradients_orthogonalise(scale):
  x = conditioned(2, 8, 12, 10)
  x = jnp.asarray(x / np.abs(x).max() * np.float32(scale))
  batch = jnp.stack([x, jnp.zeros_like(x), jnp.ones_like(x).at[0].set(-1)])
  y = compiled(batch)
  values = singular_values(y[0])
  assert 0.999 <= values.min() and values.max() <= 1.003
  assert not np.any(y[1])  # exactly zero
  assert np.isfinite(y).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_non_finite_gradient_is_not_hidden(bad):
  x = jnp.ones((3, 8, 12)).at[0, 1, 1].set(bad)
  y = compiled(x)
  assert np.isnan(y[0]).all() and np.isfinite(y[1:]).all()


def eqns(jaxpr):
  for eqn in jaxpr.eqns:
    yield eqn
    for sub in jaxprs_in_params(eqn.params):
      yield from eqns(sub)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_steps_are_one_loop_with_float32_coefficients_and_sums(dtype):
  jaxpr = jax.make_jaxpr(lambda x: newton_schulz(x, dtype=dtype))(jnp.ones((2, 8, 5)))
  scans = [eqn for eqn in jaxpr.jaxpr.eqns if eqn.primitive.name == "scan"]
  assert [scan.params["length"] for scan in scans] == [10]
  assert {v.aval.dtype for v in scans[0].invars if v.aval.shape == (10, 3)} == {jnp.dtype("float32")}
  products = [eqn for eqn in eqns(jaxpr.jaxpr) if eqn.primitive.name == "dot_general"]
  assert len(products) == 3
  for product in products:
    assert {v.aval.dtype for v in product.invars} == {jnp.dtype(dtype)}
    assert product.outvars[0].aval.dtype == jnp.float32
    if dtype == "float32":
      assert product.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2
    assert product.outvars[0].aval.shape in ((2, 5, 5), (2, 5, 8))  # the smaller side


@pytest.mark.parametrize("bad", [jnp.ones(3), jnp.ones((3, 3), jnp.int32)])
def test_refuses_what_is_no_matrix(bad):
  with pytest.raises(ValueError, match="expected floating"):
    newton_schulz(bad)
