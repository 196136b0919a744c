"""The objective of reinforcement learning: GRPO with an unbiased KL and masked sequences (V3.2's report 3.1).

    A_i   = R_i - mean of its group's R
    r_it  = exp(logp_it - old_it)                      old: as the sampler drew the token
    kl_it = r_it (exp(ref_it - logp_it) - (ref_it - logp_it) - 1)
    M_i   = 0 if A_i < 0 and mean_t(old_it - logp_it) > delta, else 1
    J     = mean_i 1/|o_i| sum_t [ min(r_it A_i, clip(r_it, 1 - eps, 1 + eps) A_i) M_i - beta kl_it ]

The ratio in the KL carries a gradient: without it the estimator has the KL's value, but not its gradient.

Axis letters: B rows   S places of a row
"""

from __future__ import annotations

from typing import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_v4.config import ReinforcementConfig

METRICS = ("kl", "masked", "clipped", "acceptance", "policy_gap", "policy_gap_max")


def advantages(rewards: Sequence[Sequence[float]]) -> np.ndarray:
  """Each reward less its group's mean: [groups, replies], float64. No division by a deviation (as in V3.2)."""
  rewards = np.asarray(rewards, np.float64)
  return rewards - rewards.mean(1, keepdims=True)


def objective(logprobs: jax.Array, rows: Mapping[str, jax.Array],
              config: ReinforcementConfig) -> tuple[jax.Array, dict[str, jax.Array]]:
  """What rows add to J, and to its metrics.

  Args:
    logprobs: [B, S], of the model that learns, at the places that have a target.
    rows: "targets" int32 [B, S], -1 = none; "segment_ids" int32 [B, S], the samples of a row; float32 [B, S] "old",
      "reference" (if the KL has a weight), "advantage", and "weight" = 1 / (|o_i| x samples of the minibatch).
    config: clip, kl_weight, mask_above.

  Returns:
    J's part, a scalar, and scalars of which the parts of all rows add up to a mean over samples: "kl" in nats per token,
    "masked" = share of samples whose gain M_i takes away, "clipped" = share of tokens whose ratio is outside the clip,
    "acceptance" = share of tokens that are neither (every sample weighs the same, whatever its length), "policy_gap" = mean
    distance |old - logp| in nats; and "policy_gap_max", the largest such distance of a token, which does not add up.
  """
  asked = rows["targets"] >= 0
  weight = jnp.where(asked, rows["weight"], 0)
  # Where nothing is asked, numbers that no function below makes infinite.
  logprobs = jnp.where(asked, logprobs, 0)
  old = jnp.where(asked, rows["old"], 0)
  advantage = rows["advantage"]
  drift = jax.lax.stop_gradient(old - logprobs)
  live = jnp.ones_like(weight) if config.mask_above is None else _live(drift, advantage, rows, config.mask_above)
  ratio = jnp.exp(logprobs - old)
  clipped = jnp.clip(ratio, 1 - config.clip, 1 + config.clip)
  gain = jnp.minimum(ratio * advantage, clipped * advantage) * live
  kl = jnp.zeros_like(ratio)
  if config.kl_weight:
    further = jnp.where(asked, rows["reference"], 0) - logprobs
    kl = ratio * (jnp.exp(further) - further - 1)
  mean = lambda x: (weight * x).sum()
  outside = jnp.abs(ratio - 1) > config.clip
  found = {"kl": mean(kl), "masked": mean(1 - live), "clipped": mean(outside), "acceptance": mean(live * ~outside),
           "policy_gap": mean(jnp.abs(drift)), "policy_gap_max": jnp.abs(drift).max()}
  return mean(gain - config.kl_weight * kl), found


def _live(drift: jax.Array, advantage: jax.Array, rows: Mapping[str, jax.Array], limit: float) -> jax.Array:
  """M_i at each place of the samples, float [B, S]."""
  asked = (rows["targets"] >= 0).astype(drift.dtype)
  total, count = (_per_sample(x, rows["segment_ids"]) for x in (drift * asked, asked))
  return 1 - ((advantage < 0) & (total > limit * count)).astype(drift.dtype)


def _per_sample(x_BS: jax.Array, segment_ids_BS: jax.Array) -> jax.Array:
  """At each place the sum over its sample."""
  length = x_BS.shape[1]

  def row(x_S, segments_S):
    return jax.ops.segment_sum(x_S, segments_S, length + 1)[segments_S]
  return jax.vmap(row)(x_BS, segment_ids_BS)
