"""V4-Pro at 4,096 tokens on 1,024 TPU v5p: the step with the batch of its recipe.

command   python -m launch.train --config configs/pod_pro_4k.py --workdir FOLDER --set data.path=GLOB
plan      python -m launch.plan --config configs/pod_pro_4k.py --topology v5p:8x8x16
hardware  1,024 TPU v5p
duration  none: nobody has trained this file
result    not compiled as it is. With twice the rows in a pass (batch_size=23552, accumulation=23) the compiler accepts the
          step, but arguments, temporaries and code are 107.6 of 95.7 GiB, which does not fit; its bounds allow a model FLOPs
          utilisation of 53% (a step at least 121 s: compute 105, HBM 71, collectives 16 alone). Estimated for
          half the rows, as here: 82 GiB, and a utilisation of about 46%

Two chips share a row, so that weights are split over all chips; 2,048 tokens each.
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
