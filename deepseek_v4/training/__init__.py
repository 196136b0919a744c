"""Training: data, state, step, loop. No kernels and no model code here.

    state = dsv4.training.init_state(run_config, key, mesh)
    step = dsv4.training.make_train_step(run_config, mesh)
"""

from __future__ import annotations

import importlib
from typing import Any

_NAMES = {"TrainState": "state", "init_state": "state", "fresh_variables": "state", "abstract_state": "state",
          "make_train_step": "step", "make_eval_step": "step", "find_non_finite": "step", "make_dataset": "data",
          "train": "loop", "Stopping": "stopping", "Stopped": "stopping"}

__all__ = [*_NAMES]


def __getattr__(name: str) -> Any:
  if name in _NAMES:
    return getattr(importlib.import_module(f"deepseek_v4.training.{_NAMES[name]}"), name)
  raise AttributeError(f"module 'deepseek_v4.training' has no attribute {name!r}; it has {', '.join(__all__)}")
