"""A model's whole life over random small configs: counted, made, run, trained a step, saved, restored, decoded; all agree.

Axis letters: B rows   S sequence   V vocabulary
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import deepseek_v4 as dsv4
from deepseek_v4 import config as c
from deepseek_v4.checkpoint.store import CheckpointStore, restore_variables
from deepseek_v4.training.state import init_state
from tests.model.small import abstract_variables
from tests.training.small import Step, differing, leaves

LENGTH, ROWS = 12, 2


@st.composite
def models(draw):
  """Any small architecture: kinds and numbers of layers, widths, rates, experts, streams, and how it is compiled."""
  of = lambda *values: draw(st.sampled_from(values))
  layers = of(1, 2, 3)
  heads, groups = of((2, 1), (2, 2), (4, 2))
  experts = of(2, 3, 4)
  return c.ModelConfig(
    vocab_size=of(17, 32), hidden_size=of(8, 12), num_hidden_layers=layers,
    layer_types=tuple(of(*c.ATTENTION_KINDS) for _ in range(layers)),
    mlp_layer_types=tuple(of(*c.ROUTER_KINDS) for _ in range(layers)), csa_compress_rate=of(2, 3, 4),
    hca_compress_rate=of(2, 5, 8), num_attention_heads=heads, head_dim=of(4, 8), qk_rope_head_dim=of(2, 4),
    q_lora_rank=of(3, 8), o_groups=groups, o_lora_rank=of(2, 5), sliding_window=of(1, 3, 8), index_n_heads=of(1, 4),
    index_head_dim=of(4, 8), index_topk=of(1, 2, 64), n_routed_experts=experts, num_experts_per_tok=of(1, 2),
    moe_intermediate_size=of(4, 6), scoring_func=of("sqrtsoftplus", "sigmoid"), hc_mult=of(1, 2, 4),
    hc_sinkhorn_iters=of(1, 3), rope_scaling=of(None, c.Yarn(2.0, 8)), max_position_embeddings=32,
    num_nextn_predict_layers=of(0, 1), init_std=0.3, mhc_init=of("identity", "zero"), scan_layers=of(True, False),
    remat=of("none", "mhc", "block", "full"), loss_chunk_size=of(5, 24))


SMALLEST = c.ModelConfig(
  vocab_size=17, hidden_size=8, num_hidden_layers=1, layer_types=(c.CSA,), mlp_layer_types=(c.LEARNED,),
  csa_compress_rate=3, hca_compress_rate=5, num_attention_heads=2, head_dim=4, qk_rope_head_dim=2, q_lora_rank=3, o_groups=1,
  o_lora_rank=2, sliding_window=3, index_n_heads=4, index_head_dim=4, index_topk=1, n_routed_experts=3,
  num_experts_per_tok=2, moe_intermediate_size=4, hc_mult=2, hc_sinkhorn_iters=3, rope_scaling=None,
  max_position_embeddings=32, num_nextn_predict_layers=0, init_std=0.3, scan_layers=False, loss_chunk_size=5)


def batch_of(config, seed):
  """int32 [1, B, S] arrays: one row of one document, one of two and of padding."""
  tokens = np.random.default_rng(seed).integers(0, config.vocab_size, (ROWS, LENGTH), dtype=np.int32)
  segments = np.ones((ROWS, LENGTH), np.int32)
  segments[1] = [1] * 5 + [2] * 6 + [0]
  positions = np.stack([np.arange(LENGTH), [*range(5), *range(6), 0]]).astype(np.int32)
  batch = {"tokens": tokens, "segment_ids": segments, "positions": positions, "loss_mask": (segments > 0).astype(np.int32)}
  return {name: x[None] for name, x in batch.items()}


def next_token_loss(logits_BSV, batch):
  """Mean nats of the next token inside documents, in float64."""
  logits, total, count = np.asarray(logits_BSV, np.float64), 0.0, 0
  tokens, segments = batch["tokens"][0], batch["segment_ids"][0]
  for row, place in np.ndindex(ROWS, LENGTH - 1):
    if segments[row, place] and segments[row, place] == segments[row, place + 1]:
      x = logits[row, place]
      total += x.max() + np.log(np.exp(x - x.max()).sum()) - x[tokens[row, place + 1]]
      count += 1
  return total / count


def decoded(model, variables, tokens, width):
  """Logits [B, S, V] through a cache, `width` tokens at a time; what is behind the last one is no token."""
  step = jax.jit(lambda v, cache, x, s: model.apply(v, x, None, s, cache))
  cache, found = dsv4.init_cache(model.config, ROWS, LENGTH), []
  for start in range(0, LENGTH, width):
    part = tokens[:, start:start + width]
    pad = ((0, 0), (0, width - part.shape[1]))
    out = step(variables, cache, np.pad(part, pad), np.pad(np.ones_like(part), pad))
    cache, found = out.cache, [*found, out.logits[:, :part.shape[1]]]
  assert dsv4.cache_lengths(cache).tolist() == [LENGTH] * ROWS
  return np.concatenate(found, 1)


def check_count(config, variables):
  """The numbers of parameters and of table entries are those that are counted from the config alone."""
  counted, parts = dsv4.count(config, LENGTH).parameters, leaves(variables).values()
  assert counted.total + counted.total_mtp == sum(x.size for x in parts if jnp.issubdtype(x.dtype, jnp.floating))
  assert counted.hash_table_entries == sum(x.size for x in parts if jnp.issubdtype(x.dtype, jnp.integer))


def live(config, seed, width, folder, owner="muon"):
  """One life; every line of it is a property. `owner` updates the matrices."""
  run = c.RunConfig(model=config, optimizer=c.OptimizerConfig(learning_rate=1e-3, warmup_steps=1, matrix_owner=owner),
                    data=c.DataConfig(sequence_length=LENGTH, batch_size=ROWS), training=c.TrainingConfig(steps=3))
  state = init_state(run, jax.random.key(seed))

  check_count(config, {"params": state.params, "router": state.router})
  model, batch = dsv4.DeepseekV4(config), batch_of(config, seed)
  forward = jax.jit(lambda v, tokens, segments: model.apply(v, tokens, None, segments).logits)
  variables = {"params": state.params, "router": state.router}
  packed = forward(variables, batch["tokens"][0], batch["segment_ids"][0])
  assert packed.shape == (ROWS, LENGTH, config.vocab_size) and np.isfinite(packed).all()

  new, metrics = Step(run)(state, batch)  # of a copy of the state
  assert metrics["finite"] and int(new.step) == 1 and np.isfinite(metrics["loss"])
  # float32 sums of a few hundred terms in another order
  np.testing.assert_allclose(metrics["next_token"], next_token_loss(packed, batch), rtol=1e-4)
  assert differing(new.params, state.params)

  with CheckpointStore(folder, keep=1, config_dict=c.to_dict(run)) as store:
    store.save(1, new, {})
  with CheckpointStore(folder, keep=1, config_dict=c.to_dict(run)) as store:
    step, restored, _ = store.restore_latest(jax.eval_shape(lambda: new))
  assert step == 1 and not differing(restored, new)
  weights, stored, _ = restore_variables(folder)
  assert c.from_dict(c.ModelConfig, stored["model"]) == config
  assert not differing(weights, {"params": new.params, "router": new.router})

  one_document = np.ones_like(batch["segment_ids"][0])
  whole = np.asarray(forward(weights, batch["tokens"][0], one_document))
  # float32 in another order; logits are of order 1, and their differences grow through a few layers
  np.testing.assert_allclose(decoded(model, weights, batch["tokens"][0], width), whole,
                             atol=2e-4 * max(1, np.abs(whole).max()))


@settings(max_examples=8, deadline=None, derandomize=True)
@given(config=models())
def test_what_is_made_is_what_was_counted_and_configs_survive(config):
  """What needs no compiler, for several architectures in every run: the rest of their lives is in the long tier."""
  check_count(config, abstract_variables(config))
  assert c.from_dict(c.ModelConfig, json.loads(json.dumps(c.to_dict(config)))) == config
  ours = {field: getattr(config, field) for field in ("init_std", "mhc_init", "scan_layers", "remat", "loss_chunk_size")}
  assert dataclasses.replace(c.ModelConfig.from_hf(json.loads(json.dumps(config.to_hf()))), **ours) == config


def test_a_life(tmp_path):
  live(SMALLEST, 0, 5, tmp_path / "checkpoints", owner="adamw")  # which compiles in half the time


@pytest.mark.long
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(config=models(), seed=st.integers(0, 2**16), width=st.sampled_from([1, 3, 4, 12]))
def test_lives(config, seed, width, tmp_path_factory):
  live(config, seed, width, tmp_path_factory.mktemp("life") / "checkpoints")
