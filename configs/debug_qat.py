"""Quantisation-aware training: experts' weights and the indexer's queries and keys in FP4.

command   python -m launch.train --config configs/debug_qat.py --workdir runs/debug_qat
base      configs/debug.py, which see
"""

import dataclasses
from pathlib import Path

from deepseek_v4.config import CSA, SLIDING, RunConfig, load


def get_config() -> RunConfig:
  base = load(Path(__file__).with_name("debug.py"))
  return dataclasses.replace(base, model=dataclasses.replace(base.model, layer_types=(SLIDING, CSA), qat="fp4"))
