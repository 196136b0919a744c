"""The README's run goes on with other text: the headers of Python's C interface. A teacher of configs/tiny_distill.py.

command   python -m launch.train --config configs/tiny_headers.py --workdir runs/headers
before    configs/tiny.py, whose run it begins with
hardware  2 CPU cores; eight emulated devices
duration  about 5 minutes with compilation
result    2.07 held-out bits per byte of the headers; the run that it began with has 4.16
"""

import dataclasses
import sysconfig
from pathlib import Path

from deepseek_v4.config import DataConfig, RunConfig, load


def get_config() -> RunConfig:
  tiny = load(Path(__file__).with_name("tiny.py"))
  data = DataConfig(source="text", path=sysconfig.get_paths()["include"], sequence_length=512, batch_size=8,
                    held_out_percent=10)
  return dataclasses.replace(tiny, data=data, training=dataclasses.replace(tiny.training, init_from="runs/tiny"))
