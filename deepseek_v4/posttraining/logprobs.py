"""Log-probabilities of given tokens, a chunk of tokens at a time: [batch, sequence, vocabulary] never exists.

They are the logp of GRPO's ratios, and kept sets its sampling mask (V3.2's report 3.1).

Axis letters: B batch   S sequence   D hidden size   V vocabulary of a device   T tokens of a device   C tokens of a chunk
              b bytes with a bit for each of V
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from deepseek_v4 import sharding


@dataclasses.dataclass(frozen=True)
class _Settings:
  chunk: int
  temperature: float
  axis: str | None  # mesh axis that the vocabulary is split over


def token_logprobs(hidden: jax.Array, head: jax.Array, targets: jax.Array, *, chunk: int, temperature: float = 1.0,
                   kept: jax.Array | None = None) -> jax.Array:
  """log softmax(hidden @ head / temperature)[target] of each place, as the sampler computes it; differentiable.

  Args:
    hidden: [B, S, D], what the head multiplies, floating.
    head: [D, V], floating.
    targets: int32 [B, S]; -1 = nothing is asked.
    chunk: tokens per device whose logits exist at a time.
    temperature: above 0.
    kept: uint8 [B, S, ceil(V / 8)], the tokens that have a probability, as bits in the order of `numpy.packbits`; None =
      all.

  Returns:
    Nats [B, S], at least float32; 0 where nothing is asked.

  Raises:
    ValueError: kept sets of another width, or a mesh that splits a vocabulary of which a device's part fills no bytes.
  """
  axis = sharding.axis_name("vocab")
  if kept is not None:
    width = -(-head.shape[1] // 8)
    if kept.shape != (*targets.shape, width) or kept.dtype != jnp.uint8:
      raise ValueError(f"kept = {kept.dtype}{kept.shape}: expected uint8 {(*targets.shape, width)}")
    if axis is not None and head.shape[1] % (8 * sharding.axis_size("vocab")):
      raise ValueError(f"vocabulary = {head.shape[1]}: expected a multiple of 8 x mesh.tensor for kept sets")
  settings = _Settings(chunk, temperature, axis)

  def run(hidden, head, targets, *kept):
    flat = lambda x: x.reshape(-1, *x.shape[2:])
    return _logprobs(flat(hidden), head, flat(targets), *(map(flat, kept) if kept else (None,)),
                     settings).reshape(targets.shape)

  tokens = ("batch", "sequence")
  in_axes = [tokens, (None, "vocab"), tokens] + ([(*tokens, "vocab")] if kept is not None else [])
  return sharding.per_shard(run, in_axes, tokens)(hidden, head, targets, *([] if kept is None else [kept]))


def _chunks(settings: _Settings, hidden_TD, targets_T, kept_Tb, *more_T):
  """Each argument as [n, C, ...]; the tokens that fill the last chunk have no target."""
  size = min(settings.chunk, hidden_TD.shape[0])
  missing = -hidden_TD.shape[0] % size

  def cut(x, fill=0):
    padded = jnp.pad(x, ((0, missing), *((0, 0),) * (x.ndim - 1)), constant_values=fill)
    return padded.reshape(-1, size, *x.shape[1:])
  return cut(hidden_TD), cut(targets_T, -1), None if kept_Tb is None else cut(kept_Tb), *map(cut, more_T)


def _logits(settings: _Settings, hidden_CD, head_DV, targets_C, kept_Cb):
  """(logits [C, V], which of them is the target)."""
  exact = jnp.promote_types(hidden_CD.dtype, jnp.float32)
  logits_CV = jnp.matmul(hidden_CD, head_DV, preferred_element_type=exact) / settings.temperature
  if kept_Cb is not None:
    kept_CV = jnp.unpackbits(kept_Cb, axis=1)[:, :head_DV.shape[1]] > 0
    logits_CV = jnp.where(kept_CV | (targets_C < 0)[:, None], logits_CV, -jnp.inf)
  first = 0 if settings.axis is None else jax.lax.axis_index(settings.axis) * head_DV.shape[1]
  return logits_CV, targets_C[:, None] == jnp.arange(head_DV.shape[1]) + first


def _normalisers(settings: _Settings, logits_CV, hit_CV):
  """(log of the sum of exp(logits), logit of the target), each [C], over the whole vocabulary."""
  top_C = logits_CV.max(-1)
  top_C = top_C if settings.axis is None else jax.lax.pmax(top_C, settings.axis)
  total_C, of_target_C = jnp.exp(logits_CV - top_C[:, None]).sum(-1), jnp.where(hit_CV, logits_CV, 0).sum(-1)
  if settings.axis is not None:
    total_C, of_target_C = jax.lax.psum((total_C, of_target_C), settings.axis)
  return top_C + jnp.log(total_C), of_target_C


def _forward(hidden_TD, head_DV, targets_T, kept_Tb, settings):
  def step(_, item):
    logits_CV, hit_CV = _logits(settings, item[0], head_DV, *item[1:])
    return None, _normalisers(settings, logits_CV, hit_CV)

  _, (whole, of_target) = jax.lax.scan(step, None, _chunks(settings, hidden_TD, targets_T, kept_Tb))
  whole_T, of_target_T = (x.reshape(-1)[:targets_T.shape[0]] for x in (whole, of_target))
  return jnp.where(targets_T >= 0, of_target_T - whole_T, 0), (hidden_TD, head_DV, targets_T, kept_Tb, whole_T)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _logprobs(hidden_TD, head_DV, targets_T, kept_Tb, settings):
  return _forward(hidden_TD, head_DV, targets_T, kept_Tb, settings)[0]


def _backward(settings, saved, g_T):
  hidden_TD, head_DV, targets_T, kept_Tb, whole_T = saved
  # Inside shard_map each device of the vocabulary's axis holds its share of the cotangent of what all of them hold.
  g_T = g_T if settings.axis is None else jax.lax.psum(g_T, settings.axis)

  def step(d_head, item):
    hidden_CD, targets_C, kept_Cb, whole_C, g_C = item
    logits_CV, hit_CV = _logits(settings, hidden_CD, head_DV, targets_C, kept_Cb)
    d_logits_CV = jnp.where((targets_C >= 0)[:, None], hit_CV - jnp.exp(logits_CV - whole_C[:, None]), 0)
    d_logits_CV = (d_logits_CV * g_C[:, None] / settings.temperature).astype(hidden_CD.dtype)
    d_head += jnp.matmul(hidden_CD.T, d_logits_CV, preferred_element_type=d_head.dtype)
    return d_head, d_logits_CV @ head_DV.T

  zeros = jnp.zeros(head_DV.shape, jnp.promote_types(head_DV.dtype, jnp.float32))
  d_head, d_hidden = jax.lax.scan(step, zeros, _chunks(settings, hidden_TD, targets_T, kept_Tb, whole_T, g_T))
  d_hidden_TD = d_hidden.reshape(-1, hidden_TD.shape[1])[:hidden_TD.shape[0]]
  return d_hidden_TD, d_head.astype(head_DV.dtype), None, None


_logprobs.defvjp(_forward, _backward)
