"""V4-Pro at 1,048,576 tokens on 2,048 TPU v5p: the step with about the batch of its recipe, 100.7M tokens.

command   python -m launch.train --config configs/pod_pro_1m.py --workdir FOLDER --set data.path=GLOB
plan      python -m launch.plan --config configs/pod_pro_1m.py --topology v5p:8x16x16 --layout
hardware  2,048 TPU v5p
duration  none: nobody has trained this file
result    laid out on 2026-11-28 (jax 0.10.2, libtpu 0.0.42.1; 5 min beside other work, the compiler with 4.9 GiB): fits,
          62.4 of 95.7 GiB a device (65%), arguments 6.1, temporaries 55.3, a GiB kept for code; by the temporaries that
          libtpu 0.0.42.1 reports of whole programs, about 1.5 times as many, it may not; libtpu 0.0.50, which reports what
          it lays out, said 60.8 on 2026-11-27 (then 60.3 here). A step of 100.7M tokens takes at least 198 s: compute 169
          (kernels 129), HBM 154, collectives 29 alone and 24 beside other work; so model FLOPs utilisation is at most 34%

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
