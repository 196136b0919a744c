"""The mHC kernels where blocks end: tokens and hidden sizes around every internal tile; both units; too many streams."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.hyper_connections import collapse, expand_collapse, kernel_blocks

STATIC = dict(norm_eps=1e-6, eps=1e-6, iterations=20)


def inputs(batch, length, streams, hidden):
  """float32 arguments of expand_collapse."""
  rng = np.random.default_rng(length + hidden)
  columns = (2 + streams) * streams
  shapes = dict(streams=(batch, length, streams, hidden), update=(batch, length, hidden), post=(batch, length, streams),
                comb=(batch, length, streams, streams), fn=(streams * hidden, columns), base=(columns,), scale=(3,))
  arrays = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
  return {**arrays, "fn": arrays["fn"] * (streams * hidden) ** -0.5}


@functools.partial(jax.jit, static_argnames=("op", "implementation"))
def values_and_gradients(arrays, op, implementation):
  """Results of an op and the gradients of their sum weighted with cosines."""
  def run(arrays):
    results = jax.tree.leaves(op(**arrays, implementation=implementation))
    return sum((x * jnp.cos(jnp.arange(x.size).reshape(x.shape))).sum() for x in results), results
  return jax.value_and_grad(run, has_aux=True)(arrays)


def same(arrays, op):
  got, want = (values_and_gradients(arrays, op, name) for name in ("interpret", "reference"))
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * max(np.abs(b).max(), 1e-30))


def both(**arrays):
  return expand_collapse(**arrays, **STATIC)


@pytest.mark.parametrize("batch, length, streams, hidden", [(1, 1, 4, 128), (3, 11, 2, 130), (5, 13, 3, 127)])
def test_blocks_end_anywhere(batch, length, streams, hidden):
  same(inputs(batch, length, streams, hidden), both)


def test_sums_over_streams_on_the_matrix_unit(monkeypatch):
  """What v6e and TPU7x do; interpreted kernels otherwise take v5p's way."""
  monkeypatch.setitem(kernel_blocks.WIDE_UNIT, "v5p", True)
  same(inputs(1, 33, 4, 129), lambda **arrays: both(**arrays))


@pytest.mark.parametrize("tokens", [16, 130])
def test_float32_weights_keep_their_bits_beside_bfloat16_streams(tokens):
  """Projections of bfloat16 streams are as exact as float32 ones: nothing of fn is rounded away, whether the kernel cuts it
  into parts, as for a few tokens, or XLA before it."""
  arrays = inputs(1, tokens, 4, 256)
  streams = arrays["streams"].astype(jnp.bfloat16)
  weights = {name: arrays[name] for name in ("fn", "base", "scale")}
  got = collapse(streams, **weights, **STATIC, implementation="interpret")
  want = collapse(streams.astype(jnp.float32), **weights, **STATIC, implementation="reference")
  for a, b in zip(got[1:], want[1:], strict=True):
    np.testing.assert_allclose(a, b, atol=3e-6)


def test_more_streams_than_a_row_of_lanes_holds_are_refused():
  arrays = inputs(1, 2, 6, 8)
  with pytest.raises(NotImplementedError, match="at most 5 streams"):
    both(**arrays, implementation="interpret")
