"""Our train step, compiled for a slice, with the libtpu that TPU_LIBRARY_PATH names.

python -m launch.benchmarks.maxtext.ours FOLDER CONFIG TOPOLOGY KEY=VALUE...

Leaves figures.json, and program.txt if the compiler accepts the step.
"""

from __future__ import annotations

import importlib.metadata
import sys
import time
from pathlib import Path

from launch.benchmarks.maxtext import theirs


def main(folder: Path, path: str, topology: str, settings: list[str]) -> None:
  started = time.perf_counter()
  import jax

  from deepseek_v4 import config
  from deepseek_v4.planning import lower
  from deepseek_v4.training import stages
  figures = {"versions": {"jax": importlib.metadata.version("jax")}}
  run_config = stages.of_stage(config.load(path, settings), "")
  try:
    compiled = lower.lower_step(run_config, lower.mesh_on(run_config, topology)).compile()
    figures["memory"] = theirs.keep(folder, compiled)
  except jax.errors.JaxRuntimeError as error:
    figures["refused"] = str(error).splitlines()[0][:400]
  theirs.leave(folder, figures, started)


if __name__ == "__main__":
  main(Path(sys.argv[1]), *sys.argv[2:4], sys.argv[4:])
