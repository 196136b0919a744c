"""What a model is made of and what a token costs: parameters, operations, bytes; from the config alone, no JAX here.

Conventions: a multiplication and an addition are two operations. A cost "at context n" is that of the one token that is
decoded as the n-th, so it sees min(n, window) keys and n // rate entries. The published ratios to V3.2 (27% and 10% of its
operations, 10% and 7% of its cache at a million tokens) come out under the rules written down at `EQUIVALENT` and
`Count.ratio_to_v32`; what other rules would give is in `Count.by_other_rules`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Mapping

from deepseek_v4.config import CSA, HASH, HCA, SLIDING, LayerSpec, ModelConfig
from deepseek_v4.config_checks import refuse
from deepseek_v4.model.formats import INDEX_BLOCK, KV_BLOCK, STORAGES

# What the operations of each part are done in: linear layers and experts in FP8 (FP4 weights are multiplied at that rate
# today), index scores of V4 in FP4, the mixing of streams in FP32, the rest in BF16.
PRECISION = {"linear": "FP8", "routed_experts": "FP8", "exact_linear": "BF16", "hyper_connections": "FP32",
             "attention": "BF16", "indexer": "FP4", "head": "BF16"}
# Operations in units of one FP8 operation, at the peak rates of a chip with twice the rate for half the width; the few FP32
# operations count like BF16.
UNITS = {"FP4": 0.5, "FP8": 1.0, "BF16": 2.0, "FP32": 2.0}
EQUIVALENT = {part: UNITS[precision] for part, precision in PRECISION.items()}
V32_INDEXER = 1.0  # V3.2's index scores are FP8
KEPT = ("window", "entries", "index_keys")  # what the published ratios of caches compare


@dataclasses.dataclass(frozen=True)
class Parameters:
  """Numbers of parameters; router biases count, hash tables (integers) do not.

  Attributes:
    main: by part, without the multi-token-prediction block.
    active: by part, what one token is multiplied with; of the embedding a single row, which is not counted.
    mtp: by part; empty without the block. Embedding and head are shared with the main model.
    hash_table_entries: integers in all hash tables.
  """

  main: Mapping[str, int]
  active: Mapping[str, int]
  mtp: Mapping[str, int]
  hash_table_entries: int

  @property
  def total(self) -> int:
    """Of the main model."""
    return sum(self.main.values())

  @property
  def total_active(self) -> int:
    """Of the main model, head included: the published "49B" and "13B"."""
    return sum(self.active.values())

  @property
  def total_mtp(self) -> int:
    """Parameters of the prediction block."""
    return sum(self.mtp.values())


@dataclasses.dataclass(frozen=True)
class Count:
  """Result of `count`.

  Attributes:
    context: tokens seen, the one that is decoded included.
    parameters: see `Parameters`.
    flops_per_token: operations of one decoded token by part, the prediction block left out.
    flops_by_precision: the same by what they are done in, see `PRECISION`.
    cache_bytes: storage ("compute", "mixed") -> kind -> bytes of one sequence: "window" and "entries" (keys = values),
      "index_keys", "scales" of what is stored in FP8 and FP4, "pending" (tokens of unfinished entries); with drafts also
      "draft", the prediction block's own cache.
    ratio_to_v32: "flops" as FP8-equivalent operations, "cache" as `kept_bytes` against V3.2's FP8 cache, at this context.
    by_other_rules: the same ratios counted otherwise: "flops" and "cache", each rule -> ratio, see `_other_rules`.
    training_bytes: kind -> bytes of training, over all devices: float32 "parameters" and "gradients", Muon's "momentum" of
      matrices (float32), AdamW's two "moments" of what is no matrix, and "streams", what `remat="block"` keeps of one row of
      this many tokens: the residual streams in front of every layer in `compute_dtype`. The prediction block is included.
  """

  context: int
  parameters: Parameters
  flops_per_token: Mapping[str, int]
  flops_by_precision: Mapping[str, int]
  cache_bytes: Mapping[str, Mapping[str, int]]
  ratio_to_v32: Mapping[str, float]
  by_other_rules: Mapping[str, Mapping[str, float]]
  training_bytes: Mapping[str, int]

  @property
  def equivalent_flops(self) -> float:
    """Operations of one decoded token in units of one FP8 operation; see `EQUIVALENT`."""
    return sum(found * EQUIVALENT[part] for part, found in self.flops_per_token.items())

  @property
  def kept_bytes(self) -> int:
    """Bytes of the mixed cache that `ratio_to_v32` compares: window, entries and index keys, without their scales."""
    return sum(self.cache_bytes["mixed"][kind] for kind in KEPT)


def count(config: ModelConfig, context: int = 1_048_576, *, rewind: int = 0, drafts: int = 0) -> Count:
  """Counts a model.

  Args:
    config: the model.
    context: tokens seen, at least 1.
    rewind: tokens that the cache can be taken back by; its windows are longer by them.
    drafts: tokens that the prediction block guesses at a time (`generate`'s `speculative`); its cache then counts, too, and
      both can be taken back by at least as many.

  Raises:
    ValueError: a context, rewind or drafts that is no such number, or drafts of a model without a prediction block.
  """
  for field, value, least in (("context", context, 1), ("rewind", rewind, 0), ("drafts", drafts, 0)):
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
      refuse(field, value, f"a whole number, at least {least}")
  if drafts and not config.num_nextn_predict_layers:
    refuse("drafts", drafts, "0, as the model has no prediction block (num_nextn_predict_layers = 0)")
  flops = _flops(config, context)
  cache = {storage: cache_bytes(config, context, storage, rewind=max(rewind, drafts)) for storage in STORAGES}
  kept = sum(cache["mixed"][kind] for kind in KEPT)
  if drafts:
    block = dataclasses.replace(config, num_hidden_layers=1, layer_types=(config.mtp_spec.attention,),
                                mlp_layer_types=(config.mtp_spec.router,))
    for storage in STORAGES:
      cache[storage]["draft"] = sum(cache_bytes(block, context, storage, rewind=max(rewind, drafts)).values())
  v32 = v32_cost(context)
  ratio = {"flops": sum(flops[part] * EQUIVALENT[part] for part in flops) / v32.equivalent_flops, "cache": kept / v32.bytes}
  precisions = {name: sum(flops[part] for part in flops if PRECISION[part] == name) for name in UNITS}
  return Count(context, parameters(config), flops, precisions, cache, ratio, _other_rules(config, context, flops, cache),
               training_bytes(config, context))


# ---- parameters ------------------------------------------------------------------------------------------------------
def dense_layer(config: ModelConfig) -> int:
  """The most parameters that a layer has beside its routed experts."""
  return max(sum(n for part, n in _layer(config, spec).items() if part != "routed_experts") for spec in config.layer_specs)


def parameters(config: ModelConfig) -> Parameters:
  """Numbers of parameters by part."""
  c = config
  main = {"embedding": c.vocab_size * c.hidden_size, **_add(*(_layer(c, spec) for spec in c.layer_specs), _output(c)),
          "head": c.vocab_size * c.hidden_size}
  mtp = {}
  if c.num_nextn_predict_layers:
    projections = {"projections": 2 * c.hidden_size**2, "norms": 2 * c.hidden_size}
    mtp = {part: n for part, n in _add(_layer(c, c.mtp_spec), _output(c), projections).items() if n}
  hashed = sum(spec.router == HASH for spec in c.layer_specs)
  active = main | {"embedding": 0,
                   "routed_experts": main["routed_experts"] // c.n_routed_experts * c.num_experts_per_tok}
  return Parameters(main, active, mtp, hashed * c.vocab_size * c.num_experts_per_tok)


def _add(*parts: Mapping[str, int]) -> dict[str, int]:
  names = dict.fromkeys(name for part in parts for name in part)
  return {name: sum(part.get(name, 0) for part in parts) for name in names}


def _attention_matrices(c: ModelConfig) -> int:
  """q_a, q_b, kv, o_a, o_b."""
  inner = c.num_attention_heads * c.head_dim
  return (c.hidden_size * c.q_lora_rank + c.q_lora_rank * inner + c.hidden_size * c.head_dim
          + inner * c.o_lora_rank + c.o_groups * c.o_lora_rank * c.hidden_size)


def _series(kind: str) -> int:
  """Overlapping series of a compressor: an entry of CSA mixes two windows."""
  return {SLIDING: 0, CSA: 2, HCA: 1}[kind]


def _compressor(c: ModelConfig, kind: str, width: int) -> int:
  """Values and gates, position biases, norm."""
  series, rate = _series(kind), c.compress_rate(kind)
  return 2 * series * width * c.hidden_size + rate * series * width + width if series else 0


def _expert(c: ModelConfig) -> int:
  return 3 * c.hidden_size * c.moe_intermediate_size


def _mixing(c: ModelConfig) -> int:
  """The projection of one hyper-connection."""
  return c.hc_mult * c.hidden_size * (2 + c.hc_mult) * c.hc_mult


def _layer(c: ModelConfig, spec: LayerSpec) -> dict[str, int]:
  indexer = 0
  if spec.attention == CSA:
    indexer = c.index_n_heads * (c.index_head_dim * c.q_lora_rank + c.hidden_size) + _compressor(c, CSA, c.index_head_dim)
  return {
    "attention": _attention_matrices(c) + c.q_lora_rank + c.head_dim + c.num_attention_heads,  # and two norms, the sinks
    "compressors": _compressor(c, spec.attention, c.head_dim),
    "indexers": indexer,
    "routers": c.n_routed_experts * c.hidden_size + (0 if spec.router == HASH else c.n_routed_experts),
    "routed_experts": c.n_routed_experts * _expert(c),
    "shared_experts": _expert(c),
    "hyper_connections": 2 * (_mixing(c) + (2 + c.hc_mult) * c.hc_mult + 3),
    "norms": 2 * c.hidden_size,
  }


def _output(c: ModelConfig) -> dict[str, int]:
  """What stands between the streams and the head: the last collapse and the last norm."""
  return {"hyper_connections": c.hc_mult * c.hidden_size * c.hc_mult + c.hc_mult + 1, "norms": c.hidden_size}


# ---- operations ------------------------------------------------------------------------------------------------------
def _flops(c: ModelConfig, context: int) -> dict[str, int]:
  """Operations of one decoded token by part; the parts are those of `EQUIVALENT`."""
  index_queries = c.q_lora_rank * c.index_n_heads * c.index_head_dim
  total = dict.fromkeys(EQUIVALENT, 0)
  for spec in c.layer_specs:
    exact = _series(spec.attention) * 2 * c.head_dim * c.hidden_size + c.n_routed_experts * c.hidden_size
    linear = _attention_matrices(c) + _expert(c)
    keys = min(context, c.sliding_window)
    if spec.attention != SLIDING:
      entries = context // c.compress_rate(spec.attention)
      keys += min(entries, c.index_topk) if spec.attention == CSA else entries
    if spec.attention == CSA:
      linear += index_queries
      exact += c.index_n_heads * c.hidden_size + 2 * 2 * c.index_head_dim * c.hidden_size
      total["indexer"] += _index_scores(c.index_n_heads, c.index_head_dim, entries)
    total["linear"] += 2 * linear
    total["exact_linear"] += 2 * exact
    total["routed_experts"] += 2 * c.num_experts_per_tok * _expert(c)
    total["hyper_connections"] += 2 * 2 * _mixing(c)
    total["attention"] += 2 * 2 * c.num_attention_heads * c.head_dim * keys
  total["hyper_connections"] += 2 * c.hc_mult * c.hidden_size * c.hc_mult
  total["head"] = 2 * c.hidden_size * c.vocab_size
  return total


def _index_scores(heads: int, width: int, keys: int) -> int:
  """A dot product, a ReLU, a weight and a sum for every head and key."""
  return heads * keys * (2 * width + 3)


# ---- cache -----------------------------------------------------------------------------------------------------------
def cache_bytes(config: ModelConfig, context: int, storage: str, *, rewind: int = 0) -> dict[str, int]:
  """Bytes of one sequence's cache by kind, the prediction block left out.

  Args:
    config: the model; `compute_dtype` is what the storage "compute" keeps.
    context: tokens that the cache has room for.
    storage: as in `init_cache`: "compute"; or "mixed", the published layout: per entry and window key the plain channels in
      e4m3 and the rotary ones in BF16, index keys in FP4, one byte of scale for every 64 e4m3 and every 32 FP4 channels.
      Pending tokens (values and gates) are kept in at least float32 by both.
    rewind: tokens that the cache can be taken back by.

  Raises:
    ValueError: a storage that does not exist.
  """
  c = config
  if storage not in STORAGES:
    refuse("storage", storage, f"one of {', '.join(STORAGES)}")
  width = {"float32": 4, "bfloat16": 2, "float64": 8}[c.compute_dtype]
  if storage == "compute":
    entry, entry_scales, index_key, index_scales = width * c.head_dim, 0, width * c.index_head_dim, 0
  else:
    plain = c.head_dim - c.qk_rope_head_dim
    entry, entry_scales = plain + 2 * c.qk_rope_head_dim, math.ceil(plain / KV_BLOCK)
    index_key, index_scales = math.ceil(c.index_head_dim / 2), math.ceil(c.index_head_dim / INDEX_BLOCK)
  rows = {kind: context // c.compress_rate(kind) for kind in (CSA, HCA)}
  layers = {kind: c.layer_types.count(kind) for kind in (CSA, HCA)}
  entries = sum(layers[kind] * rows[kind] for kind in rows)
  index_keys = layers[CSA] * rows[CSA]
  window = c.num_hidden_layers * (c.sliding_window + rewind)
  # CSA and its indexer look back one window further than the one that is being filled.
  pending = (layers[CSA] * (2 * c.csa_compress_rate + rewind) * _series(CSA) * (c.head_dim + c.index_head_dim)
             + layers[HCA] * (c.hca_compress_rate + rewind) * _series(HCA) * c.head_dim)
  return {"window": window * entry, "entries": entries * entry, "index_keys": index_keys * index_key,
          "scales": (window + entries) * entry_scales + index_keys * index_scales, "pending": 2 * max(width, 4) * pending}


# ---- the model that the report compares with -------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class V32Cost:
  """What DeepSeek-V3.2 costs as it is served.

  Attributes:
    flops: operations of one decoded token: "linear" (FP8, experts included), "exact_linear", "attention", "head" (BF16) and
      "indexer" (FP8).
    bytes: of one sequence's cache; all_bf16: if everything in it were BF16.
  """

  flops: Mapping[str, int]
  bytes: int
  all_bf16: int

  @property
  def equivalent_flops(self) -> float:
    """In units of one FP8 operation."""
    return sum(found * (V32_INDEXER if part == "indexer" else EQUIVALENT[part]) for part, found in self.flops.items())


def v32_cost(context: int) -> V32Cost:
  """DeepSeek-V3.2 at a context of so many tokens.

  61 layers, the first 3 dense; attention over latents of 512 + 64 with absorbed projections; an indexer on every layer that
  scores all tokens and keeps 2048. Widths: transformers' `DeepseekV32Config`. Cache per token and layer: 512 e4m3 with four
  float32 scales and 64 BF16, and an index key of 128 e4m3 with a float32 scale.
  """
  layers, dense, d, heads, latent, rope, nope = 61, 3, 7168, 128, 512, 64, 128
  q_rank, index_heads, index_width, top_k = 1536, 64, 128, 2048
  attention = (d * q_rank + q_rank * heads * (nope + rope) + d * (latent + rope)  # queries, latent
               + 2 * heads * nope * latent + heads * nope * d  # absorbed keys and values, output
               + q_rank * index_heads * index_width + d * index_width)  # index queries and keys
  experts = dense * 3 * d * 18432 + (layers - dense) * (8 + 1) * 3 * d * 2048
  flops = {"linear": 2 * (layers * attention + experts),
           "exact_linear": 2 * (layers * d * index_heads + (layers - dense) * d * 256),
           "attention": layers * 2 * heads * (latent + rope + latent) * min(context, top_k),
           "indexer": layers * _index_scores(index_heads, index_width, context), "head": 2 * d * 129280}
  return V32Cost(flops, layers * context * (512 + 4 * 4 + 2 * 64 + 128 + 4),
                 layers * context * 2 * (latent + rope + index_width))


def _other_rules(c: ModelConfig, context: int, flops: Mapping[str, int],
                 cache: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, float]]:
  """Ratios to V3.2 that one gets with other ways to count.

  Of operations: all alike; V4's index scores in FP8 as V3.2's are; all alike but V4's index scores for half. Of the cache:
  with V4's scales, too (V3.2's belong to its layout); with FP8 index keys; everything of both in BF16.
  """
  v32 = v32_cost(context)
  weighed = lambda weights: sum(flops[part] * weights(part) for part in flops)
  plain = sum(v32.flops.values())
  mixed = cache["mixed"]
  kept = sum(mixed[kind] for kind in KEPT)
  bf16 = cache_bytes(dataclasses.replace(c, compute_dtype="bfloat16"), context, "compute")
  return {
    "flops": {"all operations alike": weighed(lambda part: 1) / plain,
              "index scores in FP8 too": weighed(lambda part: 1 if part == "indexer" else EQUIVALENT[part])
              / v32.equivalent_flops,
              "all alike, index scores for half": weighed(lambda part: 0.5 if part == "indexer" else 1) / plain},
    "cache": {"scales too": (kept + mixed["scales"]) / v32.bytes,
              "index keys in FP8": (kept + mixed["index_keys"]) / v32.bytes,
              "all in BF16": sum(bf16[kind] for kind in KEPT) / v32.all_bf16}}


# ---- training --------------------------------------------------------------------------------------------------------
def training_bytes(config: ModelConfig, context: int) -> dict[str, int]:
  """Bytes of training by kind, over all devices; see `Count.training_bytes`.

  Which parameters Muon has: all matrices but embedding and head (report 2.4); AdamW has those two and the vectors.
  """
  c, found = config, parameters(config)
  total = found.total + found.total_mtp
  biases = sum(spec.router != HASH for spec in (*c.layer_specs, *[c.mtp_spec] * c.num_nextn_predict_layers))
  trained = total - biases * c.n_routed_experts  # no gradient moves the routers' biases
  vectors = 2 * c.vocab_size * c.hidden_size + _vectors(c)
  width = {"float32": 4, "bfloat16": 2, "float64": 8}[c.compute_dtype]
  layers = c.num_hidden_layers + c.num_nextn_predict_layers
  return {"parameters": 4 * total, "gradients": 4 * trained, "momentum": 4 * (trained - vectors), "moments": 2 * 4 * vectors,
          "streams": layers * context * c.hc_mult * c.hidden_size * width}


def _vectors(c: ModelConfig) -> int:
  """Parameters that are no matrices: norms, sinks, position biases, bases and scales of hyper-connections."""
  n, total = c.hc_mult, 0
  for spec in (*c.layer_specs, *[c.mtp_spec] * c.num_nextn_predict_layers):
    series, rate = _series(spec.attention), c.compress_rate(spec.attention) if _series(spec.attention) else 0
    widths = {SLIDING: 0, CSA: c.head_dim + c.index_head_dim, HCA: c.head_dim}[spec.attention]
    total += 2 * c.hidden_size + c.q_lora_rank + c.head_dim + c.num_attention_heads  # norms, sinks
    total += (series * rate + 1) * widths  # position biases and norms of compressors
    total += 2 * ((2 + n) * n + 3)
  outputs = 1 + c.num_nextn_predict_layers
  return total + outputs * (n + 1 + c.hidden_size) + 2 * c.hidden_size * c.num_nextn_predict_layers
