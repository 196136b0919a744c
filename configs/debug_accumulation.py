"""Gradient accumulation: four passes of eight rows make one step.

command   python -m launch.train --config configs/debug_accumulation.py --workdir runs/debug_accumulation
base      configs/debug.py, which see
"""

import dataclasses
from pathlib import Path

from deepseek_v4.config import RunConfig, load


def get_config() -> RunConfig:
  base = load(Path(__file__).with_name("debug.py"))
  return dataclasses.replace(base, data=dataclasses.replace(base.data, batch_size=32, accumulation=4))
