"""Measures this project's speed and memory, alone or beside another implementation on the same machine.

python -m launch.bench forward|train [--against transformers] [--lengths 512,1024] [--repeats 3] [--json FILE]

forward: logits of all places. train: next-token loss, gradient, AdamW; also the full step with Muon. float32, one row,
2 threads, the model of launch/benchmarks/bench_config.json with random weights, the same on both sides.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from absl import app, flags

from launch.benchmarks import cases, report, run


def define_flags() -> None:
  flags.DEFINE_enum("against", None, [cases.TRANSFORMERS], "Another implementation that takes turns with ours.")
  flags.DEFINE_list("lengths", [str(n) for n in cases.LENGTHS],
                    f"Tokens of the row; the other side is measured up to {cases.LONGEST_AGAINST}.")
  flags.DEFINE_integer("repeats", 3, "Timed passes of each side.", lower_bound=1)
  flags.DEFINE_string("json", None, "File for all figures.")


def check(arguments: list[str], lengths: list[str], against: str | None, path: str | None) -> tuple[str, tuple[int, ...]]:
  """(kind, lengths) of the command line.

  Raises:
    ValueError: something that does not exist, is not installed or cannot be written.
  """
  if len(arguments) != 1 or arguments[0] not in cases.KINDS:
    raise ValueError(f"measurement = {' '.join(arguments)!r}: expected one of {', '.join(cases.KINDS)}")
  missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
  if against and missing:
    raise ValueError(f"--against = {against!r}: {' and '.join(missing)} not installed, expected what "
                     f"pip install -e '.[test]' brings (with Python 3.11)")
  if path is not None and (Path(path).is_dir() or not Path(path).absolute().parent.is_dir()):
    raise ValueError(f"--json = {path!r}: expected a file in a folder that exists")
  return arguments[0], cases.lengths_from(lengths)


def main(argv: list[str]) -> None:
  against, path, repeats, lengths = (flags.FLAGS[name].value for name in ("against", "json", "repeats", "lengths"))
  try:
    kind, lengths = check(argv[1:], lengths, against, path)
    rows = run.measure(kind, lengths, against, repeats, lambda text: print(text, flush=True))
  except (ValueError, run.WorkerFailed) as error:
    sys.exit(f"error: {error}")
  found = report.targets(kind, rows)
  remarks = (report.losses(rows), report.disturbances(rows))
  parts = (report.table(rows), report.EXPLANATION, report.target_lines(found), *filter(None, remarks))
  print("", "\n\n".join(parts), sep="\n")
  if path is not None:
    report.write_json(path, rows, found)
  if any(row["ours"] and "failed" in row for row in rows):
    sys.exit("error: a measurement of ours failed")


if __name__ == "__main__":
  define_flags()
  app.run(main)
