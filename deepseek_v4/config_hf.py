"""Dictionaries of released models <-> `ModelConfig`. Nothing in them is silently ignored; no JAX here.

Two forms are read: the release's config.json (`compress_ratios` with an extra entry per draft stage, `num_hash_layers`,
`rope_scaling`) and the form transformers normalises it to (`layer_types`, `mlp_layer_types`, nested `rope_parameters`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Mapping

from deepseek_v4.config import CSA, HASH, HCA, LEARNED, SLIDING, ModelConfig, Yarn
from deepseek_v4.config_checks import refuse

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
# About somebody's program or its initial values (ours are init_std and mhc_init), not about the model that is described.
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
      refuse(name, raw[name], f"{value!r} (the only value this architecture has)")
  known = set(SAME) | set(ONLY) | NO_EFFECT | DRAFT | CONVERTED
  if unknown := sorted(set(raw) - known):
    raise ValueError(f"config fields without a meaning here: {', '.join(f'{k} = {raw[k]!r}' for k in unknown)}")
  fields = {name: raw[name] for name in SAME if name in raw}
  for name in ("num_hidden_layers", "head_dim"):
    if name not in fields:
      refuse(name, None, "a value in the config")
  n = fields["num_hidden_layers"]
  fields |= _rates(raw)
  fields["layer_types"] = _layer_types(raw, n, fields)
  fields["mlp_layer_types"] = _mlp_layer_types(raw, n)
  if len(raw.get("compress_ratios") or ()) == n + 3:
    fields["num_nextn_predict_layers"] = 0  # three draft stages stand where the prediction block was
  rope_dim = _rope_dim(raw, fields["head_dim"])
  fields |= _rope(raw, rope_dim / fields["head_dim"])
  return ModelConfig(**fields, qk_rope_head_dim=rope_dim, quantization=_quantization(raw))


def _read(path: Path) -> dict[str, Any]:
  path = path / "config.json" if path.is_dir() else path
  if not path.is_file():
    raise FileNotFoundError(f"{path}: expected a config.json or a folder that holds one")
  try:
    raw = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:  # no UTF-8, or no JSON
    raise ValueError(f"{path}: expected a JSON object; {error}") from error
  if not isinstance(raw, dict):
    raise ValueError(f"{path}: expected a JSON object, found a {type(raw).__name__}")
  return raw


def _layer_types(raw: Mapping[str, Any], n: int, rates: Mapping[str, int]) -> tuple[str, ...]:
  """Attention kinds by `layer_types` or by the release's ratios; where both are given they must agree."""
  types, ratios = raw.get("layer_types"), raw.get("compress_ratios")
  if types is None and ratios is None:
    refuse("compress_ratios", None, "this list or layer_types")
  by_ratio = () if ratios is None else _kinds_of_ratios(ratios, n, rates)
  if types is None:
    return by_ratio
  for i, (given, meant) in enumerate(zip(types, by_ratio or types)):
    if given != meant:
      refuse(f"layer_types[{i}]", given, f"{meant}, as compress_ratios say")
  return tuple(types)


def _kinds_of_ratios(ratios: Any, n: int, rates: Mapping[str, int]) -> tuple[str, ...]:
  if not isinstance(ratios, (list, tuple)):
    refuse("compress_ratios", ratios, "a list of numbers")
  if len(ratios) < n:
    refuse("compress_ratios", f"{len(ratios)} entries", f"at least num_hidden_layers = {n} (then one per draft stage)")
  csa, hca = rates["csa_compress_rate"], rates["hca_compress_rate"]
  kinds = {hca: HCA, csa: CSA, 0: SLIDING}
  for i, ratio in enumerate(ratios):
    if ratio not in kinds:
      refuse(f"compress_ratios[{i}]", ratio,
             f"0 (sliding), {csa} (CSA) or {hca} (HCA); other rates need compress_rates that name them")
  draft = list(ratios[n:])
  if any(draft) or len(draft) not in (0, 1, 3):
    refuse("compress_ratios", f"{draft} after the layers", "nothing, one 0 (MTP block) or three 0 (draft stages)")
  return tuple(kinds[ratio] for ratio in ratios[:n])


def _mlp_layer_types(raw: Mapping[str, Any], n: int) -> tuple[str, ...]:
  """Router kinds by `mlp_layer_types` or by the number of hash layers; where both are given they must agree."""
  types, hashed = raw.get("mlp_layer_types"), raw.get("num_hash_layers")
  if hashed is not None and not 0 <= hashed <= n:
    refuse("num_hash_layers", hashed, f"at least 0 and at most num_hidden_layers = {n}")
  first = min(3, n) if hashed is None else hashed
  by_number = (HASH,) * first + (LEARNED,) * (n - first)
  if types is None:
    return by_number
  for i, (given, meant) in enumerate(zip(types, by_number if hashed is not None else types)):
    if given != meant:
      refuse(f"mlp_layer_types[{i}]", given, f"{meant}, as num_hash_layers = {hashed} says")
  return tuple(types)


