"""YaRN: the rotary frequencies of compressed layers stretched four times.

command   python -m launch.train --config configs/debug_yarn.py --workdir runs/debug_yarn
base      configs/debug.py, which see
"""

import dataclasses
from pathlib import Path

from deepseek_v4.config import CSA, HCA, RunConfig, Yarn, load


def get_config() -> RunConfig:
  base = load(Path(__file__).with_name("debug.py"))
  yarn = Yarn(factor=4.0, original_max_position_embeddings=64)
  return dataclasses.replace(base, model=dataclasses.replace(base.model, layer_types=(CSA, HCA), rope_scaling=yarn))
