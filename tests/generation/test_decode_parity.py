"""Decoding against transformers' own cache: logits of every call, and whole greedy replies."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import torch
from transformers.models.deepseek_v4 import DeepseekV4Config, DeepseekV4ForCausalLM

import deepseek_v4 as dsv4
from tests.model.small import T0, random_tokens, random_variables

PLAIN = dataclasses.replace(T0, index_topk=3, num_nextn_predict_layers=0)
# The score of an entry is a sum over index heads behind a ReLU. With 8 heads about one in 2^8 is exactly zero, since no head
# fires, and such entries tie; with 32 that does not happen.
MANY_HEADS = dataclasses.replace(PLAIN, index_n_heads=32)


@functools.cache
def sides(config=PLAIN):
  """(our model, its variables, transformers' model with the same weights)."""
  variables = random_variables(config)
  hf_config = DeepseekV4Config(**config.to_hf())
  hf_config._attn_implementation = "eager"
  theirs = DeepseekV4ForCausalLM(hf_config).eval().float()
  state = {name: torch.tensor(np.asarray(x)) for name, x in dsv4.to_hf_names(variables, config).items()}
  missing, unexpected = theirs.load_state_dict(state, strict=False)
  assert not missing and not unexpected
  return dsv4.DeepseekV4(config), variables, theirs


def every_call_equals(widths):
  """A row fed by `widths` tokens at a time; the caches of both sides go the same way."""
  model, variables, theirs = sides()
  ids = random_tokens(1, sum(widths), seed=2)
  step = jax.jit(lambda v, tokens, cache: model.apply(v, tokens, None, None, cache))
  cache, past, start = dsv4.init_cache(PLAIN, 1, 64), None, 0
  for width in widths:
    tokens = ids[:, start:start + width]
    start += width
    out = step(variables, tokens, cache)
    cache = out.cache
    with torch.no_grad():
      want = theirs(torch.tensor(tokens, dtype=torch.long), past_key_values=past, use_cache=True)
    past = want.past_key_values
    np.testing.assert_allclose(out.logits, want.logits, atol=2e-4)


def test_every_call_equals_transformers():
  every_call_equals((17, *(1,) * 9, 17))


@pytest.mark.long
@pytest.mark.parametrize("widths", [
  (48,), (1,) * 48, (2,) * 24, (3,) * 16, (4,) * 12, (5, *(4,) * 10, 3), (7,) * 6, (8,) * 6, (9, 1, 8, 1, 16, 13), (47, 1),
  (1, 47), (16, 31, 1), (33, 2, 2, 2, 2, 2, 2, 2)], ids=lambda widths: f"{len(widths)} calls, first {widths[0]}")
def test_every_chunking_equals_transformers(widths):
  """Chunks below, at and above CSA's and HCA's windows and the sliding one, that close none, one or several of them."""
  every_call_equals(widths)


def equal_replies(prompts, new, config=PLAIN):
  """How many of our greedy replies, all prompts in one batch, are also those of transformers' cached greedy search.

  Every one must be what transformers' full forward pass, without its cache, finds greedily. (The two differ where index
  scores tie exactly: torch's top-k then depends on the shape of its input.)
  """
  model, variables, theirs = sides(config)
  keys = jax.random.split(jax.random.key(0), len(prompts))
  ours = dsv4.generate(model, variables, [p.tolist() for p in prompts], keys=keys, max_new_tokens=new, temperature=0.0,
                       chunk_size=16)
  equal = 0
  for prompt, reply in zip(prompts, ours.tokens, strict=True):
    whole, n = torch.tensor([[*prompt, *reply]]), len(prompt)
    with torch.no_grad():
      greedy = theirs(whole[:, :-1], use_cache=False).logits[0, n - 1:].argmax(-1)
    assert reply == greedy.tolist(), f"prompt of {n} tokens"
    found = theirs.generate(whole[:, :n], max_new_tokens=new, do_sample=False, use_cache=True, eos_token_id=None,
                            pad_token_id=0)
    equal += reply == found[0, n:].tolist()
  return equal


def test_greedy_replies():
  assert equal_replies([random_tokens(n, seed=n) for n in (1, 6, 30)], 12) == 3


@pytest.mark.long
@pytest.mark.parametrize("config, least", [(PLAIN, 18), (MANY_HEADS, 20)], ids=["with ties", "without ties"])
def test_long_greedy_replies(config, least):
  """200 tokens behind 20 prompts: where no index scores tie, every reply is that of transformers' cached search too."""
  lengths = np.linspace(1, 300, 20).astype(int)
  assert equal_replies([random_tokens(n, seed=n) for n in lengths], 200, config) >= least
