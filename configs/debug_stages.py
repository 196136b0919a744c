"""Stages: dense rows without the indexer while the batch grows, the indexer alone, sparse attention on longer rows.

command   python -m launch.train --config configs/debug_stages.py --workdir runs/debug_stages
base      configs/debug_csa.py, which see
"""

import dataclasses
from pathlib import Path

from deepseek_v4.config import RunConfig, StageConfig, load


def get_config() -> RunConfig:
  base = load(Path(__file__).with_name("debug_csa.py"))
  return dataclasses.replace(base, stages=(
    StageConfig("dense", steps=4, sequence_length=64, batch_size=16, accumulation=2, ramp_from=8, ramp_steps=2,
                attention_mode="dense", trainable="all_but_indexer"),
    StageConfig("indexer_warm_up", steps=3, attention_mode="dense", trainable="indexer", learning_rate=4e-3, warmup_steps=1),
    StageConfig("sparse", steps=3),
  ))
