"""V4-Flash at 4,096 tokens on 256 TPU v6e: the step with the batch of its recipe.

command   python -m launch.train --config configs/pod_flash_v6e.py --workdir FOLDER --set data.path=GLOB
plan      python -m launch.plan --config configs/pod_flash_v6e.py --topology v6e:16x16 --layout
hardware  256 TPU v6e, all of a pod
duration  none: nobody has trained this file
result    laid out on 2026-11-28 (jax 0.10.2, libtpu 0.0.42.1, launch.plan --layout; 2 min beside other work, 3.4 GiB of the
          host): fits, 23.2 of 31.2 GiB a device (74%), arguments 8.5, temporaries 13.7, a GiB kept for code; a step of 75.5M
          tokens takes at least 161 s: compute 62 (kernels 39), HBM 155, collectives 7 alone and 29 beside other work; so
          model FLOPs utilisation is at most 17%; no gather makes more than 66 M numbers. By the temporaries that libtpu
          0.0.42.1 reports of whole programs, about 1.5 times as many, it may not fit; libtpu 0.0.50, which reports what it
          lays out, said 25.3 on 2026-11-27, when this one said 25.4

A third of a v5p's memory for each chip: the streams are recomputed, too, and two chips share a row. An
expert of each layer lies on each chip.
"""

import dataclasses
from pathlib import Path

from deepseek_v4.config import MeshConfig, RunConfig, load


def get_config() -> RunConfig:
  flash = load(Path(__file__).with_name("v4_flash.py"))
  return dataclasses.replace(
    flash,
    model=dataclasses.replace(flash.model, remat="full"),
    mesh=MeshConfig(data=1, fsdp=8, expert=16, context=2),
    data=dataclasses.replace(flash.data, sequence_length=4096, batch_size=18432, accumulation=144),
    stages=())
