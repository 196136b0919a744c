"""The experts' kernels where tiles end: experts without rows at every place, several sizes, rows that nobody owns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import tpu
from pallas_kernels.grouped_matmul import expert_mlp

CHIPS = {chip.name: chip for chip in (tpu.V5P, tpu.V6E, tpu.TPU7X)}
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


@functools.partial(jax.jit, static_argnames=("tile", "implementation", "chip"))
def values_and_gradients(arrays, owned, tile, implementation, chip=""):
  """`chip`: whose blocks are taken; a program of its own for each."""
  def run(moving):
    y = expert_mlp(**moving, group_sizes=arrays["group_sizes"], tile=tile, limit=0.7, implementation=implementation)
    y = jnp.where(owned[:, None], y, 0)
    return (y * jnp.cos(jnp.arange(y.size).reshape(y.shape))).sum(), y
  return jax.value_and_grad(run, has_aux=True)({name: x for name, x in arrays.items() if name != "group_sizes"})


@pytest.mark.parametrize("sizes, tile, rows, hidden, width", [
  ((0, 8, 0, 0, 17, 0), 8, 48, 129, 640), ((0, 0), 8, 16, 128, 128),
  ((9, 0, 3), 8, 32, 1152, 1280)])  # the weights' gradients are blocks of 384 x 640, 3 x 2 of them, or 2 x 3
def test_tiles_end_anywhere(sizes, tile, rows, hidden, width):
  arrays, owned = inputs(sizes, tile, rows, hidden, width)
  got, want = (values_and_gradients(arrays, owned, tile, name) for name in ("interpret", "reference"))
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * max(np.abs(b).max(), 1e-30))


@pytest.mark.long
@pytest.mark.parametrize("dtype, share", [("float32", 2e-5), ("bfloat16", 3e-2)])  # as in the walk of the cases
@pytest.mark.parametrize("tile", [128, 256])
@pytest.mark.parametrize("chip", CHIPS)
def test_the_tiles_of_training_end_anywhere(monkeypatch, chip, tile, dtype, share):
  """One row less, as many and one more than a tile holds; widths of several inner steps."""
  monkeypatch.setattr(tpu, "current_chip", lambda interpret: CHIPS[chip])
  sizes = (tile - 1, 0, tile, tile + 1, 7)
  arrays, owned = inputs(sizes, tile, 6 * tile, 384, 512)
  narrow = {name: x if name == "group_sizes" else x.astype(dtype) for name, x in arrays.items()}
  wide = {name: x if name == "group_sizes" else jnp.asarray(x, jnp.float32) for name, x in narrow.items()}
  got = values_and_gradients(narrow, owned, tile, "interpret", chip)
  want = values_and_gradients(wide, owned, tile, "reference")
  for a, b in zip(jax.tree.leaves(got[0][1:] + got[1:]), jax.tree.leaves(want[0][1:] + want[1:]), strict=True):
    a, b = (np.asarray(x, np.float32) for x in (a, b))
    np.testing.assert_allclose(a, b, rtol=0, atol=share * np.abs(b).max())


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
