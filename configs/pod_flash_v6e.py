"""V4-Flash at 4,096 tokens on 256 TPU v6e: the step with the batch of its recipe.

command   python -m launch.train --config configs/pod_flash_v6e.py --workdir FOLDER --set data.path=GLOB
plan      python -m launch.plan --config configs/pod_flash_v6e.py --topology v6e:16x16 --layout
hardware  256 TPU v6e, all of a pod
duration  none: nobody has trained this file
result    laid out on 2026-11-28 (jax 0.10.2, libtpu 0.0.42.1, launch.plan --layout; 2 min beside other work): fits, 25.4 of
          31.2 GiB a device (81%), arguments 8.5, temporaries 15.9, a GiB kept for code; a step of 75.5M tokens takes at
          least 197 s: compute 62 (kernels 40), HBM 170, collectives 28 alone and 19 beside other work; so model FLOPs
          utilisation is at most 14%. With 4,096 tokens a chip (mesh.fsdp=4, mesh.context=1, data.accumulation=72) it was
          29.8 GiB on 2026-11-27 and did not fit nine tenths. By the temporaries that libtpu 0.0.42.1 reports of whole
          programs, about 1.5 times as many, neither fits; libtpu 0.0.50, which reports what it lays out, said 25.3

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
