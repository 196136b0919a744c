"""V4-Flash at 65,536 tokens on 256 TPU v5p: the step with the batch of its recipe.

command   python -m launch.train --config configs/pod_flash_64k.py --workdir FOLDER --set data.path=GLOB
plan      python -m launch.plan --config configs/pod_flash_64k.py --topology v5p:4x8x8 --layout
hardware  256 TPU v5p
duration  none: nobody has trained this file
result    laid out on 2026-11-28 (jax 0.10.2, libtpu 0.0.42.1, launch.plan --layout; 3 min beside other work, 3.4 GiB of the
          host): fits, 38.6 of 95.7 GiB a device (40%), arguments 8.5, temporaries 29.1, a GiB kept for code; a step of 75.5M
          tokens takes at least 283 s: compute 282 (kernels 245), HBM 88, collectives 1 alone and 12 beside other work; so
          model FLOPs utilisation is at most 22%; no gather makes more than 66 M numbers. Of the kernels' time much is masked
          attention, which multiplies what the selection leaves out

Eight chips share a row, 8,192 tokens each; an expert of each layer lies on each chip.
"""

import dataclasses
from pathlib import Path

from deepseek_v4.config import MeshConfig, RunConfig, load


def get_config() -> RunConfig:
  flash = load(Path(__file__).with_name("v4_flash.py"))
  return dataclasses.replace(
    flash,
    mesh=MeshConfig(data=1, fsdp=8, expert=4, context=8),
    data=dataclasses.replace(flash.data, sequence_length=65536, batch_size=1152, accumulation=36),
    stages=())
