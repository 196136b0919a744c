"""V4-Flash at 4,096 tokens on 256 TPU v6e: the step with the batch of its recipe.

command   python -m launch.train --config configs/pod_flash_v6e.py --workdir FOLDER --set data.path=GLOB
plan      python -m launch.plan --config configs/pod_flash_v6e.py --topology v6e:16x16 --layout
hardware  256 TPU v6e, all of a pod
duration  none: nobody has trained this file
result    laid out on 2026-11-27 (jax 0.10.2, libtpu 0.0.42.1, launch.plan --layout; 4 min beside other work): fits, 25.5 of
          31.2 GiB a device (82%), arguments 8.5, temporaries 16.0, a GiB kept for code; a step of 75.5M tokens takes at
          least 214 s: compute 62 (kernels 40), HBM 167, collectives 47 alone and 6 beside other work; so model FLOPs
          utilisation is at most 13%. With 4,096 tokens a chip (mesh.fsdp=4, mesh.context=1, data.accumulation=72) it is
          29.8 GiB and does not fit nine tenths. By the temporaries that libtpu 0.0.42.1 reports of whole programs, about 1.5
          times as many, neither fits; libtpu 0.0.50, which reports what it lays out, says 25.3

A third of a v5p's memory for each chip: the streams are recomputed, too, and two chips share a row.
"""

import dataclasses
from pathlib import Path

from deepseek_v4.config import MeshConfig, RunConfig, load


def get_config() -> RunConfig:
  flash = load(Path(__file__).with_name("v4_flash.py"))
  return dataclasses.replace(
    flash,
    model=dataclasses.replace(flash.model, remat="full"),
    mesh=MeshConfig(data=1, fsdp=2, expert=64, context=2),
    data=dataclasses.replace(flash.data, sequence_length=4096, batch_size=18432, accumulation=144),
    stages=())
