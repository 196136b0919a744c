"""MaxText's train step, compiled for a slice: run by the Python that has MaxText, from which nothing of ours is imported.

python theirs.py FOLDER ARGUMENT...

Leaves figures.json: versions, and what the compiler said if it refuses the step. XLA is told by the environment to write the
program down, and whoever started this ends it then.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path


def leave(folder: Path, figures: dict) -> None:
  (folder / "figures.json").write_text(json.dumps(figures), encoding="utf-8")


def main(folder: Path, arguments: list[str]) -> None:
  import jax
  import maxtext
  from maxtext.trainers.pre_train import train_compile
  figures = {"versions": {name: importlib.metadata.version(name) for name in ("maxtext", "jax", "libtpu")}}
  leave(folder, figures)
  base = Path(maxtext.__path__[0]) / "configs" / "base.yml"
  try:
    train_compile.main(["train_compile", str(base), f"base_output_directory={folder}", *arguments])
  except jax.errors.JaxRuntimeError as error:
    leave(folder, figures | {"refused": str(error).splitlines()[0][:400]})


if __name__ == "__main__":
  main(Path(sys.argv[1]), sys.argv[2:])
