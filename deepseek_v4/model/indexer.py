"""The lightning indexer: scores of the compressed entries, exact selection, and its own KL loss (report 2.3.1, eqs. 13-17).

The indexer reads detached inputs, so its loss trains nothing else; the selection passes no gradient, so no other loss
trains the indexer.

Axis letters: B batch   S sequence   D hidden size   T entries   h index heads   c index width   r query latent   K picks
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import pallas_kernels.indexer
from deepseek_v4 import sharding
from deepseek_v4.config import CSA, ModelConfig
from deepseek_v4.model import quantize, remat, rope, sequence, weights
from deepseek_v4.model.cache import LayerCache
from deepseek_v4.model.compression import Compressor, extend, sees_an_entry
from deepseek_v4.model.context import Context
from pallas_kernels.indexer import reference
from pallas_kernels.selection import Selection


def _axes(length: int):
  """Logical axes of (queries, weights, keys), of (positions, segment ids, entries' last and segment), and of a query.

  A score is a sum over all heads, so under tensor parallelism the queries are split and not the heads: what moves is
  small beside a sum of [S, T] scores over the mesh.
  """
  query = ("batch", sharding.query_axis(length))
  return (query, query, ("batch",)), (query, query, ("batch",), ("batch",)), query


class Indexer(nn.Module):
  """Scores every visible entry for every query and keeps the best `index_topk`."""

  config: ModelConfig
  kernels: str

  @nn.compact
  def __call__(self, x_BSD: jax.Array, latent_BSr: jax.Array, context: Context, cache: LayerCache | None = None,
               given: Selection | None = None) -> Any:
    """Returns (selection, (queries [B, S, h, c], weights [B, S, h], keys [B, T, c]), the cache with the new keys or None);
    queries and keys in x's dtype, keys of a packed cache as it holds them; weights at least float32.

    Args:
      x_BSD: the attention sublayer's normalised input, floating.
      latent_BSr: the normalised query latent that the attention's queries come from, rounded where they are.
      context: of the forward pass.
      cache: of the layer.
      given: a selection to return instead of one from the scores.
    """
    config = self.config
    x_BSD, latent_BSr = jax.lax.stop_gradient((x_BSD, latent_BSr))
    heads, width = config.index_n_heads, config.index_head_dim
    compressor = Compressor(config, CSA, width, name="compressor")
    if cache is None:
      keys_BTc = sequence.whole(self._kept(compressor(x_BSD, context.entries[CSA])[0], cache))
    else:
      keys, pending = extend(compressor, x_BSD, context.entries[CSA], context.chunk.start, context.chunk.count,
                             cache.index_keys, cache.index_pending, lambda keys: self._kept(keys, cache))
      cache = cache.replace(index_keys=keys, index_pending=pending)
      keys_BTc = jax.tree.map(lambda x: x[:, :context.chunk.reach // config.csa_compress_rate], keys)
      keys_BTc = keys_BTc if cache.packed else keys_BTc.astype(x_BSD.dtype)
    q_b = weights.matrix(self, config, "q_b", (config.q_lora_rank, heads, width))
    queries_BShc = jnp.einsum("BSr,rhc->BShc", latent_BSr, q_b)
    cos, sin = context.phases[CSA]
    queries_BShc = rope.rotate(queries_BShc, cos[:, :, None], sin[:, :, None])
    queries_BShc = quantize.hadamard(queries_BShc) if self._spreads(cache) else queries_BShc
    queries_BShc = quantize.round_index(queries_BShc) if config.rounds_index else queries_BShc
    queries_BShc = sharding.constrain(queries_BShc, ("batch", "sequence", "index_heads", None))
    head_weights = weights.matrix(self, config, "head_weights", (config.hidden_size, heads))
    weights_BSh = jnp.einsum("BSD,Dh->BSh", x_BSD, head_weights, preferred_element_type=weights.exact_dtype(config))
    weights_BSh = sharding.constrain(weights_BSh * (heads * width) ** -0.5, ("batch", "sequence", "index_heads"))
    index = (queries_BShc, weights_BSh, keys_BTc)
    selection = remat.keep(self._select(index, context) if given is None else given)
    if self.is_mutable_collection("intermediates"):
      self._trace(index, selection, context)
    return selection, index, cache

  def _spreads(self, cache: LayerCache | None) -> bool:
    """Whether queries and keys go through the Hadamard matrix: where either is rounded."""
    return self.config.rounds_index or (cache is not None and cache.packed)

  def _kept(self, keys_BTc: jax.Array, cache: LayerCache | None) -> Any:
    """Keys as the cache keeps them, or without one as they are scored."""
    keys_BTc = quantize.hadamard(keys_BTc) if self._spreads(cache) else keys_BTc
    if cache is not None and cache.packed:
      return quantize.pack_index(keys_BTc)
    return quantize.round_index(keys_BTc) if self.config.rounds_index else keys_BTc

  def _select(self, index, context: Context) -> Selection:
    config = self.config
    unpack = None
    if isinstance(index[2], quantize.PackedIndex):
      unpack = functools.partial(quantize.unpack, dtype=index[0].dtype)
    if context.attention_mode == "dense":
      return Selection.all(*context.positions.shape)

    def run(queries, head_weights, keys, positions, segment_ids, last, segment):
      return pallas_kernels.indexer.select(queries, head_weights, keys, top_k=config.index_topk, positions=positions,
                                           segment_ids=segment_ids, entry_last=last, entry_segment=segment,
                                           unpack=unpack, implementation=self.kernels)

    index_axes, place_axes, query = _axes(context.positions.shape[1])
    places = (context.positions, context.segment_ids, *context.places(CSA))
    return sharding.per_shard(run, (*index_axes, *place_axes), query)(*index, *places)

  def _trace(self, index, selection: Selection, context: Context) -> None:
    """What happened, for `dsv4.trace` only: the index, dense scores [B, S, T] and the chosen entries [B, S, K]."""
    for name, value in zip(("queries", "weights", "keys"), index):
      self.sow("intermediates", name, value)
    layout = context.entries[CSA]
    visible = reference.sees_entry(context.positions, context.segment_ids, layout.last, layout.segment)
    self.sow("intermediates", "scores", jnp.where(visible, reference.scores(*index), -jnp.inf))
    everything = jnp.where(visible, jnp.arange(layout.last.shape[1]), -1)
    self.sow("intermediates", "selected", everything if selection.kind == "all" else selection.indices())


def indexer_loss(index: Any, attention_queries: jax.Array, entries: Any, lse: jax.Array, selection: Selection,
                 context: Context, *, scale: float, kernels: str) -> Any:
  """The KL loss as (sum over queries, count of queries that see an entry), scalars, at least float32 (report 2.3.1; V3.2
  2.1.1).

  Args:
    index: the indexer's (queries, weights, keys), differentiable.
    attention_queries: [B, S, H, d]; entries: [B, T, d], floating; lse: [B, S, H], at least float32; scale: all of the
      attention that is the teacher.
  """
  layout = context.entries[CSA]

  def run(queries, head_weights, keys, teacher, entries, lse, selection, positions, segment_ids, last, segment):
    return pallas_kernels.indexer.kl_loss(queries, head_weights, keys, teacher, entries, lse, selection,
                                          positions=positions, segment_ids=segment_ids, entry_last=last,
                                          entry_segment=segment, scale=scale, implementation=kernels)

  index_axes, place_axes, query = _axes(context.positions.shape[1])
  in_axes = (*index_axes, query, ("batch",), query, query, *place_axes)
  places = (context.positions, context.segment_ids, layout.last, layout.segment)
  kl_BS = sharding.per_shard(run, in_axes, query)(*index, attention_queries, entries, lse, selection, *places)
  counted = sees_an_entry(context.positions, context.segment_ids, layout.rate)
  return kl_BS.sum(), counted.sum().astype(kl_BS.dtype)
