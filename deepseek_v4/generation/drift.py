"""How far logits move when the cache keeps what the report publishes (report 2.3.4) and not what was computed.

Axis letters: B sequences   S tokens of a chunk   D hidden size   V vocabulary   C tokens whose logits exist at a time
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_v4.config import ModelConfig
from deepseek_v4.config_checks import refuse
from deepseek_v4.generation.decode import chunks, reach_of, room_for
from deepseek_v4.model import weights
from deepseek_v4.model.cache import Cache, init_cache
from deepseek_v4.model.transformer import DeepseekV4
from deepseek_v4.model.vocabulary import LMHead, logits


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
  """The caches after a chunk, and the sums over its tokens that `Drift` consists of, with the largest difference second.

  The logits of `loss_chunk_size` tokens of either side exist at a time, whatever the chunk.
  """
  config = model.config
  outs = [model.apply(variables, tokens, None, segment_ids, cache, logits="none", cache_reach=reach) for cache in caches]
  head_DV = LMHead(config).apply({"params": variables["params"]["lm_head"]})
  token_T = (segment_ids > 0).reshape(-1)
  size = min(config.loss_chunk_size, token_T.size)

  def blocks(x):
    return jnp.pad(x, ((0, -len(x) % size), *((0, 0),) * (x.ndim - 1))).reshape(-1, size, *x.shape[1:])

  def sums(carry, item):
    token_C, *hidden = item
    exact_CV, mixed_CV = (logits(config, x, head_DV) for x in hidden)
    apart_CV = jnp.abs(mixed_CV - exact_CV)
    log_p, log_q = (jax.nn.log_softmax(x) for x in (exact_CV, mixed_CV))
    found = [apart_CV.mean(-1), apart_CV.max(-1), exact_CV.std(-1), exact_CV.argmax(-1) == mixed_CV.argmax(-1),
             (jnp.exp(log_p) * (log_p - log_q)).sum(-1)]
    found = [jnp.where(token_C, x, 0).astype(carry.dtype) for x in found]
    new = jnp.stack([jnp.maximum(carry[i], x.max()) if i == 1 else carry[i] + x.sum() for i, x in enumerate(found)])
    return new, None

  start = jnp.zeros(5, weights.exact_dtype(config))
  flat = (blocks(out.hidden.reshape(-1, config.hidden_size)) for out in outs)
  return tuple(out.cache for out in outs), jax.lax.scan(sums, start, (blocks(token_T), *flat))[0]


def storage_drift(model: DeepseekV4, variables: Any, sequences: Sequence[Sequence[int]], *, chunk_size: int = 512) -> Drift:
  """Feeds the same tokens through a cache of either storage.

  Args:
    model, variables: as in `DeepseekV4.apply`.
    sequences: token ids, at least one of each.
    chunk_size: tokens of a sequence that are fed at a time.

  Raises:
    ValueError: no sequences, an empty or too long one, ids beyond the vocabulary, no such chunk size, a model that the mixed
      storage does not fit, or one that rounds in both storages alike; before anything is computed.
  """
  _check(model.config, sequences, chunk_size)
  room = room_for(max(map(len, sequences)), model.config.max_position_embeddings)
  caches = tuple(init_cache(model.config, len(sequences), room, storage=storage) for storage in ("compute", "mixed"))
  parts = []
  for tokens, segment_ids, fed in chunks(sequences, chunk_size):
    caches, sums = _compare(model, variables, caches, tokens, segment_ids, reach=reach_of(fed, room))
    parts.append(np.asarray(sums, np.float64))
  count = sum(map(len, sequences))
  mean, _, *others = (np.sum(parts, 0) / count).tolist()
  return Drift(count, mean, float(max(part[1] for part in parts)), *others)


def _check(config: ModelConfig, sequences: Sequence[Sequence[int]], chunk_size: int) -> None:
  if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
    refuse("chunk_size", chunk_size, "a whole number, at least 1")
  if not len(sequences):
    refuse("sequences", sequences, "at least one")
  for i, ids in enumerate(sequences):
    if not 1 <= len(ids) <= config.max_position_embeddings:
      refuse(f"sequences[{i}]", f"{len(ids)} tokens", f"1 to max_position_embeddings = {config.max_position_embeddings}")
    if not 0 <= min(ids) <= max(ids) < config.vocab_size:
      refuse(f"sequences[{i}]", f"ids from {min(ids)} to {max(ids)}", f"ids below vocab_size = {config.vocab_size}")
  config.check_hadamard("storage_drift")
  if config.inference_rounding:
    refuse("inference_rounding", True, "False with storage_drift: it rounds whatever mixed storage does, in either storage")
