"""Multi-token prediction: one extra block that predicts the token after the next.

command   python -m launch.train --config configs/debug_mtp.py --workdir runs/debug_mtp
base      configs/debug.py, which see
"""

import dataclasses
from pathlib import Path

from deepseek_v4.config import RunConfig, load


def get_config() -> RunConfig:
  base = load(Path(__file__).with_name("debug.py"))
  return dataclasses.replace(base, model=dataclasses.replace(base.model, num_nextn_predict_layers=1))
