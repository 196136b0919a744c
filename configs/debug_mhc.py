"""Four residual streams (report 2.2) that start fully mixed.

command   python -m launch.train --config configs/debug_mhc.py --workdir runs/debug_mhc
base      configs/debug.py, which see
"""

import dataclasses
from pathlib import Path

from deepseek_v4.config import RunConfig, load


def get_config() -> RunConfig:
  base = load(Path(__file__).with_name("debug.py"))
  return dataclasses.replace(base, model=dataclasses.replace(base.model, hc_mult=4, mhc_init="zero"))
