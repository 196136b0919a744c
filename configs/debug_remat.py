"""Every layer recomputed in the backward pass. Other policies: `--set model.remat=mhc`, offload, full.

command   python -m launch.train --config configs/debug_remat.py --workdir runs/debug_remat
base      configs/debug.py, which see
"""

import dataclasses
from pathlib import Path

from deepseek_v4.config import RunConfig, load


def get_config() -> RunConfig:
  base = load(Path(__file__).with_name("debug.py"))
  return dataclasses.replace(base, model=dataclasses.replace(base.model, remat="block"))
