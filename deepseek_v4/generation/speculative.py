"""Decoding with guesses: the prediction block drafts a few tokens, and one step of the main model verifies all of them.

The rule that accepts or replaces a draft leaves the main model's distribution as it is (Leviathan et al. 2023, Chen et
al. 2023), so that speculation changes how fast tokens come and never which are likely; greedy replies stay the same
tokens. Rows of a batch accept different numbers of drafts: the caches are taken back row by row.

Every token of a request has its own random keys, by its number. A draft that is thrown away because one before it was
refused may be drawn again with the same key, since nothing that was said by then depends on that key.

Axis letters: B requests   n drafts   P places of a step (n + 1)   S tokens of a chunk   N streams   D hidden size
              V vocabulary
"""

from __future__ import annotations

import copy
import functools
import time
from typing import Any, Callable, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from deepseek_v4.config import ModelConfig
from deepseek_v4.config_checks import refuse
from deepseek_v4.generation import decode, sample
from deepseek_v4.generation.decode import Generation
from deepseek_v4.generation.requests import Thought
from deepseek_v4.generation.sample import Rows
from deepseek_v4.model.cache import Cache, init_cache, rewind
from deepseek_v4.model.draft import Drafter, init_draft_cache
from deepseek_v4.model.transformer import DeepseekV4


# ---- the rule ------------------------------------------------------------------------------------------------------
def place_keys(keys: jax.Array, numbers: jax.Array, places: int) -> jax.Array:
  """Typed keys [B, places, 3] of tokens `numbers` (int32 [B]) and after of requests with typed keys [B]: to draft a token,
  to accept it, and to choose it otherwise."""
  numbers_BP = numbers[:, None] + jnp.arange(places)
  keys_BP = jax.vmap(sample.token_keys, (None, 1), 1)(keys, numbers_BP)
  return jax.vmap(jax.vmap(lambda key: jax.random.split(key, 3)))(keys_BP)


