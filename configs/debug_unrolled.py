"""Layers one after the other instead of scanned.

command   python -m launch.train --config configs/debug_unrolled.py --workdir runs/debug_unrolled
base      configs/debug.py, which see
"""

import dataclasses
from pathlib import Path

from deepseek_v4.config import RunConfig, load


def get_config() -> RunConfig:
  base = load(Path(__file__).with_name("debug.py"))
  return dataclasses.replace(base, model=dataclasses.replace(base.model, scan_layers=False))
