"""Speculation through `generate`: the same greedy replies as without it, counted acceptance, stops, budgets, keys."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import deepseek_v4 as dsv4
from deepseek_v4.config import CSA, HASH, HCA, LEARNED
from deepseek_v4.generation import decode, speculative
from deepseek_v4.generation.requests import ThinkingBudget
from deepseek_v4.generation.sample import Sampling, log_probabilities, rows
from deepseek_v4.model.cache import init_cache
from deepseek_v4.model.context import make_context
from deepseek_v4.model.mtp import MTP
from tests.model.small import T0, random_tokens, random_variables

PROMPTS = [random_tokens(n, seed=30 + n).tolist() for n in (1, 9, 18, 30)]  # one less: whole chunks, or a rest that is one
NEW = 24
ROOM = 30 + NEW  # the longest row ends at the model's last position
# One layer, since programs of few layers compile faster; its router depends on the token. The long tests have more.
CONFIG = dataclasses.replace(T0, num_hidden_layers=1, layer_types=(CSA,), mlp_layer_types=(HASH,),
                             max_position_embeddings=ROOM)
DEEP = dataclasses.replace(CONFIG, num_hidden_layers=2, layer_types=(CSA, HCA), mlp_layer_types=(HASH, LEARNED))
MODEL = dsv4.DeepseekV4(CONFIG, "reference")


@functools.cache
def variables(config=CONFIG):
  return random_variables(config)


@functools.cache
def easy(strength, config=CONFIG):
  """Weights with which the next token depends on the last one alone, but for layers of this strength; at 0 the
  prediction block knows it as well as the model, so that every draft is accepted."""
  found = jax.tree.map(np.copy, variables(config))
  params, mtp = found["params"], found["params"]["mtp"]
  for block in (*params["layers"].values(), mtp["block"]):
    block["attention"]["o_b"] *= strength
    for part in ("experts", "shared"):
      block["moe"][part]["down"] *= strength
  mtp["hidden_proj"] *= strength
  mtp["embed_proj"] = np.eye(config.hidden_size, dtype=np.float32)
  mtp["embed_norm"]["scale"] = np.ones(config.hidden_size, np.float32)
  mtp["final_norm"]["scale"] = params["final_norm"]["scale"]
  return found


SOMETIMES = 0.015  # strength at which about half of the drafts are accepted
WEIGHTS = {"random": variables, "sometimes": lambda config=CONFIG: easy(SOMETIMES, config),
           "always": lambda config=CONFIG: easy(0.0, config)}


def generate(weights="random", prompts=PROMPTS, seeds=None, config=CONFIG, kernels="reference", **arguments):
  keys = jax.vmap(jax.random.key)(jnp.arange(len(prompts)) if seeds is None else jnp.array(seeds))
  # Without speculation prompts are fed token by token: the program that decodes is then the only one.
  chunk_size = 8 if arguments.get("speculative") else 1
  defaults = dict(keys=keys, max_new_tokens=NEW, temperature=0.0, chunk_size=chunk_size)
  return dsv4.generate(dsv4.DeepseekV4(config, kernels), WEIGHTS[weights](config), prompts, **{**defaults, **arguments})


@functools.cache
def plain(weights, config=CONFIG):
  return generate(weights, config=config).tokens


def one_by_one(weights, prompts, config, kernels, storage="compute"):
  """(greedy replies to prompts of one token, bytes of the cache): of one program, which is fed a token of each row at a
  time."""
  model, reach = dsv4.DeepseekV4(config, kernels), decode.room_for(1 + NEW, config.max_position_embeddings)
  cache = init_cache(config, len(prompts), reach, storage=storage)
  size, tokens = sum(cache.bytes_by_kind.values()), np.array(prompts, np.int32)
  logits, replies = jnp.zeros((len(prompts), config.vocab_size)), []
  for _ in range(NEW):
    cache, logits = decode.advance(model, WEIGHTS[weights](config), cache, tokens, np.ones_like(tokens), logits, reach=reach)
    tokens = np.asarray(logits.argmax(1, keepdims=True), np.int32)
    replies.append(tokens)
  return np.concatenate(replies, 1).tolist(), size


# ---- greedy --------------------------------------------------------------------------------------------------------
def assert_greedy_equals_plain(drafts, config=CONFIG):
  acceptance = {}
  for weights in WEIGHTS:
    found = generate(weights, config=config, speculative=drafts)
    assert found.tokens == plain(weights, config), weights
    assert found.finish == ["length"] * 4 and found.logprobs == [[0.0] * NEW] * 4
    acceptance[weights] = found.acceptance
  assert acceptance["random"] < 0.1 < acceptance["sometimes"] < 0.9 < acceptance["always"] == 1


def test_greedy_replies_are_those_of_plain_decoding():
  """Rows of different lengths accept different numbers of drafts; one of them ends at the model's last position."""
  assert_greedy_equals_plain(3)