def verify(keys: jax.Array, logits: jax.Array, drafts: jax.Array, guesses: jax.Array, offered: jax.Array,
           forced: jax.Array, settings: Rows) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Accepts the first drafts of each row and chooses the token after them.

  A draft x is accepted with probability min(1, p(x) / q(x)), where p is the distribution that plain sampling draws from
  and q the one that the draft came from. The first token that is not accepted is drawn from max(p - q, 0), normalised,
  and from p where there is no draft.

  Args:
    keys: typed [B, P, 3] of `place_keys`, P = n + 1.
    logits: [B, P, V] of the main model at each place, supposing the drafts before it.
    drafts: int32 [B, n].
    guesses: [B, n, V], log q of each draft, filtered as p is.
    offered: int32 [B], drafts that count: the first of each row, 0 to n.
    forced: int32 [B, P], a token >= 0 that has to stand at a place, supposing the drafts before it.
    settings: of the rows.

  Returns:
    (tokens int32 [B, P], log-probabilities [B, P] under p, 0 of forced ones; accepted int32 [B]). Of a row the first
    accepted + 1 places have a meaning.
  """
  n = drafts.shape[1]
  places_P = jnp.arange(n + 1)
  target_BPV = jax.vmap(sample.log_probabilities, (1, None), 1)(logits, settings)
  of_draft = lambda x_BnV: jnp.take_along_axis(x_BnV, drafts[..., None], 2)[..., 0]
  uniform_Bn = jax.vmap(jax.vmap(lambda key: jax.random.uniform(key, (), target_BPV.dtype)))(keys[:, :n, 1])
  agreed_Bn = jnp.log(uniform_Bn) < of_draft(target_BPV[:, :n]) - of_draft(guesses)
  agreed_Bn = jnp.where(forced[:, :n] >= 0, forced[:, :n] == drafts, agreed_Bn) & (places_P[:n] < offered[:, None])
  accepted_B = jnp.cumprod(agreed_Bn, axis=1, dtype=jnp.int32).sum(1)

  at_end = lambda x: jnp.take_along_axis(x, accepted_B.reshape(-1, *(1,) * (x.ndim - 1)), 1)[:, 0]
  target_BV, end_keys_B = at_end(target_BPV), jax.vmap(lambda row, i: row[i, 2])(keys, accepted_B)
  guess_BV = at_end(jnp.pad(guesses, ((0, 0), (0, 1), (0, 0)), constant_values=-jnp.inf))
  refused_B1 = (accepted_B < offered)[:, None]
  left_BV = jnp.exp(target_BV) - jnp.where(refused_B1, jnp.exp(guess_BV), 0)
  # Where rounding leaves nothing, p and q are equal.
  left_BV = jnp.where((left_BV > 0).any(1, keepdims=True), jnp.log(jnp.maximum(left_BV, 0)), target_BV)
  noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, left_BV.shape[1:], left_BV.dtype))(end_keys_B)
  own_B = jnp.argmax(left_BV + noise_BV, axis=1).astype(drafts.dtype)

  own_BP = jnp.where(forced >= 0, forced, own_B[:, None])
  tokens_BP = jnp.where(places_P < accepted_B[:, None], jnp.pad(drafts, ((0, 0), (0, 1))), own_BP)
  logprobs_BP = jnp.take_along_axis(target_BPV, tokens_BP[..., None], 2)[..., 0]
  return tokens_BP, jnp.where(forced >= 0, 0, logprobs_BP), accepted_B


# ---- programs ------------------------------------------------------------------------------------------------------
@flax.struct.dataclass
class State:
  """What one step leaves for the next.

  Attributes:
    cache: of the main model, without the last token.
    draft_cache: of the prediction block; as long as `cache`.
    token: int32 [B], the last token of each row, which neither cache holds yet.
    drafts: int32 [B, n], guesses of the tokens after it; guesses: [B, n, V], log of what they were drawn from.
  """

  cache: Cache
  draft_cache: Cache
  token: jax.Array
  drafts: jax.Array
  guesses: jax.Array


def _draft(model: DeepseekV4, variables: Any, cache: Cache, streams, tokens, count, keys, settings: Rows):
  """Feeds the prediction block what the main model has settled, then its own guesses, which its cache then forgets.

  Args:
    streams, tokens, count: see `Drafter`.
    keys: typed [B, n] of the tokens that are guessed.

  Returns:
    (cache, drafts [B, n], guesses [B, n, V]).
  """
  drafter = Drafter(model.config, model.kernels)
  lengths_B, further_B = cache.lengths + count, (count > 0).astype(jnp.int32)

  def draw(logits_BV, keys_B):
    guess_BV = sample.log_probabilities(logits_BV, settings)
    noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, guess_BV.shape[1:], guess_BV.dtype))(keys_B)
    return jnp.argmax(guess_BV + noise_BV, axis=1).astype(jnp.int32), guess_BV

  def chain(carry, keys_B):
    cache, streams_B1ND, last_B = carry
    logits_BV, streams_B1ND, cache = drafter.apply(variables, streams_B1ND, last_B[:, None], further_B, cache)
    draft_B, guess_BV = draw(logits_BV, keys_B)
    return (cache, streams_B1ND, draft_B), (draft_B, guess_BV)

  logits_BV, streams_B1ND, cache = drafter.apply(variables, streams, tokens, count, cache)
  draft_B, guess_BV = draw(logits_BV, keys[:, 0])
  drafts_nB, guesses_nBV = draft_B[None], guess_BV[None]
  if keys.shape[1] > 1:  # a loop that never runs is compiled all the same
    start = cache, streams_B1ND, draft_B
    (cache, _, _), further = jax.lax.scan(chain, start, keys[:, 1:].swapaxes(0, 1))
    drafts_nB, guesses_nBV = (jnp.concatenate(pair) for pair in zip((drafts_nB, guesses_nBV), further))
  return rewind(cache, lengths_B), drafts_nB.swapaxes(0, 1), guesses_nBV.swapaxes(0, 1)


@functools.partial(jax.jit, static_argnames=("model", "reach"), donate_argnames=("cache", "draft_cache"))
def feed(model: DeepseekV4, variables: Any, cache: Cache, draft_cache: Cache, tokens: jax.Array, following: jax.Array,
         segment_ids: jax.Array, *, reach: int) -> tuple[Cache, Cache]:
  """The two caches, which are given up, after a chunk of prompts.

  Args:
    tokens, following, segment_ids: int32 [B, S]: tokens, those after each, and 0 where there is none; tokens first.
    reach: see `cache_reach` of `DeepseekV4.__call__`.
  """
  out = model.apply(variables, tokens, None, segment_ids, cache, logits="none", cache_reach=reach)
  count_B = (segment_ids > 0).sum(1, dtype=jnp.int32)
  drafter = Drafter(model.config, model.kernels)
  _, _, draft_cache = drafter.apply(variables, out.streams, following, count_B, draft_cache)
  return out.cache, draft_cache


@functools.partial(jax.jit, static_argnames=("model", "reach"), donate_argnames=("state",))
def advance(model: DeepseekV4, variables: Any, state: State, keys: jax.Array, numbers: jax.Array, count: jax.Array,
            forced: jax.Array, settings: Rows, *, reach: int) -> Any:
  """One step of the main model over the last token and its drafts, and drafts for the next one; the state is given up.

  Args:
    keys: typed [B], of the requests.
    numbers: int32 [B], tokens of each reply so far.
    count: int32 [B], tokens to feed: 0 of a reply that has ended, else 1 and the drafts that there is room for.
    forced: int32 [B, P], see `verify`.
    reach: see `cache_reach` of `DeepseekV4.__call__`.

  Returns:
    (State, (tokens [B, P], log-probabilities [B, P], accepted [B])); see `verify`.
  """
  n = state.drafts.shape[1]
  before_B, alive_B = state.cache.lengths, (count > 0).astype(jnp.int32)
  tokens_BP = jnp.concatenate([state.token[:, None], state.drafts], 1)
  segment_ids_BP = (jnp.arange(n + 1) < count[:, None]).astype(jnp.int32)
  out = model.apply(variables, tokens_BP, None, segment_ids_BP, state.cache, cache_reach=reach)
  keys_BP3 = place_keys(keys, numbers, 2 * n + 1)
  offered_B = jnp.maximum(count - 1, 0)
  found = verify(keys_BP3[:, :n + 1], out.logits, state.drafts, state.guesses, offered_B, forced, settings)
  tokens_BP, _, accepted_B = found
  kept_B = (accepted_B + 1) * alive_B
  # The drafts follow the last token that was chosen.
  draft_keys_Bn = jax.vmap(lambda row, i: jax.lax.dynamic_slice_in_dim(row, i, n))(keys_BP3[:, :, 0], accepted_B + 1)
  draft_cache, drafts_Bn, guesses_BnV = _draft(model, variables, state.draft_cache, out.streams, tokens_BP, kept_B,
                                               draft_keys_Bn, settings)
  last_B = jnp.take_along_axis(tokens_BP, accepted_B[:, None], 1)[:, 0]
  return State(rewind(out.cache, before_B + kept_B), draft_cache, last_B, drafts_Bn, guesses_BnV), found


# ---- replies -------------------------------------------------------------------------------------------------------
class _Replies:
  """What has been said so far."""

  def __init__(self, thoughts: Sequence[Thought], max_new_tokens: int, on_token: Callable[[int, int], None] | None):
    self.tokens: list[list[int]] = [[] for _ in thoughts]
    self.logprobs: list[list[float]] = [[] for _ in thoughts]
    self.stopped = [False] * len(thoughts)
    self._thoughts, self._most, self._on_token = thoughts, max_new_tokens, on_token

  def room(self, row: int) -> int:
    """Tokens that the reply may still grow by."""
    return 0 if self.stopped[row] else self._most - len(self.tokens[row])

  def add(self, row: int, tokens, logprobs) -> int:
    """Takes tokens up to the first that ends the reply; returns how many."""
    for taken, (token, logprob) in enumerate(zip(tokens, logprobs), 1):
      self.tokens[row].append(int(token))
      self.logprobs[row].append(float(logprob))
      self.stopped[row] = self._thoughts[row].add(int(token))
      if self._on_token is not None:
        self._on_token(row, int(token))
      if self.stopped[row]:
        return taken
    return len(tokens)

  def forced(self, row: int, drafts) -> list[int]:
    """Tokens that the thinking budget puts at the next place and behind each of these drafts, -1 where none."""
    thought = copy.copy(self._thoughts[row])
    found = [thought.forced]
    for draft in drafts:
      thought.add(draft)
      found.append(thought.forced)
    return found


def check(config: ModelConfig, variables: Any, speculative: Any) -> int:
  """The number of drafts.

  Raises:
    ValueError: it is no such number, or the model or its variables have no prediction block.
  """
  if not isinstance(speculative, int) or speculative < 0:
    refuse("speculative", speculative, "True, False or a number of drafts")
  if speculative and config.num_nextn_predict_layers != 1:
    refuse("speculative", speculative, "a model with a prediction block (num_nextn_predict_layers = 1), or False")
  if speculative and "mtp" not in variables["params"]:
    refuse("speculative", speculative, "variables with the prediction block's (params/mtp), or False")
  return int(speculative)


def generate(model: DeepseekV4, variables: Any, prompts: Sequence[Sequence[int]], *, drafts: int, keys: jax.Array,
             settings: Rows, max_new_tokens: int, thoughts: Sequence[Thought], chunk_size: int, cache_storage: str,
             on_token: Callable[[int, int], None] | None, on_chunk: Callable[[int], None] | None) -> Generation:
  """`decode.generate` with this many drafts a step; arguments as there, dtypes too, where they have been
  checked."""
  config, batch = model.config, len(prompts)
  room = decode.room_for(max(map(len, prompts)) + max_new_tokens, config.max_position_embeddings)
  cache, draft_cache = (make(config, batch, room, rewind=drafts, storage=cache_storage)
                        for make in (init_cache, init_draft_cache))
  size = sum(cache.bytes_by_kind.values()) + sum(draft_cache.bytes_by_kind.values())
  started = time.perf_counter()
  # The last token of a prompt is the first step's, as that of a reply is the next one's.
  parts = ([prompt[part] for prompt in prompts] for part in (slice(-1), slice(1, None)))
  for (tokens, segment_ids, end), (after, _, _) in zip(*(decode.chunks(part, chunk_size) for part in parts)):
    cache, draft_cache = feed(model, variables, cache, draft_cache, tokens, after, segment_ids,
                              reach=decode.reach_of(end, room))
    if on_chunk is not None:
      cache.lengths.block_until_ready()
      on_chunk(end)
  cache.lengths.block_until_ready()
  prefilled = time.perf_counter()

  replies = _Replies(thoughts, max_new_tokens, on_token)
  exact = jnp.promote_types(config.compute_dtype, jnp.float32)
  state = State(cache, draft_cache, jnp.array([prompt[-1] for prompt in prompts], jnp.int32),
                jnp.zeros((batch, drafts), jnp.int32), jnp.zeros((batch, drafts, config.vocab_size), exact))
  count, offered, kept = np.ones(batch, np.int32), 0, 0
  while count.any():
    guessed = np.asarray(state.drafts)
    forced = np.array([replies.forced(i, guessed[i].tolist()) for i in range(batch)], np.int32)
    numbers = np.array([len(reply) for reply in replies.tokens], np.int32)
    longest = max(len(prompts[i]) + len(replies.tokens[i]) - 1 + int(count[i]) for i in np.flatnonzero(count).tolist())
    state, found = advance(model, variables, state, keys, numbers, count, forced, settings,
                           reach=decode.reach_of(longest, room))
    tokens, logprobs, accepted = jax.device_get(found)
    for i in np.flatnonzero(count):
      taken = replies.add(int(i), tokens[i, :accepted[i] + 1], logprobs[i, :accepted[i] + 1])
      offered, kept = offered + int(count[i]) - 1, kept + min(taken, int(accepted[i]))
    count = np.array([min(replies.room(i), drafts + 1) for i in range(batch)], np.int32)
  finish = ["stop" if stopped else "length" for stopped in replies.stopped]
  return Generation(replies.tokens, replies.logprobs, finish, kept / offered if offered else None, size,
                    prefilled - started, time.perf_counter() - prefilled)
