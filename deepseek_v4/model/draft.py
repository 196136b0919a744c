"""The multi-token-prediction block behind a cache of its own: guesses of tokens that the main model has yet to choose.

Position t of the block reads the main model's streams at t and the token t + 1, and guesses token t + 2 (report 2.1, as
in V3). Its layer has a sliding window, so that its cache is one ring: a `Cache` of a model of one such layer.

Axis letters: B batch   S new positions   N streams   D hidden size   V vocabulary
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from deepseek_v4.config import ModelConfig
from deepseek_v4.model.cache import Cache, init_cache
from deepseek_v4.model.context import make_chunk_context
from deepseek_v4.model.mtp import MTP
from deepseek_v4.model.vocabulary import Embedding, LMHead, logits


def _one_layer(config: ModelConfig) -> ModelConfig:
  """The model whose only layer is of the prediction block's kind."""
  return dataclasses.replace(config, num_hidden_layers=1, layer_types=(config.mtp_spec.attention,),
                             mlp_layer_types=(config.mtp_spec.router,))


def init_draft_cache(config: ModelConfig, batch_size: int, max_length: int, **options: Any) -> Cache:
  """An empty cache of the prediction block; arguments, errors and `rewind` are those of `init_cache`."""
  return init_cache(_one_layer(config), batch_size, max_length, **options)


class Drafter(nn.Module):
  """Embedding, prediction block and head on their own; the variables are `DeepseekV4`'s, under the same names."""

  config: ModelConfig
  kernels: str

  @nn.compact
  def __call__(self, streams: jax.Array, tokens: jax.Array, count: jax.Array, cache: Cache
               ) -> tuple[jax.Array, jax.Array, Cache]:
    """Continues the block's rows.

    Args:
      streams: [B, S, N, D] of the main model at the new positions (`ModelOutput.streams`); or of the block itself,
        where the main model has not been yet.
      tokens: int32 [B, S], the token after each position.
      count: int32 [B], new positions of each row, which are its first places.
      cache: of `init_draft_cache`.

    Returns:
      (logits [B, V] of the token after the last of `tokens`, at least float32; the block's streams there [B, 1, N, D];
      the cache). A row without new positions gets numbers without meaning.
    """
    config = self.config
    segment_ids_BS = (jnp.arange(tokens.shape[1]) < count[:, None]).astype(jnp.int32)
    context, _ = make_chunk_context(_one_layer(config), tokens, segment_ids_BS, cache, "sparse", cache.max_length)
    (key,) = cache.groups.keys
    next_BSD = Embedding(config, name="embed")(tokens)
    block = MTP(config, self.kernels, name="mtp")
    out_BSD, streams_BSND, _, layer = block(streams, next_BSD, context, cache.layers[key])
    lengths_B = cache.lengths + count
    cache = cache.replace(layers={key: layer}, lengths=lengths_B, furthest=jnp.maximum(cache.furthest, lengths_B))
    last_B = jnp.maximum(count - 1, 0)
    out_BD = jnp.take_along_axis(out_BSD, last_B[:, None, None], 1)[:, 0]
    logits_BV = logits(config, out_BD, LMHead(config, name="lm_head")())
    return logits_BV, jnp.take_along_axis(streams_BSND, last_B[:, None, None, None], 1), cache
