"""Eight emulated CPU devices: sequences in four parts, whose CSA and HCA windows lie over the borders.

command   python -m launch.train --config configs/debug_context.py --workdir runs/debug_context
base      configs/debug.py, which see
"""

import dataclasses
from pathlib import Path

from deepseek_v4.config import CSA, HCA, MeshConfig, RunConfig, load


def get_config() -> RunConfig:
  base = load(Path(__file__).with_name("debug.py"))
  return dataclasses.replace(base, model=dataclasses.replace(base.model, layer_types=(CSA, HCA)),
                             mesh=MeshConfig(data=2, context=4, emulated_devices=8))
