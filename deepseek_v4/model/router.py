"""Which experts a token goes to: learned top-k or a fixed hash, the balancing bias and the balance loss (report 2.1).

Axis letters: B batch   S sequence   D hidden size   E experts   k experts per token   V vocabulary
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from deepseek_v4 import sharding
from deepseek_v4.config import HASH, ModelConfig
from deepseek_v4.model import remat, sequence, weights
from deepseek_v4.model.context import Context

_LINEAR_BELOW = -40.0  # softplus(x) = exp(x) to the last bit there, and its square root has a finite gradient


def score(logits: jax.Array, scoring_func: str) -> jax.Array:
  """Affinity of each expert, shape and dtype of the logits [..., E]: sqrt(softplus(x)), or sigmoid(x); values and gradients
  finite for every x."""
  if scoring_func == "sigmoid":
    return jax.nn.sigmoid(logits)
  # where, not maximum: at a tie that would halve the gradient
  upper = jnp.sqrt(jax.nn.softplus(jnp.where(logits < _LINEAR_BELOW, _LINEAR_BELOW, logits)))
  return jnp.where(logits < _LINEAR_BELOW, jnp.exp(0.5 * jnp.minimum(logits, _LINEAR_BELOW)), upper)


def combine_weights(scores_BSE: jax.Array, experts_BSk: jax.Array, factor: float) -> jax.Array:
  """Weights [B, S, k], in the scores' dtype, of the chosen experts (int32): their unbiased scores, normalised to sum to
  `factor`."""
  return _normalised(jnp.take_along_axis(scores_BSE, experts_BSk, axis=-1)) * factor


def _normalised(scores: jax.Array) -> jax.Array:
  """scores / (their sum over the last axis + 1e-20)."""
  total = scores.sum(-1, keepdims=True) + 1e-20
  # Where all scores underflow, the quotient's derivative by the sum, scores / total^2, is 0 times more than float32 holds.
  return scores / jnp.where(total < 1e-18, jax.lax.stop_gradient(total), total)


def _mix_bits(x: jax.Array) -> jax.Array:
  """A fixed avalanche of 32-bit integers: every input bit changes about half of the output bits."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
  x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
  return x ^ (x >> 16)


def hash_table(vocab_size: int, num_experts: int, top_k: int, layer: jax.Array | int) -> jax.Array:
  """Experts of each token id, int32 [V, k]: distinct along k, loads over the whole table balanced within one.

  Ids come in blocks of E. Within a block, id r takes the experts P[(r + c_j) mod E] for a permutation P and k distinct
  offsets c_j, both from the hash of (block, layer): every expert occurs exactly k times. The last, partial block deals the
  experts of one permutation out in turn. The table of a release replaces this one; its hash function is not published.
  """
  blocks, rest = divmod(vocab_size, num_experts)
  seed = _mix_bits(jnp.uint32(layer) + jnp.uint32(0x9E3779B9))
  number = jnp.arange((blocks + 1) * num_experts, dtype=jnp.uint32).reshape(blocks + 1, num_experts)
  order = jnp.argsort(_mix_bits(number ^ seed), axis=1)
  offsets = jnp.argsort(_mix_bits(~number ^ seed), axis=1)[:, :top_k]
  r = jnp.arange(num_experts)[:, None]
  full = jax.vmap(lambda p, c: p[(r + c[None, :]) % num_experts])(order[:blocks], offsets[:blocks])
  dealt = order[blocks][(r[:rest] * top_k + jnp.arange(top_k)) % num_experts]
  return jnp.concatenate([full.reshape(-1, top_k), dealt.reshape(-1, top_k)]).astype(jnp.int32)


def expert_load(experts_BSk: jax.Array, num_experts: int, segment_ids_BS: jax.Array) -> jax.Array:
  """int32 [E]: (token, expert) pairs per expert, padding not counted."""
  hits = (experts_BSk[..., None] == jnp.arange(num_experts)) & (segment_ids_BS > 0)[..., None, None]
  return hits.sum((0, 1, 2), dtype=jnp.int32)


def balance_loss(scores_BSE: jax.Array, experts_BSk: jax.Array, context: Context) -> tuple[jax.Array, jax.Array]:
  """Sequence-wise balance loss per document, weighted by its tokens, as scalars (sum, tokens) in the scores' dtype, of int32
  experts; 1 per token at perfect balance.

  For a document of n tokens: sum_e f_e P_e with f_e = E / (k n) * picks of e (no gradient) and P_e the mean over its
  tokens of the scores normalised over experts (V3 eqs. 17-20; report 4.2.2).
  """
  num_experts, top_k = scores_BSE.shape[-1], experts_BSk.shape[-1]
  token_BS = (context.segment_ids > 0).astype(scores_BSE.dtype)
  share_BSE = _normalised(scores_BSE)
  picks_BSE = (experts_BSk[..., None] == jnp.arange(num_experts)).sum(-2).astype(scores_BSE.dtype) * token_BS[..., None]
  if context.contiguous:
    picks_of_document, tokens_of_document = picks_BSE.sum(1, keepdims=True), float(picks_BSE.shape[1])
  else:
    picks_of_document, tokens_of_document = sequence.by_part(_document_sums)(picks_BSE, context.segment_ids)
  terms_BS = (jax.lax.stop_gradient(picks_of_document) * share_BSE).sum(-1) / tokens_of_document
  return (terms_BS * token_BS).sum() * (num_experts / top_k), token_BS.sum()


