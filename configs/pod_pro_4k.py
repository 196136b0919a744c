"""V4-Pro at 4,096 tokens on 1,024 TPU v5p: the step with about the batch of its recipe, 96.5M tokens.

command   python -m launch.train --config configs/pod_pro_4k.py --workdir FOLDER --set data.path=GLOB
plan      python -m launch.plan --config configs/pod_pro_4k.py --topology v5p:8x8x16
hardware  1,024 TPU v5p
duration  none: nobody has trained this file
result    not compiled yet

Two chips share two rows, so that weights are split over all chips and each has 4,096 tokens. 23 passes of 1,024 rows: the
recipe's 23,040 rows would be 45 passes of half as many.
"""

import dataclasses
from pathlib import Path

from deepseek_v4.config import MeshConfig, RunConfig, load


def get_config() -> RunConfig:
  pro = load(Path(__file__).with_name("v4_pro.py"))
  return dataclasses.replace(
    pro,
    mesh=MeshConfig(data=1, fsdp=4, expert=128, context=2),
    data=dataclasses.replace(pro.data, sequence_length=4096, batch_size=23552, accumulation=23),
    stages=())
