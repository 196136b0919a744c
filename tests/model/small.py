"""The smallest model that has everything, its random weights, and the compiled functions that several files share."""

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np

import deepseek_v4 as dsv4
from deepseek_v4.config import CSA, HASH, HCA, LEARNED, SLIDING, ModelConfig
from deepseek_v4.model.losses import next_token_targets
from deepseek_v4.model.router import hash_table

# Eight index heads: with two, scores that are exactly zero tie, and comparing sets would say nothing.
T0 = ModelConfig(
    vocab_size=97, hidden_size=32, num_hidden_layers=3, layer_types=(SLIDING, CSA, HCA),
    mlp_layer_types=(HASH, LEARNED, LEARNED), csa_compress_rate=4, hca_compress_rate=8, num_attention_heads=4, head_dim=16,
    qk_rope_head_dim=8, q_lora_rank=16, o_groups=2, o_lora_rank=8, sliding_window=8, index_n_heads=8, index_head_dim=8,
    index_topk=2, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, rope_scaling=None,
    max_position_embeddings=4096, loss_chunk_size=24)  # a chunk that does not divide the row
ROW = 64


@functools.cache
def abstract_variables(config):
  """Shapes of a model's variables; no shape depends on the tokens."""
  return jax.eval_shape(lambda: dsv4.DeepseekV4(config, "reference").init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))


def random_variables(config, seed=0):
  """Variables (NumPy) in which every term matters: sinks, biases, norms and mixing far from their initial values."""
  def draw(path, leaf):
    name = "/".join(str(p.key) for p in path)
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    if name.endswith("hash_table"):
      table = hash_table(*leaf.shape[-2:-1], config.n_routed_experts, leaf.shape[-1], len(name))
      return np.broadcast_to(table, leaf.shape)  # of scanned layers the same
    noise = rng.normal(size=leaf.shape)
    if "norm/scale" in name:
      noise = 1 + 0.2 * noise
    elif name.endswith("hc/scale") or name.endswith("hc_head/scale"):
      noise = 0.5 + 0.3 * noise
    elif not name.endswith(("sink", "position_bias", "base")):
      noise = (0.2 if name.endswith("bias") else 0.3) * noise
    return noise.astype(leaf.dtype)

  return jax.tree_util.tree_map_with_path(draw, abstract_variables(config))


@functools.cache
def variables():
  """Those of T0."""
  return random_variables(T0)


def random_tokens(*shape, seed=0):
  return np.random.default_rng(seed).integers(1, T0.vocab_size, shape).astype(np.int32)


def pack(*documents, length=ROW, first_segment=1):
  """(tokens, segment_ids) int32 [1, length]: documents one after another, padding (segment 0, token 0) behind them."""
  tokens, segments = np.zeros((2, 1, length), np.int32)
  place = 0
  for number, document in enumerate(documents):
    tokens[0, place:place + len(document)] = document
    segments[0, place:place + len(document)] = first_segment + number
    place += len(document)
  return tokens, segments


@functools.cache
def packed_model(kernels):
  """(variables, tokens, segment_ids) -> output with all losses, jitted; rows may hold any documents."""
  model = dsv4.DeepseekV4(T0, kernels)

  @jax.jit
  def run(variables, tokens, segment_ids):
    targets = next_token_targets(tokens, segment_ids, jnp.ones_like(tokens))
    return model.apply(variables, tokens, None, segment_ids, targets=targets)

  return lambda tokens, segment_ids, changed=None: jax.device_get(run(changed or variables(), tokens, segment_ids))


@functools.cache
def plain_model(kernels):
  """(variables, tokens) -> output with all losses of rows that are one document each, jitted."""
  model = dsv4.DeepseekV4(T0, kernels)

  @jax.jit
  def run(variables, tokens):
    targets = next_token_targets(tokens, jnp.ones_like(tokens), jnp.ones_like(tokens))
    return model.apply(variables, tokens, targets=targets)

  return lambda tokens, changed=None: jax.device_get(run(changed or variables(), tokens))


@functools.cache
def traced_model(kernels):
  """(variables, tokens) -> trace, jitted."""
  model = dsv4.DeepseekV4(T0, kernels)
  run = jax.jit(lambda variables, tokens: dsv4.trace(model, variables, tokens))
  return lambda tokens, changed=None: jax.device_get(run(changed or variables(), tokens))


def logits(hidden):
  """What the head makes of hidden states, in NumPy."""
  return hidden @ variables()["params"]["lm_head"]["kernel"]


def equations(program):
  """Every equation of a traced program and of the programs inside it, in order."""
  def inner(value):
    if hasattr(value, "eqns"):
      yield value
    elif hasattr(value, "jaxpr"):
      yield value.jaxpr
    elif isinstance(value, (tuple, list)):
      for item in value:
        yield from inner(item)

  for equation in program.eqns:
    yield equation
    for value in equation.params.values():
      for body in inner(value):
        yield from equations(body)
