"""Hash routing (report 2.1): both layers.

command   python -m launch.train --config configs/debug_hash.py --workdir runs/debug_hash
base      configs/debug.py, which see
"""

import dataclasses
from pathlib import Path

from deepseek_v4.config import HASH, RunConfig, load


def get_config() -> RunConfig:
  base = load(Path(__file__).with_name("debug.py"))
  return dataclasses.replace(base, model=dataclasses.replace(base.model, mlp_layer_types=(HASH,) * 2))
