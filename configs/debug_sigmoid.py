"""Sigmoid router scores, as in V3, in place of the square root of softplus.

command   python -m launch.train --config configs/debug_sigmoid.py --workdir runs/debug_sigmoid
base      configs/debug.py, which see
"""

import dataclasses
from pathlib import Path

from deepseek_v4.config import RunConfig, load


def get_config() -> RunConfig:
  base = load(Path(__file__).with_name("debug.py"))
  return dataclasses.replace(base, model=dataclasses.replace(base.model, scoring_func="sigmoid"))
