"""Floating-point operations of the matmuls that one token needs, by the formula: a multiplication and an addition are two.

Counted: every parameter matmul, of the routed experts only the chosen ones; attention's two products with the window and the
entries that a query sees; the index scores of the visible entries. Not counted: elementwise work (norms, mixing of the
residual streams, softmax, Sinkhorn), sorting, and what an implementation computes beyond the formula (masked pairs, padding
rows, recomputation). So a share of the machine's matmul rate says how close the whole program comes to bare matmuls.
"""

from __future__ import annotations

import numpy as np

from deepseek_v4.config import CSA, SLIDING, ModelConfig


def per_token(config: ModelConfig, length: int, kind: str) -> float:
  """FLOPs per token of a pass over one document of `length` tokens, the mean over its places.

  Args:
    config: the model; a prediction block is not counted.
    length: tokens of the document.
    kind: "forward"; "train" and "remat": a backward pass needs twice the forward's matmuls; "prefill": logits of the last
      place only; "decode": the one token after `length` others.
  """
  seen = np.array([length + 1]) if kind == "decode" else np.arange(1, length + 1)
  layers = sum(_attention(config, spec.attention, seen) + _experts(config) + 2 * _mixing(config)
               for spec in config.layer_specs)
  n, d = config.hc_mult, config.hidden_size
  head = 2 * d * config.vocab_size / (length if kind == "prefill" else 1)
  return float((3 if kind in ("train", "remat") else 1) * (layers + 2 * n * d * n + head))


def entries_per_token(config: ModelConfig, length: int) -> int:
  """What the layers read of a cache for the one token after `length` others: keys of windows, entries, and index keys."""
  total = 0
  for kind in config.layer_types:
    total += min(length + 1, config.sliding_window)
    entries = (length + 1) // config.compress_rate(kind) if kind != SLIDING else 0
    total += min(entries, config.index_topk) + entries if kind == CSA else entries
  return total


def _mixing(config: ModelConfig) -> float:
  """Coefficients of one hyper-connection: [N D] x [N D, (2 + N) N]."""
  n = config.hc_mult
  return 2 * n * config.hidden_size * (2 + n) * n


def _experts(config: ModelConfig) -> float:
  """Router, the chosen experts and the shared one, three matrices each."""
  d, chosen = config.hidden_size, config.num_experts_per_tok + 1
  return 2 * d * config.n_routed_experts + chosen * 3 * 2 * d * config.moe_intermediate_size


def _attention(config: ModelConfig, kind: str, seen: np.ndarray) -> float:
  """Mean over queries of which each sees so many tokens, its own included."""
  c, d = config, config.hidden_size
  inner = c.num_attention_heads * c.head_dim
  weights = d * c.q_lora_rank + c.q_lora_rank * inner + d * c.head_dim
  weights += inner * c.o_lora_rank + c.o_groups * c.o_lora_rank * d
  keys = np.minimum(seen, c.sliding_window).mean()
  if kind == SLIDING:
    return 2 * weights + 4 * inner * keys
  entries = seen // c.compress_rate(kind)
  series = 2 if kind == CSA else 1
  weights += 2 * series * d * c.head_dim  # values and gates of the compressor
  if kind != CSA:
    return 2 * weights + 4 * inner * (keys + entries.mean())
  index = c.index_n_heads * c.index_head_dim
  weights += c.q_lora_rank * index + d * c.index_n_heads + 2 * series * d * c.index_head_dim
  # Where every entry of the row may be picked there is nothing to choose, and no index score is needed.
  scores = 2 * index * entries.mean() if entries.max() > c.index_topk else 0.0
  return 2 * weights + 4 * inner * (keys + np.minimum(entries, c.index_topk).mean()) + scores
