"""V4-Flash at 4,096 tokens on 128 TPU v5p: the step with the batch of its recipe.

command   python -m launch.train --config configs/pod_flash_4k.py --workdir FOLDER --set data.path=GLOB
plan      python -m launch.plan --config configs/pod_flash_4k.py --topology v5p:4x4x8
hardware  128 TPU v5p; twice as many: mesh.fsdp=4, data.accumulation=72
duration  none: nobody has trained this file
result    compiled on 2026-11-27 (jax 0.10.2, libtpu 0.0.42.1; 27 min on two shared cores with 14.6 GiB), before weights were
          rounded by their bits and a unit's layers made again one by one, which takes less:
          fits, 81.9 of 95.7 GiB a device (86%), arguments 17.0, temporaries 64.1, held at one time 55.9;
          a step of 75.5M tokens takes at least 208.5 s: compute 178.3 (kernels 104.1), HBM 140.6, collectives 30.2 alone and
          9.0 beside other work; so model FLOPs utilisation is at most 53%

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