def _document_sums(picks_BSE: jax.Array, segment_ids_BS: jax.Array) -> tuple[jax.Array, jax.Array]:
  """For each token the picks [B, S, E] of its document and how many tokens [B, S] that has."""
  start_BS, end_BS = _document_bounds(segment_ids_BS)
  summed_BSE = jnp.cumsum(picks_BSE, 1)
  at = lambda place: jnp.take_along_axis(summed_BSE, jnp.maximum(place, 0)[..., None], 1)
  picks_BSE = at(end_BS) - jnp.where((start_BS > 0)[..., None], at(start_BS - 1), 0)
  tokens_BS = (end_BS - start_BS + 1).astype(picks_BSE.dtype)
  if sequence.is_split():
    both = sequence.document_sums(jnp.concatenate([picks_BSE, tokens_BS[..., None]], -1), segment_ids_BS)
    picks_BSE, tokens_BS = both[..., :-1], both[..., -1]
  return picks_BSE, tokens_BS


def _document_bounds(segment_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
  """First and last place [B, S] in the row, or in a part of it, of each token's document."""
  place = jnp.broadcast_to(jnp.arange(segment_ids.shape[1]), segment_ids.shape)
  changes = segment_ids[:, 1:] != segment_ids[:, :-1]
  starts = jnp.pad(changes, ((0, 0), (1, 0)), constant_values=True)
  ends = jnp.pad(changes, ((0, 0), (0, 1)), constant_values=True)
  first = jax.lax.cummax(jnp.where(starts, place, 0), axis=1)
  last = jax.lax.cummin(jnp.where(ends, place, segment_ids.shape[1]), axis=1, reverse=True)
  return first, last


class Router(nn.Module):
  """Scores every expert for every token in float32 and names the experts of each token.

  The `router` collection holds what no gradient moves: the balancing bias of a learned router (it only steers the choice)
  or the table of a hash router.
  """

  config: ModelConfig
  kind: str

  @nn.compact
  def __call__(self, x_BSD: jax.Array, context: Context, layer: jax.Array | int, given: jax.Array | None = None
               ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (experts int32 [B, S, k], weights [B, S, k], scores [B, S, E]); the latter two at least float32, whatever x
    is, and the weights sum to routed_scaling_factor.

    `given` experts int32 [B, S, k] are taken instead of the best ones by a learned router; the weights are their current
    scores. The weights of a token with an unknown expert are NaN.
    """
    config = self.config
    num_experts, top_k = config.n_routed_experts, config.num_experts_per_tok
    gate_DE = weights.exact(self, config, "gate", (config.hidden_size, num_experts))
    logits_BSE = jnp.einsum("BSD,DE->BSE", x_BSD.astype(gate_DE.dtype), gate_DE, precision="highest")
    # Else, in the gradient of the gate, XLA may gather the tokens of a whole sequence.
    logits_BSE = remat.keep(sharding.constrain(logits_BSE, (*sequence.TOKENS, None)))
    scores_BSE = score(logits_BSE, config.scoring_func)
    if self.kind == HASH:
      table = self.variable("router", "hash_table",
                            lambda: hash_table(config.vocab_size, num_experts, top_k, layer)).value
      experts_BSk = table[context.tokens]
    elif given is not None:
      experts_BSk = jnp.clip(given, 0, num_experts - 1)
    else:
      bias_E = self.variable("router", "bias", jnp.zeros, (num_experts,), jnp.float32).value
      best = lambda biased_BSE: jax.lax.top_k(biased_BSE, top_k)[1]
      # XLA would gather the scores of all devices.
      experts_BSk = sharding.per_shard(best, (sequence.TOKENS,), sequence.TOKENS)(jax.lax.stop_gradient(scores_BSE) + bias_E)
    experts_BSk = remat.keep(experts_BSk)
    self.sow("intermediates", "scores", scores_BSE)
    self.sow("intermediates", "experts", experts_BSk)
    weighed_BSk = experts_BSk
    if given is not None and self.kind != HASH:
      # What is beyond the scores has the score NaN; a change of the weights themselves would round gradients otherwise.
      weighed_BSk = jnp.where((given != experts_BSk) & (context.segment_ids > 0)[..., None], num_experts, experts_BSk)
    weights_BSk = combine_weights(scores_BSE, weighed_BSk, config.routed_scaling_factor)
    self.sow("intermediates", "weights", weights_BSk)
    return experts_BSk, weights_BSk, scores_BSE
