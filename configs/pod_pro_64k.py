"""V4-Pro at 65,536 tokens on 2,048 TPU v5p: the step with the batch of its recipe.

command   python -m launch.train --config configs/pod_pro_64k.py --workdir FOLDER --set data.path=GLOB
plan      python -m launch.plan --config configs/pod_pro_64k.py --topology v5p:8x16x16 --layout
hardware  2,048 TPU v5p
duration  none: nobody has trained this file
result    laid out on 2026-11-28 (jax 0.10.2, libtpu 0.0.42.1, launch.plan --layout; 3 min beside other work, 3.3 GiB of the
          host): fits, 23.5 of 95.7 GiB a device (25%), arguments 6.3, temporaries 16.2, a GiB kept for code; a step of 94.4M
          tokens takes at least 137 s: compute 129 (kernels 108), HBM 45, collectives 8 alone and 15 beside other work; so
          model FLOPs utilisation is at most 25%; no gather makes more than 117 M numbers. Of the kernels' time much is
          masked attention, which multiplies what the selection leaves out

64 chips share a row, 1,024 tokens each; three experts of each layer lie on 16 chips, which gather them.
"""

import dataclasses
from pathlib import Path

from deepseek_v4.config import MeshConfig, RunConfig, load


def get_config() -> RunConfig:
  pro = load(Path(__file__).with_name("v4_pro.py"))
  return dataclasses.replace(
    pro,
    mesh=MeshConfig(data=1, fsdp=16, expert=2, context=64),
    data=dataclasses.replace(pro.data, sequence_length=65536, batch_size=1440, accumulation=45),
    stages=())
