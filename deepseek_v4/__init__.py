"""DeepSeek-V4 in JAX: the public names, imported when they are first used. Nothing else lives here.

    import deepseek_v4 as dsv4

Sources, as docstrings name them: "report" is DeepSeek-V4's (arXiv 2606.19348), "V3" and "V3.2" are those of these models
(2412.19437, 2512.02556), "mHC" is the paper on hyper-connections (2512.24880), "the release" DeepSeek's own inference code.
"""

from __future__ import annotations

import importlib
from typing import Any

_NAMES = {
    "ModelConfig": "deepseek_v4.config", "RunConfig": "deepseek_v4.config",
    "DeepseekV4": "deepseek_v4.model.transformer", "ModelOutput": "deepseek_v4.model.transformer",
    "Replay": "deepseek_v4.model.replay",
    **dict.fromkeys(("init_cache", "cache_lengths", "cache_entries", "rewind"), "deepseek_v4.model.cache"),
    "trace": "deepseek_v4.analysis.trace", "count": "deepseek_v4.analysis.count",
    "load_hf": "deepseek_v4.checkpoint.hf_read", "save_hf": "deepseek_v4.checkpoint.hf_write",
    "to_hf_names": "deepseek_v4.checkpoint.hf_trees",
    "from_hf_names": "deepseek_v4.checkpoint.hf_trees", "restack": "deepseek_v4.checkpoint.trees",
    "generate": "deepseek_v4.generation.decode",
}
_MODULES = {name: f"deepseek_v4.{name}" for name in
            ("config", "sharding", "text", "model", "analysis", "optim", "checkpoint", "training", "posttraining",
             "generation")}
_MODULES["chat"] = "deepseek_v4.text.chat"
_MODULES["distillation"] = "deepseek_v4.posttraining.distillation"

__all__ = [*_NAMES, *_MODULES]


def __getattr__(name: str) -> Any:
  if name in _NAMES:
    return getattr(importlib.import_module(_NAMES[name]), name)
  if name in _MODULES:
    return importlib.import_module(_MODULES[name])
  raise AttributeError(f"module 'deepseek_v4' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
  return sorted(__all__)
