"""Eight emulated CPU devices as two slices: gradients rounded to bfloat16 for their way, experts over two devices.

command   python -m launch.train --config configs/debug_slices.py --workdir runs/debug_slices
base      configs/debug.py, which see
"""

import dataclasses
from pathlib import Path

from deepseek_v4.config import MeshConfig, RunConfig, load


def get_config() -> RunConfig:
  base = load(Path(__file__).with_name("debug.py"))
  training = dataclasses.replace(base.training, gradient_reduction="bfloat16")
  return dataclasses.replace(base, mesh=MeshConfig(dcn_data=2, data=2, expert=2, emulated_devices=8), training=training)
