"""V4-Pro at 4,096 tokens on 2,048 TPU v5p: the step with about the batch of its recipe, 92.3M tokens.

command   python -m launch.train --config configs/pod_pro_4k.py --workdir FOLDER --set data.path=GLOB
plan      python -m launch.plan --config configs/pod_pro_4k.py --topology v5p:8x16x16 --layout
hardware  2,048 TPU v5p
duration  none: nobody has trained this file
result    laid out on 2026-11-28 (jax 0.10.2, libtpu 0.0.42.1, launch.plan --layout; 3 min beside other work, 4.4 GiB of the
          host): fits, 54.1 of 95.7 GiB a device (57%), arguments 12.0, temporaries 41.1, a GiB kept for code; a step of
          92.3M tokens takes at least 48.6 s: compute 46.8 (kernels 26.5), HBM 27.2, collectives 1.8 alone and 5.7 beside
          other work; so model FLOPs utilisation is at most 63%; no gather makes more than 352 M numbers. Compiled whole,
          without --layout (33 min beside other work, 16.4 GiB of the host), it fits by the 65.0 GiB of temporaries, too,
          that this libtpu reports: 77.8 (81%), code 0.75, with the same bounds

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
