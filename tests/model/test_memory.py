"""Nothing quadratic in the sequence and nothing of size tokens x vocabulary, read from the traced program."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

import deepseek_v4 as dsv4
from deepseek_v4.config import CSA, HASH, HCA, LEARNED, SLIDING
from tests.model.small import T0, abstract_variables, equations

LENGTH = 8192  # at which selection already goes tile by tile, as at twice the length
# the released rates and window; a vocabulary wider than anything else that a token has
CONFIG = dataclasses.replace(
    T0, num_hidden_layers=2, layer_types=(CSA, HCA), mlp_layer_types=(LEARNED,) * 2, hca_compress_rate=128,
    sliding_window=128, index_topk=64, hidden_size=16, num_attention_heads=2, head_dim=8, index_n_heads=2, hc_mult=2,
    vocab_size=5003, loss_chunk_size=256, num_nextn_predict_layers=0, max_position_embeddings=2 * LENGTH)


def traced(length, kernels="blockwise", backward=True, config=CONFIG, **arguments):
  """(primitive, shape) of every array of a pass over [1, length], packed; nothing is executed."""
  model, variables = dsv4.DeepseekV4(config, kernels), abstract_variables(config)
  tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)

  def total(params, router, tokens, segment_ids):
    out = model.apply({"params": params, "router": router}, tokens, None, segment_ids, targets=tokens, **arguments)
    return sum(pair[0] for pair in out.losses.values())

  run = jax.value_and_grad(total) if backward else total
  program = jax.make_jaxpr(run)(variables["params"], variables["router"], tokens, tokens)
  return [(e.primitive.name, tuple(v.aval.shape)) for e in equations(program.jaxpr) for v in e.outvars]


def grow_faster_than_the_sequence(once, twice):
  """Arrays of a program whose size more than doubles (padding of blocks aside) when the sequence doubles.

  The two programs are the same but for shapes, so their arrays are compared one by one; an array with two axes that grow,
  such as [S, S], [S, S / 4] or [S, S / 128], becomes four times as large, and so does one that merges such axes.
  """
  assert [name for name, _ in once] == [name for name, _ in twice]
  return [(name, a, b) for (name, a), (_, b) in zip(once, twice) if math.prod(b) > 2.5 * math.prod(a)]


# every kind of layer and router, the prediction block, layers recomputed
WHOLE = dataclasses.replace(CONFIG, num_hidden_layers=3, layer_types=(SLIDING, CSA, HCA), num_nextn_predict_layers=1,
                            mlp_layer_types=(HASH, LEARNED, LEARNED), remat="block")


@pytest.mark.parametrize("attention_mode, config", [("sparse", WHOLE), ("dense", CONFIG.cut_layers(1))],
                         ids=["sparse", "dense"])
def test_memory_is_linear_in_the_sequence(attention_mode, config):
  once, twice = (traced(length, config=config, attention_mode=attention_mode) for length in (LENGTH, 2 * LENGTH))
  assert not grow_faster_than_the_sequence(once, twice)
  # and in training logits exist for a chunk of tokens at a time
  largest = max((math.prod(shape) for _, shape in once), default=0)
  assert CONFIG.loss_chunk_size * CONFIG.vocab_size <= largest < LENGTH * CONFIG.vocab_size / 4


def test_the_formulas_would_be_caught():
  """The reference implementation makes [S, S], [S, S / 4] and [S, S / 128]."""
  once, twice = (traced(length, "reference", backward=False, attention_mode="dense") for length in (LENGTH, 2 * LENGTH))
  caught = {shape for _, shape, _ in grow_faster_than_the_sequence(once, twice)}
  for entries in (LENGTH, LENGTH // 4, LENGTH // 128):
    assert (1, LENGTH, entries) in caught
