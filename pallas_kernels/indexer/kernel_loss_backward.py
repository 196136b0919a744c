"""Backward pass of the indexer's KL loss (report 2.3.1; V3.2 2.1.1) on TPU: gradients of the index queries, head weights
and keys.

Mass and scores of a tile are computed again. With e = d loss / d score [bq, bk] and M = e where dot > 0, else 0
[bq * h, bk], all three gradients come from two matmuls, and the head weights stay outside of the tile:

    d queries_h = w_h (M_h keys)      d weights_h = queries_h . (M_h keys), since sum_t M_t dot_t = q . sum_t M_t key_t
    d keys += M^T (w queries)         float32 [T, c] in VMEM for the whole row, one copy per core

Axis letters: B batch   S queries   T entries   h index heads   c index width   H heads   d head width   W words
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu
from pallas_kernels.indexer.tiles import LossCall, Sizes, head_dots, masses, prepare, tile_mask, tile_of, weigh
from pallas_kernels.tpu import LANES

TILE = {"v5p": (1024, 512), "v6e": (2048, 512), "tpu7x": (1024, 1024)}  # ((query, head) rows, entries)


def _kernel(ranges, q, w, k, a, lse, entries, words, factors, dq, dw, dk, teacher, base, wq, dqa, dka, sem, *,
            sizes: Sizes, scale: float):
  core, row, step, j = (pl.program_id(axis) for axis in range(4))
  packed = ranges[sizes.row_block(core, row, step)]

  @pl.when((step == 0) & (j == 0))
  def _():
    dka[...] = jnp.zeros_like(dka)

  @pl.when(j == 0)
  def _():
    prepare(a[0], lse[0], teacher, base, scale)
    weighted = q[0].astype(jnp.float32) * w[0].astype(jnp.float32)[:, :, None]
    wq[...] = weighted.astype(wq.dtype).reshape(wq.shape)
    dqa[...] = jnp.zeros_like(dqa)

  @pl.when(j < packed >> 16)
  def _():
    tile = tile_of(packed, j)
    chosen = tile_mask(words[0], tile, sizes.entries)
    mass = masses(teacher[...], base[...], entries[0], chosen)
    dots = head_dots(q[0], k[0])
    f = factors[0]
    towards = f[:, 0:1] * jnp.exp(weigh(dots, w[0]) - f[:, 1:2]) - f[:, 2:3] * mass
    moved = jnp.where(dots > 0, jnp.where(chosen, towards, 0)[:, None, :], 0)
    moved = moved.astype(wq.dtype).reshape(wq.shape[0], sizes.entries)
    dqa[...] += tpu.matmul(moved, k[0])
    dka[pl.ds(pl.multiple_of(tile * sizes.entries, sizes.entries), sizes.entries)] += tpu.t_matmul(moved, wq[...])

  @pl.when(j == sizes.steps - 1)
  def _():
    pulled = dqa[...].reshape(q.shape[1:])
    dq[0] = (pulled * w[0].astype(jnp.float32)[:, :, None]).astype(dq.dtype)
    dw[0] = (pulled * q[0].astype(jnp.float32)).sum(-1).astype(dw.dtype)

    @pl.when(step == sizes.blocks - 1)
    def _():
      copy = pltpu.make_async_copy(dka, dk.at[core, row], sem)
      copy.start()
      copy.wait()


def gradients(static: Any, arrays: Any, words: Any, kept: Any, g: jax.Array) -> Any:
  """-> d queries [B, S, h, c], d weights [B, S, h], d keys [B, T, c], in the operands' dtypes.

  Args:
    static: (scale of the attention's logits, interpret).
    arrays: (queries, weights, keys, attention queries, entries, lse); words: int32 [B, S, W].
    kept: float32 [B, S, 2], log of the sum of exp(score) and 1 / (sum of mass); g: [B, S], gradient of the loss.
  """
  scale, interpret = static
  call = LossCall.of(arrays, words, TILE, interpret)
  sizes, (q, w, _, a, *_) = call.sizes, call.padded
  batch, length, _ = words.shape
  inverse = kept[..., 1]
  g = jnp.where(inverse > 0, g, 0)  # without any mass the loss is 0, whatever the scores
  factors = tpu.pad_axis(jnp.stack([g, kept[..., 0], g * inverse], -1), 1, sizes.all_queries)
  heads, (rows, width) = q.shape[2], (sizes.queries * q.shape[2], q.shape[3])
  grid = pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1, grid=call.grid, in_specs=[*call.in_specs, call.per_query(3)],
      out_specs=[call.per_query(heads, width), call.per_query(heads), pl.BlockSpec(memory_space=pl.ANY)],
      scratch_shapes=[pltpu.VMEM((sizes.queries * a.shape[2], a.shape[3]), a.dtype),
                      pltpu.VMEM((sizes.queries * a.shape[2], LANES), jnp.float32), pltpu.VMEM((rows, width), q.dtype),
                      pltpu.VMEM((rows, width), jnp.float32), pltpu.VMEM((sizes.all_entries, width), jnp.float32),
                      pltpu.SemaphoreType.DMA])
  dq, dw, dk = pl.pallas_call(
      functools.partial(_kernel, sizes=sizes, scale=scale), grid_spec=grid,
      out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(w.shape, w.dtype),
                 jax.ShapeDtypeStruct((sizes.cores, batch, sizes.all_entries, width), jnp.float32)],
      compiler_params=tpu.compiler_params(call.chip, "parallel", "arbitrary", "arbitrary", "arbitrary"),
      interpret=interpret, name="index_loss_backward")(call.ranges, *call.padded, factors)
  queries, weights, keys = arrays[:3]
  dk = dk.sum(0)[:, :keys.shape[1], :keys.shape[2]].astype(keys.dtype)
  return dq[:, :length, :queries.shape[2], :queries.shape[3]], dw[:, :length, :weights.shape[2]], dk