def test_greedy_replies_of_one_request_with_the_kernels_of_a_cpu():
  """Alone and with these kernels, plain decoding's token comes to its experts only, while with a draft that is verified
  there are enough for a plan of all experts: the tokens are the same."""
  found = generate("sometimes", [PROMPTS[1][:1]], config=DEEP, kernels="blockwise", speculative=1)
  assert found.tokens == one_by_one("sometimes", [PROMPTS[1][:1]], DEEP, "blockwise")[0] and 0 < found.acceptance < 1


def test_greedy_replies_from_a_mixed_cache():
  """One draft, prompts of one token."""
  prompts = [prompt[:1] for prompt in PROMPTS]
  found = generate("sometimes", prompts, cache_storage="mixed", speculative=1)
  want, size = one_by_one("sometimes", prompts, CONFIG, "reference", "mixed")
  assert found.tokens == want and found.cache_bytes > size and 0.1 < found.acceptance < 0.95


@pytest.mark.long
def test_greedy_replies_from_a_mixed_cache_with_chained_drafts():
  found, want = (generate("sometimes", config=DEEP, cache_storage="mixed", speculative=n) for n in (2, 0))
  assert found.tokens == want.tokens and found.cache_bytes > want.cache_bytes and 0.1 < found.acceptance < 0.95


@pytest.mark.long
@pytest.mark.parametrize("drafts", [True, 2, 3, 5])
def test_greedy_replies_with_other_numbers_of_drafts(drafts):
  assert_greedy_equals_plain(drafts, DEEP)


# ---- the same without caches ---------------------------------------------------------------------------------------
def row(ids):
  return np.pad(np.array([ids], np.int32), ((0, 0), (0, ROOM - len(ids))))


distribution = jax.jit(log_probabilities)


@functools.cache
def network():
  """(weights, ids [1, ROOM]) -> the model's last streams and logits; (weights, streams, ids) -> the prediction block's
  streams and greedy guesses; of whole rows."""

  @jax.jit
  def main(weights, ids):
    out, found = MODEL.apply(weights, ids, mutable=["intermediates"])
    return found["intermediates"]["layers"]["layer_00"]["streams"][0], out.logits

  @jax.jit
  def block(weights, streams, ids):
    params = weights["params"]
    following = params["embed"]["embedding"][jnp.roll(ids, -1, 1)]
    mtp = {"params": params["mtp"], "router": weights["router"]["mtp"]}
    context = make_context(CONFIG, ids, None, None, "sparse", with_losses=False)
    hidden, streams, *_ = MTP(CONFIG, "reference").apply(mtp, streams, following, context)
    return streams, jnp.argmax(hidden @ params["lm_head"]["kernel"], -1)

  return main, block


def full(weights, ids):
  """Logits [1, V] after the last id."""
  return network()[0](weights, row(ids))[1][:, len(ids) - 1]


def drafts_behind(weights, ids, count):
  """Greedy drafts after these ids; behind the first the block's own streams follow the model's."""
  streams, ids = np.array(network()[0](weights, row(ids))[0]), list(ids)
  for _ in range(count):
    own, guesses = network()[1](weights, streams, row(ids))
    streams[:, len(ids) - 1] = own[:, len(ids) - 2]
    ids.append(int(guesses[0, len(ids) - 2]))
  return ids[len(ids) - count:]


@pytest.mark.parametrize("weights", ["random", "sometimes"])
def test_drafts_and_acceptance_are_those_without_caches(weights, monkeypatch):
  """Every step again, from whole rows: which drafts the block makes, and how many of them the greedy reply has."""
  made = []

  def recording(*arguments, advance=speculative.advance, **options):
    state, found = advance(*arguments, **options)
    made.append(np.asarray(state.drafts))
    return state, found

  monkeypatch.setattr(speculative, "advance", recording)
  found = generate(weights, speculative=3)
  offered = kept = 0
  for i, (prompt, reply) in enumerate(zip(PROMPTS, plain(weights), strict=True)):
    said, step = 1, 0
    while said < NEW:
      room = min(3, NEW - said - 1)
      drafts = drafts_behind(WEIGHTS[weights](), prompt + reply[:said], room)
      assert made[step][i, :room].tolist() == drafts
      agreed = np.array(drafts, int) == reply[said:said + room]
      accepted = int(np.cumprod(agreed).sum())
      offered, kept, said, step = offered + room, kept + accepted, said + accepted + 1, step + 1
  assert found.acceptance == kept / offered


