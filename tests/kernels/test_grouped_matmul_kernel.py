"""The experts' kernels where tiles end: experts without rows at every place, several sizes, rows that nobody owns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_matmul import expert_mlp

WEIGHTS = ("gate", "up", "down")


def inputs(sizes, tile, rows, hidden, width):
  """float32 arguments; owned rows by expert, the others 0."""
  rng = np.random.default_rng(0)
  up = (len(sizes), hidden, width)
  shapes = dict(x=(rows, hidden), gate=up, up=up, down=(len(sizes), width, hidden))
  arrays = {name: rng.normal(size=shape).astype(np.float32) * shape[-2] ** -0.5 for name, shape in shapes.items()}
  owned, start = np.zeros(rows, bool), 0
  for size in sizes:
    owned[start:start + size] = True
    start += -(-size // tile) * tile
  return {**arrays, "group_sizes": jnp.array(sizes, jnp.int32)}, owned


@functools.partial(jax.jit, static_argnames=("tile", "implementation"))
def values_and_gradients(arrays, owned, tile, implementation):
  def run(moving):
    y = expert_mlp(**moving, group_sizes=arrays["group_sizes"], tile=tile, limit=0.7, implementation=implementation)
    y = jnp.where(owned[:, None], y, 0)
    return (y * jnp.cos(jnp.arange(y.size).reshape(y.shape))).sum(), y
  return jax.value_and_grad(run, has_aux=True)({name: x for name, x in arrays.items() if name != "group_sizes"})


@pytest.mark.parametrize("sizes, tile, rows, hidden, width", [
  ((0, 8, 0, 0, 17, 0), 8, 48, 129, 640), ((0, 0), 8, 16, 128, 128)])
def test_tiles_end_anywhere(sizes, tile, rows, hidden, width):
  arrays, owned = inputs(sizes, tile, rows, hidden, width)
  got, want = (values_and_gradients(arrays, owned, tile, name) for name in ("interpret", "reference"))
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * max(np.abs(b).max(), 1e-30))


def test_rows_of_no_expert_are_finite_and_leave_the_weights_alone():
  arrays, owned = inputs((3, 0, 9), 8, 64, 128, 128)
  filled = {**arrays, "x": np.where(owned[:, None], arrays["x"], 1e3).astype(np.float32)}
  run = functools.partial(expert_mlp, tile=8, limit=0.7, implementation="interpret")
  d_y = np.where(owned[:, None], 1, np.zeros((64, 128))).astype(np.float32)

  @jax.jit
  def both(arrays):
    y, pull = jax.vjp(lambda x, *w: run(x, *w, arrays["group_sizes"]), arrays["x"], *(arrays[name] for name in WEIGHTS))
    return y, pull(d_y)

  y, gradients = both(filled)
  assert np.isfinite(y).all()
  for a, b in zip(gradients, both(arrays)[1], strict=True):
    assert np.isfinite(a).all()
    np.testing.assert_array_equal(a[owned] if a.ndim == 2 else a, b[owned] if b.ndim == 2 else b)
