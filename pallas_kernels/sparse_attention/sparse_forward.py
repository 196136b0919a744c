"""The sparse form's forward kernel: each query meets its own gathered rows, all queries of a step the same window keys.

Softmax (report 2.3, eqs. 19 and 27) runs in base 2 as in the masked form. The queries of a step are independent
straight-line code: the compiler overlaps the softmax of one with the matmuls of another.

Axis letters: N all steps   H heads   d head width   R rows of a step   U places of a tile   w words of a packed row
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
from pallas_kernels.sparse_attention import sparse_copies, sparse_plan, sparse_table, tiles
from pallas_kernels.tpu import LANES, matmul, matmul_t, widen


def attend_rows(chunk: Any, rows: Any, words: Any, operands: Any, direct: Any, results: Any, plan: Any, options: Any
                ) -> Any:
  """Attention of one chunk's queries.

  Args:
    chunk: int32 scalar, its number.
    rows: [C / queries, queries, staged places, w], the gathered entries, packed.
    words: int32 [C / queries, queries, ...], bits of those places that hold an entry.
    operands: q [N, R, d], and what `sparse_plan.near` and `sink_logits` give.
    direct: where the plan has direct places, the table of entries and the row numbers of these places.
    results: out [N, R, d] and lse [N, R / 128, 128], of which this chunk's part is written in place.
  """
  spec = sparse_plan.specs(plan)
  vector = lambda width, dtype=jnp.float32: pltpu.VMEM((plan.rows, width), dtype)
  anywhere, first = pl.BlockSpec(memory_space=pl.ANY), 1 + 6 + len(direct)
  grid_spec = pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1, grid=(plan.chunk, plan.run, plan.places // plan.tile),
      in_specs=[sparse_plan.rows_spec(plan, rows.shape[-1]), spec["words"], spec["steps"], spec["near_keys"],
                spec["near_words"], spec["sink"], *[anywhere, spec["direct"]][:len(direct)], anywhere, anywhere],
      out_specs=[spec["steps"], spec["statistics"]],
      scratch_shapes=[vector(plan.width, operands[0].dtype), vector(LANES), vector(LANES), vector(plan.width),
                      *sparse_copies.scratch(plan, *direct[:1])])
  return pl.pallas_call(
      functools.partial(_body, plan=plan, window=options.window, scale=options.scale), grid_spec=grid_spec,
      out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results], input_output_aliases={first: 0, first + 1: 1},
      compiler_params=sparse_copies.compiler_params(
          plan, tpu.compiler_params(options.chip, "parallel", "arbitrary", "arbitrary")),
      interpret=options.interpret, name="attend_rows",
  )(jnp.reshape(chunk, 1), rows, words, *operands, *direct, *results)


def _body(_, rows, words, q, near_keys, near_words, sink, *refs, plan, window, scale):
  """One tile of one step. Kept between its tiles: qs, and of each row the largest logit, the sum and the weighted keys."""
  tile, count = pl.program_id(2), plan.places // plan.tile
  direct, refs = (refs[:2], refs[2:]) if plan.direct else ((), refs)
  _, _, out, lse, qs, top, total, acc, *landing = refs  # the first two: out and lse before this call
  copies = sparse_copies.of(plan, *direct, *landing)

  def at(number, part):
    pl.when(tile == number)(part) if count > 1 else part()

  def start():
    copies.begin()
    qs[...] = tiles.scaled(q[...], scale)
    logit = tiles.per_row(sink[...], plan)
    one_lane = lax.broadcasted_iota(jnp.int32, logit.shape, 1) == 0  # the lanes of `total` are summed in the end
    if window:
      keys = near_keys[...]
      s = tiles.hide(matmul_t(qs[...], keys), tiles.key_mask(near_words[...], 0, 2 * plan.reach))
      top[...] = jnp.maximum(logit, s.max(-1, keepdims=True))
      p = jnp.exp2(s - widen(top[...], s.shape[1]))
      total[...] = tpu.lane_sums(p) + jnp.where(one_lane, jnp.exp2(logit - top[...]), 0.0)
      acc[...] = matmul(p.astype(keys.dtype), keys)
    else:
      top[...], total[...], acc[...] = logit, jnp.where(one_lane, 1.0, 0.0), jnp.zeros_like(acc)

  def attend_tile(last):
    copies.wait()
    for query in range(plan.queries):
      r = pl.ds(query * plan.heads, plan.heads)
      keys = sparse_table.unpack(copies.join(rows[query], query))
      s = tiles.hide(matmul_t(qs[r], keys), tiles.key_mask(words[pl.ds(query, 1)], tile, plan.tile))
      copies.start_next(query, 0)
      new = jnp.maximum(top[r], s.max(-1, keepdims=True))
      copies.start_next(query, 1)
      p, keep = jnp.exp2(s - widen(new, plan.tile)), jnp.exp2(top[r] - new)
      copies.start_next(query, 2)
      sums = keep * total[r] + tpu.lane_sums(p)
      values = acc[r] * widen(keep, plan.width) + matmul(p.astype(keys.dtype), keys)
      copies.start_next(query, 3)
      if last:
        sums = sums.sum(-1, keepdims=True)
        out[r] = (values * (1 / sums)).astype(out.dtype)
        top[r] = new + jnp.log2(sums)
      else:
        top[r], total[r], acc[r] = new, sums, values

  def finish():
    attend_tile(True)
    for row in range(plan.rows // LANES):
      lse[row] = jnp.transpose(top[pl.ds(row * LANES, LANES)])[0] * tpu.LN2
    copies.end()

  at(0, start)
  if count > 1:
    pl.when(tile < count - 1)(lambda: attend_tile(False))
  at(count - 1, finish)
