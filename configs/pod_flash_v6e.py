"""V4-Flash at 4,096 tokens on 256 TPU v6e: the step with the batch of its recipe.

command   python -m launch.train --config configs/pod_flash_v6e.py --workdir FOLDER --set data.path=GLOB
plan      python -m launch.plan --config configs/pod_flash_v6e.py --topology v6e:16x16
hardware  256 TPU v6e, all of a pod
duration  none: nobody has trained this file
result    not compiled as it is, and perhaps it does not fit. On 2026-11-26, before updates were made in place, the compiler
          refused the step, whose temporaries alone wanted 34.6 of 31.2 GiB. Estimated from shapes now: 22 GiB held at
          one time, state 8.5; temporaries as the compiler reports them may be half as much again

A third of a v5p's memory for each chip, so that the streams are recomputed, too.
"""

import dataclasses
from pathlib import Path

from deepseek_v4.config import MeshConfig, RunConfig, load


def get_config() -> RunConfig:
  flash = load(Path(__file__).with_name("v4_flash.py"))
  return dataclasses.replace(
    flash,
    model=dataclasses.replace(flash.model, remat="full"),
    mesh=MeshConfig(data=1, fsdp=4, expert=64),
    data=dataclasses.replace(flash.data, sequence_length=4096, batch_size=18432, accumulation=72),
    stages=())
