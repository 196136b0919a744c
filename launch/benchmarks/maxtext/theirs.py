"""MaxText's train step, compiled for a slice: run by the Python that has MaxText, from which nothing of ours is imported.

python theirs.py FOLDER ARGUMENT...

Leaves figures.json, and program.txt if the compiler accepts the step.
"""

from __future__ import annotations

import importlib.metadata
import json
import resource
import sys
import time
from pathlib import Path


def keep(folder: Path, compiled) -> dict:
  """Leaves the text of a compiled program in the folder; bytes of its memory, named as `planning.read.memory` does."""
  (folder / "program.txt").write_text(compiled.as_text(), encoding="utf-8")
  found = compiled.memory_analysis()
  names = {"arguments": "argument", "outputs": "output", "aliased": "alias", "temporaries": "temp", "code": "generated_code"}
  return {name: getattr(found, f"{field}_size_in_bytes") for name, field in names.items()}


def leave(folder: Path, figures: dict, started: float) -> None:
  """Leaves the figures, with the seconds and the host's memory that they took."""
  figures |= {"seconds": time.perf_counter() - started,
              "host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
  (folder / "figures.json").write_text(json.dumps(figures), encoding="utf-8")


def main(folder: Path, arguments: list[str]) -> None:
  started = time.perf_counter()
  import jax
  import maxtext
  from maxtext.trainers.pre_train import train_compile
  figures = {"versions": {name: importlib.metadata.version(name) for name in ("maxtext", "jax", "libtpu")}}
  compile_step = train_compile.jit_and_compile

  def kept(*operands, **named):
    """Their compilation, of which the result is not thrown away."""
    compiled = compile_step(*operands, **named)
    figures["memory"] = keep(folder, compiled)
    return compiled

  train_compile.jit_and_compile = kept
  base = Path(maxtext.__path__[0]) / "configs" / "base.yml"
  try:
    train_compile.main(["train_compile", str(base), f"base_output_directory={folder}", *arguments])
  except jax.errors.JaxRuntimeError as error:
    figures["refused"] = str(error).splitlines()[0][:400]
  leave(folder, figures, started)


if __name__ == "__main__":
  main(Path(sys.argv[1]), sys.argv[2:])
