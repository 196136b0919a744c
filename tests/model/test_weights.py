"""Parameters in the compute dtype: bit for bit what numpy's bfloat16 makes of them."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from deepseek_v4.model.weights import cast

_BITS = np.random.default_rng(0).integers(0, 2**32, 1 << 16, np.uint64).astype(np.uint32)
# All upper halves, with lower halves around the tie between neighbours.
_TIES = (np.arange(1 << 16, dtype=np.uint32)[:, None] << 16 | np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32))


@pytest.mark.parametrize("bits", [_BITS, _TIES.ravel()], ids=["random", "ties, infinities, NaN"])
def test_bfloat16_is_the_nearest(bits):
  x = bits.view(np.float32)
  with np.errstate(invalid="ignore"):
    expected = x.astype(ml_dtypes.bfloat16)
  found = np.asarray(jax.jit(lambda x: cast(x, jnp.bfloat16))(x))
  nan = np.isnan(x)
  assert np.array_equal(found.view(np.uint16)[~nan], expected.view(np.uint16)[~nan]) and np.isnan(found[nan]).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_gradient_is_cast_back(dtype):
  gradient = jax.grad(lambda x: (cast(x, dtype) * jnp.array([1, 2], dtype)).astype(jnp.float32).sum())(jnp.array([3.0, 4.0]))
  assert gradient.dtype == jnp.float32 and gradient.tolist() == [1, 2]
