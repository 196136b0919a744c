"""One student learns from two teachers on its own replies: Python's standard library, and the headers of its C interface.

The teachers are the runs of configs/tiny.py and configs/tiny_headers.py, which go before; the student begins with the
weights of the first.

command   python -m launch.distill --config configs/tiny_distill.py --workdir runs/student
hardware  2 CPU cores
duration  5 and a half minutes with compilation, and as long for each teacher
result    held-out bits per byte: headers from 4.16 to 2.94 (their teacher has 2.07); Python, where the student began as its
          own teacher, went from 2.62 to 2.68; distillation.png
"""

import dataclasses
from pathlib import Path

from deepseek_v4.config import (
  DataConfig,
  DistillationConfig,
  MeshConfig,
  OptimizerConfig,
  RunConfig,
  TeacherConfig,
  TrainingConfig,
  load,
)


def get_config() -> RunConfig:
  tiny = load(Path(__file__).with_name("tiny.py"))
  theirs = load(Path(__file__).with_name("tiny_headers.py")).data
  headers = DataConfig(source=theirs.source, path=theirs.path, held_out_percent=theirs.held_out_percent)
  return dataclasses.replace(
    tiny,
    optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=4, decay_steps=20),
    data=DataConfig(sequence_length=256, batch_size=16, accumulation=2),
    mesh=MeshConfig(data=1),
    training=TrainingConfig(steps=80, init_from="runs/tiny", log_every=4, eval_every=20, eval_batches=4,
                            checkpoint_every=20),
    distillation=DistillationConfig(
      teachers=(TeacherConfig("python", "runs/tiny", DataConfig(held_out_percent=1)),
                TeacherConfig("headers", "runs/headers", headers)),
      prompt_length=96, shortest_prompt=32, reply_length=160, steps_per_round=4, decode_batch=64))
