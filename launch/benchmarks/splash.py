"""JAX's own splash attention on our operands, as the benches of speed and of memory compile it beside the kernels.

It knows no entries, positions or selections. Two ways to tell it who sees which key: one dense mask, made in the same
program, which says everything; or a rule that is known when the program is traced, with documents beside it. Tiles that the
rule hides are skipped and no mask of all pairs exists, but it can name neither selected entries nor, in a row of several
documents, which entries are whose. Either way entries stand behind the window's keys, and in training the log-sum-exp that
our kernels return is not to be had.

Axis letters: S queries   H heads   T entries   K keys, S + T and padding   d head width
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

from launch.benchmarks.kernels.cases import SPLASH_BLOCK
from pallas_kernels import bits, tpu
from pallas_kernels.selection import Selection

_DENSE = splash.BlockSizes(*[SPLASH_BLOCK] * 8)
# Queries and keys of a step, of all three kernels. Tried on V4-Pro's sliding layer, forward: 256 x 128, 256 x 256, and v5p
# 128 x 128, the others 512 x 256 and 512 x 512; the fastest is taken, v5p's of both ways (256 x 256 is 0.2% faster forward).
# Small ones multiply less that the window hides: both ways on v5p 8,280 cycles per token at 512 x 512, 7,300 at 512 x 128,
# 5,740 so.
RULE_BLOCKS = {"v5p": (256, 128), "v6e": (512, 256), "tpu7x": (512, 512)}


def attend(q_1SHd: jax.Array, window_kv_1Sd: jax.Array, entries_1Td: jax.Array, selection: Selection, sink_H: jax.Array,
           places: dict[str, jax.Array], window: int, scale: float) -> jax.Array:
  """`sparse_attention.attend` of one row, [1, S, H, d]; `places` as in `mask`."""
  dense_SK = tpu.pad_axis(mask(selection, places, window), 1, _whole(window_kv_1Sd.shape[1] + entries_1Td.shape[1]))
  run = splash.make_splash_mqa_single_device(dense_SK[None], block_sizes=_DENSE)
  return _run(run, True, q_1SHd, window_kv_1Sd, entries_1Td, sink_H, None, scale)


def attend_by_rule(q_1SHd: jax.Array, window_kv_1Sd: jax.Array, entries_1Td: jax.Array, sink_H: jax.Array,
                   places: dict[str, jax.Array], window: int, rate: int, scale: float) -> jax.Array:
  """`attend` to every visible entry: the same where the row is one document, or has no entries.

  Args:
    places: segment_ids int32 [1, S], entry_segment int32 [1, T].
    rate: tokens per entry.
  """
  length, num_entries = window_kv_1Sd.shape[1], entries_1Td.shape[1]
  keys = _whole(length + num_entries)
  static = splash_mask.MultiHeadMask([rule(length, keys, num_entries, window, rate)])
  of_queries, of_keys = RULE_BLOCKS[tpu.current_chip(interpret=False).name]
  blocks = splash.BlockSizes(*[of_queries, of_keys, of_keys] * 2, of_queries, of_keys)
  run = splash.make_splash_mqa_single_device(static, block_sizes=blocks)
  segments = documents(places["segment_ids"][0], places["entry_segment"][0], keys)
  return _run(run, False, q_1SHd, window_kv_1Sd, entries_1Td, sink_H, segments, scale)


def documents(segment_S: jax.Array, segment_T: jax.Array, keys: int) -> splash.SegmentIds:
  """int32 [S], [T] -> numbers of the documents of queries [S] and of K `keys`: padding is nobody's, not its own."""
  segment_K = jnp.concatenate([segment_S, segment_T])
  return splash.SegmentIds(segment_S, tpu.pad_axis(jnp.where(segment_K > 0, segment_K, -1), 0, keys, -1))


def rule(length: int, keys: int, num_entries: int, window: int, rate: int) -> splash_mask.Mask:
  """Who sees which of K `keys`, documents aside: without entries by itself, as JAX has it, which costs no memory."""
  near: splash_mask.Mask = splash_mask.LocalMask((length, keys), (window - 1, 0), 0)
  return near | Entries(length, keys, num_entries, rate) if num_entries else near


@dataclasses.dataclass(frozen=True)
class Entries(splash_mask.Mask):
  """Key S + t is entry t of a row of one document: seen from the last of its tokens on."""

  queries: int
  keys: int
  entries: int
  rate: int

  @property
  def shape(self) -> tuple[int, ...]:
    return self.queries, self.keys

  def __getitem__(self, place: tuple[slice, slice]) -> np.ndarray:
    query, key = (np.arange(size)[part] for size, part in zip(self.shape, place))
    entry = key - self.queries
    return (entry >= 0) & (entry < self.entries) & ((entry + 1) * self.rate <= query[:, None] + 1)


def _whole(keys: int) -> int:
  return tpu.round_up(keys, SPLASH_BLOCK)


def _run(run: Any, dynamic: bool, q_1SHd: jax.Array, window_kv_1Sd: jax.Array, entries_1Td: jax.Array, sink_H: jax.Array,
         segments: splash.SegmentIds | None, scale: float) -> jax.Array:
  for name in ("fwd_mask_info", "dq_mask_info", "dkv_mask_info"):  # inside jit it takes its own flag for an array
    setattr(run, name, getattr(run, name)._replace(is_dynamic_mask=dynamic))
  keys = jnp.concatenate([window_kv_1Sd[0], entries_1Td[0]])
  keys = tpu.pad_axis(keys, 0, _whole(keys.shape[0]))
  q_HSd = (q_1SHd[0] * scale).astype(q_1SHd.dtype).swapaxes(0, 1)
  return run(q_HSd, keys, keys, segments, sinks=sink_H).swapaxes(0, 1)[None]


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
