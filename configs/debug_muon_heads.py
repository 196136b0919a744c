"""Muon on query matrices head by head, Newton-Schulz in bfloat16, position biases under Muon.

command   python -m launch.train --config configs/debug_muon_heads.py --workdir runs/debug_muon_heads
base      configs/debug.py, which see
"""

import dataclasses
from pathlib import Path

from deepseek_v4.config import CSA, RunConfig, load


def get_config() -> RunConfig:
  base = load(Path(__file__).with_name("debug.py"))
  model = dataclasses.replace(base.model, layer_types=(CSA,) * 2)
  optimizer = dataclasses.replace(base.optimizer, muon_split="head", newton_schulz_dtype="bfloat16",
                                  position_bias_owner="muon")
  return dataclasses.replace(base, model=model, optimizer=optimizer)
