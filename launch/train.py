"""Trains the run of a config file; goes on by itself if the workdir holds a run.

python -m launch.train --config configs/tiny.py --workdir runs/tiny [--set training.steps=100]...

Several processes, one on each host of a pod, run this same command: launch/processes.py says how they find each other.
With --set training.init_from=DIR a new run starts with the weights of a converted release or of another run.

After SIGTERM (as a preemption sends) or Ctrl-C the step in hand is finished and saved, within training.grace_seconds.
Exit codes:
  0     all steps are done
  75    stopped by SIGTERM, and every finished step is saved: the same command goes on from there
  130   stopped by Ctrl-C, and every finished step is saved
  143   stopped by SIGTERM, but there was no time to save the last step: the next start goes on from an earlier one
  1     an error, which is said
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any, Callable

from absl import app, flags, logging

from launch import emulate_devices, processes, use_huge_pages


def define_flags() -> None:
  flags.DEFINE_string("config", None, "Python file with get_config().", required=True)
  flags.DEFINE_string("workdir", None, "Folder of the run: new, empty, or with a run to go on with.", required=True)
  flags.DEFINE_multi_string("set", [], "KEY=VALUE replaces a setting, for example training.steps=100; repeatable.")
  processes.define_flags()


def main(argv: list[str]) -> None:
  run(argv, train)


def train(run_config: Any, *arguments: Any) -> None:
  """Learns from text or conversations (`training.loop.train`), or from rewards (`posttraining.reinforcement.reinforce`).

  Raises:
    ValueError: a run that asks for more than training.
  """
  from deepseek_v4.posttraining import reinforcement
  from deepseek_v4.training import loop
  if run_config.distillation is not None:
    raise ValueError("distillation: expected None, or the command python -m launch.distill")
  work = loop.train if run_config.reinforcement is None else reinforcement.reinforce
  work(run_config, *arguments)


def run(argv: list[str], work: Callable[..., Any]) -> None:
  """Reads the settings, wakes JAX, joins the other processes, and does the work (run_config, workdir, mesh, stop)."""
  if argv[1:]:
    raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
  for number, code in ((signal.SIGTERM, 75), (signal.SIGINT, 130)):  # until Stopping listens, there is nothing to save
    signal.signal(number, lambda *_, code=code: os._exit(code))
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)  # Orbax tells at INFO level how it saves
  from deepseek_v4 import config
  try:
    join = processes.from_flags(os.environ)
    run_config = config.load(flags.FLAGS["config"].value, flags.FLAGS["set"].value)
    emulate_devices(processes.emulated_share(run_config.mesh.emulated_devices, join))
  except (ValueError, FileNotFoundError) as error:  # a mistake in a setting needs no traceback
    sys.exit(f"error: {error}")
  import jax

  from deepseek_v4.sharding import make_mesh
  from deepseek_v4.training.stopping import Stopped, Stopping
  stop = Stopping(run_config.training.grace_seconds)
  try:
    with stop:
      processes.start(join, os.environ)
      processes.refuse_unjoined()
      try:
        work(run_config, flags.FLAGS["workdir"].value, make_mesh(run_config.mesh), stop)
      except Stopped as stopped:
        if jax.process_index() == 0:
          print(stopped)
        processes.finish(join)
        sys.exit(stop.exit_code)
      processes.finish(join)
  except (ValueError, FileNotFoundError, NotImplementedError, FloatingPointError) as error:  # mostly in a setting
    if logging.get_verbosity() >= logging.DEBUG:
      raise
    sys.exit(f"error: {error}\n(--verbosity=1 shows where)")


if __name__ == "__main__":
  use_huge_pages()
  define_flags()
  app.run(main)
