"""A model small enough to write its tree down by hand: every layer kind, hash and learned routing, MTP, scanned layers."""

import types

import numpy as np
import pytest

from deepseek_v4.config import CSA, HASH, HCA, LEARNED, SLIDING, ModelConfig

CONFIG = ModelConfig(
  vocab_size=29, hidden_size=8, num_hidden_layers=6, layer_types=(SLIDING, CSA, HCA, CSA, HCA, CSA),
  mlp_layer_types=(HASH,) + (LEARNED,) * 5, csa_compress_rate=2, hca_compress_rate=3, num_attention_heads=4, head_dim=6,
  qk_rope_head_dim=2, q_lora_rank=5, o_groups=2, o_lora_rank=3, sliding_window=4, index_n_heads=2, index_head_dim=4,
  index_topk=2, n_routed_experts=3, num_experts_per_tok=2, moe_intermediate_size=7, hc_mult=2, rope_scaling=None,
  max_position_embeddings=64)


def layer_shapes(c, attention, router):
  """Shapes of one decoder layer: (params, router state)."""
  n, d = c.hc_mult, c.hidden_size
  hc = {"fn_pre": (n * d, n), "fn_post": (n * d, n), "fn_res": (n * d, n * n), "base": ((2 + n) * n,), "scale": (3,)}

  def compressor(co, m, width):
    return {"kv": (co, d, width), "gate": (co, d, width), "position_bias": (co, m, width), "norm": {"scale": (width,)}}

  att = {"q_a": (d, c.q_lora_rank), "q_a_norm": {"scale": (c.q_lora_rank,)},
         "q_b": (c.q_lora_rank, c.num_attention_heads, c.head_dim), "kv": (d, c.head_dim),
         "kv_norm": {"scale": (c.head_dim,)},
         "sink": (c.num_attention_heads,), "o_b": (c.o_groups * c.o_lora_rank, d),
         "o_a": (c.o_groups, c.num_attention_heads * c.head_dim // c.o_groups, c.o_lora_rank)}
  if attention == CSA:
    att["compressor"] = compressor(2, c.csa_compress_rate, c.head_dim)
    att["indexer"] = {"q_b": (c.q_lora_rank, c.index_n_heads, c.index_head_dim), "head_weights": (d, c.index_n_heads),
                      "compressor": compressor(2, c.csa_compress_rate, c.index_head_dim)}
  if attention == HCA:
    att["compressor"] = compressor(1, c.hca_compress_rate, c.head_dim)
  e, f = c.n_routed_experts, c.moe_intermediate_size
  moe = {"router": {"gate": (d, e)}, "experts": {"gate": (e, d, f), "up": (e, d, f), "down": (e, f, d)},
         "shared": {"gate": (d, f), "up": (d, f), "down": (f, d)}}
  params = {"attn_hc": hc, "ffn_hc": hc, "attn_norm": {"scale": (d,)}, "ffn_norm": {"scale": (d,)},
            "attention": att, "moe": moe}
  state = {"hash_table": (c.vocab_size, c.num_experts_per_tok)} if router == HASH else {"bias": (e,)}
  return params, {"moe": {"router": state}}


def variable_shapes(c):
  """{"params", "router"} with a shape for every leaf, layers unscanned."""
  n, d = c.hc_mult, c.hidden_size
  head = {"fn": (n * d, n), "base": (n,), "scale": (1,)}
  layers = {f"layer_{i:02d}": layer_shapes(c, a, r) for i, (a, r) in enumerate(zip(c.layer_types, c.mlp_layer_types))}
  params = {"embed": {"embedding": (c.vocab_size, d)}, "layers": {k: p for k, (p, _) in layers.items()}, "hc_head": head,
            "final_norm": {"scale": (d,)}, "lm_head": {"kernel": (d, c.vocab_size)}}
  router = {"layers": {k: r for k, (_, r) in layers.items()}}
  if c.num_nextn_predict_layers:
    block, state = layer_shapes(c, SLIDING, LEARNED)
    params["mtp"] = {"embed_norm": {"scale": (d,)}, "hidden_norm": {"scale": (d,)}, "embed_proj": (d, d),
                     "hidden_proj": (d, d), "block": block, "hc_head": head, "final_norm": {"scale": (d,)}}
    router["mtp"] = {"block": state}
  return {"params": params, "router": router}


def variables(c, seed=0):
  """Unscanned numpy variables: float32 normals, hash tables of real ids."""
  rng = np.random.default_rng(seed)

  def fill(node, name=""):
    if isinstance(node, dict):
      return {key: fill(value, key) for key, value in node.items()}
    if name == "hash_table":
      return rng.integers(0, c.n_routed_experts, node).astype(np.int32)
    return rng.normal(size=node).astype(np.float32)

  return fill(variable_shapes(c))


@pytest.fixture(scope="session")
def tiny():
  return types.SimpleNamespace(config=CONFIG, variables=variables, variable_shapes=variable_shapes)


@pytest.fixture(scope="session")
def equal():
  """Whether two trees have the same structure, dtypes and bits."""
  import jax

  def compare(a, b):
    (xs, tree_a), (ys, tree_b) = jax.tree.flatten(a), jax.tree.flatten(b)
    return tree_a == tree_b and all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(xs, ys))

  return compare