# ---- drawn tokens --------------------------------------------------------------------------------------------------
def test_a_request_draws_the_same_tokens_in_any_batch_and_row():
  hot = dict(temperature=1.0, top_p=0.9, speculative=3)  # nearly all drafts are accepted, not all
  seeds, order = [3, 1, 4, 1], [2, 0, 3, 1]
  together = generate("sometimes", seeds=seeds, **hot)
  shuffled = generate("sometimes", [PROMPTS[i] for i in order], [seeds[i] for i in order], **hot)
  assert 0.1 < together.acceptance == shuffled.acceptance < 1
  for place, i in enumerate(order):
    assert shuffled.tokens[place] == together.tokens[i]
    np.testing.assert_allclose(shuffled.logprobs[place], together.logprobs[i], atol=1e-3)
  # other neighbours, one of them greedy
  others = generate("sometimes", [PROMPTS[3], PROMPTS[1], PROMPTS[3], PROMPTS[0]], [7, 1, 8, 9],
                    **{**hot, "temperature": [0.0, 1.0, 0.5, 1.0]})
  assert others.tokens[1] == together.tokens[1] and others.tokens[0] == plain("sometimes")[3]


def test_every_token_is_drawn_with_keys_of_its_own():
  """All drafts accepted: tokens 0, 4, 8, ... and the last are drawn by the model, those between by the block, from the
  same distribution; each with its number's key, which nothing else is drawn with."""
  found = generate("always", temperature=1.0, speculative=3)
  keys = speculative.place_keys(jax.random.key(2)[None], jnp.zeros(1, int), NEW)[0]
  ids = list(PROMPTS[2])
  for number, token in enumerate(found.tokens[2]):
    by_model = number % 4 == 0 or number == NEW - 1
    noise = jax.random.gumbel(keys[number, 2 if by_model else 0], (CONFIG.vocab_size,))
    assert token == int(jnp.argmax(jax.nn.log_softmax(full(easy(0.0), ids)[0]) + noise))
    ids.append(token)


def test_log_probabilities_are_those_of_the_model():
  found = generate("sometimes", temperature=0.8, top_k=20, speculative=3)
  settings = rows([Sampling(0.8, top_k=20)])
  ids = list(PROMPTS[2])
  for token, logprob in zip(found.tokens[2], found.logprobs[2], strict=True):
    want = distribution(full(easy(SOMETIMES), ids), settings)[0, token]
    np.testing.assert_allclose(logprob, want, atol=2e-3)
    ids.append(token)


def test_drawn_tokens_have_the_frequencies_of_the_model():
  """The second and third token of 300 replies to one prompt, against whole forward passes."""
  request, weights = Sampling(top_k=3), easy(SOMETIMES)
  settings, expected = rows([request]), {}
  probabilities = lambda ids: np.exp(np.asarray(distribution(full(weights, ids), settings)[0], float))
  for first, p in enumerate(probabilities(PROMPTS[1])):
    for second, q in enumerate(probabilities([*PROMPTS[1], first]) if p else ()):
      expected |= {(first, second): p * q} if q else {}
  drawn = []
  for call in range(75):
    found = generate("sometimes", [PROMPTS[1]] * 4, range(4 * call, 4 * call + 4), temperature=1.0, top_k=3,
                     max_new_tokens=3, speculative=3)
    drawn += [tuple(reply[:2]) for reply in found.tokens]
  assert set(drawn) <= set(expected) and len(expected) == 9
  counts = [drawn.count(pair) for pair in expected]
  total = sum(expected.values())
  assert scipy.stats.chisquare(counts, [p * len(drawn) / total for p in expected.values()]).pvalue > 1e-3


# ---- in the middle of accepted drafts ------------------------------------------------------------------------------
def test_stop_tokens_end_a_reply_in_the_middle_of_a_step():
  """With every draft accepted a step is four tokens; the stop stands at each place of one."""
  whole = plain("always")
  for place in (5, 6, 7, 8):
    stop, seen = whole[2][place], []
    found = generate("always", stop_tokens=(stop, 96), speculative=3,
                     on_token=lambda row, token, seen=seen: seen.append((row, token)))
    for row, (reply, want, finish) in enumerate(zip(found.tokens, whole, found.finish, strict=True)):
      ends = [i for i, token in enumerate(want) if token in (stop, 96)]
      assert reply == (want[:ends[0] + 1] if ends else want)
      assert finish == ("stop" if ends else "length")
      assert [token for r, token in seen if r == row] == reply
    # Of a step in which a reply ends only the drafts up to there count as accepted.
    drafted = [number % 4 != 0 and number != NEW - 1 for number in range(NEW)]
    kept = sum(sum(drafted[:len(reply)]) for reply in found.tokens)
    offered = sum(min(3, NEW - first - 1) for reply in found.tokens for first in range(1, len(reply), 4))
    assert found.acceptance == kept / offered


