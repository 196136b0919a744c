"""Rotary embedding: the two frequency tables, the layout, and which layer reads which table."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_v4.config import CSA, HCA, SLIDING, ModelConfig, Yarn
from deepseek_v4.model import rope
from deepseek_v4.model.attention import Attention
from deepseek_v4.model.context import make_context
from tests.model.small import T0, random_variables, variables

FLASH = ModelConfig()  # rotary width 64, YaRN factor 16 on 65536 positions, bases 10000 and 160000
LAYER_OF = {SLIDING: 0, CSA: 1, HCA: 2}


def test_sliding_layers_use_the_plain_table():
  np.testing.assert_allclose(rope.frequencies(FLASH, SLIDING), 10000.0 ** (-2 * np.arange(32) / 64), rtol=1e-12)
  np.testing.assert_allclose(rope.frequencies(FLASH, SLIDING)[31], 1.33352e-4, rtol=1e-5)


@pytest.mark.parametrize("attention", [CSA, HCA])
def test_compressed_layers_use_yarn_on_the_other_base(attention):
  """The ramp runs from pair 15 to pair 25: unchanged before, divided by 16 behind."""
  table = rope.frequencies(FLASH, attention)
  ratio = table / 160000.0 ** (-2 * np.arange(32) / 64)
  np.testing.assert_allclose(ratio[:16], 1)
  np.testing.assert_allclose(ratio[16:25], [0.9063, 0.8125, 0.7188, 0.625, 0.5312, 0.4375, 0.3438, 0.25, 0.1562], atol=1e-4)
  np.testing.assert_allclose(ratio[25:], 0.0625)
  np.testing.assert_allclose(table[[1, 16, 20, 31]], [0.6876560, 2.2656e-3, 2.9698e-4, 5.6805e-7], rtol=1e-4)
  without = dataclasses.replace(FLASH, rope_scaling=None)
  np.testing.assert_allclose(rope.frequencies(without, attention), 160000.0 ** (-2 * np.arange(32) / 64))


def test_angles_far_out_and_amplitude():
  positions = jnp.array([0, 1, 70000, 1048575])
  cos, sin = rope.angles(FLASH, CSA, positions)
  assert cos.dtype == jnp.float32
  assert (np.asarray(cos[0]) == 1).all() and (np.asarray(sin[0]) == 0).all()  # never YaRN's 1.277
  # The frequencies are rounded to float32 first, as the releases do; the rest is exact to a float32 angle.
  angle = np.asarray(positions)[:, None] * rope.frequencies(FLASH, CSA).astype(np.float32).astype(np.float64)
  np.testing.assert_allclose(cos[:2], np.cos(angle[:2]), atol=1e-6)
  np.testing.assert_allclose(cos, np.cos(angle), atol=0.07)  # an angle of 10^6 has a rounding of 0.06
  x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 80)), jnp.float32)
  turned = rope.rotate(x, cos, sin)
  np.testing.assert_allclose(np.linalg.norm(turned[:, 16:], axis=1), np.linalg.norm(x[:, 16:], axis=1), rtol=1e-6)
  np.testing.assert_array_equal(turned[:, :16], x[:, :16])
  np.testing.assert_allclose(rope.rotate(turned, cos, sin, inverse=True), x, atol=2e-6)


def test_pairs_are_neighbours_at_the_end_of_a_head():
  cos, sin = rope.angles(FLASH, SLIDING, jnp.array(1))
  turned = np.asarray(rope.rotate(jnp.zeros(80).at[16].set(1.0), cos, sin))
  np.testing.assert_allclose(turned[16:18], [np.cos(1), np.sin(1)], rtol=1e-6)
  assert (np.delete(turned, [16, 17]) == 0).all()
  half = rope.rotate(jnp.ones(80, jnp.bfloat16), cos, sin)
  assert half.dtype == jnp.bfloat16 and (half[:16] == 1).all()


@pytest.mark.parametrize("kind", [SLIDING, CSA, HCA])
def test_a_layer_reads_its_own_table_only_and_relative_positions_only(kind):
  """NaN in the other kinds' tables changes no bit. Moving everything by 128 places changes nothing, moving queries and
  window keys without the entries does: so queries, keys, compressor, indexer and the inverse share one table."""
  yarn = Yarn(factor=16, original_max_position_embeddings=32, beta_fast=8, beta_slow=0.5)
  config = dataclasses.replace(T0, rope_scaling=yarn)
  params = variables()["params"]["layers"][f"layer_{LAYER_OF[kind]:02d}"]["attention"]
  tokens = jnp.ones((1, 41), jnp.int32)
  x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 41, T0.hidden_size)), jnp.float32)
  place = jnp.arange(41)[None]
  at = jax.jit(lambda positions: make_context(
    config, tokens, positions, jnp.ones_like(tokens), "sparse", with_losses=False))
  base = at(place)
  table = rope.frequencies(config, kind)
  np.testing.assert_allclose(base.phases[kind][0][0], np.cos(np.arange(41)[:, None] * table), atol=1e-5)
  if kind in base.entries:
    rate = config.compress_rate(kind)
    first = np.arange(0, 41 - rate + 1, rate)
    np.testing.assert_allclose(base.entries[kind].cos[0], np.cos(first[:, None] * table), atol=1e-5)

  run = jax.jit(lambda context: Attention(config, kind, "blockwise").apply({"params": params}, x, context)[0])
  want = run(base)
  broken = lambda layout: dataclasses.replace(layout, cos=layout.cos * jnp.nan, sin=layout.sin * jnp.nan)
  poisoned = dataclasses.replace(
      base, phases={k: v if k == kind else jax.tree.map(lambda a: a * jnp.nan, v) for k, v in base.phases.items()},
      entries={k: v if k == kind else broken(v) for k, v in base.entries.items()})
  np.testing.assert_array_equal(run(poisoned), want)
  far = at(place + 128)
  # a float32 angle of 168 is off by up to 8e-6; the layer's logits, of tens, and its sums carry that on
  np.testing.assert_allclose(run(far), want, atol=2e-3)
  assert np.abs(run(dataclasses.replace(base, phases=at(2 * place).phases)) - want).max() > 0.05
  if kind != SLIDING:
    assert np.abs(run(dataclasses.replace(base, phases=far.phases)) - want).max() > 0.05


def test_the_output_is_turned_back():
  """One visible key, at the query's own place, and a sink that weighs nothing: the heads return the key before rotation."""
  config = dataclasses.replace(T0, sliding_window=1, layer_types=(SLIDING,), mlp_layer_types=("moe",), num_hidden_layers=1,
                               num_nextn_predict_layers=0)
  params = random_variables(config)["params"]["layers"]["layer_00"]["attention"]
  params = {**params, "sink": jnp.full(config.num_attention_heads, -1e9)}
  x = np.random.default_rng(0).normal(size=(1, 4, config.hidden_size)).astype(np.float32)
  context = make_context(config, jnp.ones((1, 4), jnp.int32), jnp.array([[3, 50, 999, 2000]]), jnp.ones((1, 4), jnp.int32),
                         "sparse", with_losses=False)
  out, *_ = jax.jit(lambda x: Attention(config, SLIDING, "blockwise").apply({"params": params}, x, context))(x)
  key = x[0] @ np.asarray(params["kv"])
  key = key / np.sqrt((key**2).mean(-1, keepdims=True) + 1e-6) * np.asarray(params["kv_norm"]["scale"])
  heads = np.tile(key[:, None], (1, 4, 1)).reshape(4, config.o_groups, -1)
  low = np.einsum("sgc,gcr->sgr", heads, np.asarray(params["o_a"])).reshape(4, -1)
  np.testing.assert_allclose(out[0], low @ np.asarray(params["o_b"]), atol=2e-4)
