"""V4-Flash at 4,096 tokens on 128 TPU v5p: the step with the batch of its recipe.

command   python -m launch.train --config configs/pod_flash_4k.py --workdir FOLDER --set data.path=GLOB
plan      python -m launch.plan --config configs/pod_flash_4k.py --topology v5p:4x4x8 --layout
hardware  128 TPU v5p; twice as many: mesh.expert=32, data.accumulation=72
duration  none: nobody has trained this file
result    laid out on 2026-11-28 (jax 0.10.2, libtpu 0.0.42.1, launch.plan --layout; 2 min beside other work, 3.0 GiB of the
          host): fits, 47.2 of 95.7 GiB a device (49%), arguments 17.0, temporaries 29.2, a GiB kept for code; a step of
          75.5M tokens takes at least 179 s: compute 178 (kernels 104), HBM 135, collectives 0 alone and 24 beside other
          work; so model FLOPs utilisation is at most 62%; no gather makes more than 66 M numbers. With the meshes and
          programs of before it was 207 s. Compiled whole on 2026-11-27 (27 min, 14.6 GiB), before changes that take less:
          81.9 GiB (86%) with temporaries that this libtpu counts twice in part, code 0.7

Two experts of each layer lie on each chip and are never gathered; all other weights are split over all chips.
"""

import dataclasses
from pathlib import Path

from deepseek_v4.config import MeshConfig, RunConfig, load


def get_config() -> RunConfig:
  flash = load(Path(__file__).with_name("v4_flash.py"))
  return dataclasses.replace(
    flash,
    mesh=MeshConfig(data=1, fsdp=8, expert=16),
    data=dataclasses.replace(flash.data, sequence_length=4096, batch_size=18432, accumulation=144),
    stages=())
