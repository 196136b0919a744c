"""Shows a stage of V4's training in miniature: real learning of small models on two CPU cores, a table and a picture.

python -m launch.miniature NAME --workdir runs/NAME [--seeds 3] [--json FILE]

The same command goes on where an interrupted one stopped.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any, Sequence

from absl import app, flags, logging

from launch import miniatures, use_huge_pages
from launch.benchmarks import report


def define_flags() -> None:
  flags.DEFINE_string("workdir", None, "Folder for checkpoints, metrics and the picture.", required=True)
  flags.DEFINE_integer("seeds", 1, "How many times it is repeated with other random numbers.", lower_bound=1)
  flags.DEFINE_string("json", None, "File for all figures.")


def table(rows: Sequence[dict[str, Any]]) -> str:
  """Rows with the same columns as text; numbers to the right, with three decimals unless they are whole."""
  titles = list(rows[0])
  text = lambda value: "-" if value is None else f"{value:,.3f}" if isinstance(value, float) else f"{value}"
  cells = [titles, *([text(row[title]) for title in titles] for row in rows)]
  widths = [max(len(line[i]) for line in cells) for i in range(len(titles))]
  left = [isinstance(rows[0][title], str) for title in titles]
  return "\n".join("  ".join(cell.ljust(width) if to_left else cell.rjust(width)
                             for cell, width, to_left in zip(line, widths, left)).rstrip() for line in cells)


def check(arguments: Sequence[str], workdir: Path, path: str | None) -> str:
  """The miniature's name.

  Raises:
    ValueError: there is none of that name, the workdir is a file, or the JSON file cannot be written.
  """
  from deepseek_v4.training.workdir import check_folder
  if len(arguments) != 1 or arguments[0] not in miniatures.NAMES:
    raise ValueError(f"miniature = {' '.join(arguments)!r}: expected one of {', '.join(miniatures.NAMES)}")
  check_folder(workdir, "--workdir")
  if path is not None and (Path(path).is_dir() or not Path(path).absolute().parent.is_dir()):
    raise ValueError(f"--json = {path!r}: expected a file in a folder that exists")
  return arguments[0]


def main(argv: list[str]) -> None:
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)  # Orbax tells at INFO level how it saves
  path = flags.FLAGS["json"].value
  try:
    workdir = Path(flags.FLAGS["workdir"].value).absolute()  # settings of runs name files in it
    name = check(argv[1:], workdir, path)
    use_huge_pages()
    module = importlib.import_module(f"launch.miniatures.{name}")
    result = module.run(workdir, flags.FLAGS["seeds"].value, lambda text: print(text, flush=True))
  except (ValueError, FileNotFoundError) as error:
    sys.exit(f"error: {error}")
  print("", table(result.rows), report.target_lines(result.targets), f"picture: {workdir / result.picture}", sep="\n")
  if path is not None:
    report.write_json(path, result.rows, result.targets)


if __name__ == "__main__":
  define_flags()
  app.run(main)
