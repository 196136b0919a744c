"""From prompts to tokens: prefill in chunks, then token by token, through one cache.

A batch holds prompts of any lengths; a request's tokens depend on its prompt, its settings and its key, not on what is
beside it. Programs are compiled for a few widths of chunks and a few reaches (how many entries are read), never for a
length: the cache has static shapes and is donated. Layers that are scanned copy their cache at every step;
`dsv4.restack(variables, config, scan_layers=False)` with a model of `scan_layers=False` updates it in place.

Axis letters: B requests   S tokens of a chunk   V vocabulary   L layers   k experts per token
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from typing import Any, Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_v4.config_checks import refuse
from deepseek_v4.generation import requests, sample
from deepseek_v4.generation.requests import ThinkingBudget, Thought
from deepseek_v4.generation.sample import Rows
from deepseek_v4.model.cache import Cache, init_cache
from deepseek_v4.model.formats import STORAGES
from deepseek_v4.model.transformer import DeepseekV4

_SMALLEST_REACH = 1024
_TOGETHER, _PATIENCE = 16, 0.1  # tokens that come from one call at most, and the seconds that it should not exceed
RECORDS = ("experts", "kept")  # what `generate` can record


@dataclasses.dataclass(frozen=True)
class Drawn:
  """Tokens of one reply that came together.

  Attributes:
    request: which one.
    tokens: ids, in order.
    logprobs: of each of them; see `Generation`.
  """

  request: int
  tokens: tuple[int, ...]
  logprobs: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Generation:
  """Result of `generate`.

  Attributes:
    tokens: of each reply, the stop token included; what it had begun with is not repeated.
    logprobs: of each token, under the distribution that it was drawn from (filters and temperature applied); 0 for greedy
      choices and for tokens that a thinking budget put there.
    finish: "stop" (a stop token came) or "length", of each reply.
    acceptance: drafts that became tokens of the replies, as a share of those that were verified; None if none were.
    cache_bytes: of all rows together.
    prefill_seconds, decode_seconds: with compilation, where something was compiled.
    experts: if recorded: of each request uint16 [L, n, k], the experts of the n tokens that were fed: the prompt and the
      reply but its last token.
    kept: if recorded: of each request uint8 [m, ceil(V / 8)], for each token of the reply the set that it was drawn from, as
      bits in the order of `numpy.packbits`.
  """

  tokens: list[list[int]]
  logprobs: list[list[float]]
  finish: list[str]
  acceptance: float | None
  cache_bytes: int
  prefill_seconds: float
  decode_seconds: float
  experts: list[np.ndarray] | None = None
  kept: list[np.ndarray] | None = None


@functools.partial(jax.jit, static_argnames=("model", "reach", "with_experts"), donate_argnames=("cache", "logits"))
def advance(model: DeepseekV4, variables: Any, cache: Cache, tokens: jax.Array, segment_ids: jax.Array, logits: jax.Array,
            *, reach: int, with_experts: bool = False) -> tuple[Any, ...]:
  """Feeds a chunk; the cache and the logits that came in are given up.

  Args:
    tokens, segment_ids: int32 [B, S]; segment 0 = not a token.
    logits: [B, V], at least float32, after each row's last token so far.
    reach: see `cache_reach` of `DeepseekV4.__call__`.
    with_experts: also return who worked on each token.

  Returns:
    The cache and logits [B, V], dtype kept, after these tokens; rows without a token keep theirs. And int32 [L, B, S, k], if
    wanted.
  """
  out = model.apply(variables, tokens, None, segment_ids, cache, logits="last", cache_reach=reach)
  moved_B1 = (segment_ids > 0).any(1, keepdims=True)
  moved = out.cache, jnp.where(moved_B1, out.logits[:, 0], logits)
  return (*moved, out.routing["experts"]) if with_experts else moved


@functools.partial(jax.jit, static_argnames=("model", "reach", "record"), donate_argnames=("cache", "logits"))
def _go_on(model: DeepseekV4, variables: Any, cache: Cache, logits: jax.Array, last: jax.Array, stopped: jax.Array,
           stop: jax.Array, keys: jax.Array, number: jax.Array, count: jax.Array, settings: Rows, forced: jax.Array,
           thinking: jax.Array, *, reach: int, record: tuple[str, ...] = ()):
  """Up to `count` tokens of each reply, one after another; the cache and the logits that came in are given up.

  Args:
    logits: [B, V], see `advance`.
    last: int32 [B], the token before, not fed yet.
    stopped: bool [B], replies that take no more; stop: int32 [s], tokens that end one.
    number: int32 [B], of each reply's first token; count: at most `_TOGETHER`, fewer tokens come if all replies stop, or one
      that is `thinking` (bool [B]) draws a stop token, after which somebody has to look.
    keys, settings, forced: see `_draw`; record: of `generate`.

  Returns:
    (cache, logits, how many tokens have come, what `_draw` returns for each of them, [_TOGETHER, B, ...]; with recorded
    "experts", int32 [_TOGETHER, L, B, 1, k], of the token before).
  """
  experts = "experts" in record

  def one(state):
    i, cache, logits, last, stopped, _, found = state
    goes_on = (~stopped[:, None]).astype(jnp.int32)
    cache, logits, *used = advance(model, variables, cache, last[:, None], goes_on, logits, reach=reach,
                                   with_experts=experts)
    new = _draw(logits, keys, number + i, settings, forced, record=record) | ({"experts": used[0]} if experts else {})
    ends = (new["tokens"][:, None] == stop).any(1) & ~stopped
    found = jax.tree.map(lambda so_far, x: so_far.at[i].set(x), found, new)
    return i + 1, cache, logits, new["tokens"], stopped | ends, (ends & thinking).any(), found

  config, rows = model.config, last.shape[0]
  shapes = jax.eval_shape(lambda *x: _draw(*x, record=record), logits, keys, number, settings, forced)
  if experts:
    shapes["experts"] = jax.ShapeDtypeStruct((config.num_hidden_layers, rows, 1, config.num_experts_per_tok), jnp.int32)
  found = {name: jnp.zeros((_TOGETHER, *x.shape), x.dtype) for name, x in shapes.items()}
  state = jnp.int32(0), cache, logits, last, stopped, jnp.bool_(False), found
  goes_on = lambda state: (state[0] < count) & ~state[4].all() & ~state[5]
  came, cache, logits, _, _, _, found = jax.lax.while_loop(goes_on, one, state)
  return cache, logits, came, found


@functools.partial(jax.jit, static_argnames="record")
def _draw(logits: jax.Array, keys: jax.Array, number: jax.Array, settings: Rows, forced: jax.Array,
          *, record: tuple[str, ...] = ()) -> dict[str, jax.Array]:
  """"tokens": number `number` [B] of each one, "logprobs" of them; a forced token (>= 0) comes instead, with 0. Recorded:
  "kept", see `Generation`."""
  drawn = sample.sample(sample.token_keys(keys, number), logits, settings)
  logprobs_BV = sample.log_probabilities(logits, settings)
  logprob = jnp.take_along_axis(logprobs_BV, drawn[:, None], 1)[:, 0]
  found = {"tokens": jnp.where(forced >= 0, forced, drawn), "logprobs": jnp.where(forced >= 0, 0, logprob)}
  return found | ({"kept": jnp.packbits(logprobs_BV > -jnp.inf, axis=1)} if "kept" in record else {})


def reach_of(length: int, max_length: int) -> int:
  """The reach for rows of at most `length` tokens: one of few, each four times the one before."""
  reach = _SMALLEST_REACH
  while reach < length:
    reach *= 4
  return min(reach, max_length)


def room_for(length: int, most: int) -> int:
  """Tokens to make room for, so that few sizes of caches occur: the next power of two, at least 64 and at most `most`."""
  return min(most, max(64, 1 << (length - 1).bit_length()))


def chunks(prompts: Sequence[Sequence[int]], chunk_size: int) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
  """(tokens, segment_ids) int32 [B, S] and the number of tokens fed with them; S is chunk_size, or for the last chunk a
  smaller power of two."""
  longest = max(map(len, prompts))
  for start in range(0, longest, chunk_size):
    end = min(start + chunk_size, longest)
    tokens = np.zeros((len(prompts), min(chunk_size, 1 << (end - start - 1).bit_length())), np.int32)
    segment_ids = np.zeros_like(tokens)
    for i, prompt in enumerate(prompts):
      part = prompt[start:end]
      tokens[i, :len(part)], segment_ids[i, :len(part)] = part, 1
    yield tokens, segment_ids, end


def prefill(model: DeepseekV4, variables: Any, cache: Cache, prompts: Sequence[Sequence[int]], *, chunk_size: int = 512,
            on_chunk: Callable[[int], None] | None = None,
            on_experts: Callable[[jax.Array], None] | None = None) -> tuple[Cache, jax.Array]:
  """Feeds prompts into an empty cache, which is given up.

  Args:
    prompts: ids of each row, at least one.
    chunk_size: tokens of a row that are fed at a time.
    on_chunk: called after each chunk with the number of tokens fed so far, once they are computed.
    on_experts: called with the experts int32 [L, B, S, k] of each chunk.

  Returns:
    The cache and the logits [B, V], at least float32, after each prompt.
  """
  logits = jnp.zeros((len(prompts), model.config.vocab_size), jnp.promote_types(model.config.compute_dtype, jnp.float32))
  for tokens, segment_ids, fed in chunks(prompts, chunk_size):
    cache, logits, *experts = advance(model, variables, cache, tokens, segment_ids, logits,
                                      reach=reach_of(fed, cache.max_length), with_experts=on_experts is not None)
    if on_experts is not None:
      on_experts(*experts)
    if on_chunk is not None:
      logits.block_until_ready()
      on_chunk(fed)
  return cache, logits


def generate(model: DeepseekV4, variables: Any, prompts: Sequence[Sequence[int]], *, keys: jax.Array, max_new_tokens: int,
             temperature: Any = 1.0, top_p: Any = 1.0, top_k: Any = 0, min_p: Any = 0.0, stop_tokens: Sequence[int] = (),
             thinking_budget: ThinkingBudget | None | Sequence[ThinkingBudget | None] = None, chunk_size: int = 512,
             speculative: bool | int = False, cache_storage: str = "compute", record: Sequence[str] = (),
             begun: Sequence[Sequence[int]] | None = None,
             on_drawn: Callable[[list[Drawn]], None] | None = None,
             on_token: Callable[[int, int], None] | None = None,
             on_chunk: Callable[[int], None] | None = None) -> Generation:
  """Replies to prompts.

  Args:
    model, variables: as in `DeepseekV4.apply`.
    prompts: token ids of each request.
    keys: typed random keys [number of prompts], one per request.
    max_new_tokens: of each reply.
    temperature, top_p, top_k, min_p: see `Sampling`; one value, or one per request.
    stop_tokens: ids that end a reply; inside a thought with a budget they end the thought, which is closed behind them.
    thinking_budget: of replies that begin inside a thought; one for all, or one (or None) per request.
    chunk_size: tokens of a prompt that are fed at a time.
    speculative: number of tokens that the prediction block guesses and one step verifies; True = 1, False = none. Greedy
      replies are the same tokens, drawn ones have the same distribution; see `speculative.py`.
    cache_storage: see `init_cache`.
    record: what the result holds beside the tokens, of `RECORDS`; not with speculation.
    begun: of each request the first tokens of its reply, drawn earlier with the same prompt, settings and key: the reply
      goes on behind them as if it had never been interrupted. None = no reply has begun. Not with speculation.
    on_drawn: called with the tokens that came together, before any that are drawn after them; not with speculation.
    on_token: called with (request, token) as tokens come.
    on_chunk: called during prefill; see `prefill`.

  Raises:
    ValueError: what does not fit, before anything is computed.
  """
  budgets = requests.budgets(thinking_budget, len(prompts))
  requests.check(model.config, prompts, keys, max_new_tokens, chunk_size, stop_tokens, budgets)
  if cache_storage not in STORAGES:
    refuse("cache_storage", cache_storage, f"one of {', '.join(STORAGES)}")
  record, thoughts = tuple(record), [Thought(budget, stop_tokens) for budget in budgets]
  begun = requests.begun(begun, thoughts, max_new_tokens, model.config.vocab_size)
  if speculative and (any(begun) or on_drawn is not None):
    refuse("speculative", speculative, "False with begun or on_drawn")
  if not set(record) <= set(RECORDS) or (record and speculative):
    refuse("record", record, f"some of {', '.join(RECORDS)}, without speculation")
  from deepseek_v4.generation import speculative as speculation  # it builds on this module
  drafts = speculation.check(model.config, variables, speculative)
  settings = requests.settings(len(prompts), temperature, top_p, top_k, min_p)
  if drafts:
    return speculation.generate(model, variables, prompts, drafts=drafts, keys=keys, settings=settings,
                                max_new_tokens=max_new_tokens, thoughts=thoughts, chunk_size=chunk_size,
                                cache_storage=cache_storage, on_token=on_token, on_chunk=on_chunk)
  room = room_for(max(map(len, prompts)) + max_new_tokens, model.config.max_position_embeddings)
  cache = init_cache(model.config, len(prompts), room, storage=cache_storage)
  prompts = [[*prompt, *reply] for prompt, reply in zip(prompts, begun, strict=True)]
  size = sum(cache.bytes_by_kind.values())
  started = time.perf_counter()
  experts: list[jax.Array] = []
  cache, logits = prefill(model, variables, cache, prompts, chunk_size=chunk_size, on_chunk=on_chunk,
                          on_experts=experts.append if "experts" in record else None)
  logits.block_until_ready()
  prefilled = time.perf_counter()

  found, finish = _reply(model, variables, cache, logits, keys, settings, max(map(len, prompts)), begun, max_new_tokens,
                         stop_tokens, thoughts, record, on_token, on_drawn)
  recorded: dict[str, Any] = {name: [np.stack(x) for x in found[name]] for name in record if name == "kept"}
  if experts:
    fed = np.concatenate(jax.device_get(experts), axis=2).astype(np.uint16)
    recorded["experts"] = [np.concatenate([fed[:, i, :len(prompt)], *later], axis=1) for i, (prompt, later) in
                           enumerate(zip(prompts, found["experts"], strict=True))]
  tokens = [reply[len(first):] for reply, first in zip(found["tokens"], begun, strict=True)]
  return Generation(tokens, found["logprobs"], finish, None, size, prefilled - started,
                    time.perf_counter() - prefilled, **recorded)


def _reply(model: DeepseekV4, variables: Any, cache: Cache, logits: jax.Array, keys: jax.Array, settings: Rows, longest: int,
           begun: list[list[int]], max_new_tokens: int, stop_tokens: Sequence[int], thoughts: Sequence[Thought],
           record: tuple[str, ...], on_token: Callable[[int, int], None] | None,
           on_drawn: Callable[[list[Drawn]], None] | None) -> tuple[dict[str, list[list[Any]]], list[str]]:
  """What `_go_on` found for each token of each reply, by name, and `Generation.finish`; goes on from what `prefill` returns
  for prompts, with what is begun, of at most `longest` tokens; the thoughts are where that ends. The other arguments are
  those of `generate`."""
  rows = range(keys.shape[0])
  said: dict[str, list[list[Any]]] = {name: [[] for _ in rows] for name in ("tokens", "logprobs", *record)}
  tokens, stopped = said["tokens"], np.zeros(len(rows), bool)
  for reply, first in zip(tokens, begun, strict=True):
    reply += first
  going = lambda: ~stopped & (lengths() < max_new_tokens)
  lengths = lambda: np.array([len(reply) for reply in tokens], np.int32)
  # Filled up with -1, which is no token, to a multiple of four: each length is a program of its own.
  stop = np.full(4 * max(1, math.ceil(len(stop_tokens) / 4)), -1, np.int32)
  stop[:len(stop_tokens)] = sorted(stop_tokens)

  def take(new: dict[str, np.ndarray]) -> None:
    """The next token of each reply that goes on."""
    drawn = new["tokens"]
    for i in np.flatnonzero(going()):
      tokens[i].append(int(drawn[i]))
      said["logprobs"][i].append(float(new["logprobs"][i]))
      if "kept" in new:
        said["kept"][i].append(new["kept"][i])
      if "experts" in new:
        said["experts"][i].append(new["experts"][:, i].astype(np.uint16))
      if on_token is not None:
        on_token(int(i), int(drawn[i]))
      stopped[i] = thoughts[i].add(int(drawn[i]))

  def tell(before: np.ndarray) -> None:
    """Hands on what has come since the replies had these lengths."""
    if on_drawn is not None:
      on_drawn([Drawn(i, tuple(tokens[i][before[i]:]), tuple(said["logprobs"][i][before[i] - len(begun[i]):]))
                for i in rows if len(tokens[i]) > before[i]])

  forced = lambda: np.array([thought.forced for thought in thoughts], np.int32)
  numbers = lengths()
  new = jax.device_get(_draw(logits, keys, numbers, settings, forced(), record=record))
  take(new)
  tell(numbers)
  last = new["tokens"]
  drawn, seconds = 1, _PATIENCE  # tokens so far, and what one takes: not known yet, so the first comes alone
  while going().any():
    numbers, alive = lengths(), np.flatnonzero(going())
    left = [max_new_tokens - numbers[i] for i in alive]
    # Nobody has to look at tokens before the first that a budget may force.
    free = [thoughts[i].free for i in alive if thoughts[i].is_open]
    reach, started = reach_of(longest + drawn, cache.max_length), time.perf_counter()
    # A token is computed in one reach only, so that no clock has a say in its bits.
    count = int(max(1, min(_TOGETHER, *left, reach - longest - drawn + 1, int(_PATIENCE / seconds), *free)))
    thinking = np.array([thought.is_open for thought in thoughts])
    cache, logits, came, found = _go_on(model, variables, cache, logits, last, ~going(), stop, keys, numbers, count,
                                        settings, forced(), thinking, reach=reach, record=record)
    count, found = int(came), jax.device_get(found)
    seconds = (time.perf_counter() - started) / count
    for i in range(count):
      take({name: x[i] for name, x in found.items()})
    tell(numbers)
    drawn, last = drawn + count, found["tokens"][count - 1]
  return said, ["stop" if ended else "length" for ended in stopped]
