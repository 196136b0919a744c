"""Shared-KV attention: sliding window, compressed entries, sinks, inverse rotation, grouped output (report 2.3, eqs. 18-19
and 24-27).

One vector per token is key and value of every head. Because the value carries the rotation of its own position, the output
is rotated back by the query's position.

Axis letters: B batch   S sequence   D hidden size   H heads   d head width   r query latent   T entries
              G output groups   R group rank   c channels of a group (H d / G)
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import pallas_kernels.sparse_attention
from deepseek_v4 import sharding
from deepseek_v4.config import CSA, HCA, SLIDING, ModelConfig
from deepseek_v4.model import indexer, quantize, remat, rope, sequence, weights
from deepseek_v4.model.cache import LayerCache, read_ring, write_ring
from deepseek_v4.model.compression import Compressor, extend
from deepseek_v4.model.context import Context
from deepseek_v4.model.norm import RMSNorm, rms_norm
from pallas_kernels.blocks import sees_entry
from pallas_kernels.selection import Selection


class Attention(nn.Module):
  """One attention sublayer of any kind."""

  config: ModelConfig
  attention: str
  kernels: str

  @nn.compact
  def __call__(self, x_BSD: jax.Array, context: Context, cache: LayerCache | None = None, given: Selection | None = None
               ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None, LayerCache | None, Selection | None]:
    """Returns (output [B, S, D] in x's floating dtype, indexer loss as (sum, count) at least in float32 or None, the cache
    after these tokens or None, the selection of entries that was read).

    A `given` selection is taken instead of the indexer's own.
    """
    config = self.config
    heads, width = config.num_attention_heads, config.head_dim
    cos, sin = context.phases[self.attention]
    in_BSD = quantize.linear_input(config, x_BSD)
    latent_BSr = remat.keep(in_BSD @ weights.matrix(self, config, "q_a", (config.hidden_size, config.q_lora_rank)))
    latent_BSr = RMSNorm(config, name="q_a_norm")(latent_BSr)
    latent_BSr = sharding.constrain(quantize.linear_input(config, latent_BSr), ("batch", "sequence", None))
    q_b = weights.matrix(self, config, "q_b", (config.q_lora_rank, heads, width))
    q_BSHd = rms_norm(jnp.einsum("BSr,rHd->BSHd", latent_BSr, q_b), None, config.rms_norm_eps)
    q_BSHd = sharding.constrain(rope.rotate(q_BSHd, cos[:, :, None], sin[:, :, None]), ("batch", "sequence", "heads", None))
    kv_BSd = remat.keep(in_BSD @ weights.matrix(self, config, "kv", (config.hidden_size, width)))
    kv_BSd = RMSNorm(config, name="kv_norm")(kv_BSd)
    kv_BSd, stored = self._kept(rope.rotate(kv_BSd, cos, sin), cache)
    sink_H = weights.exact(self, config, "sink", (heads,), nn.initializers.zeros)

    entries_BTd, selection, index, new_cache = self._entries(x_BSD, latent_BSr, context, cache, given)
    past = ()
    if context.past_segment is not None:
      past = sequence.before_parts(kv_BSd, config.sliding_window - 1), context.past_segment
    if cache is not None:
      past = self._past(cache, context)
      window = write_ring(cache.window, stored, context.chunk.start, context.chunk.count)
      new_cache = new_cache.replace(window=window)
    out_BSHd, lse_BSH = self._attend(q_BSHd, kv_BSd, entries_BTd, selection, sink_H, context, past)
    loss = None
    if self.attention == CSA and context.with_losses:
      loss = indexer.indexer_loss(index, q_BSHd, entries_BTd, lse_BSH, selection, context, scale=width**-0.5,
                                  kernels=self.kernels)
    if self.is_mutable_collection("intermediates"):
      self._trace(q_BSHd, kv_BSd, entries_BTd, selection, lse_BSH, sink_H, context)
    out_BSHd = rope.rotate(out_BSHd, cos[:, :, None], sin[:, :, None], inverse=True)
    return self._project(out_BSHd), loss, new_cache, selection

  def _kept(self, x: jax.Array, cache: LayerCache | None) -> tuple[jax.Array, Any]:
    """Keys = values [B, S or C, d] as attention reads them and as the cache keeps them."""
    rotary = self.config.qk_rope_head_dim
    if cache is not None and cache.packed:
      stored = quantize.pack_kv(x, rotary)
      return quantize.unpack(stored, x.dtype), stored
    x = quantize.round_kv(x, rotary) if self.config.inference_rounding else x
    return x, x

  def _entries(self, x_BSD, latent_BSr, context: Context, cache: LayerCache | None, given: Selection | None):
    """Compressed entries of the sequence (as a packed cache holds them), which of them each query reads, the indexer's
    tensors, the cache with the new entries."""
    config = self.config
    batch, length = context.positions.shape
    if self.attention == SLIDING:
      return jnp.zeros((batch, 0, config.head_dim), x_BSD.dtype), Selection.all(batch, length), None, cache
    layout = context.entries[self.attention]
    compressor = Compressor(config, self.attention, config.head_dim, name="compressor")
    if cache is None:
      entries_BTd, _ = self._kept(compressor(x_BSD, layout)[0], cache)
      entries_BTd = sequence.whole(entries_BTd)
    else:
      entries, pending = extend(compressor, x_BSD, layout, context.chunk.start, context.chunk.count, cache.entries,
                                cache.pending, lambda x: self._kept(x, cache)[1])
      cache = cache.replace(entries=entries, pending=pending)
      entries_BTd = jax.tree.map(lambda x: x[:, :context.chunk.reach // layout.rate], entries)
      entries_BTd = entries_BTd if cache.packed else entries_BTd.astype(x_BSD.dtype)
    if self.attention == HCA:
      return entries_BTd, Selection.all(batch, length), None, cache
    of_indexer = indexer.Indexer(config, self.kernels, name="indexer")(x_BSD, latent_BSr, context, cache, given)
    return entries_BTd, *of_indexer

  def _past(self, cache: LayerCache, context: Context) -> tuple[jax.Array, jax.Array]:
    """Keys of the window in front of the chunk [B, P, d], and their documents [B, P]."""
    count, start_B = self.config.sliding_window - 1, context.chunk.start
    exists_BP = start_B[:, None] + jnp.arange(-count, 0) >= 0
    past_BPd = quantize.unpack(read_ring(cache.window, start_B, count), self.config.compute_dtype)
    return past_BPd, exists_BP.astype(jnp.int32)

  def _attend(self, q_BSHd, kv_BSd, entries_BTd, selection, sink_H, context: Context, past=()):
    config = self.config
    unpack = None
    if isinstance(entries_BTd, quantize.PackedKV):
      unpack = functools.partial(quantize.unpack, dtype=kv_BSd.dtype)

    def run(q, kv, entries, selection, sink, positions, segment_ids, last, segment, *past):
      past = dict(zip(("past_kv", "past_segment"), past))
      return pallas_kernels.sparse_attention.attend(
          q, kv, entries, selection, sink, positions=positions, segment_ids=segment_ids, entry_last=last,
          entry_segment=segment, window=config.sliding_window, scale=config.head_dim**-0.5, **past, unpack=unpack,
          implementation=self.kernels)

    tokens, rows, heads = ("batch", "sequence"), ("batch",), ("batch", "sequence", "heads")
    in_axes = (heads, tokens, rows, tokens, ("heads",), tokens, tokens, rows, rows, *(tokens for _ in past))
    return sharding.per_shard(run, in_axes, (heads, heads))(
        q_BSHd, kv_BSd, entries_BTd, selection, sink_H, context.positions, context.segment_ids,
        *context.places(self.attention), *past)

  def _project(self, out_BSHd: jax.Array) -> jax.Array:
    """Grouped output projection: consecutive heads form a group; each group to rank R, all groups together to D."""
    config = self.config
    groups, rank = config.o_groups, config.o_lora_rank
    channels = config.num_attention_heads * config.head_dim // groups
    o_a = weights.matrix(self, config, "o_a", (groups, channels, rank))
    o_b = weights.matrix(self, config, "o_b", (groups * rank, config.hidden_size))
    out_BSGc = out_BSHd.reshape(*out_BSHd.shape[:2], groups, channels)
    low_BSGR = remat.keep(jnp.einsum("BSGc,GcR->BSGR", out_BSGc, o_a))
    return quantize.linear_input(config, low_BSGR.reshape(*out_BSHd.shape[:2], groups * rank)) @ o_b

  def _trace(self, q_BSHd, kv_BSd, entries_BTd, selection, lse_BSH, sink_H, context: Context) -> None:
    """Queries, keys and dense weights from lse, for `dsv4.trace` only: window [B, S, H, S], entries [B, S, H, T], sink
    [B, S, H]."""
    self.sow("intermediates", "queries", q_BSHd)
    self.sow("intermediates", "keys", kv_BSd)
    self.sow("intermediates", "sink_weight", jnp.exp(sink_H - lse_BSH))
    scale, dtype = self.config.head_dim**-0.5, lse_BSH.dtype
    place = jnp.arange(q_BSHd.shape[1])
    apart = place[:, None] - place[None, :]
    near = (apart >= 0) & (apart < self.config.sliding_window) & (context.segment_ids > 0)[:, :, None]
    near &= context.segment_ids[:, :, None] == context.segment_ids[:, None, :]
    last, segment = context.places(self.attention)
    chosen = selection.mask(last.shape[1]) & sees_entry(context.positions, context.segment_ids, last, segment)
    for name, keys, visible in (("window_weight", kv_BSd, near), ("entry_weight", entries_BTd, chosen)):
      logits = jnp.einsum("BSHd,BUd->BSHU", q_BSHd.astype(dtype), keys.astype(dtype)) * scale
      self.sow("intermediates", name, jnp.where(visible[:, :, None], jnp.exp(logits - lse_BSH[..., None]), 0))
    if self.attention != SLIDING:
      self.sow("intermediates", "entries", entries_BTd)
      self.sow("intermediates", "entry_segment", segment)
      self.sow("intermediates", "entry_position", last - (context.entries[self.attention].rate - 1))
