"""V4-Flash at 4,096 tokens on 128 TPU v5p: the step with the batch of its recipe.

command   python -m launch.train --config configs/pod_flash_4k.py --workdir FOLDER --set data.path=GLOB
plan      python -m launch.plan --config configs/pod_flash_4k.py --topology v5p:4x4x8
hardware  128 TPU v5p; twice as many: mesh.fsdp=4, data.accumulation=72
duration  none: nobody has trained this file
result    not compiled yet

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
