"""Backward pass of the masked form: one pass, five matmuls a tile; the gradient of all entries stays in VMEM.

Of the attention of report 2.3, with logits s and probabilities p = exp(s - lse), recomputed (Dao et al. 2022):
dp = d_out . key, ds = p (dp - delta) where delta = sum(out * d_out) - d_lse. A key's gradient is its part as value
(p . d_out) and as key (ds . q).

Axis letters: B batch   S queries   H heads   T entries   d head width   W words   R rows of a block   U keys of a tile
              P parts of the grid's parallel axis   V blocks of window keys
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu
from pallas_kernels.sparse_attention import tiles
from pallas_kernels.tpu import LANES, matmul, matmul_t, t_matmul, widen

TILE = {"v5p": (1024, 1024), "v6e": (2048, 512), "tpu7x": (1024, 512)}  # rows, entries: fewest bundles


def backward(q: jax.Array, window_kv: jax.Array, entries: Any, sink: jax.Array, words: Any,
             segments: tuple[jax.Array, jax.Array], out: jax.Array, lse: jax.Array, d_out: jax.Array, d_lse: jax.Array,
             options: Any) -> Any:
  """-> gradients of q, window_kv, entries and sink, in the shapes and dtypes of `attend`'s arguments."""
  past = window_kv.shape[1] - q.shape[1]
  plan = _plan(q, entries, options, past)
  counts, *operands = tiles.operands(q, window_kv, entries, sink, words, segments, options.window, plan)
  rows, in_specs, near = tiles.specs(plan)
  parts = plan.batch * plan.parts
  statistics = pl.BlockSpec((2, None, None, plan.rows // LANES, LANES),
                            lambda part, step, *_: (0, *plan.block(part, step), 0, 0))
  vector = lambda width, dtype=jnp.float32: pltpu.VMEM((plan.rows, width), dtype)
  grid_spec = pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2, grid=(parts, plan.blocks // plan.parts, jnp.maximum(counts.max(), 1)),
      in_specs=[*in_specs, rows, rows, statistics],
      out_specs=[rows, near, pl.BlockSpec(memory_space=pl.ANY),
                 pl.BlockSpec((None, plan.heads, LANES), lambda part, *_: (part, 0, 0))],
      scratch_shapes=[vector(plan.width, q.dtype), vector(LANES), vector(LANES), vector(plan.width),
                      pltpu.VMEM((plan.tiles * plan.entries, plan.width), jnp.float32), pltpu.SemaphoreType.DMA])
  shape = lambda *sizes, dtype=jnp.float32: jax.ShapeDtypeStruct(sizes, dtype)
  dq, d_near, d_entries, d_sink = pl.pallas_call(
      functools.partial(_body, plan=plan, window=options.window, scale=options.scale), grid_spec=grid_spec,
      out_shape=[shape(plan.batch, plan.blocks * plan.rows, plan.width, dtype=q.dtype),
                 shape(plan.batch, plan.windows, 2 * plan.reach, plan.width),
                 shape(parts, plan.tiles * plan.entries, plan.width), shape(parts, plan.heads, LANES)],
      compiler_params=tpu.compiler_params(options.chip, "parallel", "arbitrary", "arbitrary"),
      interpret=options.interpret, name="masked_attention_backward",
  )(counts, *operands, tiles.as_rows(out, plan), tiles.as_rows(d_out, plan),
    jnp.stack([tiles.as_statistics(lse, plan), tiles.as_statistics(d_lse, plan)]))
  d_entries = d_entries.reshape(plan.batch, plan.parts, *d_entries.shape[1:]).sum(1)
  return (tiles.from_rows(dq, q.shape, plan), _cut(tiles.from_near_keys(d_near, past), window_kv), _cut(d_entries, entries),
          (-tpu.LOG2E * d_sink[..., 0].sum(0)[:sink.shape[0]]).astype(sink.dtype))


def _cut(gradient, x):
  return gradient[:, :x.shape[1], :x.shape[2]].astype(x.dtype)


def _plan(q, entries, options, past=0):
  """The table's tile, or the widest one with which the gradient of all entries fits.

  Raises:
    NotImplementedError: there is none.
  """
  rows, widest = TILE[options.chip.name]
  for wide in (widest, widest // 2):
    plan = tiles.make_plan(q.shape, entries.shape[1], q.dtype.itemsize, options, rows, wide, True, past)
    if _vmem_bytes(plan, q.dtype.itemsize) <= options.chip.vmem * 2**20:
      return plan
  raise NotImplementedError(
      f"backward of masked attention: the gradient of {entries.shape[1]} entries of width {q.shape[3]}, beside a window of "
      f"{options.window} keys of {q.dtype.itemsize} bytes a number, does not fit the "
      f"{options.chip.vmem} MiB of VMEM that a kernel may use on {options.chip.name}")


def _vmem_bytes(plan, itemsize):
  """What the compiler is known to take: sums, double-buffered blocks, and room for a tile's logits in flight, of float32
  (matmuls in several passes) far more of it: 45 to 53 bytes a logit of what it spills, and a little to spare."""
  sums = plan.tiles * plan.entries * plan.width * 4
  rows = plan.rows * (plan.width * (9 * itemsize + 4) + 2 * LANES * 4)
  keys = plan.width * (2 * plan.entries * itemsize + plan.reach * (4 * itemsize + 16))
  return sums + rows + keys + plan.rows * max(plan.entries, 2 * plan.reach) * (11 if itemsize == 2 else 68)


def _body(counts, ids, q, words, entries, near_words, near_keys, sink, out, d_out, lse_and_d_lse, dq, d_near, d_entries,
          d_sink, qs, lse2, delta, dq_sum, entry_sum, semaphore, *, plan, window, scale):
  """One tile of one block. Kept between its tiles: qs, lse in base 2, delta * ln 2, dq_sum; between blocks: entry_sum."""
  part, step, j = (pl.program_id(axis) for axis in range(3))
  number = plan.list_of(*plan.block(part, step))
  last_tile = j == pl.num_programs(2) - 1

  def gradients(keys, seen):
    """Adds to dq_sum; returns the gradient of `keys`."""
    g = d_out[...]
    p = jnp.exp2(tiles.hide(matmul_t(qs[...], keys), seen) - widen(lse2[...], keys.shape[0]))
    ds = p * (matmul_t(g, keys) * tpu.LN2 - widen(delta[...], keys.shape[0]))  # ln 2 undoes log2(e) in qs
    p, ds = p.astype(keys.dtype), ds.astype(keys.dtype)
    dq_sum[...] += matmul(ds, keys)
    return t_matmul(p, g) + t_matmul(ds, qs[...])

  @pl.when((step == 0) & (j == 0))
  def _():
    d_sink[...] = jnp.zeros_like(d_sink)

    def clear(tile, _):
      entry_sum[_tile_rows(tile, plan)] = jnp.zeros((plan.entries, plan.width), jnp.float32)
      return 0
    lax.fori_loop(0, plan.tiles, clear, 0)

  @pl.when((lax.rem(step, plan.run) == 0) & (j == 0))
  def _():
    d_near[...] = jnp.zeros_like(d_near)

  @pl.when(j == 0)
  def _():
    qs[...] = tiles.scaled(q[...], scale)
    dq_sum[...] = jnp.zeros_like(dq_sum)
    for chunk in range(plan.rows // LANES):
      rows = pl.ds(chunk * LANES, LANES)
      dot = (out[rows].astype(jnp.float32) * d_out[rows].astype(jnp.float32)).sum(-1, keepdims=True)
      delta[rows] = (dot - tiles.column(lse_and_d_lse[1, pl.ds(chunk, 1)])) * tpu.LN2
      lse2[rows] = tiles.column(lse_and_d_lse[0, pl.ds(chunk, 1)] * tpu.LOG2E)
    share = jnp.exp2(jnp.minimum(tiles.per_row(sink[...], plan) - lse2[...], 0.0)) * delta[...]
    d_sink[...] += share.reshape(plan.queries, plan.heads, LANES).sum(0)
    first = tiles.first_keys(words, entries, near_words, near_keys, window, plan)
    if first is not None:
      d_keys = gradients(*first)
      if window:
        d_near[...] += d_keys[:2 * plan.reach]
      if plan.merged:
        entry_sum[...] += d_keys[-plan.entries:]

  if not plan.merged:
    @pl.when(j < counts[number])
    def tile():
      tile = tiles.tile_id(counts, ids, number, j, plan)
      entry_sum[_tile_rows(tile, plan)] += gradients(entries[...], tiles.key_mask(words[...], tile, plan.entries))

  @pl.when(last_tile)
  def _():
    dq[...] = (dq_sum[...] * (scale * tpu.LOG2E)).astype(dq.dtype)

  @pl.when(last_tile & (step == pl.num_programs(1) - 1))
  def _():
    copy = pltpu.make_async_copy(entry_sum, d_entries.at[part], semaphore)
    copy.start()
    copy.wait()


def _tile_rows(tile, plan):
  return pl.ds(pl.multiple_of(tile * plan.entries, plan.entries), plan.entries)
