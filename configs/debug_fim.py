"""Fill-in-the-middle: half of the documents rearranged as prefix, suffix, middle.

command   python -m launch.train --config configs/debug_fim.py --workdir runs/debug_fim
base      configs/debug.py, which see
"""

import dataclasses
from pathlib import Path

from deepseek_v4.config import RunConfig, load


def get_config() -> RunConfig:
  base = load(Path(__file__).with_name("debug.py"))
  return dataclasses.replace(base, data=dataclasses.replace(base.data, fim_rate=0.5))
