"""Manifold-constrained hyper-connections: N residual streams, mixed by a nearly doubly stochastic matrix (report 2.2,
eqs. 1-8).

Axis letters: B batch   S sequence   N streams   D hidden size
"""

from __future__ import annotations

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels.hyper_connections
from deepseek_v4 import sharding
from deepseek_v4.config import ModelConfig
from deepseek_v4.model import weights

_GATING_SCALE = 0.01  # initial factor of the input-dependent part (mHC table 5)
_STREAMS = ("batch", "sequence")


def initial_base(config: ModelConfig) -> np.ndarray:
  """Static part of the coefficients, float32 [(2 + N) N], at initialisation.

  "identity": the sublayer reads the mean of the streams, writes to all of them, and the streams stay (almost) unmixed;
  "zero": every coefficient at the middle of its range, which mixes the streams completely in every sublayer.
  """
  n = config.hc_mult
  if config.mhc_init == "zero":
    return np.zeros((2 + n) * n, np.float32)
  off = -8.0 * (1 - np.eye(n))
  return np.concatenate([np.full(n, _mean_logit(n)), np.zeros(n), off.reshape(-1)]).astype(np.float32)


def _mean_logit(n: int) -> float:
  """sigmoid(_mean_logit(n)) = 1 / n; a large finite number for n = 1."""
  return -math.log(n - 1) if n > 1 else 8.0


class HyperConnection(nn.Module):
  """Coefficients of one sublayer: streams -> its input, and how its output comes back."""

  config: ModelConfig
  kernels: str

  @nn.compact
  def __call__(self, streams_BSND: jax.Array, before: tuple[jax.Array, jax.Array, jax.Array] | None = None) -> Any:
    """Returns (streams, collapsed [B, S, D], post [B, S, N], comb [B, S, N, N]); the coefficients post and comb at least
    float32, the others of the streams' dtype.

    Args:
      before: (update [B, S, D], post, comb) of the sublayer before, whose output has not returned to the streams yet: it
        does so in the same pass over them. The streams that come back are those that this sublayer reads.
    """
    config, n = self.config, self.config.hc_mult
    width = n * config.hidden_size
    fn = jnp.concatenate([weights.exact(self, config, name, (width, columns)) for name, columns in (
        ("fn_pre", n), ("fn_post", n), ("fn_res", n * n))], 1)
    base = weights.exact(self, config, "base", ((2 + n) * n,), lambda *_: jnp.asarray(initial_base(config)))
    scale = weights.exact(self, config, "scale", (3,), nn.initializers.constant(_GATING_SCALE))

    options = dict(norm_eps=config.rms_norm_eps, eps=config.hc_eps, iterations=config.hc_sinkhorn_iters,
                   implementation=self.kernels)
    if before is None:
      run = functools.partial(pallas_kernels.hyper_connections.collapse, **options)
      found = sharding.per_shard(run, (_STREAMS, (), (), ()), (_STREAMS,) * 3)(streams_BSND, fn, base, scale)
      found = streams_BSND, *found
    else:
      run = functools.partial(pallas_kernels.hyper_connections.expand_collapse, **options)
      axes = (_STREAMS,) * 4
      found = sharding.per_shard(run, (*axes, (), (), ()), axes)(streams_BSND, *before, fn, base, scale)
    _, _, post, comb = found
    self.sow("intermediates", "post", post)
    self.sow("intermediates", "comb", comb)
    return found


def expand(streams_BSND: jax.Array, update_BSD: jax.Array, post: jax.Array, comb: jax.Array, *, kernels: str) -> jax.Array:
  """X'_k = post_k * update + sum_j comb[j, k] X_j: the sublayer's output returns to the streams, whose floating dtype stays;
  post and comb at least float32, as `HyperConnection` returns them."""
  def run(*args):
    return pallas_kernels.hyper_connections.expand(*args, implementation=kernels)
  return sharding.per_shard(run, (_STREAMS,) * 4, _STREAMS)(streams_BSND, update_BSD, post, comb)


class HyperHead(nn.Module):
  """Collapse of the streams in front of the output head: a gated sum, no Sinkhorn."""

  config: ModelConfig

  @nn.compact
  def __call__(self, streams_BSND: jax.Array) -> jax.Array:
    """Returns [B, S, D] = sum_j (sigmoid(u_j scale + base_j) + eps) X_j, summed at least in float32, in the streams'
    dtype."""
    config, n = self.config, self.config.hc_mult
    fn = weights.exact(self, config, "fn", (n * config.hidden_size, n))
    base = weights.exact(self, config, "base", (n,), nn.initializers.constant(
        _mean_logit(n) if config.mhc_init == "identity" else 0.0))
    scale = weights.exact(self, config, "scale", (1,), nn.initializers.constant(_GATING_SCALE))
    x = streams_BSND.astype(fn.dtype)
    flat = x.reshape(*x.shape[:2], -1)
    # The norm's factor is one number per token, so it may follow the matmul.
    u_BSN = jnp.matmul(flat, fn, precision="highest")
    u_BSN = u_BSN * jax.lax.rsqrt((flat * flat).mean(-1, keepdims=True) + config.rms_norm_eps)
    weight_BSN = jax.nn.sigmoid(u_BSN * scale + base) + config.hc_eps
    return jnp.einsum("BSN,BSND->BSD", weight_BSN, x).astype(streams_BSND.dtype)
