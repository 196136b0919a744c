"""Compressed sparse attention with its indexer (report 2.3.1): both layers.

command   python -m launch.train --config configs/debug_csa.py --workdir runs/debug_csa
base      configs/debug.py, which see
"""

import dataclasses
from pathlib import Path

from deepseek_v4.config import CSA, RunConfig, load


def get_config() -> RunConfig:
  base = load(Path(__file__).with_name("debug.py"))
  return dataclasses.replace(base, model=dataclasses.replace(base.model, layer_types=(CSA,) * 2))
