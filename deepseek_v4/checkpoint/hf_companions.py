"""What lies beside the weights of a release: its config.json, tokenizer and chat encoder."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from deepseek_v4.config import ModelConfig
from deepseek_v4.config_hf import DRAFT

COMPANIONS = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "chat_template*",
              "generation_config.json", "encoding")
CONFIG_NAME = "config.json"
# Fields of ours that say how a model is stored, started or computed with, not what it is.
_NOT_ARCHITECTURE = ("quantization", "init_std", "mhc_init", "compute_dtype", "inference_rounding", "qat", "scan_layers",
                     "remat", "expert_exchange", "loss_chunk_size")


def copy_companions(source: Path, target: Path) -> list[str]:
  """Copies the tokenizer and encoder files of a folder; returns their names.

  Raises:
    FileNotFoundError: no such folder.
  """
  if not source.is_dir():
    raise FileNotFoundError(f"copy_files_from = {str(source)!r}: expected a folder")
  found = sorted({path for pattern in COMPANIONS for path in source.glob(pattern)})
  for path in found:
    if path.is_dir():
      shutil.copytree(path, target / path.name, ignore=shutil.ignore_patterns("__pycache__"))
    else:
      shutil.copyfile(path, target / path.name)
  return [path.name for path in found]


def write_config(folder: Path, config: ModelConfig, quantization: str | None, dtype: str, source: Path | None) -> None:
  """Writes config.json: the source's own where it describes this model, changed only where the storage differs."""
  file = None if source is None else source / CONFIG_NAME
  raw = json.loads(file.read_text(encoding="utf-8")) if file is not None and file.is_file() else None
  if raw is not None and _same_model(raw, config):
    adapted = _stored_as(_without_draft(raw, config), ModelConfig.from_hf(raw).quantization, quantization, dtype)
    if adapted == raw and file is not None:
      shutil.copyfile(file, folder / CONFIG_NAME)
      return
  else:
    adapted = _stored_as({"architectures": ["DeepseekV4ForCausalLM"], **config.to_hf()}, None, quantization, dtype)
  (folder / CONFIG_NAME).write_text(json.dumps(adapted, indent=2) + "\n", encoding="utf-8")


def _same_model(raw: dict[str, Any], config: ModelConfig) -> bool:
  """Whether a release's dictionary describes this model, up to a draft that was left out."""
  theirs = ModelConfig.from_hf(raw)
  alike = {name: getattr(config, name) for name in _NOT_ARCHITECTURE}
  if config.num_nextn_predict_layers == 0:
    alike["num_nextn_predict_layers"] = 0
  return dataclasses.replace(theirs, **alike) == config


def _without_draft(raw: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
  """The dictionary without what describes tensors that are not written."""
  if config.num_nextn_predict_layers:
    return raw
  kept = {name: value for name, value in raw.items() if name not in DRAFT} | {"num_nextn_predict_layers": 0}
  if raw.get("compress_ratios"):
    kept["compress_ratios"] = raw["compress_ratios"][:config.num_hidden_layers]
  return kept


def _stored_as(raw: dict[str, Any], before: str | None, quantization: str | None, dtype: str) -> dict[str, Any]:
  """The dictionary with the fields that say how weights are stored."""
  if quantization == before and quantization is not None:
    return raw
  kept = {name: value for name, value in raw.items() if name not in ("quantization_config", "expert_dtype")}
  kept["dtype" if "dtype" in raw else "torch_dtype"] = "bfloat16" if quantization else dtype
  if quantization is not None:
    kept["quantization_config"] = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                                   "scale_fmt": "ue8m0", "weight_block_size": [128, 128]}
    kept["expert_dtype"] = "fp4" if quantization == "fp8+fp4" else "fp8"
  return kept
