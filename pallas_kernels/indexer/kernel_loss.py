"""The indexer's KL loss (report 2.3.1; V3.2 2.1.1) on TPU: attention mass and index score of an entry meet in registers and
add up online.

    HBM    attention queries [bq, H, d] and index queries [bq, h, c] once; tiles of entries and keys, from the first to
           the last one in which a query of the block has an entry; the selection's bits
    VMEM   m = running maximum of the scores, and with it three sums over the entries of a query:
           total = sum mass     cross = sum mass (log mass - (score - m))     norm = sum exp(score - m)
    result KL = cross / total - log total + log norm

With the maximum inside `cross` no number is larger than the spread of the scores, so nothing cancels. The gradient of a
score is g (exp(score - m) / norm - mass / total): of this pass the backward one needs two numbers per query.

Axis letters: B batch   S queries   T entries   h index heads   c index width   H heads   d head width   W words
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import bits, tpu
from pallas_kernels.blocks import MASKED
from pallas_kernels.indexer import kernel_loss_backward
from pallas_kernels.indexer.tiles import LossCall, Sizes, head_dots, masses, prepare, tile_mask, tile_of, weigh
from pallas_kernels.names import INDEX_LOSS, named
from pallas_kernels.selection import Selection
from pallas_kernels.tpu import LANES

TILE = {"v5p": (1024, 512), "v6e": (2048, 512), "tpu7x": (1024, 1024)}  # ((query, head) rows, entries)


def _kernel(ranges, q, w, k, a, lse, entries, words, out, teacher, base, top, total, cross, norm, *, sizes: Sizes,
            scale: float):
  core, row, step, j = (pl.program_id(axis) for axis in range(4))
  packed = ranges[sizes.row_block(core, row, step)]

  @pl.when(j == 0)
  def _():
    prepare(a[0], lse[0], teacher, base, scale)
    top[...] = jnp.full_like(top, MASKED)
    for x in (total, cross, norm):
      x[...] = jnp.zeros_like(x)

  @pl.when(j < packed >> 16)
  def _():
    chosen = tile_mask(words[0], tile_of(packed, j), sizes.entries)
    mass = masses(teacher[...], base[...], entries[0], chosen)
    scores = jnp.where(chosen, weigh(head_dots(q[0], k[0]), w[0]), MASKED)
    new = jnp.maximum(top[...], scores.max(-1, keepdims=True))
    shifted = scores - tpu.widen(new, sizes.entries)
    terms = jnp.where(mass > 0, mass * (jnp.log(mass) - shifted), 0)
    norm[...] = norm[...] * jnp.exp(top[...] - new) + tpu.lane_sums(jnp.where(chosen, jnp.exp(shifted), 0))
    cross[...] += total[...] * (new - top[...]) + tpu.lane_sums(terms)
    total[...] += tpu.lane_sums(mass)
    top[...] = new

  @pl.when(j == sizes.steps - 1)
  def _():
    sum_mass, sum_cross, sum_norm = (x[...].sum(-1, keepdims=True) for x in (total, cross, norm))
    known = sum_mass > 0
    sum_mass, log_norm = jnp.where(known, sum_mass, 1), jnp.log(jnp.where(sum_norm > 0, sum_norm, 1))
    kl = jnp.where(known, sum_cross / sum_mass - jnp.log(sum_mass) + log_norm, 0)
    lane = lax.broadcasted_iota(jnp.int32, top.shape, 1)
    out[0] = jnp.where(lane == 0, kl, jnp.where(lane == 1, top[...] + log_norm, jnp.where(known, 1 / sum_mass, 0)))


def _forward(static, arrays, words):
  """float32 [B, S, 3]: KL, log of the sum of exp(score), and 1 / (sum of mass), 0 where that sum is 0."""
  scale, interpret = static
  call = LossCall.of(arrays, words, TILE, interpret)
  sizes, heads = call.sizes, call.padded[4].shape[2]
  rows = sizes.queries * heads
  numbers = [pltpu.VMEM((sizes.queries, LANES), jnp.float32)] * 4
  grid = pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1, grid=call.grid, in_specs=call.in_specs, out_specs=call.per_query(LANES),
      scratch_shapes=[pltpu.VMEM((rows, call.padded[3].shape[3]), call.padded[3].dtype),
                      pltpu.VMEM((rows, LANES), jnp.float32), *numbers])
  out = pl.pallas_call(
      functools.partial(_kernel, sizes=sizes, scale=scale), grid_spec=grid,
      out_shape=jax.ShapeDtypeStruct((words.shape[0], sizes.all_queries, LANES), jnp.float32),
      compiler_params=tpu.compiler_params(call.chip, "parallel", "arbitrary", "arbitrary", "arbitrary"),
      interpret=interpret, name="index_loss")(call.ranges, *call.padded)
  return out[:, :words.shape[1], :3]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(static, arrays, words):
  return _forward(static, arrays, words)[..., 0]


def _loss_forward(static, arrays, words):
  numbers = _forward(static, arrays, words)
  return numbers[..., 0], (arrays, words, *named(INDEX_LOSS, numbers[..., 1:]))


def _loss_backward(static, kept, g):
  return (*kernel_loss_backward.gradients(static, *kept, g), None, None, None), None


_loss.defvjp(_loss_forward, _loss_backward)


def kl_loss(queries: jax.Array, weights: jax.Array, keys: jax.Array, attention_queries: jax.Array, entries: Any,
            lse: jax.Array, selection: Selection, *, positions: jax.Array, segment_ids: jax.Array,
            entry_last: jax.Array, entry_segment: jax.Array, scale: float, interpret: bool) -> jax.Array:
  """See `pallas_kernels.indexer.kl_loss`; float32."""
  if not keys.shape[1]:
    return jnp.zeros(positions.shape, jnp.float32)
  places = dict(positions=positions, segment_ids=segment_ids, entry_last=entry_last, entry_segment=entry_segment)
  words = bits.words_of(selection, keys.shape[1], places)
  keys = jnp.where((entry_segment > 0)[..., None], keys, 0)  # a gradient of zero is still multiplied by them
  return _loss((scale, interpret), (queries, weights, keys, attention_queries, entries, lse), words)
