"""Compressed layers that attend to every visible entry, as in the first stage; the indexer learns beside them.

command   python -m launch.train --config configs/debug_dense.py --workdir runs/debug_dense
base      configs/debug.py, which see
"""

import dataclasses
from pathlib import Path

from deepseek_v4.config import CSA, RunConfig, load


def get_config() -> RunConfig:
  base = load(Path(__file__).with_name("debug.py"))
  model = dataclasses.replace(base.model, layer_types=(CSA,) * 2)
  return dataclasses.replace(base, model=model, training=dataclasses.replace(base.training, attention_mode="dense"))
