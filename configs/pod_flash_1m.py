"""V4-Flash at 1,048,576 tokens on 512 TPU v5p: the step with the batch of its recipe.

command   python -m launch.train --config configs/pod_flash_1m.py --workdir FOLDER --set data.path=GLOB
plan      python -m launch.plan --config configs/pod_flash_1m.py --topology v5p:8x8x8 --layout
hardware  512 TPU v5p
duration  none: nobody has trained this file
result    laid out on 2026-11-28 (jax 0.10.2, libtpu 0.0.42.1, launch.plan --layout; 4 min beside other work, 4.6 GiB of the
          host): fits, 49.8 of 95.7 GiB a device (52%), arguments 8.5, temporaries 40.3, a GiB kept for code; a step of 75.5M
          tokens takes at least 180 s: compute 179 (kernels 156), HBM 89, collectives 1 alone and 7 beside other work; so
          model FLOPs utilisation is at most 46%; no gather makes more than 134 M numbers

64 chips share a row, 16,384 tokens each. Two copies, each with an expert of each layer on each chip, add their gradients up
in every pass, as the axis context wants it.
"""

import dataclasses
from pathlib import Path

from deepseek_v4.config import MeshConfig, RunConfig, load


def get_config() -> RunConfig:
  flash = load(Path(__file__).with_name("v4_flash.py"))
  return dataclasses.replace(
    flash,
    model=dataclasses.replace(flash.model, remat="full"),
    mesh=MeshConfig(data=2, fsdp=4, context=64),
    data=dataclasses.replace(flash.data, sequence_length=1048576, batch_size=72, accumulation=9),
    stages=())
