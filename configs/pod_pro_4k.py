"""V4-Pro at 4,096 tokens on 2,048 TPU v5p: the step with about the batch of its recipe, 92.3M tokens.

command   python -m launch.train --config configs/pod_pro_4k.py --workdir FOLDER --set data.path=GLOB
plan      python -m launch.plan --config configs/pod_pro_4k.py --topology v5p:8x16x16
hardware  2,048 TPU v5p
duration  none: nobody has trained this file
result    not compiled as it is; estimated from shapes: 31 of 95.7 GiB held at one time. With as many tokens a chip on 1,024
          chips (fsdp=4, batch_size=23552, accumulation=23) the compiler accepted the step on 2026-11-26, before updates
          were made in place and queries were split over more than fsdp: 107.6 of 95.7 GiB, which does not fit; held at
          one time 71.3. Its bounds allowed a model FLOPs utilisation of 53% (a step at least 121 s: compute 105,
          HBM 71, collectives 16 alone)

Two chips share two rows, so that weights are split over all chips; 4,096 tokens each. The recipe's 23,040 rows do not
divide.
"""

import dataclasses
from pathlib import Path

from deepseek_v4.config import MeshConfig, RunConfig, load


def get_config() -> RunConfig:
  pro = load(Path(__file__).with_name("v4_pro.py"))
  return dataclasses.replace(
    pro,
    mesh=MeshConfig(data=1, fsdp=8, expert=128, context=2),
    data=dataclasses.replace(pro.data, sequence_length=4096, batch_size=22528, accumulation=11),
    stages=())
