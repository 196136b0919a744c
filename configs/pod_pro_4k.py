"""V4-Pro at 4,096 tokens on 2,048 TPU v5p: the step with about the batch of its recipe, 92.3M tokens.

command   python -m launch.train --config configs/pod_pro_4k.py --workdir FOLDER --set data.path=GLOB
plan      python -m launch.plan --config configs/pod_pro_4k.py --topology v5p:8x16x16 --layout
hardware  2,048 TPU v5p
duration  none: nobody has trained this file
result    laid out on 2026-11-28 (jax 0.10.2, libtpu 0.0.42.1; 2 min beside other work, the compiler with 3.1 GiB): fits,
          45.7 of 95.7 GiB a device (48%), arguments 6.1, temporaries 38.6, a GiB kept for code. Compiled whole, without
          --layout (29 min, 14.6 GiB of the host, on 2026-11-27 with 39.1 GiB laid out), it fits by the 59.4 GiB of
          temporaries, too, that this libtpu reports: 66.4 (69%). A step of 92.3M tokens takes at least 54.0 s: compute 49.3
          (kernels 27.8), HBM 30.1, collectives 4.6 alone and 3.2 beside other work; so model FLOPs utilisation is at most
          57%

Two copies, since 7,168 channels divide over half of the chips; three experts of each layer lie on eight chips, which gather
them. 4,096 tokens a chip and pass; the recipe's 23,040 rows do not divide.
"""

import dataclasses
from pathlib import Path

from deepseek_v4.config import MeshConfig, RunConfig, load


def get_config() -> RunConfig:
  pro = load(Path(__file__).with_name("v4_pro.py"))
  return dataclasses.replace(
    pro,
    mesh=MeshConfig(data=2, fsdp=8, expert=128),
    data=dataclasses.replace(pro.data, sequence_length=4096, batch_size=22528, accumulation=11),
    stages=())
