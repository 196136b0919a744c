"""V4-Pro at 4,096 tokens on 512 TPU7x: the step with the batch of its recipe.

command   python -m launch.train --config configs/pod_pro_tpu7x.py --workdir FOLDER --set data.path=GLOB
plan      python -m launch.plan --config configs/pod_pro_tpu7x.py --topology TPU7x:8x8x8 --layout
hardware  512 TPU7x, which are 1,024 devices
duration  none: nobody has trained this file
result    laid out on 2026-11-28 (jax 0.10.2, libtpu 0.0.42.1, launch.plan --layout; 2 min beside other work, 4.1 GiB of the
          host): fits, 40.7 of 94.8 GiB a device (43%), arguments 11.8, temporaries 28.0, a GiB kept for code; a step of
          94.4M tokens takes at least 53 s: compute 40 (kernels 23), HBM 50, collectives 3 alone and 48 beside other work; so
          model FLOPs utilisation is at most 47%; no gather makes more than 117 M numbers

Two devices share a row, so that weights are split over all of them; 2,048 tokens each. Three experts of each layer lie on
eight devices, which gather them. A device is half a chip.
"""

import dataclasses
from pathlib import Path

from deepseek_v4.config import MeshConfig, RunConfig, load


def get_config() -> RunConfig:
  pro = load(Path(__file__).with_name("v4_pro.py"))
  return dataclasses.replace(
    pro,
    mesh=MeshConfig(data=1, fsdp=8, expert=64, context=2),
    data=dataclasses.replace(pro.data, sequence_length=4096, batch_size=23040, accumulation=45),
    stages=())
