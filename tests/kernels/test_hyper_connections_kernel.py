"""The mHC kernels where blocks end: tokens and hidden sizes around every internal tile, every chip's way, bfloat16; too many
streams."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import tpu
from pallas_kernels.hyper_connections import collapse, expand_collapse

STATIC = dict(norm_eps=1e-6, eps=1e-6, iterations=20)
CHIPS = {chip.name: chip for chip in (tpu.V5P, tpu.V6E, tpu.TPU7X)}
# As a share of an array's largest number; bfloat16: as in the cases of the walk.
TOLERANCE = {"float32": 2e-5, "bfloat16": 3e-2}


def inputs(batch, length, streams, hidden):
  """float32 arguments of expand_collapse."""
  rng = np.random.default_rng(length + hidden)
  columns = (2 + streams) * streams
  shapes = dict(streams=(batch, length, streams, hidden), update=(batch, length, hidden), post=(batch, length, streams),
                comb=(batch, length, streams, streams), fn=(streams * hidden, columns), base=(columns,), scale=(3,))
  arrays = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
  return {**arrays, "fn": arrays["fn"] * np.float32((streams * hidden) ** -0.5)}


@functools.partial(jax.jit, static_argnames=("op", "implementation"))
def values_and_gradients(arrays, op, implementation):
  """Results of an op and the gradients of their sum weighted with cosines."""
  def run(arrays):
    results = jax.tree.leaves(op(**arrays, implementation=implementation))
    return sum((x * jnp.cos(jnp.arange(x.size).reshape(x.shape))).sum() for x in results), results
  return jax.value_and_grad(run, has_aux=True)(arrays)


def same(arrays, dtype="float32"):
  """Streams and update in `dtype`, beside the formula with the same arrays. In float32 throughout the formula would be no
  measure of what is rounded to bfloat16 and cancels then: d scale of 17 tokens differs by 5%, kernel's and formula's alike.
  """
  op = functools.partial(expand_collapse, **STATIC)  # a new one each time: programs differ by chip
  narrow = {name: arrays[name].astype(dtype) for name in ("streams", "update")}
  (_, got), got_gradients = values_and_gradients({**arrays, **narrow}, op, "interpret")
  (_, want), want_gradients = values_and_gradients({**arrays, **narrow}, op, "reference")
  for a, b in zip(jax.tree.leaves((got, got_gradients)), jax.tree.leaves((want, want_gradients)), strict=True):
    a, b = (np.asarray(x, np.float32) for x in (a, b))
    np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE[dtype] * max(np.abs(b).max(), 1e-30))


@pytest.mark.parametrize("batch, length, streams, hidden", [
  (3, 11, 2, 130), (5, 13, 3, 127), (1, 17, 4, 1025),  # more lanes than any loop takes at a time
  *(pytest.param(*case, marks=pytest.mark.long) for case in ((1, 1, 4, 128), (1, 17, 4, 513), (1, 130, 4, 1025),
                                                             (1, 3, 4, 2049)))])
def test_blocks_end_anywhere(batch, length, streams, hidden):
  same(inputs(batch, length, streams, hidden))


IN_SUITE = (("v6e", "bfloat16", 33),)  # the v5p's way is that of all other interpreted kernels


@pytest.mark.parametrize("chip, dtype, tokens", [
    *IN_SUITE, *(pytest.param(chip, dtype, tokens, marks=pytest.mark.long) for chip in CHIPS for dtype in TOLERANCE
                 for tokens in (15, 16, 17, 33, 127, 128, 129) if (chip, dtype, tokens) not in IN_SUITE)])
def test_every_chips_way(monkeypatch, chip, dtype, tokens):
  """Sums over streams on the vector unit, v5p, and on the matrix unit; up to 128 tokens fn is cut inside of the kernel."""
  monkeypatch.setattr(tpu, "current_chip", lambda interpret: CHIPS[chip])
  same(inputs(1, tokens, 4, 129), dtype)


@pytest.mark.parametrize("tokens", [16, 130])
def test_float32_weights_keep_their_bits_beside_bfloat16_streams(tokens):
  """Projections of bfloat16 streams are as exact as float32 ones: nothing of fn is rounded away, whether the kernel cuts it
  into parts, as for a few tokens, or XLA before it."""
  arrays = inputs(1, tokens, 4, 256)
  streams = arrays["streams"].astype(jnp.bfloat16)
  run = lambda implementation: jax.jit(functools.partial(collapse, **STATIC, implementation=implementation))
  weights = {name: arrays[name] for name in ("fn", "base", "scale")}
  got, want = run("interpret")(streams, **weights), run("reference")(streams.astype(np.float32), **weights)
  for a, b in zip(got[1:], want[1:], strict=True):
    np.testing.assert_allclose(a, b, atol=3e-6)


def test_more_streams_than_a_row_of_lanes_holds_are_refused():
  arrays = inputs(1, 2, 6, 8)
  with pytest.raises(NotImplementedError, match="at most 5 streams"):
    expand_collapse(**arrays, **STATIC, implementation="interpret")
