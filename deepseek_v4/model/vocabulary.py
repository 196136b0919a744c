"""The two matrices of the vocabulary, which are not tied: embedding and output head (report 2), and how devices share them.

Each is larger than the dense weights of a layer, so in pre-training no device of the mesh axis `fsdp`, whose devices have
different tokens, makes one whole. The embedding keeps a part of the channels: every device looks up all devices' tokens in
its own part, and an exchange gives each its own tokens' channels, as many numbers as it would have looked up alone. The head
keeps a part of the vocabulary, beside what `tensor` splits of it (`losses.py`). Over `expert` and `context` both are
gathered, and for logits, which decoding and post-training want, the head over `fsdp`, too.

Axis letters: B batch   S sequence   D hidden size   V vocabulary
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from deepseek_v4 import sharding
from deepseek_v4.config import ModelConfig
from deepseek_v4.model import weights


class Embedding(nn.Module):
  """Token embedding [V, D]."""

  config: ModelConfig

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    """tokens int32 [B, S] -> [B, S, D] in the compute dtype; a row's gradient is summed in the parameter's precision."""
    table_VD = weights.stored(self, self.config, "embedding", (self.config.vocab_size, self.config.hidden_size))
    # A forward pass may be asked for on a mesh that divides neither; a run is refused there.
    vocab, channels = (name if size % sharding.axis_size(name) == 0 else None
                       for name, size in zip(("vocab", "channels"), table_VD.shape))
    run = functools.partial(_look_up, dtype=self.config.compute_dtype, parts=channels and sharding.axis_name(channels),
                            vocab_axis=vocab and sharding.axis_name(vocab))
    shared = sharding.per_shard(run, (("batch", "sequence"), (vocab, channels)), ("batch", "sequence"))
    return sharding.constrain(shared(tokens, table_VD), ("batch", "sequence", None))


def _look_up(tokens_BS: jax.Array, table_VD: jax.Array, *, dtype: str, parts: str | None, vocab_axis: str | None
             ) -> jax.Array:
  """Rows of a device's tokens, all channels, from its part of the table; `parts`: mesh axis that splits channels and
  tokens, `vocab_axis`: the one that splits rows."""
  if parts is not None:
    tokens_BS = jax.lax.all_gather(tokens_BS, parts, tiled=True)
  if vocab_axis is None:
    rows = table_VD[tokens_BS]
  else:
    own_BS = tokens_BS - jax.lax.axis_index(vocab_axis) * table_VD.shape[0]
    inside_BS = (own_BS >= 0) & (own_BS < table_VD.shape[0])
    rows = jnp.where(inside_BS[..., None], table_VD[jnp.where(inside_BS, own_BS, 0)], 0)
  rows = rows.astype(dtype)
  if parts is not None:
    rows = jax.lax.all_to_all(rows, parts, split_axis=0, concat_axis=2, tiled=True)
  return rows if vocab_axis is None else jax.lax.psum(rows, vocab_axis)


class LMHead(nn.Module):
  """Output head [D, V]."""

  config: ModelConfig

  @nn.compact
  def __call__(self) -> jax.Array:
    """The matrix [D, V] in the compute dtype, V split over `weight_axes("head_vocab", V)` of `sharding`."""
    return weights.matrix(self, self.config, "kernel", (self.config.hidden_size, self.config.vocab_size))


def logits(config: ModelConfig, hidden: jax.Array, head_DV: jax.Array) -> jax.Array:
  """hidden [..., D] -> [..., V], at least float32, by a head that is whole but for tensor: not for training."""
  head_DV = sharding.constrain(head_DV, (None, "vocab"))
  return jnp.matmul(hidden, head_DV, preferred_element_type=weights.exact_dtype(config))
