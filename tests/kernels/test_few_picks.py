"""The experts of a few picks, one after another without sorting: against a loop in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_matmul import few_picks

LIMIT = 0.6  # bites


def inputs():
  """Five rows with three picks of four experts, of which some are on other devices: outside [0, 4)."""
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.normal(size=shape)
  return dict(x=normal(5, 6), experts=np.array([[0, 3, 1], [2, 2, -1], [4, 0, 9], [-3, -1, 7], [1, 0, 2]], np.int32),
              weights=rng.random((5, 3)), gate=normal(4, 6, 7), up=normal(4, 6, 7), down=normal(4, 7, 6))


def loop(x, experts, weights, gate, up, down, rounded=lambda x: x):
  """`rounded`: of the hidden vector with its weight in it."""
  out = np.zeros_like(x)
  for row, rank in np.ndindex(*experts.shape):
    if 0 <= (e := experts[row, rank]) < len(gate):
      g, u = np.minimum(x[row] @ gate[e], LIMIT), np.clip(x[row] @ up[e], -LIMIT, LIMIT)
      out[row] += rounded(weights[row, rank] * g / (1 + np.exp(-g)) * u) @ down[e]
  return out


@pytest.mark.parametrize("dtype, share", [("float32", 1e-5), ("bfloat16", 3e-2)])  # bfloat16: as in the walk of the cases
def test_values_equal_a_loop(dtype, share):
  arrays = {name: x if x.dtype == np.int32 else np.asarray(jnp.asarray(x, dtype)) for name, x in inputs().items()}
  wide = {name: x if x.dtype == np.int32 else x.astype(np.float64) for name, x in arrays.items()}
  got, want = jax.jit(lambda arrays: few_picks(**arrays, limit=LIMIT))(arrays), loop(**wide)
  assert got.dtype == dtype and not want[3].any()  # none of its picks is here
  np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=0, atol=share * np.abs(want).max())


def test_matrices_and_hidden_are_rounded_as_asked():
  """A quantised model's way: weights as prepared, and the hidden vector rounded with its weight in it."""
  arrays = {name: x if x.dtype == np.int32 else x.astype(np.float32) for name, x in inputs().items()}
  half = lambda x: jnp.round(2 * x) / 2
  got = few_picks(**arrays, limit=LIMIT, prepared=half, rounded=half)
  half_64 = lambda x: np.round(2 * x.astype(np.float64)) / 2
  x, experts, weights, *matrices = (x if x.dtype == np.int32 else x.astype(np.float64) for x in arrays.values())
  want = loop(x, experts, weights, *map(half_64, matrices), half_64)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
