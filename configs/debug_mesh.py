"""Eight emulated CPU devices: weights over fsdp, experts over it and expert, heads over tensor.

command   python -m launch.train --config configs/debug_mesh.py --workdir runs/debug_mesh
base      configs/debug.py, which see
"""

import dataclasses
from pathlib import Path

from deepseek_v4.config import MeshConfig, RunConfig, load


def get_config() -> RunConfig:
  base = load(Path(__file__).with_name("debug.py"))
  return dataclasses.replace(base, mesh=MeshConfig(data=1, fsdp=2, expert=2, tensor=2, emulated_devices=8))
