"""Heavily compressed attention (report 2.3.2): both layers.

command   python -m launch.train --config configs/debug_hca.py --workdir runs/debug_hca
base      configs/debug.py, which see
"""

import dataclasses
from pathlib import Path

from deepseek_v4.config import HCA, RunConfig, load


def get_config() -> RunConfig:
  base = load(Path(__file__).with_name("debug.py"))
  return dataclasses.replace(base, model=dataclasses.replace(base.model, layer_types=(HCA,) * 2))
