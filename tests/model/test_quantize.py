"""Rounding as in DeepSeek's inference: every code, tie and border of a scale against NumPy, and the whole model with it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import deepseek_v4 as dsv4
from deepseek_v4.checkpoint import hf_format
from deepseek_v4.config import RunConfig
from deepseek_v4.model import quantize
from tests.model import numpy_model
from tests.model.numpy_model import E4M3, KINDS, PLACES
from tests.model.small import T0, random_tokens, random_variables

RULES = {"kv": quantize.KV, "linear": quantize.LINEAR, "index": quantize.INDEX}
ROUND = {kind: jax.jit(functools.partial(quantize.rounded, rule=rule)) for kind, rule in RULES.items()}
ENCODE = {kind: jax.jit(functools.partial(quantize.encode, rule=rule)) for kind, rule in RULES.items()}


def same(found, want, dtype=np.float32):
  """Equal numbers, signs of zeros included."""
  with np.errstate(over="ignore"):
    found, want = np.asarray(found), np.asarray(want).astype(dtype)
  assert found.dtype == want.dtype
  np.testing.assert_array_equal(found.astype(np.float64), want.astype(np.float64))
  np.testing.assert_array_equal(np.signbit(found), np.signbit(want))


def around(x):
  """Numbers, their neighbours in float32, and all of them negative."""
  x = np.asarray(x, np.float32)
  near = np.concatenate([x, np.nextafter(x, np.float32(0)), np.nextafter(x, np.float32(np.inf))])
  return np.concatenate([near, -near])


def in_blocks(numbers, kind, largest):
  """Rows [n, block] that hold the numbers, `largest` in front of each so that it decides the scale."""
  per_row = KINDS[kind][1] - 1
  numbers = np.pad(numbers, (0, -len(numbers) % per_row)).reshape(-1, per_row)
  return np.concatenate([np.full((len(numbers), 1), largest, np.float32), numbers], 1)


# ---- numbers ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", RULES)
def test_every_code_every_tie_and_what_is_beside_them(kind):
  """At five scales: all codes, all middles between neighbours (they go to the even code), and one bit more or less."""
  values = KINDS[kind][0]
  numbers = around(np.concatenate([values[:-1], (values[1:] + values[:-1]) / 2]))
  for exponent in (-20, -7, 0, 5, 60):
    x = in_blocks(numbers, kind, values[-1]) * np.float32(2.0**exponent)
    same(ROUND[kind](x), numpy_model.rounded(x, kind))
    found, scales = ENCODE[kind](x)
    nearest, sign, k = numpy_model.codes(x, kind)
    np.testing.assert_array_equal(scales, k[:, :1] + 127)
    np.testing.assert_array_equal(found, nearest + np.where(sign < 0, 128 if values is E4M3 else 8, 0))
    assert k[0, 0] == exponent and set(nearest.reshape(-1)) == set(range(len(values)))


@pytest.mark.parametrize("kind", RULES)
def test_borders_of_scales(kind):
  """The largest magnitude on, below and above every border: the scale is the smallest that holds it."""
  values, block, least = KINDS[kind]
  borders = around(values[-1] * 2.0 ** np.arange(-12, 20))
  borders = np.concatenate([borders, around([least, 2 * least, least / 2] if kind != "index" else [1e-30, 3e-36])])
  x = np.tile(borders[:, None], (1, block)) * np.linspace(1, 0, block, dtype=np.float32)
  same(ROUND[kind](x), numpy_model.rounded(x, kind))
  _, scales = ENCODE[kind](x)
  np.testing.assert_array_equal(scales, numpy_model.exponents(x, kind) + 127)


# Of each kind: less than a block, whole blocks, and a part of one behind them.
IN_THE_SUITE = {"kv": (8, 448, 200), "linear": (31, 128, 200), "index": (1, 64, 200)}


@pytest.mark.parametrize("width, kind", [
  pytest.param(width, kind, marks=[pytest.mark.long] * (width not in IN_THE_SUITE[kind]))
  for width in (1, 8, 31, 64, 128, 200, 448) for kind in RULES])
def test_widths_and_dtypes(kind, width):
  """The last block of a width may be smaller; blocks far apart in size; bfloat16 in, bfloat16 out, without a loss."""
  x = np.random.default_rng(width).normal(size=(3, 2, width)).astype(np.float32)
  x *= np.exp(np.random.default_rng(1).normal(size=(3, 2, width)) * 4).astype(np.float32)
  same(ROUND[kind](x), numpy_model.rounded(x, kind))
  half = x.astype(ml_dtypes.bfloat16)
  same(ROUND[kind](half), numpy_model.rounded(half.astype(np.float32), kind), ml_dtypes.bfloat16)
  assert ENCODE[kind](x)[1].shape == (3, 2, -(-width // KINDS[kind][1]))


@pytest.mark.parametrize("kind", RULES)
def test_blocks_of_zeros_and_of_what_is_no_number(kind):
  block = KINDS[kind][1]
  x = np.zeros((6, 2 * block), np.float32)
  x[1] = -0.0
  x[2, 3], x[3, 3], x[4, 3] = np.nan, np.inf, -np.inf
  x[2:5, block:] = 1.5
  x[5, :] = np.finfo(np.float32).max
  found = np.asarray(ROUND[kind](x))
  same(found[:2], x[:2])
  assert not np.isfinite(found[2:5, :block]).any()
  same(found[2:5, block:], np.full((3, block), 1.5))
  same(found[5], numpy_model.rounded(x[5], kind))


def test_float64_is_rounded_once():
  with jax.enable_x64(True):
    x = np.random.default_rng(0).normal(size=(5, 200)) * 100
    for kind in RULES:
      same(ROUND[kind](x), numpy_model.rounded(x, kind), np.float64)


def test_codes_are_those_of_the_releases():
  """Packed index keys and FP8 codes, read by the decoder of release files."""
  x = np.random.default_rng(2).normal(size=(4, 128)).astype(np.float32)
  packed = quantize.pack_index(x)
  assert packed.pairs.shape == (4, 64) and packed.scales.shape == (4, 4)
  same(hf_format.decode(np.asarray(packed.pairs), np.asarray(packed.scales), hf_format.FP4), numpy_model.rounded(x, "index"))
  codes, scales = ENCODE["linear"](x[:1])
  same(hf_format.decode(np.asarray(codes), np.asarray(scales), hf_format.FP8), numpy_model.rounded(x[:1], "linear"))


@pytest.mark.parametrize("width, rotary", [(512, 64), (16, 8), (80, 10), (8, 8)])
def test_keys_as_a_cache_keeps_them(width, rotary):
  """448 codes, 64 bfloat16 and 7 scales of the real width; what comes back is what `round_kv` makes, and stays that."""
  x = np.random.default_rng(width).normal(size=(3, 5, width)).astype(np.float32)
  pack, round_kv = (jax.jit(functools.partial(f, rotary=rotary)) for f in (quantize.pack_kv, quantize.round_kv))
  unpack = jax.jit(quantize.unpack, static_argnames="dtype")
  packed = pack(x)
  plain = width - rotary
  assert [(a.shape[-1], a.dtype) for a in (packed.plain, packed.rotary, packed.scales)] == [
    (plain, np.uint8), (rotary, ml_dtypes.bfloat16), (-(-plain // 64), np.uint8)]
  back = unpack(packed, dtype=jnp.float32)
  parts = [numpy_model.rounded(x[..., :plain], "kv")] if plain else []
  same(back, np.concatenate([*parts, numpy_model.rounded_bfloat16(x[..., plain:])], -1))
  for again in (round_kv(x), round_kv(back)):
    same(again, back)
  same(unpack(packed, dtype=jnp.bfloat16), back, ml_dtypes.bfloat16)  # as exact
  index = ROUND["index"](x[..., -8:])
  same(unpack(quantize.pack_index(x[..., -8:]), dtype=jnp.float32), index)
  same(ROUND["index"](index), index)


@pytest.mark.parametrize("width", [1, 2, 8, 128])
def test_hadamard(width):
  x = np.random.default_rng(width).normal(size=(7, width)).astype(np.float32)
  found = quantize.hadamard(x)
  np.testing.assert_allclose(found, x @ numpy_model.hadamard(width), atol=2e-6)
  np.testing.assert_allclose(quantize.hadamard(found), x, atol=2e-6)
  np.testing.assert_allclose(found @ found.T, x @ x.T, atol=2e-5 * width**0.5)


def test_rounding_has_no_gradient():
  x = np.random.default_rng(3).normal(size=(2, 16)).astype(np.float32)
  for function in (functools.partial(quantize.round_kv, rotary=8), functools.partial(quantize.rounded, rule=quantize.INDEX),
                   functools.partial(quantize.rounded, rule=quantize.LINEAR)):
    gradient = jax.jit(jax.grad(lambda x, f=function: (f(x) ** 2).sum()))
    np.testing.assert_array_equal(gradient(x), np.zeros_like(x))


# ---- settings ---------------------------------------------------------------------------------------------------------
def test_settings_that_do_not_go_together():
  for fields in (dict(index_head_dim=12), dict(index_head_dim=24)):
    config = dataclasses.replace(T0, **fields)
    with pytest.raises(ValueError, match="index_head_dim = .*: expected a power of two with inference_rounding = True"):
      dataclasses.replace(config, inference_rounding=True)
  sliding = dict(num_hidden_layers=1, layer_types=T0.layer_types[:1], mlp_layer_types=T0.mlp_layer_types[:1])
  dataclasses.replace(T0, index_head_dim=12, inference_rounding=True, **sliding)  # no indexer
  with pytest.raises(ValueError, match="model.inference_rounding = True: expected False in a run"):
    RunConfig(model=dataclasses.replace(T0, inference_rounding=True))
  with pytest.raises(ValueError, match="inference_rounding = 'yes': expected bool"):
    dataclasses.replace(T0, inference_rounding="yes")


# ---- the whole model --------------------------------------------------------------------------------------------------
# No width is a multiple of its block: 160 = 128 + 32, 80 plain channels = 64 + 16, 144 = 128 + 16, 136 = 128 + 8; and two
# whole blocks of index channels.
ODD = dataclasses.replace(
  T0, hidden_size=160, head_dim=88, csa_compress_rate=2, index_head_dim=64, o_lora_rank=72, moe_intermediate_size=136)
IDS = random_tokens(1, 22, seed=4)


def test_the_model_rounds_what_deepseek_rounds():
  """Everywhere and nowhere else: equal to NumPy's rounding in all places, and to no other choice of places."""
  # float64: between two codes the last bit of a sum in float32 would decide.
  config = dataclasses.replace(ODD, inference_rounding=True, compute_dtype="float64")
  network = lambda places: numpy_model.Network(ODD, random_variables(ODD), places)(IDS)
  with jax.enable_x64(True):
    run = jax.jit(lambda v: dsv4.DeepseekV4(config, "reference").apply(v, IDS, mtp=True))
    out = run(random_variables(ODD))
    logits, mtp = np.asarray(out.logits), np.asarray(out.mtp_hidden)
  for found, want in zip((logits, mtp), network(PLACES)):
    np.testing.assert_allclose(found, want, atol=1e-9)
  assert np.abs(logits - network(())[0]).max() > 0.1
  for place in PLACES:
    less_logits, less_mtp = network([p for p in PLACES if p != place])
    moved = less_mtp - mtp if place in ("embed_proj", "hidden_proj") else less_logits - logits
    assert np.abs(moved).max() > 1e-3, place
