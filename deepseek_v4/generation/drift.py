"""How far logits move when the cache keeps what the report publishes and not what was computed.

Axis letters: B sequences   S tokens of a chunk   V vocabulary
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_v4.generation.decode import chunks, reach_of, room_for
from deepseek_v4.model.cache import Cache, init_cache
from deepseek_v4.model.transformer import DeepseekV4


@dataclasses.dataclass(frozen=True)
class Drift:
  """Logits of storage "mixed" against those of "compute", over all tokens of all sequences.

  Attributes:
    tokens: compared.
    mean, largest: absolute difference of a logit.
    spread: standard deviation of a token's logits, the mean over tokens.
    same_choice: share of tokens after which both prefer the same next one.
    divergence: mean KL(compute || mixed) of the next token's distributions, nats.
  """

  tokens: int
  mean: float
  largest: float
  spread: float
  same_choice: float
  divergence: float


@functools.partial(jax.jit, static_argnames=("model", "reach"), donate_argnames=("caches",))
def _compare(model: DeepseekV4, variables: Any, caches: tuple[Cache, Cache], tokens: jax.Array, segment_ids: jax.Array, *,
             reach: int):
  """The caches after a chunk, and the sums over its tokens that `Drift` consists of, with the largest difference second."""
  outs = [model.apply(variables, tokens, None, segment_ids, cache, cache_reach=reach) for cache in caches]
  exact_BSV, mixed_BSV = (out.logits for out in outs)
  token_BS = segment_ids > 0
  apart_BSV = jnp.abs(mixed_BSV - exact_BSV)
  log_p, log_q = (jax.nn.log_softmax(x) for x in (exact_BSV, mixed_BSV))
  sums = [apart_BSV.mean(-1), apart_BSV.max(-1), exact_BSV.std(-1), exact_BSV.argmax(-1) == mixed_BSV.argmax(-1),
          (jnp.exp(log_p) * (log_p - log_q)).sum(-1)]
  sums = [jnp.where(token_BS, x, 0).astype(log_p.dtype) for x in sums]
  return tuple(out.cache for out in outs), jnp.stack([x.max() if i == 1 else x.sum() for i, x in enumerate(sums)])


def storage_drift(model: DeepseekV4, variables: Any, sequences: Sequence[Sequence[int]], *, chunk_size: int = 512) -> Drift:
  """Feeds the same tokens through a cache of either storage.

  Args:
    model, variables: as in `DeepseekV4.apply`.
    sequences: token ids, at least one of each.
    chunk_size: tokens of a sequence that are fed at a time.
  """
  room = room_for(max(map(len, sequences)), model.config.max_position_embeddings)
  caches = tuple(init_cache(model.config, len(sequences), room, storage=storage) for storage in ("compute", "mixed"))
  parts = []
  for tokens, segment_ids, fed in chunks(sequences, chunk_size):
    caches, sums = _compare(model, variables, caches, tokens, segment_ids, reach=reach_of(fed, room))
    parts.append(np.asarray(sums, np.float64))
  count = sum(map(len, sequences))
  mean, _, *others = (np.sum(parts, 0) / count).tolist()
  return Drift(count, mean, float(max(part[1] for part in parts)), *others)
