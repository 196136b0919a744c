"""One decoder layer: attention and experts, each between a collapse and an expansion of the residual streams (report 2.2).

Axis letters: B batch   S sequence   N streams   D hidden size   E experts   k experts per token
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from deepseek_v4 import sharding
from deepseek_v4.config import CSA, LayerSpec, ModelConfig
from deepseek_v4.model import remat, weights
from deepseek_v4.model.attention import Attention
from deepseek_v4.model.cache import LayerCache
from deepseek_v4.model.context import Context
from deepseek_v4.model.experts import MoE
from deepseek_v4.model.hyper_connections import HyperConnection, expand
from deepseek_v4.model.norm import RMSNorm
from deepseek_v4.model.replay import Choice
from pallas_kernels.selection import Selection


@flax.struct.dataclass
class LayerOutput:
  """What a layer reports beside its streams; sums over tokens, 0 where the layer has no such loss.

  Attributes:
    experts: int32 [B, S, k].
    load: int32 [E], without padding.
    balance, balance_count, indexer, indexer_count: scalars, at least float32.
    selection: of a CSA layer, where the context says that selections are kept; else None.
  """

  experts: jax.Array
  load: jax.Array
  balance: jax.Array
  balance_count: jax.Array
  indexer: jax.Array
  indexer_count: jax.Array
  selection: Selection | None = None


class Block(nn.Module):
  """A layer of one (attention kind, router kind)."""

  config: ModelConfig
  spec: LayerSpec
  kernels: str

  @nn.compact
  def __call__(self, streams_BSND: jax.Array, context: Context, layer: Any, cache: LayerCache | None = None,
               given: Choice | None = None) -> tuple[jax.Array, LayerOutput, LayerCache | None]:
    """Returns the new streams, in the floating dtype of the old ones, the layer's report and its cache after these tokens
    (None without one).

    `layer` is the layer's number (it seeds a fresh hash table); `given` are choices that the layer does not make itself.
    """
    config, kernels, given = self.config, self.kernels, given or Choice()
    streams_BSND = remat.keep(sharding.constrain(streams_BSND, ("batch", "sequence", None, None)), remat.STREAMS)
    streams_BSND, z_BSD, post, comb = HyperConnection(config, kernels, name="attn_hc")(streams_BSND)
    attention = Attention(config, self.spec.attention, kernels, name="attention")
    x_BSD = sharding.constrain(RMSNorm(config, name="attn_norm")(z_BSD), ("batch", "sequence", None))
    self.sow("intermediates", "attn_input", x_BSD)
    y_BSD, indexer_loss, cache, selection = attention(x_BSD, context, cache, given.selection)
    self.sow("intermediates", "attn_output", y_BSD)
    y_BSD = remat.keep(y_BSD)

    ffn_hc = HyperConnection(config, kernels, name="ffn_hc")
    streams_BSND, z_BSD, post, comb = ffn_hc(streams_BSND, (y_BSD, post, comb))
    moe = MoE(config, self.spec.router, kernels, name="moe")
    x_BSD = sharding.constrain(RMSNorm(config, name="ffn_norm")(z_BSD), ("batch", "sequence", None))
    self.sow("intermediates", "ffn_input", x_BSD)
    y_BSD, experts, load, balance_loss = moe(x_BSD, context, layer, given.experts)
    self.sow("intermediates", "ffn_output", y_BSD)
    streams_BSND = expand(streams_BSND, remat.keep(y_BSD), post, comb, kernels=kernels)
    self.sow("intermediates", "streams", streams_BSND)
    nothing = (jnp.zeros((), weights.exact_dtype(config)),) * 2
    selection = selection if context.keep_selection and self.spec.attention == CSA else None
    report = LayerOutput(experts, load, *(balance_loss or nothing), *(indexer_loss or nothing), selection)
    return streams_BSND, report, cache
