"""V4-Flash at 4,096 tokens on 128 TPU v5p: the step with the batch of its recipe.

command   python -m launch.train --config configs/pod_flash_4k.py --workdir FOLDER --set data.path=GLOB
plan      python -m launch.plan --config configs/pod_flash_4k.py --topology v5p:4x4x8
hardware  128 TPU v5p; twice as many: mesh.fsdp=4, data.accumulation=72
duration  none: nobody has trained this file
result    compiled on 2026-11-26 (jax 0.10.2, libtpu 0.0.42.1; 6 min with 15 GiB), before updates were made in place:
          fits, 85.5 of 95.7 GiB a device (89%), arguments 17.0, temporaries 67.7, held at one time 59.6;
          a step of 75.5M tokens takes at least 210.7 s: compute 180.8 (kernels 106.8, by the compiler's schedule),
          HBM 150.0, collectives 29.9 alone and 7.7 beside other work; so model FLOPs utilisation is at most 52%.
          As it is now only its update was compiled, alone: temporaries 2.4 GiB beside the gradients

Weights are split over all chips; an expert's over two, so that little of them is gathered.
"""

import dataclasses
from pathlib import Path

from deepseek_v4.config import MeshConfig, RunConfig, load


def get_config() -> RunConfig:
  flash = load(Path(__file__).with_name("v4_flash.py"))
  return dataclasses.replace(
    flash,
    mesh=MeshConfig(data=1, fsdp=2, expert=64),
    data=dataclasses.replace(flash.data, sequence_length=4096, batch_size=18432, accumulation=144),
    stages=())
