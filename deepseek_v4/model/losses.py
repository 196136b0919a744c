"""Cross entropy from hidden states, a chunk of tokens at a time: [batch, sequence, vocabulary] never exists.

The losses of the next token and of the prediction block (report 2.1, as V3 2.2). They are (sum, count) pairs; the gradient
of the sum is computed together with it, so that a chunk's logits are made once.

A device holds a part of the head. Along `tensor` the others with the same tokens hold the rest; along `fsdp` they have other
tokens, and all of them work on the tokens of all: a chunk's hidden states are gathered, their gradients are scattered. With
much more than V / T devices that would move far more than the head and its gradient, which are gathered then (`MOST`).

Axis letters: B batch   S sequence   D hidden size   V vocabulary of a device   T tokens of a device   C tokens of a chunk
              A tokens of a chunk, of all devices that share the head and have other tokens
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from deepseek_v4 import sharding
from deepseek_v4.model import sequence

# Tokens of all devices that share a head are gathered up to so many times its columns; then the head is.
MOST = 4


def cross_entropy(hidden_BSD: jax.Array, head_DV: jax.Array, targets_BS: jax.Array, *, chunk_size: int
                  ) -> tuple[jax.Array, jax.Array]:
  """(sum, count) of -log softmax(hidden @ head)[target] in nats over the places with a target.

  Args:
    hidden_BSD: what the head multiplies, floating.
    head_DV: the output head, of the same dtype; both scalars are at least float32.
    targets_BS: int32, -1 = not counted.
    chunk_size: tokens whose logits, of a device's part of the vocabulary, exist at a time.
  """
  axes = sharding.weight_axes("head_vocab", head_DV.shape[1])
  apart = tuple(axis for axis in axes if axis in sharding.BATCH_AXES)
  own_tokens = targets_BS.size // (sharding.batch_shards() * sharding.sequence_parts())
  columns = head_DV.shape[1] // math.prod(sharding.mesh_axis_size(axis) for axis in axes if axis not in apart)
  if own_tokens * math.prod(map(sharding.mesh_axis_size, apart)) > MOST * columns:
    axes, apart = sharding.MeshAxes(axis for axis in axes if axis not in apart), ()
  shared = _Shared(axes, apart)

  def run(hidden, head, targets):
    flat = hidden.reshape(-1, hidden.shape[-1])
    return _sum(flat, head, targets.reshape(-1), chunk_size, shared)[None]

  in_axes = (("batch", "sequence"), (None, axes), ("batch", "sequence"))
  sums = sharding.per_shard(run, in_axes, ("shards",))(hidden_BSD, head_DV, targets_BS)
  return sums.sum(), (targets_BS >= 0).sum().astype(sums.dtype)


@dataclasses.dataclass(frozen=True)
class _Shared:
  """Mesh axes over which the vocabulary is split, and those of them whose devices have other tokens."""

  vocabulary: tuple[str, ...]
  tokens: tuple[str, ...]

  @property
  def same(self) -> tuple[str, ...]:
    """Those whose devices have the same tokens."""
    return tuple(axis for axis in self.vocabulary if axis not in self.tokens)

  def of_all(self, x_C: jax.Array) -> jax.Array:
    return jax.lax.all_gather(x_C, self.tokens, tiled=True) if self.tokens else x_C

  def own(self, x_A: jax.Array, count: int) -> jax.Array:
    if not self.tokens:
      return x_A
    return jax.lax.dynamic_slice_in_dim(x_A, jax.lax.axis_index(self.tokens) * count, count)


def in_chunks(x_T: jax.Array, chunk_size: int, fill: int = 0) -> jax.Array:
  """[T, ...] -> [n, C, ...], dtype kept; `fill` stands in the places of the last chunk that hold no token."""
  size = min(chunk_size, x_T.shape[0])
  missing = -x_T.shape[0] % size
  padded = jnp.pad(x_T, ((0, missing), *((0, 0),) * (x_T.ndim - 1)), constant_values=fill)
  return padded.reshape(-1, size, *x_T.shape[1:])


def _chunks(hidden_TD, targets_T, chunk_size, shared: _Shared):
  """[n, C, D] and [n, C]; the tokens that fill the last chunk have no target."""
  size = max(chunk_size // math.prod(map(jax.lax.axis_size, shared.tokens)), 1)
  return in_chunks(hidden_TD, size), in_chunks(targets_T, size, -1)


def _chunk(hidden_AD, head_DV, targets_A, shared: _Shared):
  """Each token's loss and the gradient of their sum by the logits."""
  axes = shared.vocabulary
  exact = jnp.promote_types(hidden_AD.dtype, jnp.float32)
  logits_AV = jnp.matmul(hidden_AD, head_DV, preferred_element_type=exact)
  first = jax.lax.axis_index(axes) * head_DV.shape[1] if axes else 0
  hit_AV = targets_A[:, None] == jnp.arange(head_DV.shape[1]) + first
  top_A = logits_AV.max(-1)
  top_A = jax.lax.pmax(top_A, axes) if axes else top_A
  power_AV = jnp.exp(logits_AV - top_A[:, None])
  total_A, of_target_A = power_AV.sum(-1), jnp.where(hit_AV, logits_AV, 0).sum(-1)
  if axes:
    total_A, of_target_A = jax.lax.psum((total_A, of_target_A), axes)
  counted_A = targets_A >= 0
  loss_A = jnp.where(counted_A, top_A + jnp.log(total_A) - of_target_A, 0)
  d_logits_AV = jnp.where(counted_A[:, None], power_AV / total_A[:, None] - hit_AV, 0)
  return loss_A, d_logits_AV.astype(hidden_AD.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _sum(hidden_TD, head_DV, targets_T, chunk_size, shared: _Shared):
  # A device's gradient of the head is of all devices' tokens: it is right as long as their sums are added up alike.
  def step(total, item):
    loss_A, _ = _chunk(shared.of_all(item[0]), head_DV, shared.of_all(item[1]), shared)
    return total + shared.own(loss_A, item[1].shape[0]).sum(), None
  exact = jnp.promote_types(hidden_TD.dtype, jnp.float32)
  return jax.lax.scan(step, jnp.zeros((), exact), _chunks(hidden_TD, targets_T, chunk_size, shared))[0]


def _sum_forward(hidden_TD, head_DV, targets_T, chunk_size, shared: _Shared):
  exact = jnp.promote_types(hidden_TD.dtype, jnp.float32)

  def step(carry, item):
    total, d_head = carry
    hidden_AD, targets_A = map(shared.of_all, item)
    loss_A, d_logits_AV = _chunk(hidden_AD, head_DV, targets_A, shared)
    d_head += jnp.matmul(hidden_AD.T, d_logits_AV, preferred_element_type=exact)
    if shared.tokens:
      d_hidden = jnp.matmul(d_logits_AV, head_DV.T, preferred_element_type=exact)
      d_hidden = jax.lax.psum_scatter(d_hidden, shared.tokens, tiled=True).astype(hidden_AD.dtype)
    else:
      d_hidden = d_logits_AV @ head_DV.T
    return (total + shared.own(loss_A, item[1].shape[0]).sum(), d_head), d_hidden

  zeros = (jnp.zeros((), exact), jnp.zeros(head_DV.shape, exact))
  (total, d_head), d_hidden = jax.lax.scan(step, zeros, _chunks(hidden_TD, targets_T, chunk_size, shared))
  d_hidden = d_hidden.reshape(-1, hidden_TD.shape[1])[:hidden_TD.shape[0]]
  # Else the head's gradient, which is wanted last, could stay in float32 through the whole backward pass.
  return total, jax.lax.optimization_barrier((d_hidden, d_head.astype(head_DV.dtype)))


def weighed(gradients: tuple[jax.Array, ...], g: jax.Array, axis: str | tuple[str, ...] | None) -> tuple[jax.Array, ...]:
  """Gradients (any shapes and dtypes, kept) of a sum times its cotangent, the scalar `g`; `axis` is the mesh axis along
  which the vocabulary, and not the tokens, is split."""
  # Inside shard_map each device of this axis holds its share of the cotangent of a sum that all of them hold.
  g = jax.lax.psum(g, axis) if axis else g
  # In the cotangent's own precision: weight over count, rounded to bfloat16, would weigh this loss wrongly.
  return tuple((d.astype(g.dtype) * g).astype(d.dtype) for d in gradients)


def _sum_backward(chunk_size, shared: _Shared, saved, g):
  return *weighed(saved, g, shared.same), None


_sum.defvjp(_sum_forward, _sum_backward)


def next_token_targets(tokens_BS: jax.Array, segment_ids_BS: jax.Array, loss_mask_BS: jax.Array) -> jax.Array:
  """Target of each place, int32 [B, S]: the next token of the same document where that token counts; -1 elsewhere."""
  mask_BS, next_BS, token_BS = map(sequence.following, (loss_mask_BS, segment_ids_BS, tokens_BS))
  return jnp.where((mask_BS > 0) & (next_BS == segment_ids_BS) & (segment_ids_BS > 0), token_BS, -1)


def mtp_targets(targets_BS: jax.Array, segment_ids_BS: jax.Array) -> jax.Array:
  """Target of the prediction block at each place, int32 [B, S]: the token after next of the same document; -1 elsewhere."""
  same_BS = sequence.following(segment_ids_BS) == segment_ids_BS
  return jnp.where(same_BS, sequence.following(targets_BS + 1) - 1, -1)  # behind a row stands 0, which becomes -1