def _rates(raw: Mapping[str, Any]) -> dict[str, int]:
  """Tokens per entry, in either spelling; where both are given they must agree."""
  rates, found = dict(raw.get("compress_rates") or {}), {}
  for kind, flat, field, default in ((CSA, "compress_rate_csa", "csa_compress_rate", 4),
                                     (HCA, "compress_rate_hca", "hca_compress_rate", 128)):
    named, single = rates.pop(kind, None), raw.get(flat)
    if None not in (named, single) and named != single:
      refuse(flat, single, f"{named}, as compress_rates says")
    found[field] = next((rate for rate in (named, single) if rate is not None), default)
  if rates:
    refuse("compress_rates", sorted(rates), f"only the keys {CSA} and {HCA}")
  return found


def _rope_dim(raw: Mapping[str, Any], head_dim: int) -> int:
  """Rotary channels per head; the two spellings must agree where both are given."""
  factor, given = raw.get("partial_rotary_factor"), raw.get("qk_rope_head_dim")
  if factor is None:
    return given if given is not None else round(head_dim * 64 / 512)
  dim = round(head_dim * factor)
  if given is not None and given != dim:
    refuse("qk_rope_head_dim", given, f"partial_rotary_factor * head_dim = {dim}")
  return dim


def _rope(raw: Mapping[str, Any], rotary_share: float) -> dict[str, Any]:
  """rope_scaling (flat, release) and rope_parameters (flat or nested main/compress) -> thetas and Yarn; all must agree."""
  parameters = dict(raw.get("rope_parameters") or {})
  found: dict[str, Any] = {}
  if "main" in parameters or "compress" in parameters:
    if set(parameters) != {"main", "compress"}:
      refuse("rope_parameters", sorted(parameters), "exactly main and compress, or one flat dictionary")
    main, parameters = dict(parameters["main"]), dict(parameters["compress"])
    if main.pop("rope_type", main.pop("type", "default")) != "default":
      refuse("rope_parameters.main", raw["rope_parameters"]["main"],
             "rope_type default (sliding layers are never stretched)")
    found["rope_theta"] = main.pop("rope_theta", raw.get("rope_theta", 10000.0))
    found["compress_rope_theta"] = parameters.pop("rope_theta", raw.get("compress_rope_theta", 160000.0))
    _check_share(main, rotary_share)
    if main:
      refuse("rope_parameters.main", sorted(main), "rope_type, rope_theta and partial_rotary_factor only")
  elif "rope_theta" in parameters:
    found["rope_theta"] = parameters.pop("rope_theta")
  _check_share(parameters, rotary_share)
  stretches = [_yarn(dict(part)) for part in (parameters, raw.get("rope_scaling")) if part]
  if len(stretches) == 2 and stretches[0] != stretches[1]:
    refuse("rope_scaling", raw["rope_scaling"], f"what rope_parameters say: {stretches[0]}")
  found["rope_scaling"] = stretches[0] if stretches else None
  for name, value in found.items():
    if name in SAME and raw.get(name, value) != value:
      refuse(name, raw[name], f"{value}, as rope_parameters says")
  return found


def _check_share(part: dict[str, Any], rotary_share: float) -> None:
  """Takes the share of rotary channels out of a part of rope_parameters; there is one share for all layers."""
  share = part.pop("partial_rotary_factor", rotary_share)
  if abs(share - rotary_share) > 1e-9:
    refuse("partial_rotary_factor", share, f"the same share as qk_rope_head_dim / head_dim = {rotary_share}")


def _yarn(scaling: dict[str, Any]) -> Yarn | None:
  old_spelling = scaling.pop("type", None)
  kind = scaling.pop("rope_type", old_spelling)
  factor = scaling.pop("attention_factor", 1.0)
  if factor not in (None, 1.0):
    refuse("attention_factor", factor, "1.0 (V4 does not scale cos and sin)")
  if kind in (None, "default"):
    if scaling:
      refuse("rope_scaling", sorted(scaling), "a type of yarn beside these fields")
    return None
  if kind != "yarn":
    refuse("rope_scaling.type", kind, "yarn or default")
  allowed = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow")
  if unknown := sorted(set(scaling) - set(allowed)):
    refuse("rope_scaling", unknown, f"only {', '.join(allowed)}")
  return Yarn(**scaling)


def _quantization(raw: Mapping[str, Any]) -> str | None:
  quantized = raw.get("quantization_config")
  experts = raw.get("expert_dtype", (quantized or {}).get("expert_dtype", "fp8"))
  if experts not in ("fp4", "fp8"):
    refuse("expert_dtype", experts, "fp4 or fp8")
  if quantized is None:
    return None
  expected = {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "activation_scheme": "dynamic",
              "weight_block_size": [128, 128]}
  for name, value in expected.items():
    given = quantized.get(name, value)
    if (list(given) if isinstance(given, (list, tuple)) else given) != value:
      refuse(f"quantization_config.{name}", given, repr(value))
  if unknown := sorted(set(quantized) - set(expected) - {"expert_dtype"}):
    refuse("quantization_config", unknown, f"only {', '.join(expected)}")
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
