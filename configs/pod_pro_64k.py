"""V4-Pro at 65,536 tokens on 2,048 TPU v5p: the step with the batch of its recipe.

command   python -m launch.train --config configs/pod_pro_64k.py --workdir FOLDER --set data.path=GLOB
plan      python -m launch.plan --config configs/pod_pro_64k.py --topology v5p:8x16x16
hardware  2,048 TPU v5p
duration  none: nobody has trained this file
result    on 2026-11-27 (jax 0.10.2, libtpu 0.0.42.1) the compiler laid out its memory; machine code was not waited for,
          times were not read: fits, held at one time 36.3 of 95.7 GiB, arguments 8.9; at most 65 (67%) if all else counts
          twice. On 1,024 chips (context=32) with six times the tokens a chip (accumulation=15) the bounds of 2026-11-26
          allowed a model FLOPs utilisation of 22%: masked attention multiplies what the selection leaves out

64 chips share a row, 1,024 tokens each.
"""

import dataclasses
from pathlib import Path

from deepseek_v4.config import MeshConfig, RunConfig, load


def get_config() -> RunConfig:
  pro = load(Path(__file__).with_name("v4_pro.py"))
  return dataclasses.replace(
    pro,
    mesh=MeshConfig(data=1, expert=32, context=64),
    data=dataclasses.replace(pro.data, sequence_length=65536, batch_size=1440, accumulation=45),
    stages=())
