"""V4-Pro at 65,536 tokens on 1,024 TPU v5p: the step with the batch of its recipe.

command   python -m launch.train --config configs/pod_pro_64k.py --workdir FOLDER --set data.path=GLOB
plan      python -m launch.plan --config configs/pod_pro_64k.py --topology v5p:8x8x16
hardware  1,024 TPU v5p
duration  none: nobody has trained this file
result    not compiled yet

32 chips share a row, and have 2,048 tokens of each of three.
"""

import dataclasses
from pathlib import Path

from deepseek_v4.config import MeshConfig, RunConfig, load


def get_config() -> RunConfig:
  pro = load(Path(__file__).with_name("v4_pro.py"))
  return dataclasses.replace(
    pro,
    mesh=MeshConfig(data=1, expert=32, context=32),
    data=dataclasses.replace(pro.data, sequence_length=65536, batch_size=1440, accumulation=15),
    stages=())
