"""The whole schedule in ten steps: three of warm-up, three constant, four of cosine decay with the lower MTP weight.

command   python -m launch.train --config configs/debug_schedule.py --workdir runs/debug_schedule
base      configs/debug.py, which see
"""

import dataclasses
from pathlib import Path

from deepseek_v4.config import RunConfig, load


def get_config() -> RunConfig:
  base = load(Path(__file__).with_name("debug.py"))
  model = dataclasses.replace(base.model, num_nextn_predict_layers=1)
  return dataclasses.replace(base, model=model, optimizer=dataclasses.replace(base.optimizer, warmup_steps=3, decay_steps=4))
