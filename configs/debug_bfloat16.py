"""bfloat16 activations and matmuls over float32 parameters, as on pods.

command   python -m launch.train --config configs/debug_bfloat16.py --workdir runs/debug_bfloat16
base      configs/debug.py, which see
"""

import dataclasses
from pathlib import Path

from deepseek_v4.config import RunConfig, load


def get_config() -> RunConfig:
  base = load(Path(__file__).with_name("debug.py"))
  return dataclasses.replace(base, model=dataclasses.replace(base.model, compute_dtype="bfloat16"))
