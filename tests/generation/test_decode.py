"""Generation against repeated full forward passes: prompts of any lengths together, sampling, stopping, budgets."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deepseek_v4 as dsv4
from deepseek_v4.config import CSA, HASH, HCA, LEARNED
from deepseek_v4.generation import decode, sample
from deepseek_v4.generation.requests import ThinkingBudget, Thought
from deepseek_v4.model.cache import init_cache
from tests.model.small import T0, random_tokens, random_variables

# The kinds of layers that keep entries, one of each: a layer more is a third more to compile.
CONFIG = dataclasses.replace(T0, num_hidden_layers=2, layer_types=(CSA, HCA), mlp_layer_types=(HASH, LEARNED))
MODEL = dsv4.DeepseekV4(CONFIG, "blockwise")
PROMPTS = [random_tokens(n, seed=30 + n).tolist() for n in (1, 5, 18, 30)]
NEW = 9


@functools.cache
def variables():
  return random_variables(CONFIG)


@functools.cache
def full():
  """Ids -> logits [V] after the last one, without a cache."""
  run = jax.jit(lambda v, tokens: MODEL.apply(v, tokens).logits)
  padded = lambda ids: np.pad(np.array([ids], np.int32), ((0, 0), (0, 40 - len(ids))))
  return lambda ids: np.asarray(run(variables(), padded(ids)))[0, len(ids) - 1]


@functools.cache
def greedy():
  """Replies by taking the largest logit of a full forward pass again and again."""
  replies = []
  for prompt in PROMPTS:
    ids = list(prompt)
    for _ in range(NEW):
      ids.append(int(full()(ids).argmax()))
    replies.append(ids[len(prompt):])
  return replies


def generate(prompts=PROMPTS, seeds=None, **arguments):
  keys = jax.vmap(jax.random.key)(jnp.arange(len(prompts)) if seeds is None else jnp.array(seeds))
  # What is recorded is an output more of the same programs: with it everywhere there are no others.
  defaults = dict(keys=keys, max_new_tokens=NEW, temperature=0.0, chunk_size=8, record=("experts",))
  return dsv4.generate(MODEL, variables(), prompts, **{**defaults, **arguments})


def test_greedy_replies_are_those_of_full_forward_passes():
  found = generate()
  assert found.tokens == greedy()
  assert found.finish == ["length"] * 4 and found.logprobs == [[0.0] * NEW] * 4
  assert found.cache_bytes == 4 * sum(dsv4.count(CONFIG, 64).cache_bytes["compute"].values())


def test_a_request_draws_the_same_tokens_in_any_batch_and_row():
  hot = dict(temperature=1.5, top_p=0.9, top_k=40)
  together = generate(seeds=[3, 1, 4, 1], **hot)
  order = [2, 0, 3, 1]
  shuffled = generate([PROMPTS[i] for i in order], seeds=[[3, 1, 4, 1][i] for i in order], **hot)
  for place, i in enumerate(order):
    assert shuffled.tokens[place] == together.tokens[i]
    np.testing.assert_allclose(shuffled.logprobs[place], together.logprobs[i], atol=1e-3)
  assert together.tokens != greedy()
  alone = generate(PROMPTS[3:], seeds=[1], **hot)  # other programs: a batch of one
  assert alone.tokens == together.tokens[3:]
  np.testing.assert_allclose(alone.logprobs, together.logprobs[3:], atol=1e-3)
  # one greedy request among sampled ones
  mixed = generate(seeds=[3, 1, 4, 1], **{**hot, "temperature": [1.5, 0.0, 1.5, 0.0]})
  assert [mixed.tokens[i] for i in (0, 2)] == [together.tokens[i] for i in (0, 2)]
  assert [mixed.tokens[i] for i in (1, 3)] == [greedy()[i] for i in (1, 3)]
  # each log-probability is that of the distribution which the full forward pass gives
  settings = sample.rows([sample.Sampling(1.5, 0.9, 40)])
  ids = list(PROMPTS[1])
  for token, logprob in zip(together.tokens[1], together.logprobs[1], strict=True):
    want = sample.log_probabilities(jnp.asarray(full()(ids))[None], settings)[0, token]
    np.testing.assert_allclose(logprob, want, atol=2e-3)
    ids.append(token)


@pytest.mark.long
def test_a_request_is_the_same_beside_a_long_one():
  """A cache with other room, of which more is read, and other chunks: the same tokens as alone."""
  prompts = [random_tokens(n, seed=n).tolist() for n in (5, 300)]
  hot = dict(chunk_size=64, temperature=[1.5, 0.0], top_p=0.9)
  together = generate(prompts, [3, 1], **hot)
  assert decode.room_for(5 + NEW, 4096) < decode.room_for(300 + NEW, 4096)
  for i in range(2):
    alone = generate(prompts[i:i + 1], [[3, 1][i]], **{**hot, "temperature": hot["temperature"][i]})
    assert alone.tokens == together.tokens[i:i + 1]
    np.testing.assert_allclose(alone.logprobs, together.logprobs[i:i + 1], atol=1e-3)


def test_stop_tokens_end_a_reply_and_no_other():
  stop = greedy()[2][4]
  seen = []
  found = generate(stop_tokens=(stop, 96), on_token=lambda row, token: seen.append((row, token)))
  for reply, want, finish in zip(found.tokens, greedy(), found.finish, strict=True):
    ends = [i for i, token in enumerate(want) if token in (stop, 96)]
    assert reply == (want[:ends[0] + 1] if ends else want)
    assert finish == ("stop" if ends else "length")
  assert found.finish[2] == "stop" and "length" in found.finish
  for row, reply in enumerate(found.tokens):
    assert [token for r, token in seen if r == row] == reply


def test_a_thinking_budget_closes_the_thought():
  close = (90, 91, 92)
  assert not {90, 91} & {token for reply in greedy() for token in reply[:4]}
  found = generate(thinking_budget=ThinkingBudget(3, close), temperature=[0.0, 1.0, 0.0, 0.0])
  for i in (0, 2, 3):
    assert found.tokens[i][:6] == greedy()[i][:3] + [90, 91, 92]
    ids = PROMPTS[i] + found.tokens[i][:6]
    assert found.tokens[i][6] == full()(ids).argmax()  # what comes after has read the closing
  assert found.tokens[1][3:6] == [90, 91, 92] and found.logprobs[1][3:6] == [0.0] * 3
  assert all(x < 0 for x in found.logprobs[1][:3] + found.logprobs[1][6:])
  # a closing that comes by itself is not repeated, one that has begun is completed
  own = tuple(greedy()[0][1:3])
  assert generate(thinking_budget=ThinkingBudget(4, own)).tokens[0] == greedy()[0]
  begun = (greedy()[0][2], 90)
  assert generate(thinking_budget=ThinkingBudget(3, begun)).tokens[0][:4] == [*greedy()[0][:3], 90]
  assert generate(thinking_budget=ThinkingBudget(0, close)).tokens[3][:3] == [90, 91, 92]


def test_every_request_has_a_thinking_budget_of_its_own():
  budgets = [ThinkingBudget(0, (90, 91)), ThinkingBudget(3, (92,)), None, ThinkingBudget(7, (90, 91))]
  together = generate(thinking_budget=budgets, seeds=[3, 1, 4, 1], temperature=[0.0, 1.0, 0.0, 1.0])
  for i, budget in enumerate(budgets):  # as where all have it
    same = generate(thinking_budget=budget, seeds=[3, 1, 4, 1], temperature=[0.0, 1.0, 0.0, 1.0])
    assert same.tokens[i] == together.tokens[i]
    place = NEW if budget is None else budget.tokens
    close = () if budget is None else budget.close
    assert tuple(together.tokens[i][place:place + len(close)]) == close
  assert together.tokens[2] == greedy()[2]


def test_a_stop_token_inside_a_thought_closes_it(monkeypatch):
  """It stays in the reply, the closing comes behind it, then the answer; however many tokens come from one call. The next
  stop token ends the reply."""
  stop, close = greedy()[2][4], (90, 91)
  budget = ThinkingBudget(20, close)
  assert stop not in greedy()[2][:4]
  results = []
  for patience in (1e-9, 1e9):
    monkeypatch.setattr(decode, "_PATIENCE", patience)
    found = generate(stop_tokens=(stop,), thinking_budget=[None, budget, budget, None], max_new_tokens=12)
    results.append((found.tokens, found.finish))
    assert [x.shape[1] for x in found.experts] == [len(p) + len(r) - 1 for p, r in zip(PROMPTS, found.tokens, strict=True)]
  assert results[0] == results[1]
  tokens, _ = results[0]
  assert tokens[2][:7] == [*greedy()[2][:5], 90, 91] and len(tokens[2]) > 7
  ids = [*PROMPTS[2], *tokens[2][:7]]
  assert tokens[2][7] == full()(ids).argmax()  # the answer has read the closing
  others = generate(stop_tokens=(stop,), thinking_budget=budget, max_new_tokens=12)  # which then think, too
  assert others.tokens[2] == tokens[2]
  # one that was interrupted in the middle of the closing goes on with the rest of it
  rest = generate(stop_tokens=(stop,), thinking_budget=budget, max_new_tokens=12, begun=[[], [], tokens[2][:6], []])
  assert rest.tokens[2] == tokens[2][6:]


def test_a_thought_ends_by_itself_by_its_budget_or_by_a_stop_token():
  """(reply, what is forced before each token and after the last, whether the last one ends the reply)"""
  for reply, forced, ends in (
      ([1, 8, 9, 5], [-1] * 5, True),  # closed by itself
      ([1, 5, 8, 9, 5], [-1, -1, 8, 9, -1, -1], True),
      ([1, 2, 3, 8, 9], [-1, -1, -1, 8, 9, -1], False),
      ([1, 2, 8, 9, 2], [-1, -1, -1, 9, -1, -1], False),  # begun by itself, when the budget ends
      ([5, 8, 5], [-1, 8, 9, 8], False)):  # not what was forced: never open for good
    thought = Thought(ThinkingBudget(3, (8, 9)), (5,))
    found = [thought.forced]
    for token in reply:
      ended = thought.add(token)
      found.append(thought.forced)
    assert (found, ended) == (forced, ends), reply
  free = Thought(None, (5,))
  assert [free.add(token) for token in (1, 5)] == [False, True] and free.forced == -1 and not free.is_open


def test_how_many_tokens_come_from_one_call_changes_nothing(monkeypatch):
  """One by one, as on a slow machine, and up to 16 at a time: stops and budgets in the middle of a call, replies that end
  before the others, more tokens than a call gives, more stop tokens than fill one row of four."""
  arguments = dict(max_new_tokens=24, seeds=[3, 1, 4, 1], temperature=[0.0, 1.5, 0.0, 1.5], top_p=0.9)
  plain = generate(**arguments).tokens
  stop = {plain[0][9], plain[1][19]}
  own = {token for reply in plain for token in reply[:6]}
  unused = sorted(set(range(97)).difference(*plain))[:4]
  close = tuple(sorted(set(range(97)) - own - stop)[:2])
  calls, go_on = [], decode._go_on
  monkeypatch.setattr(decode, "_go_on", lambda *args, **options: calls.append(int(args[9])) or go_on(*args, **options))
  for extra in ({}, dict(stop_tokens=(*unused, *stop)), dict(thinking_budget=ThinkingBudget(6, close))):
    results = []
    for patience in (1e-9, 1e9):
      monkeypatch.setattr(decode, "_PATIENCE", patience)
      seen = []
      found = generate(**arguments, **extra, on_token=lambda *token, seen=seen: seen.append(token))
      results.append((found.tokens, found.logprobs, found.finish, seen))
    assert results[0] == results[1]
    if "stop_tokens" in extra:
      until = lambda reply: reply[:next((i + 1 for i, token in enumerate(reply) if token in stop), len(reply))]
      assert found.tokens == [until(reply) for reply in plain] and found.finish.count("stop") >= 2
  assert results[0][0][0][6:8] == list(close)
  assert 1 in calls and max(calls) == 16


def test_no_length_compiles_anything_and_the_cache_is_given_up():
  generate()
  sizes = lambda: [program._cache_size() for program in (decode.advance, decode._go_on, decode._draw)]
  programs = sizes()
  generate([p[:n] for p, n in zip(PROMPTS, (1, 4, 11, 22))], max_new_tokens=12, temperature=0.7)
  for stop_tokens in ((96,), (93, 94, 95, 96)):
    generate(stop_tokens=stop_tokens)
  assert sizes() == programs
  cache = init_cache(CONFIG, 4, 64)
  arrays = jax.tree.leaves(cache)
  new, _ = decode.prefill(MODEL, variables(), cache, PROMPTS, chunk_size=8, on_experts=lambda _: None)
  assert all(x.is_deleted() for x in arrays)
  assert dsv4.cache_lengths(new).tolist() == [1, 5, 18, 30]


def test_chunks_and_reaches_come_in_few_sizes():
  cut = list(decode.chunks([[1] * 21, [2] * 9], 8))
  assert [(tokens.shape[1], fed) for tokens, _, fed in cut] == [(8, 8), (8, 16), (8, 21)]
  assert [segments.sum(1).tolist() for _, segments, _ in cut] == [[8, 8], [8, 1], [5, 0]]
  assert [tokens.shape[1] for tokens, _, _ in decode.chunks([[1] * 18], 8)] == [8, 8, 2]
  assert [decode.reach_of(n, 10**6) for n in (1, 1024, 1025, 5000, 300_000)] == [1024, 1024, 4096, 16384, 10**6]
  assert [decode.room_for(n, 3000) for n in (1, 64, 65, 1024, 1025, 2500)] == [64, 64, 128, 1024, 2048, 3000]


@pytest.mark.parametrize("arguments, message", [
  (dict(prompts=[]), r"prompts = \[\]: expected at least one"),
  (dict(prompts=[[1], []]), r"prompts\[1\] = '0 tokens': expected 1 to max_position_embeddings - max_new_tokens = 4087"),
  (dict(prompts=[[1] * 4090]), r"prompts\[0\] = '4090 tokens'"),
  (dict(prompts=[[1, 97]]), r"prompts\[0\] = 'ids from 1 to 97': expected ids below vocab_size = 97"),
  (dict(stop_tokens=(97,)), "stop_tokens = 'ids from 97 to 97'"),
  (dict(thinking_budget=ThinkingBudget(1, (97,))), r"thinking_budget\[0\].close = 'ids from 97 to 97'"),
  (dict(thinking_budget=[None] * 3), r"thinking_budget = .*: expected .* one of them for each of the 4 requests"),
  (dict(thinking_budget=7), "thinking_budget = 7: expected a ThinkingBudget or None"),
  (dict(max_new_tokens=0), "max_new_tokens = 0: expected a whole number, at least 1"),
  (dict(chunk_size=0), "chunk_size = 0: expected a whole number, at least 1"),
  (dict(cache_storage="fp8"), "cache_storage = 'fp8': expected one of compute, mixed"),
  (dict(temperature=[1.0]), r"temperature = \[1.0\]: expected one value, or one for each of the 4 requests"),
  (dict(top_p=0.0), "top_p = 0.0: expected a number above 0"),
  (dict(keys=jnp.arange(4)), r"keys = .*: expected typed keys of shape \(4,\)"),
  (dict(keys=jax.random.split(jax.random.key(0), 3)), r"keys = .*: expected typed keys of shape \(4,\)"),
])
def test_refusals(arguments, message):
  with pytest.raises(ValueError, match=message):
    generate(**arguments)


def test_budgets_that_cannot_be():
  with pytest.raises(ValueError, match="tokens = -1: expected at least 0"):
    ThinkingBudget(-1, (3,))
  for close in ((), (-1,)):
    with pytest.raises(ValueError, match="close = .*: expected at least one token id"):
      ThinkingBudget(5, close)
