"""V4-Flash at 4,096 tokens on 128 TPU7x: the step with the batch of its recipe.

command   python -m launch.train --config configs/pod_flash_tpu7x.py --workdir FOLDER --set data.path=GLOB
plan      python -m launch.plan --config configs/pod_flash_tpu7x.py --topology TPU7x:4x4x8 --layout
hardware  128 TPU7x, which are 256 devices
duration  none: nobody has trained this file
result    laid out on 2026-11-28 (jax 0.10.2, libtpu 0.0.42.1, launch.plan --layout; 2 min beside other work, 3.9 GiB of the
          host): fits, 31.7 of 94.8 GiB a device (33%), arguments 8.5, temporaries 22.1, a GiB kept for code; a step of 75.5M
          tokens takes at least 65 s: compute 37 (kernels 22), HBM 54, collectives 11 alone and 14 beside other work; so
          model FLOPs utilisation is at most 34%; no gather makes more than 66 M numbers

A device is half a chip, with a little less memory than a v5p: twice as many devices as pod_flash_4k, with
an expert of each layer on each.
"""

import dataclasses
from pathlib import Path

from deepseek_v4.config import MeshConfig, RunConfig, load


def get_config() -> RunConfig:
  flash = load(Path(__file__).with_name("v4_flash.py"))
  return dataclasses.replace(
    flash,
    mesh=MeshConfig(data=1, fsdp=8, expert=32),
    data=dataclasses.replace(flash.data, sequence_length=4096, batch_size=18432, accumulation=72),
    stages=())
