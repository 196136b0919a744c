"""V4-Flash at 4,096 tokens on 256 TPU v6e: the step with the batch of its recipe.

command   python -m launch.train --config configs/pod_flash_v6e.py --workdir FOLDER --set data.path=GLOB
plan      python -m launch.plan --config configs/pod_flash_v6e.py --topology v6e:16x16
hardware  256 TPU v6e, all of a pod
duration  none: nobody has trained this file
result    does not fit: on 2026-11-27 (jax 0.10.2, libtpu 0.0.42.1) the compiler laid out its memory and did not refuse it,
          held at one time 28.8 of 31.2 GiB (92%), arguments 8.5; but that is more than nine tenths, and its temporaries
          count a part of the rest twice; machine code was not waited for. Not tried: half of the tokens a chip
          (mesh.fsdp=2, mesh.context=2, data.accumulation=144), optimizer.momentum_dtype=bfloat16

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
