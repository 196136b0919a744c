"""What must not change a number: scanning, recomputation, dense attention against a large top-k. And who trains whom."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deepseek_v4 as dsv4
from deepseek_v4.config import CSA, LEARNED
from deepseek_v4.model.losses import next_token_targets
from tests.model.small import T0, abstract_variables, pack, random_tokens, random_variables

# The parity with transformers has a scanned unit of two layers; here the unit is one layer that has every loss.
SCANNED = dataclasses.replace(T0, num_hidden_layers=2, layer_types=(CSA,) * 2, mlp_layer_types=(LEARNED,) * 2,
                              num_nextn_predict_layers=0)
ONE_LAYER = SCANNED.cut_layers(1)
LOSSES = ("next_token", "balance", "indexer")
TOKENS, SEGMENTS = pack(random_tokens(17, seed=1), random_tokens(11, seed=2), length=31)


@functools.cache
def scanned_variables():
  return random_variables(SCANNED)


@functools.cache
def compiled(kernels="reference", attention_mode="sparse", **fields):
  """(variables, weights of the losses) -> (gradients, output), jitted, for a variant of SCANNED."""
  model = dsv4.DeepseekV4(dataclasses.replace(SCANNED, **fields), kernels)

  @jax.jit
  def run(variables, weights):
    def total(params):
      targets = next_token_targets(TOKENS, SEGMENTS, np.ones_like(TOKENS))
      out = model.apply({"params": params, "router": variables["router"]}, TOKENS, None, SEGMENTS, targets=targets,
                        attention_mode=attention_mode)
      return sum(weights[name] * pair[0] / pair[1] for name, pair in out.losses.items()), out
    return jax.grad(total, has_aux=True)(variables["params"])

  return lambda variables, **weights: jax.device_get(run(variables, {k: jnp.float32(weights.get(k, 0)) for k in LOSSES}))


def named(tree):
  return {"/".join(str(p.key) for p in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def same(got, want, tolerance):
  """Equal leaf by leaf, within a share of each leaf's largest number."""
  got, want = named(got), named(want)
  assert got.keys() == want.keys()
  for name, leaf in want.items():
    np.testing.assert_allclose(got[name], leaf, atol=tolerance * max(np.abs(leaf).max(), 1e-6), err_msg=name)


ALL = dict(next_token=1.0, balance=0.5, indexer=0.7)


def test_scanning_and_recomputation_change_nothing():
  """Scanned and recomputed against neither."""
  gradients, out = compiled(remat="full")(scanned_variables(), **ALL)
  variables = dsv4.restack(scanned_variables(), SCANNED, scan_layers=False)
  assert set(variables["params"]["layers"]) == {"layer_00", "layer_01"}
  other_gradients, other = compiled(scan_layers=False)(variables, **ALL)
  other_gradients = dsv4.restack({"params": other_gradients}, SCANNED, scan_layers=True)["params"]
  np.testing.assert_allclose(other.hidden, out.hidden, atol=1e-4)
  for name in LOSSES:
    np.testing.assert_allclose(other.losses[name], out.losses[name], rtol=1e-5, err_msg=name)
  np.testing.assert_array_equal(other.routing["experts"], out.routing["experts"])
  np.testing.assert_array_equal(other.routing["load"], out.routing["load"])
  same(other_gradients, gradients, 2e-4)


# Blockwise, of one layer and with the prediction block: test_isolation.py.
@pytest.mark.parametrize("kernels, mode", [("reference", "sparse"),
                                           pytest.param("blockwise", "dense", marks=pytest.mark.long)])
def test_language_and_indexer_train_apart(kernels, mode):
  """The indexer's leaves get exactly nothing from the other losses, and its loss gives exactly nothing to other leaves."""
  run = compiled(remat="full") if mode == "sparse" else compiled(kernels, mode)
  language, out = run(scanned_variables(), next_token=1.0, balance=1.0)
  indexer, _ = run(scanned_variables(), indexer=1.0)
  assert all(np.isfinite(pair[0]) and pair[0] > 0 for pair in out.losses.values())
  of_indexer = [name for name in named(language) if "/indexer/" in name]
  assert len(of_indexer) == 6
  for name, leaf in named(language).items():
    assert (leaf == 0).all() == (name in of_indexer), name
  for name, leaf in named(indexer).items():
    assert (leaf == 0).all() == (name not in of_indexer), name
  # every repetition of the scan gets a gradient of its own
  for name in of_indexer:
    assert (np.abs(named(indexer)[name]).reshape(2, -1).max(1) > 0).all(), name


def program(config, attention_mode):
  """Text of the traced forward pass with losses."""
  run = functools.partial(dsv4.DeepseekV4(config, "blockwise").apply, targets=TOKENS, attention_mode=attention_mode)
  traced = jax.make_jaxpr(lambda v: run(v, TOKENS, None, SEGMENTS))(abstract_variables(ONE_LAYER))
  return re.sub(r"0x[0-9a-f]+", "", str(traced))


def test_dense_attention_is_the_program_of_a_top_k_that_drops_nothing():
  entries = TOKENS.shape[1] // T0.csa_compress_rate
  dense = program(ONE_LAYER, "dense")
  assert dense == program(dataclasses.replace(ONE_LAYER, index_topk=entries), "sparse")
  assert dense == program(dataclasses.replace(ONE_LAYER, index_topk=64), "dense")
  assert dense != program(dataclasses.replace(ONE_LAYER, index_topk=entries - 1), "sparse")
