"""Cross entropy from hidden states, a chunk of tokens at a time: [batch, sequence, vocabulary] never exists.

The losses of the next token and of the prediction block (report 2.1, as V3 2.2). They are (sum, count) pairs; the gradient
of the sum is computed together with it, so that a chunk's logits are made once.

Axis letters: B batch   S sequence   D hidden size   V vocabulary of a device   T tokens of a device   C tokens of a chunk
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from deepseek_v4 import sharding
from deepseek_v4.model import sequence


def cross_entropy(hidden_BSD: jax.Array, head_DV: jax.Array, targets_BS: jax.Array, *, chunk_size: int
                  ) -> tuple[jax.Array, jax.Array]:
  """(sum, count) of -log softmax(hidden @ head)[target] in nats over the places with a target.

  Args:
    hidden_BSD: what the head multiplies, floating.
    head_DV: the output head, of the same dtype; both scalars are at least float32.
    targets_BS: int32, -1 = not counted.
    chunk_size: tokens per device whose logits exist at a time.
  """
  vocab_axis = sharding.axis_name("vocab")

  def run(hidden, head, targets):
    flat = hidden.reshape(-1, hidden.shape[-1])
    return _sum(flat, head, targets.reshape(-1), chunk_size, vocab_axis)[None]

  in_axes = (("batch", "sequence"), (None, "vocab"), ("batch", "sequence"))
  sums = sharding.per_shard(run, in_axes, ("shards",))(hidden_BSD, head_DV, targets_BS)
  return sums.sum(), (targets_BS >= 0).sum().astype(sums.dtype)


def in_chunks(x_T: jax.Array, chunk_size: int, fill: int = 0) -> jax.Array:
  """[T, ...] -> [n, C, ...], dtype kept; `fill` stands in the places of the last chunk that hold no token."""
  size = min(chunk_size, x_T.shape[0])
  missing = -x_T.shape[0] % size
  padded = jnp.pad(x_T, ((0, missing), *((0, 0),) * (x_T.ndim - 1)), constant_values=fill)
  return padded.reshape(-1, size, *x_T.shape[1:])


def _chunks(hidden_TD, targets_T, chunk_size):
  """[n, C, D] and [n, C]; the tokens that fill the last chunk have no target."""
  return in_chunks(hidden_TD, chunk_size), in_chunks(targets_T, chunk_size, -1)


def _chunk(hidden_CD, head_DV, targets_C, axis):
  """Loss sum of a chunk and the gradient of it by the logits."""
  exact = jnp.promote_types(hidden_CD.dtype, jnp.float32)
  logits_CV = jnp.matmul(hidden_CD, head_DV, preferred_element_type=exact)
  first = 0 if axis is None else jax.lax.axis_index(axis) * head_DV.shape[1]
  hit_CV = targets_C[:, None] == jnp.arange(head_DV.shape[1]) + first
  top_C = logits_CV.max(-1)
  top_C = top_C if axis is None else jax.lax.pmax(top_C, axis)
  power_CV = jnp.exp(logits_CV - top_C[:, None])
  total_C, of_target_C = power_CV.sum(-1), jnp.where(hit_CV, logits_CV, 0).sum(-1)
  if axis is not None:
    total_C, of_target_C = jax.lax.psum((total_C, of_target_C), axis)
  counted_C = targets_C >= 0
  loss = jnp.where(counted_C, top_C + jnp.log(total_C) - of_target_C, 0).sum()
  d_logits_CV = jnp.where(counted_C[:, None], power_CV / total_C[:, None] - hit_CV, 0)
  return loss, d_logits_CV.astype(hidden_CD.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _sum(hidden_TD, head_DV, targets_T, chunk_size, axis):
  def step(total, item):
    return total + _chunk(item[0], head_DV, item[1], axis)[0], None
  exact = jnp.promote_types(hidden_TD.dtype, jnp.float32)
  return jax.lax.scan(step, jnp.zeros((), exact), _chunks(hidden_TD, targets_T, chunk_size))[0]


def _sum_forward(hidden_TD, head_DV, targets_T, chunk_size, axis):
  exact = jnp.promote_types(hidden_TD.dtype, jnp.float32)

  def step(carry, item):
    total, d_head = carry
    hidden_CD, targets_C = item
    loss, d_logits_CV = _chunk(hidden_CD, head_DV, targets_C, axis)
    d_head += jnp.matmul(hidden_CD.T, d_logits_CV, preferred_element_type=exact)
    return (total + loss, d_head), d_logits_CV @ head_DV.T

  zeros = (jnp.zeros((), exact), jnp.zeros(head_DV.shape, exact))
  (total, d_head), d_hidden = jax.lax.scan(step, zeros, _chunks(hidden_TD, targets_T, chunk_size))
  d_hidden = d_hidden.reshape(-1, hidden_TD.shape[1])[:hidden_TD.shape[0]]
  # Else the head's gradient, which is wanted last, could stay in float32 through the whole backward pass.
  return total, jax.lax.optimization_barrier((d_hidden, d_head.astype(head_DV.dtype)))


def weighed(gradients: tuple[jax.Array, ...], g: jax.Array, axis: str | None) -> tuple[jax.Array, ...]:
  """Gradients (any shapes and dtypes, kept) of a sum times its cotangent, the scalar `g`; `axis` is the mesh axis along
  which the vocabulary is split."""
  # Inside shard_map each device of the vocabulary's axis holds its share of the cotangent of a sum that all of them hold.
  g = g if axis is None else jax.lax.psum(g, axis)
  # In the cotangent's own precision: weight over count, rounded to bfloat16, would weigh this loss wrongly.
  return tuple((d.astype(g.dtype) * g).astype(d.dtype) for d in gradients)


def _sum_backward(chunk_size, axis, saved, g):
  return *weighed(saved, g, axis), None


_sum.defvjp(_sum_forward, _sum_backward)


def next_token_targets(tokens_BS: jax.Array, segment_ids_BS: jax.Array, loss_mask_BS: jax.Array) -> jax.Array:
  """Target of each place, int32 [B, S]: the next token of the same document where that token counts; -1 elsewhere."""
  mask_BS, next_BS, token_BS = map(sequence.following, (loss_mask_BS, segment_ids_BS, tokens_BS))
  return jnp.where((mask_BS > 0) & (next_BS == segment_ids_BS) & (segment_ids_BS > 0), token_BS, -1)


def mtp_targets(targets_BS: jax.Array, segment_ids_BS: jax.Array) -> jax.Array:
  """Target of the prediction block at each place, int32 [B, S]: the token after next of the same document; -1 elsewhere."""
  same_BS = sequence.following(segment_ids_BS) == segment_ids_BS
  return jnp.where(same_BS, sequence.following(targets_BS + 1) - 1, -1)  # behind a row stands 0, which becomes -1
