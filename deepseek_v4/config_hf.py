"""Dictionaries of released models <-> `ModelConfig`. Nothing in them is silently ignored; no JAX here.

Two forms are read: the release's config.json (`compress_ratios` with an extra entry per draft stage, `num_hash_layers`,
`rope_scaling`) and the form transformers normalises it to (`layer_types`, `mlp_layer_types`, nested `rope_parameters`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Mapping

from deepseek_v4.config import CSA, HASH, HCA, LEARNED, SLIDING, ModelConfig, Yarn, _refuse

RATIO_KINDS = {0: SLIDING, 4: CSA, 128: HCA}

# Read as they stand.
SAME = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim", "q_lora_rank", "o_groups",
        "o_lora_rank", "sliding_window", "index_n_heads", "index_head_dim", "index_topk", "n_routed_experts",
        "num_experts_per_tok", "moe_intermediate_size", "scoring_func", "routed_scaling_factor", "swiglu_limit", "hc_mult",
        "hc_sinkhorn_iters", "hc_eps", "rms_norm_eps", "rope_theta", "compress_rope_theta", "max_position_embeddings",
        "num_nextn_predict_layers", "bos_token_id", "eos_token_id", "pad_token_id")
# The architecture has one value only; anything else is a different model.
ONLY = {"model_type": "deepseek_v4", "num_key_value_heads": 1, "n_shared_experts": 1, "norm_topk_prob": True,
        "topk_method": "noaux_tc", "hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0,
        "mlp_bias": False, "tie_word_embeddings": False, "router_jitter_noise": 0.0}
# About somebody's program, not about the model: no number of ours depends on them.
NO_EFFECT = {"architectures", "transformers_version", "torch_dtype", "dtype", "use_cache", "initializer_range",
             "output_router_logits", "router_aux_loss_coef", "output_attentions", "output_hidden_states", "return_dict",
             "_name_or_path", "name_or_path", "chunk_size_feed_forward", "is_encoder_decoder", "id2label", "label2id",
             "problem_type", "auto_map", "_attn_implementation", "attn_implementation", "experts_implementation"}
# Describe the draft stages of later releases; the backbone is the same and the stages are not built.
DRAFT = {"dspark_block_size", "dspark_noise_token_id", "dspark_target_layer_ids", "dspark_markov_rank"}
CONVERTED = {"layer_types", "mlp_layer_types", "compress_rates", "compress_ratios", "compress_rate_csa", "compress_rate_hca",
             "num_hash_layers", "qk_rope_head_dim", "partial_rotary_factor", "rope_scaling", "rope_parameters",
             "quantization_config", "expert_dtype"}


def from_hf(source: Mapping[str, Any] | str | Path) -> ModelConfig:
  """See `ModelConfig.from_hf`.

  Raises:
    ValueError: a field that has no meaning here, or a value that this architecture does not have.
  """
  raw = dict(source) if isinstance(source, Mapping) else _read(Path(source))
  for name, value in ONLY.items():
    if name in raw and raw[name] != value:
      _refuse(name, raw[name], f"{value!r} (the only value this architecture has)")
  known = set(SAME) | set(ONLY) | NO_EFFECT | DRAFT | CONVERTED
  if unknown := sorted(set(raw) - known):
    raise ValueError(f"config fields without a meaning here: {', '.join(f'{k} = {raw[k]!r}' for k in unknown)}")
  fields = {name: raw[name] for name in SAME if name in raw}
  for name in ("num_hidden_layers", "head_dim"):
    if name not in fields:
      _refuse(name, None, "a value in the config")
  n = fields["num_hidden_layers"]
  fields["layer_types"] = _layer_types(raw, n)
  fields["mlp_layer_types"] = _mlp_layer_types(raw, n)
  fields |= _rates(raw)
  rope_dim = _rope_dim(raw, fields["head_dim"])
  fields |= _rope(raw, rope_dim / fields["head_dim"])
  return ModelConfig(**fields, qk_rope_head_dim=rope_dim, quantization=_quantization(raw))


def _read(path: Path) -> dict[str, Any]:
  path = path / "config.json" if path.is_dir() else path
  if not path.is_file():
    raise FileNotFoundError(f"{path}: expected a config.json or a folder that holds one")
  return json.loads(path.read_text(encoding="utf-8"))


def _layer_types(raw: Mapping[str, Any], n: int) -> tuple[str, ...]:
  if (types := raw.get("layer_types")) is not None:
    return tuple(types)
  ratios = raw.get("compress_ratios")
  if ratios is None:
    _refuse("compress_ratios", None, "this list or layer_types")
  if len(ratios) < n:
    _refuse("compress_ratios", f"{len(ratios)} entries", f"at least num_hidden_layers = {n} (then one per draft stage)")
  for i, ratio in enumerate(ratios):
    if ratio not in RATIO_KINDS:
      _refuse(f"compress_ratios[{i}]", ratio,
              "0 (sliding), 4 (CSA) or 128 (HCA); other rates need layer_types and compress_rates")
  draft = ratios[n:]
  if any(draft) or len(draft) not in (0, 1, 3):
    _refuse("compress_ratios", f"{draft} after the layers", "nothing, one 0 (MTP block) or three 0 (draft stages)")
  return tuple(RATIO_KINDS[ratio] for ratio in ratios[:n])


def _mlp_layer_types(raw: Mapping[str, Any], n: int) -> tuple[str, ...]:
  if (types := raw.get("mlp_layer_types")) is not None:
    return tuple(types)
  hashed = raw.get("num_hash_layers", 3)
  if not 0 <= hashed:
    _refuse("num_hash_layers", hashed, "at least 0")
  return (HASH,) * min(n, hashed) + (LEARNED,) * max(0, n - hashed)


def _rates(raw: Mapping[str, Any]) -> dict[str, int]:
  rates = dict(raw.get("compress_rates") or {})
  found = {"csa_compress_rate": rates.pop(CSA, raw.get("compress_rate_csa", 4)),
           "hca_compress_rate": rates.pop(HCA, raw.get("compress_rate_hca", 128))}
  if rates:
    _refuse("compress_rates", sorted(rates), f"only the keys {CSA} and {HCA}")
  return found


def _rope_dim(raw: Mapping[str, Any], head_dim: int) -> int:
  """Rotary channels per head; the two spellings must agree where both are given."""
  factor, given = raw.get("partial_rotary_factor"), raw.get("qk_rope_head_dim")
  if factor is None and given is None:
    return int(head_dim * 64 / 512)
  if factor is None:
    return given
  dim = int(head_dim * factor)
  if given is not None and given != dim:
    _refuse("qk_rope_head_dim", given, f"partial_rotary_factor * head_dim = {dim}")
  return dim


def _rope(raw: Mapping[str, Any], rotary_share: float) -> dict[str, Any]:
  """rope_scaling (flat, release) or rope_parameters (flat or nested main/compress) -> thetas and Yarn."""
  parameters, scaling = raw.get("rope_parameters"), raw.get("rope_scaling")
  found: dict[str, Any] = {}
  if parameters and "main" in parameters:
    if extra := set(parameters) - {"main", "compress"}:
      _refuse("rope_parameters", sorted(extra), "only main and compress")
    main = dict(parameters["main"])
    if main.pop("rope_type", main.pop("type", "default")) != "default":
      _refuse("rope_parameters.main", parameters["main"], "rope_type default (sliding layers are never stretched)")
    scaling = dict(parameters["compress"])
    found["rope_theta"] = main.pop("rope_theta", raw.get("rope_theta", 10000.0))
    found["compress_rope_theta"] = scaling.pop("rope_theta", raw.get("compress_rope_theta", 160000.0))
    for part in (main, scaling):
      share = part.pop("partial_rotary_factor", rotary_share)
      if abs(share - rotary_share) > 1e-9:
        _refuse("partial_rotary_factor", share, f"the same share as qk_rope_head_dim / head_dim = {rotary_share}")
    if main:
      _refuse("rope_parameters.main", sorted(main), "rope_type, rope_theta and partial_rotary_factor only")
  elif parameters:
    scaling = dict(parameters)
    scaling.pop("rope_theta", None)
    scaling.pop("partial_rotary_factor", None)
  found["rope_scaling"] = _yarn(dict(scaling or {}))
  for name, value in found.items():
    if name in SAME and raw.get(name, value) != value:
      _refuse(name, raw[name], f"{value}, as rope_parameters says")
  return found


def _yarn(scaling: dict[str, Any]) -> Yarn | None:
  old_spelling = scaling.pop("type", None)
  kind = scaling.pop("rope_type", old_spelling)
  factor = scaling.pop("attention_factor", 1.0)
  if factor not in (None, 1.0):
    _refuse("attention_factor", factor, "1.0 (V4 does not scale cos and sin)")
  if kind in (None, "default"):
    if scaling:
      _refuse("rope_scaling", sorted(scaling), "a type of yarn beside these fields")
    return None
  if kind != "yarn":
    _refuse("rope_scaling.type", kind, "yarn or default")
  allowed = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow")
  if unknown := sorted(set(scaling) - set(allowed)):
    _refuse("rope_scaling", unknown, f"only {', '.join(allowed)}")
  return Yarn(**scaling)


def _quantization(raw: Mapping[str, Any]) -> str | None:
  quantized = raw.get("quantization_config")
  if quantized is None:
    return None
  expected = {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "activation_scheme": "dynamic",
              "weight_block_size": [128, 128]}
  for name, value in expected.items():
    given = quantized.get(name, value)
    if (list(given) if isinstance(given, (list, tuple)) else given) != value:
      _refuse(f"quantization_config.{name}", given, repr(value))
  experts = raw.get("expert_dtype", quantized.get("expert_dtype", "fp8"))
  if experts not in ("fp4", "fp8"):
    _refuse("expert_dtype", experts, "fp4 or fp8")
  return "fp8+fp4" if experts == "fp4" else "fp8"


def to_hf(config: ModelConfig) -> dict[str, Any]:
  """See `ModelConfig.to_hf`. Weights leave as floats, so no quantization_config is written."""
  share = config.qk_rope_head_dim / config.head_dim
  main = {"rope_type": "default", "rope_theta": config.rope_theta, "partial_rotary_factor": share}
  compress = {"rope_type": "default", "rope_theta": config.compress_rope_theta, "partial_rotary_factor": share}
  if (yarn := config.rope_scaling) is not None:
    compress |= {"rope_type": "yarn", "attention_factor": 1.0, "factor": yarn.factor, "beta_fast": yarn.beta_fast,
                 "beta_slow": yarn.beta_slow, "original_max_position_embeddings": yarn.original_max_position_embeddings}
  only = {k: v for k, v in ONLY.items() if k not in ("topk_method", "router_jitter_noise")}
  return ({name: getattr(config, name) for name in SAME} | only | {
      "layer_types": list(config.layer_types), "mlp_layer_types": list(config.mlp_layer_types),
      "compress_rates": {CSA: config.csa_compress_rate, HCA: config.hca_compress_rate},
      "partial_rotary_factor": share, "rope_parameters": {"main": main, "compress": compress}})
