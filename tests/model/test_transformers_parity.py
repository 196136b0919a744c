"""Ours against transformers 5.24.0, live, random weights that make every term matter: logits, streams, picks, gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.deepseek_v4 import DeepseekV4Config, DeepseekV4ForCausalLM

import deepseek_v4 as dsv4
from deepseek_v4.config import CSA, HASH, HCA, LEARNED, SLIDING, ModelConfig, Yarn

BASE = ModelConfig(
    vocab_size=97, hidden_size=32, num_hidden_layers=3, layer_types=(SLIDING, CSA, HCA),
    mlp_layer_types=(HASH, LEARNED, LEARNED),
    csa_compress_rate=4, hca_compress_rate=8, num_attention_heads=4, head_dim=16, qk_rope_head_dim=8, q_lora_rank=16,
    o_groups=2, o_lora_rank=8, sliding_window=8, index_n_heads=8, index_head_dim=8, index_topk=3, n_routed_experts=6,
    num_experts_per_tok=2, moe_intermediate_size=16, rope_scaling=None, max_position_embeddings=4096,
    num_nextn_predict_layers=0)
SLIDINGS = dict(num_hidden_layers=2, layer_types=(SLIDING,) * 2, mlp_layer_types=(HASH, LEARNED))
# All kinds of layers, a lone one and a scanned unit of two.
REPEATED = dict(num_hidden_layers=5, layer_types=(SLIDING, HCA, CSA, HCA, CSA), mlp_layer_types=(HASH, *(LEARNED,) * 4))
COMPRESSED = dict(num_hidden_layers=2, layer_types=(CSA, HCA), mlp_layer_types=(HASH, LEARNED))
# YaRN that bites at these lengths: with 32 original positions every pair is on or beyond the ramp.
SHORT_YARN = Yarn(factor=16, original_max_position_embeddings=32, beta_fast=8, beta_slow=0.5)

# name -> (fields beside BASE, batch, length)
CASES = {
    "all_kinds_odd_length": (dict(), 2, 41),
    "sigmoid_clamp_bites": (SLIDINGS | dict(scoring_func="sigmoid", swiglu_limit=0.4), 2, 41),
    "two_streams_shorter_than_any_rate": (COMPRESSED | dict(hc_mult=2), 2, 3),
    "yarn_scanned_top_k_bites": (REPEATED | dict(rope_scaling=SHORT_YARN, index_topk=2), 1, 61),
    "real_rates_window_inside": (
        COMPRESSED | dict(hca_compress_rate=128, sliding_window=16, index_topk=8, rope_scaling=Yarn()), 1, 263),
    "one_expert_per_token_other_rates": (
        COMPRESSED | dict(csa_compress_rate=3, hca_compress_rate=5, num_experts_per_tok=1, hc_mult=3), 2, 29),
}


@functools.cache
def transformers_side(name):
  """The torch model with random weights, its logits, streams, picks and gradients on random tokens."""
  fields, batch, length = CASES[name]
  config = dataclasses.replace(BASE, **fields)
  rng = np.random.default_rng(sum(map(ord, name)))
  hf_config = DeepseekV4Config(**config.to_hf())
  hf_config._attn_implementation = "eager"
  model = DeepseekV4ForCausalLM(hf_config).eval().float()
  with torch.no_grad():
    for key, value in model.state_dict().items():
      noise = rng.normal(size=tuple(value.shape))
      if key.endswith("tid2eid"):
        noise = np.argsort(rng.random((config.vocab_size, config.n_routed_experts)), 1)[:, :config.num_experts_per_tok]
      elif "norm" in key:
        noise = 1 + 0.2 * noise
      elif key.endswith(("hc.scale", "hc_scale")):
        noise = 0.5 + 0.3 * noise
      elif key.endswith(("sinks", "position_bias", "hc.base", "hc_base")):
        noise = noise
      elif key.endswith("e_score_correction_bias"):
        noise = 0.2 * noise
      else:
        noise = 0.2 * noise
      value.copy_(torch.tensor(noise))
  streams, picks, experts = {}, {}, {}
  for i, layer in enumerate(model.model.layers):
    layer.register_forward_hook(lambda _, __, out, i=i: streams.__setitem__(i, out.detach().numpy()))
    layer.mlp.gate.register_forward_hook(lambda _, __, out, i=i: experts.__setitem__(i, out[2].detach().numpy()))
    if config.layer_types[i] == CSA:
      layer.self_attn.compressor.indexer.register_forward_hook(
          lambda _, __, out, i=i: picks.__setitem__(i, out.detach().numpy()))
  tokens = rng.integers(1, config.vocab_size, (batch, length))
  direction = rng.normal(size=(batch, length, config.vocab_size)).astype(np.float32)
  logits = model(torch.tensor(tokens), use_cache=False).logits
  (logits * torch.tensor(direction)).sum().backward()
  gradients = {k: np.zeros(tuple(p.shape), np.float32) if p.grad is None else p.grad.numpy()
               for k, p in model.named_parameters()}
  return config, model.state_dict(), tokens, direction, logits.detach().numpy(), streams, picks, experts, gradients


LONG = ("all_kinds_odd_length",)  # all kinds and an odd length are in yarn_scanned_top_k_bites, too


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.long] * (name in LONG)) for name in CASES])
def test_equals_transformers(name):
  config, state, tokens, direction, logits, streams, picks, experts, gradients = transformers_side(name)
  assert 0.5 < logits.std() < 5, "weights so small or large that a comparison says nothing"
  variables = dsv4.from_hf_names(state, config)
  model = dsv4.DeepseekV4(config)

  @jax.jit
  def both(params, router, tokens, direction):
    def loss(params):
      found = dsv4.trace(model, {"params": params, "router": router}, tokens)
      return (found["logits"] * direction).sum(), found
    return jax.grad(loss, has_aux=True)(params)

  with jax.default_matmul_precision("highest"):
    grads, found = both(variables["params"], variables["router"], jnp.asarray(tokens), direction)
  # float32 on both sides; 2e-4 is the bound, seen are 1e-6 to 5e-5.
  np.testing.assert_allclose(found["logits"], logits, atol=2e-4)
  for i, want in streams.items():
    np.testing.assert_allclose(found[f"layers/{i:02d}/streams"], want, atol=2e-4, err_msg=f"streams after layer {i}")
  compared = {"experts": [0, 0], "entries": [0, 0]}
  for i, want in experts.items():
    same_sets(compared["experts"], found[f"layers/{i:02d}/router/experts"], want.reshape(*tokens.shape, -1),
              None if config.mlp_layer_types[i] == HASH else biased(variables, config, found, i))
  for i, want in picks.items():
    same_sets(compared["entries"], found[f"layers/{i:02d}/indexer/selected"], want, found[f"layers/{i:02d}/indexer/scores"])
  for rows, with_margin in compared.values():
    assert with_margin >= 0.95 * rows, "too many near ties: the comparison of sets says little"
  ours = dsv4.to_hf_names(grads, config)
  assert set(ours) == set(gradients)
  # A gradient that is zero by the formula (the gate of a router that picks one expert, whose weight is a constant) is noise
  # on both sides: below 1e-5 of the largest it is compared with that, not with itself.
  floor = 1e-5 * max(np.linalg.norm(g) for g in gradients.values())
  for key, want in gradients.items():
    error = np.linalg.norm(ours[key] - want) / max(np.linalg.norm(want), floor)
    assert error < 1e-3, f"gradient of {key}: relative L2 error {error:.1e}"


def biased(variables, config, found, layer):
  """Scores by which a learned router chose."""
  layers = dsv4.restack(variables["router"], config, scan_layers=False)["layers"]
  return found[f"layers/{layer:02d}/router/scores"] + layers[f"layer_{layer:02d}"]["moe"]["router"]["bias"]


def same_sets(counts, ours, theirs, scores):
  """Equal sets of picks on every row whose last pick is clearly ahead of the next candidate; counts rows and such rows."""
  ours, theirs = (np.sort(np.asarray(x), -1) for x in (ours, theirs))
  k = theirs.shape[-1]
  margin = np.ones(ours.shape[:-1], bool)
  if scores is not None and scores.shape[-1] > k:
    ordered = -np.sort(-np.asarray(scores), -1)
    with np.errstate(invalid="ignore"):
      margin = ~(ordered[..., k - 1] - ordered[..., k] < 1e-5)  # not (nan < ..): two invisible entries are no tie
  counts[0] += margin.size
  counts[1] += int(margin.sum())
  np.testing.assert_array_equal(ours[margin], theirs[margin])
