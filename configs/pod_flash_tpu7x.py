"""V4-Flash at 4,096 tokens on 128 TPU7x: the step with the batch of its recipe.

command   python -m launch.train --config configs/pod_flash_tpu7x.py --workdir FOLDER --set data.path=GLOB
plan      python -m launch.plan --config configs/pod_flash_tpu7x.py --topology TPU7x:4x4x8
hardware  128 TPU7x, which are 256 devices
duration  none: nobody has trained this file
result    not compiled; estimated from shapes: 25 of 94.8 GiB a device held at one time

A device is half a chip, with a little less memory than a v5p: twice as many devices as pod_flash_4k.
"""

import dataclasses
from pathlib import Path

from deepseek_v4.config import MeshConfig, RunConfig, load


def get_config() -> RunConfig:
  flash = load(Path(__file__).with_name("v4_flash.py"))
  return dataclasses.replace(
    flash,
    mesh=MeshConfig(data=1, fsdp=4, expert=64),
    data=dataclasses.replace(flash.data, sequence_length=4096, batch_size=18432, accumulation=72),
    stages=())