@pytest.mark.parametrize("weights", ["always", "sometimes"])
def test_a_thinking_budget_closes_the_thought_in_the_middle_of_a_step(weights):
  close = (90, 91, 92)
  for budget in (ThinkingBudget(0, close), ThinkingBudget(6, close), ThinkingBudget(7, close)):
    expected = generate(weights, thinking_budget=budget)
    found = generate(weights, thinking_budget=budget, speculative=3)
    assert found.tokens == expected.tokens
    for reply in found.tokens:
      assert reply[budget.tokens:budget.tokens + 3] == [90, 91, 92]
    drawn = generate(weights, thinking_budget=budget, speculative=3, temperature=1.0)
    for reply, logprobs in zip(drawn.tokens, drawn.logprobs, strict=True):
      assert reply[budget.tokens:budget.tokens + 3] == [90, 91, 92]
      assert logprobs[budget.tokens:budget.tokens + 3] == [0.0] * 3
      assert all(x < 0 for x in logprobs[:budget.tokens] + logprobs[budget.tokens + 3:])
  # a closing that comes by itself, in accepted drafts, is not repeated; one that has begun is completed
  reply = plain(weights)[0]
  for own in (reply[1:3], reply[2:4], [reply[5], 90]):
    budget = ThinkingBudget(6, tuple(own))
    assert (generate(weights, thinking_budget=budget, speculative=3).tokens
            == generate(weights, thinking_budget=budget).tokens)


def test_budgets_of_each_request_and_stops_inside_thoughts():
  """Every draft is accepted, so that closings and stops come in the middle of steps; the same without drafts,
  and each row as where all have its budget."""
  stop = plain("always")[3][2]
  budgets = [ThinkingBudget(0, (90, 91)), ThinkingBudget(3, (92,)), None, ThinkingBudget(7, (90, 91))]
  expected = generate("always", thinking_budget=budgets, stop_tokens=(stop,))
  found = generate("always", thinking_budget=budgets, stop_tokens=(stop,), speculative=3)
  assert found.tokens == expected.tokens and found.finish == expected.finish
  first = plain("always")[3].index(stop) + 1
  assert found.tokens[3][:first + 2] == [*plain("always")[3][:first], 90, 91]
  for i, budget in enumerate(budgets):
    same = generate("always", thinking_budget=budget, stop_tokens=(stop,), speculative=3)
    assert same.tokens[i] == found.tokens[i]


# ---- programs and refusals -----------------------------------------------------------------------------------------
def test_no_length_compiles_anything_and_the_caches_are_counted():
  found = generate(speculative=3)
  programs = speculative.feed._cache_size(), speculative.advance._cache_size()
  shorter = [prompt[:n] for prompt, n in zip(PROMPTS, (1, 4, 11, 22))]
  generate("always", shorter, max_new_tokens=32, temperature=0.7, speculative=3)
  assert (speculative.feed._cache_size(), speculative.advance._cache_size()) == programs
  assert found.cache_bytes == 4 * sum(dsv4.count(CONFIG, ROOM, drafts=3).cache_bytes["compute"].values())


def test_prompts_of_one_token_and_replies_of_one():
  single = [prompt[:1] for prompt in PROMPTS]
  expected = generate(prompts=single, max_new_tokens=8).tokens
  assert generate(prompts=single, max_new_tokens=8, speculative=3).tokens == expected
  found = generate(max_new_tokens=1, speculative=3)
  assert found.tokens == [reply[:1] for reply in plain("random")] and found.acceptance is None
  assert generate(max_new_tokens=2).acceptance is None


@pytest.mark.parametrize("value", [-1, 1.5, "yes", None])
def test_numbers_of_drafts_that_cannot_be(value):
  with pytest.raises(ValueError, match=f"speculative = {value!r}: expected True, False or a number of drafts"):
    generate(speculative=value)


def test_a_model_without_the_block_is_refused_before_anything_is_compiled():
  config = dataclasses.replace(CONFIG, num_nextn_predict_layers=0)
  without = {"params": {k: v for k, v in variables()["params"].items() if k != "mtp"}}
  keys = jax.random.split(jax.random.key(0), 1)
  for model, message in ((dsv4.DeepseekV4(config), r"a model with a prediction block \(num_nextn_predict_layers = 1\)"),
                         (MODEL, r"variables with the prediction block's \(params/mtp\)")):
    with pytest.raises(ValueError, match=f"speculative = True: expected {message}, or False"):
      dsv4.generate(model, without, [[1]], keys=keys, max_new_tokens=2, speculative=True)
