"""V4-Pro at 1,048,576 tokens on 2,048 TPU v5p: the step with about the batch of its recipe, 100.7M tokens.

command   python -m launch.train --config configs/pod_pro_1m.py --workdir FOLDER --set data.path=GLOB
plan      python -m launch.plan --config configs/pod_pro_1m.py --topology v5p:8x16x16
hardware  2,048 TPU v5p
duration  none: nobody has trained this file
result    not compiled as it is; estimated from shapes: 35 of 95.7 GiB held at one time. On 1,024 chips (expert=16,
          context=64, tensor=1) the compiler refused the step on 2026-11-26, before updates were made in place: its
          temporaries alone wanted 117.8 of 95.7 GiB

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
    mesh=MeshConfig(data=1, expert=8, context=128, tensor=2),
    data=dataclasses.replace(pro.data, sequence_length=1048576, batch_size=96, accumulation=12),
    stages=())
