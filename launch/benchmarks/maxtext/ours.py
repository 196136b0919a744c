"""Our train step, compiled for a slice, with the libtpu that TPU_LIBRARY_PATH names.

python -m launch.benchmarks.maxtext.ours FOLDER CONFIG TOPOLOGY KEY=VALUE...

Leaves in the folder what `theirs.py` leaves.
"""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

from launch import children
from launch.benchmarks.maxtext import theirs


def main(folder: Path, path: str, topology: str, settings: list[str]) -> None:
  children.end_with_parent()
  import jax

  from deepseek_v4 import config
  from deepseek_v4.planning import lower
  from deepseek_v4.training import stages
  figures = {"versions": {"jax": importlib.metadata.version("jax")}}
  theirs.leave(folder, figures)
  run_config = stages.of_stage(config.load(path, settings), "")
  try:
    lower.lower_step(run_config, lower.mesh_on(run_config, topology)).compile()
  except jax.errors.JaxRuntimeError as error:
    theirs.leave(folder, figures | {"refused": str(error).splitlines()[0][:400]})


if __name__ == "__main__":
  main(Path(sys.argv[1]), *sys.argv[2:4], sys.argv[4:])
