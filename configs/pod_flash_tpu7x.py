"""V4-Flash at 4,096 tokens on 64 TPU7x: the step with the batch of its recipe.

command   python -m launch.train --config configs/pod_flash_tpu7x.py --workdir FOLDER --set data.path=GLOB
plan      python -m launch.plan --config configs/pod_flash_tpu7x.py --topology TPU7x:4x4x4
hardware  64 TPU7x, which are 128 devices
duration  none: nobody has trained this file
result    not compiled yet

The mesh of pod_flash_4k; a device is half a chip.
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
