"""V4-Flash at 65,536 tokens on 256 TPU v5p: the step with the batch of its recipe.

command   python -m launch.train --config configs/pod_flash_64k.py --workdir FOLDER --set data.path=GLOB
plan      python -m launch.plan --config configs/pod_flash_64k.py --topology v5p:4x8x8
hardware  256 TPU v5p
duration  none: nobody has trained this file
result    on 2026-11-27 (jax 0.10.2, libtpu 0.0.42.1) the compiler laid out its memory; machine code was not waited for:
          fits, held at one time 43.4 of 95.7 GiB a device, arguments 8.5; at most 79 (83%) if all else counts twice.
          Its times were not read again. On 2026-11-26, with 53.4 GiB at one time: at least 298.3 s for a step of 75.5M
          tokens: compute 285.6 (kernels 248.6), HBM 103.7, collectives 12.6 alone and 5.5 beside other work; so model
          FLOPs utilisation at most 21%

Eight chips share a row, 8,192 tokens each.
"""

import dataclasses
from pathlib import Path

from deepseek_v4.config import MeshConfig, RunConfig, load


def get_config() -> RunConfig:
  flash = load(Path(__file__).with_name("v4_flash.py"))
  return dataclasses.replace(
    flash,
    mesh=MeshConfig(data=1, expert=32, context=8),
    data=dataclasses.replace(flash.data, sequence_length=65536, batch_size=1152, accumulation=36),
    stages=())
