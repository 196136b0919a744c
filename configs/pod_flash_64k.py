"""V4-Flash at 65,536 tokens on 256 TPU v5p: the step with the batch of its recipe.

command   python -m launch.train --config configs/pod_flash_64k.py --workdir FOLDER --set data.path=GLOB
plan      python -m launch.plan --config configs/pod_flash_64k.py --topology v5p:4x8x8
hardware  256 TPU v5p
duration  none: nobody has trained this file
result    compiled on 2026-11-26 (jax 0.10.2, libtpu 0.0.42.1; 7 min with 16 GiB), before updates were made in place, not
          since: fits, 78.5 of 95.7 GiB a device (82%), arguments 8.5, temporaries 69.1, held at one time 53.4;
          a step of 75.5M tokens takes at least 298.3 s: compute 285.6 (kernels 248.6),
          HBM 103.7, collectives 12.6 alone and 5.5 beside other work; so model FLOPs utilisation
          is at most 21%

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
