"""Multi-token prediction, depth 1 (report 2.1, as V3 2.2 but for the streams): the token after next.

Axis letters: B batch   S sequence   N streams   D hidden size
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from deepseek_v4.config import ModelConfig
from deepseek_v4.model import quantize, remat, sequence, weights
from deepseek_v4.model.block import Block, LayerOutput
from deepseek_v4.model.cache import LayerCache
from deepseek_v4.model.context import Context
from deepseek_v4.model.hyper_connections import HyperHead
from deepseek_v4.model.norm import RMSNorm
from deepseek_v4.model.replay import Choice


class MTP(nn.Module):
  """The main model's last streams and the next token's embedding through one more layer; embedding and head are shared."""

  config: ModelConfig
  kernels: str

  @nn.compact
  def __call__(self, streams_BSND: jax.Array, next_BSD: jax.Array, context: Context, cache: LayerCache | None = None,
               given: Choice | None = None) -> tuple[jax.Array, jax.Array, LayerOutput, LayerCache | None]:
    """Returns (what the shared head multiplies [B, S, D], the block's streams, the layer's report, its cache or None); both
    arrays in the streams' floating dtype.

    Args:
      streams_BSND: after the main model's last layer, before its head's collapse; or the block's own, to guess further.
      next_BSD: embedding of the token after each place.
      context: of the forward pass.
      cache: of the block's window.
      given: choices that the block's layer does not make itself.
    """
    config = self.config
    d = config.hidden_size
    e_BSD = quantize.linear_input(config, RMSNorm(config, name="embed_norm")(next_BSD))
    e_BSD = e_BSD @ weights.matrix(self, config, "embed_proj", (d, d))
    h_BSND = quantize.linear_input(config, RMSNorm(config, name="hidden_norm")(streams_BSND))
    h_BSND = h_BSND @ weights.matrix(self, config, "hidden_proj", (d, d))
    block = remat.recomputed(Block, config)(config, config.mtp_spec, self.kernels, name="block")
    streams_BSND, report, cache = block(e_BSD[:, :, None] + h_BSND, context, config.num_hidden_layers, cache, given)
    out_BSD = RMSNorm(config, name="final_norm")(HyperHead(config, name="hc_head")(streams_BSND))
    return out_BSD, streams_BSND, report, cache


def next_embeddings(embedded_BSD: jax.Array, segment_ids_BS: jax.Array) -> jax.Array:
  """[B, S, D] in the dtype given: what stands at each place's right, of the same document; zero behind a document's last
  token, which keeps a packed row equal to its documents alone."""
  same_BS = sequence.following(segment_ids_BS) == segment_ids_BS
  return jnp.where(same_BS[..., None], sequence.following(embedded_BSD), 0)
