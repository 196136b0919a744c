"""Teaches one student what several teachers know, on its own samples (on-policy distillation, report 5.1.2).

python -m launch.distill --config configs/tiny_distill.py --workdir runs/student [--set training.steps=100]...

The same command goes on where an interrupted one stopped, in the middle of a rollout too: nothing is sampled twice. What
happens on SIGTERM and Ctrl-C, and the exit codes, are those of launch/train.py.
"""

from __future__ import annotations

from typing import Any

from absl import app

from launch import train, use_huge_pages


def distill(*arguments: Any) -> None:
  """See `posttraining.distillation_loop.distill`."""
  from deepseek_v4.posttraining import distillation_loop
  distillation_loop.distill(*arguments)


def main(argv: list[str]) -> None:
  train.run(argv, distill)


if __name__ == "__main__":
  use_huge_pages()
  train.define_flags()
  app.run(main)
