"""V4-Pro at 1,048,576 tokens on 2,048 TPU v5p: the step with about the batch of its recipe, 100.7M tokens.

command   python -m launch.train --config configs/pod_pro_1m.py --workdir FOLDER --set data.path=GLOB
plan      python -m launch.plan --config configs/pod_pro_1m.py --topology v5p:8x16x16 --layout
hardware  2,048 TPU v5p
duration  none: nobody has trained this file
result    laid out on 2026-11-28 (jax 0.10.2, libtpu 0.0.42.1, launch.plan --layout; 5 min beside other work, 5.2 GiB of the
          host): fits, 38.1 of 95.7 GiB a device (40%), arguments 6.1, temporaries 31.1, a GiB kept for code; a step of
          100.7M tokens takes at least 165 s: compute 160 (kernels 129), HBM 116, collectives 6 alone and 13 beside other
          work; so model FLOPs utilisation is at most 40%; no gather makes more than 134 M numbers

256 chips share a row, pairs of them with the same 8,192 tokens and half of the heads each. Twelve passes of 8 rows: the
recipe's 90 rows do not divide.
"""

import dataclasses
from pathlib import Path

from deepseek_v4.config import MeshConfig, RunConfig, load


def get_config() -> RunConfig:
  pro = load(Path(__file__).with_name("v4_pro.py"))
  return dataclasses.replace(
    pro,
    model=dataclasses.replace(pro.model, remat="full"),
    mesh=MeshConfig(data=1, fsdp=8, context=128, tensor=2),
    data=dataclasses.replace(pro.data, sequence_length=1048576, batch_size=96, accumulation=12),
    stages=())
