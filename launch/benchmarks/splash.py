"""JAX's own splash attention on our operands, as the benches of speed and of memory compile it beside the kernels.

It knows no entries, documents or selections: who sees which key must be one dense mask, made in the same program.

Axis letters: S queries   H heads   T entries   d head width
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

from launch.benchmarks.kernels.cases import SPLASH_BLOCK
from pallas_kernels import bits
from pallas_kernels.selection import Selection


def attend(q_1SHd: jax.Array, window_kv_1Sd: jax.Array, entries_1Td: jax.Array, selection: Selection, sink_H: jax.Array,
           places: dict[str, jax.Array], window: int, scale: float) -> jax.Array:
  """`sparse_attention.attend` of one row, [1, S, H, d]; `places` as in `mask`."""
  run = splash.make_splash_mqa_single_device(mask(selection, places, window)[None],
                                             block_sizes=splash.BlockSizes(*[SPLASH_BLOCK] * 8))
  for name in ("fwd_mask_info", "dq_mask_info", "dkv_mask_info"):  # inside jit it takes its own flag for an array
    setattr(run, name, getattr(run, name)._replace(is_dynamic_mask=True))
  keys = jnp.concatenate([window_kv_1Sd[0], entries_1Td[0]])
  q_HSd = (q_1SHd[0] * scale).astype(q_1SHd.dtype).swapaxes(0, 1)
  return run(q_HSd, keys, keys, sinks=sink_H).swapaxes(0, 1)[None]


def mask(selection: Selection, places: dict[str, jax.Array], window: int) -> jax.Array:
  """bool [S, S + T]: the window's keys, and the selected visible entries.

  Args:
    places: positions, segment_ids int32 [1, S], entry_last, entry_segment int32 [1, T].
  """
  position, segment = places["positions"][0], places["segment_ids"][0]
  apart = position[:, None] - position[None, :]
  near = (apart >= 0) & (apart < window) & (segment[:, None] == segment[None, :]) & (segment > 0)[:, None]
  num_entries = places["entry_last"].shape[1]
  return jnp.concatenate([near, bits.unpack(bits.words_of(selection, num_entries, places), num_entries)[0]], 1)
