"""The sparse form's backward kernel: gradients of the queries, of the window keys, and of each gathered row by itself.

The formulas are those of `kernel_backward` (report 2.3.1). A row's gradient leaves in float32: an entry's is the sum over
all queries that selected it, which `sparse_rows.add_rows` makes.

Axis letters: N all steps   H heads   d head width   R rows of a step   U keys of a tile   w words of a packed row
              B batch   V blocks of window keys
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu
from pallas_kernels.sparse_attention import sparse_plan, sparse_table, tiles
from pallas_kernels.tpu import LANES, matmul, matmul_t, t_matmul, widen


def gradients(chunk: Any, rows: Any, words: Any, operands: Any, results: Any, plan: Any, options: Any) -> Any:
  """Gradients of one chunk's queries.

  Args:
    chunk, rows, words: as in `sparse_forward.attend_rows`.
    operands: q [N, R, d], near keys, near words, sink logits, out and d_out [N, R, d], lse and d_lse [2, N, R / 128, 128].
    results: dq [N, R, d] and d_near float32 [B, V, 2 * reach, d], of which this chunk's part is written in place.

  Returns:
    `results`, d_rows float32 [C / queries, queries, K, d], d_sink float32 [runs of the chunk, H, 128].
  """
  spec = sparse_plan.specs(plan)
  vector = lambda width, dtype=jnp.float32: pltpu.VMEM((plan.rows, width), dtype)
  q, anywhere = operands[0], pl.BlockSpec(memory_space=pl.ANY)
  steps, pair = spec["steps"], spec["statistics"]
  statistics = pl.BlockSpec((2, *pair.block_shape), lambda *at: (0, *pair.index_map(*at)))
  grid_spec = pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1, grid=(plan.chunk, plan.run, plan.places // plan.tile),
      in_specs=[sparse_plan.rows_spec(plan, rows.shape[-1]), spec["words"], steps, spec["near_keys"], spec["near_words"],
                spec["sink"], steps, steps, statistics, anywhere, anywhere],
      out_specs=[steps, spec["near_keys"], sparse_plan.rows_spec(plan, plan.width),
                 pl.BlockSpec((None, plan.heads, LANES), lambda i, *_: (i, 0, 0))],
      scratch_shapes=[vector(plan.width, q.dtype), vector(LANES), vector(LANES), vector(plan.width)])
  shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
  return pl.pallas_call(
      functools.partial(_body, plan=plan, window=options.window, scale=options.scale), grid_spec=grid_spec,
      out_shape=[*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results), shape(*rows.shape[:-1], plan.width),
                 shape(plan.chunk, plan.heads, LANES)],
      input_output_aliases={10: 0, 11: 1},
      compiler_params=tpu.compiler_params(options.chip, "parallel", "arbitrary", "arbitrary"),
      interpret=options.interpret, name="attend_rows_backward",
  )(jnp.reshape(chunk, 1), rows, words, *operands, *results)


def _body(_, rows, words, q, near_keys, near_words, sink, out, d_out, lse_and_d_lse, dq_before, d_near_before, dq, d_near,
          d_rows, d_sink, qs, lse2, delta, dq_sum, *, plan, window, scale):
  """One tile of one step. Kept between its tiles: qs, lse in base 2, delta * ln 2, dq_sum; in a run: d_near, d_sink."""
  step, tile, count = pl.program_id(1), pl.program_id(2), plan.places // plan.tile

  def at(number, part):
    pl.when(tile == number)(part) if count > 1 else part()

  def key_gradients(r, keys, seen):
    """Adds to dq_sum of rows r; returns the gradient of `keys`."""
    g = d_out[r]
    p = jnp.exp2(tiles.hide(matmul_t(qs[r], keys), seen) - widen(lse2[r], keys.shape[0]))
    ds = p * (matmul_t(g, keys) * tpu.LN2 - widen(delta[r], keys.shape[0]))  # ln 2 undoes log2(e) in qs
    p, ds = p.astype(keys.dtype), ds.astype(keys.dtype)
    dq_sum[r] += matmul(ds, keys)
    return t_matmul(p, g) + t_matmul(ds, qs[r])

  @pl.when((step == 0) & (tile == 0))
  def _():
    d_near[...], d_sink[...] = jnp.zeros_like(d_near), jnp.zeros_like(d_sink)

  def start():
    qs[...] = tiles.scaled(q[...], scale)
    dq_sum[...] = jnp.zeros_like(dq_sum)
    for chunk in range(plan.rows // LANES):
      r = pl.ds(chunk * LANES, LANES)
      dot = (out[r].astype(jnp.float32) * d_out[r].astype(jnp.float32)).sum(-1, keepdims=True)
      delta[r] = (dot - tiles.column(lse_and_d_lse[1, pl.ds(chunk, 1)])) * tpu.LN2
      lse2[r] = tiles.column(lse_and_d_lse[0, pl.ds(chunk, 1)] * tpu.LOG2E)
    share = jnp.exp2(jnp.minimum(tiles.per_row(sink[...], plan) - lse2[...], 0.0)) * delta[...]
    d_sink[...] += share.reshape(plan.queries, plan.heads, LANES).sum(0)
    if window:
      d_near[...] += key_gradients(pl.ds(0, plan.rows), near_keys[...], tiles.key_mask(near_words[...], 0, 2 * plan.reach))

  at(0, start)
  for query in range(plan.queries):
    r = pl.ds(query * plan.heads, plan.heads)
    seen = tiles.key_mask(words[pl.ds(query, 1)], tile, plan.tile)
    d_rows[query] = key_gradients(r, sparse_table.unpack(rows[query]), seen)

  def finish():
    dq[...] = (dq_sum[...] * (scale * tpu.LOG2E)).astype(dq.dtype)

  at(count - 1, finish)
