"""Measures this project's speed and memory, alone or beside another implementation on the same machine.

python -m launch.bench forward|train|decode|remat [--against transformers] [--lengths 512,1024] [--repeats 3] [...]
python -m launch.bench kernels --topology v5p:2x2x1 [--ops attention,select] [--models flash,pro] [--noothers]
                            [--lengths 4096] [--minutes 60] [--json FILE]
python -m launch.bench memory --topology v5p:2x2x2 [--lengths 65536] [--noothers] [--json FILE]
python -m launch.bench exchange --topology v5p:2x2x2 [--lengths 4096] [--models pro] [--json FILE]
python -m launch.bench overlap --checkpoint runs/tiny/checkpoints [--lengths 512,2048] [--json FILE]
python -m launch.bench context [--tokens 1048576] [--chunks 4096,3000] [--json FILE]
python -m launch.bench plan [--against maxtext --maxtext_python FILE] [--optimizers adamw,muon] [--json FILE [--resume]]
python -m launch.bench start [--repeats 3] [--json FILE]
python -m launch.bench all [--parts forward,decode] [--minutes 60] [--lengths 512] [--repeats 1] [--noothers]
                       [--json FILE [--resume]]
python -m launch.bench tables FILE...

forward: logits of all places. train: next-token loss, gradient, AdamW; also the full step with Muon. decode: a prompt in
chunks, then token by token through the cache. remat: train with each policy of model/remat.py. float32, one row, 2 threads,
the model of launch/benchmarks/bench_config.json with random weights, the same on both sides.
kernels: the ops of pallas_kernels at the released models' sizes, compiled for a TPU that need not be there; the compiler's
final schedule beside the bounds of the chip, and beside what else a user could run.
memory: what attention takes of a chip's HBM, forward and backward, heads split over the slice, from the same compiler.
exchange: what a layer's experts take that are spread over the slice, tokens gathered and tokens sent, from the same.
overlap: of a trained run, how much of its selection a query shares with its neighbours.
context: a context of a million tokens read and gone on with by a small model; what a token costs along it.
plan: Flash's whole train step compiled for 128 and 256 v5p, beside MaxText's by the same libtpu if its Python is given:
python3.12 -m venv FOLDER && FOLDER/bin/pip install 'maxtext[tpu]==0.2.5', then --maxtext_python FOLDER/bin/python. A
compilation, up to its layout, takes three to seven minutes; the file of --json is written after each, and --resume goes on
from it.
start: seconds from nothing to the import, the first forward pass and the first training step of configs/tiny.py.
all: every one of them but overlap, which needs a run's checkpoint, one after another, and launch.plan of a slice of Pro too;
beside transformers if it is installed (pip install -e '.[test]' with Python 3.11 brings it). Hours, unattended: what has not
the time or the memory is left out, which is said, and a part that fails does not stop the others. --resume goes on from the
file of --json: what is whole in it, by the same code, versions and machine, is not measured again.
To see it work in half an hour: --minutes 30 --lengths 512 --repeats 1 --noothers.
tables: README's tables, from what kernels, forward, train, decode, remat, launch.plan and all wrote.

--minutes: forward, train, decode, remat, kernels, memory and exchange write what they have when it is over; all gives each
part its share; of plan it is for one compilation. What is printed begins with machine, versions and date.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any, Mapping

from absl import app, flags

from launch import children, use_huge_pages
from launch.benchmarks import cases, context, context_rows, everything, exchange, overlap, report, run, start, tables, worker
from launch.benchmarks.kernels import cases as kernel_cases
from launch.benchmarks.kernels import chips
from launch.benchmarks.kernels import report as kernel_report
from launch.benchmarks.kernels import run as kernel_run
from launch.benchmarks.maxtext import cases as plan_cases
from launch.benchmarks.maxtext import run as plan_run
from launch.benchmarks.memory import cases as memory_cases
from launch.benchmarks.memory import run as memory_run

KERNELS, MEMORY, EXCHANGE, OVERLAP, CONTEXT = "kernels", "memory", "exchange", "overlap", "context"
PLAN, START, ALL, TABLES = "plan", "start", "all", "tables"
PLAN_MINUTES = 30  # of a compilation
KINDS = (*cases.KINDS, KERNELS, MEMORY, EXCHANGE, OVERLAP, CONTEXT, PLAN, START, ALL, TABLES)
MAXTEXT = "maxtext"

# Which measurements know a flag; all others refuse it. Whom --against may name: see `check`.
COMPILED = (KERNELS, MEMORY, EXCHANGE)
KNOWN_BY = {
    "lengths": (*cases.KINDS, *COMPILED, OVERLAP, ALL), "repeats": (*cases.KINDS, START, ALL), "topology": COMPILED,
    "ops": (KERNELS,), "models": (KERNELS, EXCHANGE), "others": (KERNELS, MEMORY, ALL), "checkpoint": (OVERLAP,),
    "tokens": (CONTEXT,), "chunks": (CONTEXT,), "maxtext_python": (PLAN,), "optimizers": (PLAN,), "resume": (PLAN, ALL),
    "minutes": (*cases.KINDS, *COMPILED, PLAN, ALL), "parts": (ALL,),
    "json": tuple(kind for kind in KINDS if kind != TABLES)}


def define_flags() -> None:
  flags.DEFINE_enum("against", None, [cases.TRANSFORMERS, MAXTEXT], "Another implementation: transformers takes turns with "
                    "ours, MaxText stands beside plan.")
  flags.DEFINE_list("lengths", None, f"Tokens of the row: {', '.join(map(str, cases.LENGTHS))} if not given (the other side "
                    f"is measured up to {cases.LONGEST_AGAINST}); {', '.join(map(str, cases.DECODE_LENGTHS))} for decode, "
                    f"{', '.join(map(str, cases.REMAT_LENGTHS))} for remat, "
                    f"{', '.join(map(str, kernel_cases.LENGTHS))} for kernels, "
                    f"{memory_cases.LENGTH} for memory, {exchange.LENGTH} of a device for exchange, "
                    f"{', '.join(map(str, overlap.LENGTHS))} for overlap.")
  flags.DEFINE_integer("repeats", 3, "Timed passes of each side; three times as many for short prompts.", lower_bound=1)
  flags.DEFINE_string("topology", None, "Of kernels, memory and exchange: a chip and the shape of a slice, such as "
                      f"{', '.join(chip.topology for chip in chips.CHIPS)}.")
  flags.DEFINE_list("ops", list(kernel_cases.BY_NAME), "Of kernels: which operations.")
  flags.DEFINE_list("models", list(kernel_cases.MODELS), "Of kernels and exchange: whose sizes.")
  flags.DEFINE_bool("others", True, "Of kernels, memory and all: also what else a user could run; --noothers is faster.")
  flags.DEFINE_string("checkpoint", None, "Of overlap: the checkpoints of a run.")
  flags.DEFINE_integer("tokens", 1_048_576, "Of context: how long it is.")
  flags.DEFINE_list("chunks", ["4096", "3000"], "Of context: tokens fed at a time, in the first and the second run.")
  flags.DEFINE_string("maxtext_python", None, f"Of plan: the Python of an environment with MaxText: {plan_run.INSTALL}")
  flags.DEFINE_list("optimizers", [], "Of plan: which ones; all if not given.")
  flags.DEFINE_float("minutes", None, "The most that all of it may take; what is not measured then is left out. Of plan: "
                     f"the most that one compilation may take, {PLAN_MINUTES} if not given.",
                     lower_bound=everything.LEAST_MINUTES)
  flags.DEFINE_bool("resume", False, "Of plan and all: what the file of --json says already, by the same code, is not "
                    "measured again.")
  flags.DEFINE_list("parts", [], "Of all: which ones; all if not given.")
  flags.DEFINE_string("json", None, "File for all figures.")


def check(arguments: list[str], lengths: list[str] | None, against: str | None,
          path: str | None) -> tuple[str, tuple[int, ...]]:
  """(kind, lengths) of the command line.

  Raises:
    ValueError: something that does not exist, is not installed or cannot be written.
  """
  if not arguments or arguments[0] not in KINDS or (len(arguments) == 1) == (arguments[0] == TABLES):
    raise ValueError(f"measurement = {' '.join(arguments)!r}: expected one of {', '.join(KINDS)}; files behind tables only")
  kind = arguments[0]
  allowed = {PLAN: [MAXTEXT], ALL: [cases.TRANSFORMERS]} | {name: [cases.TRANSFORMERS] for name in cases.KINDS}
  allowed[cases.REMAT] = []
  if against and against not in allowed.get(kind, []):
    expected = " or ".join(allowed.get(kind, [])) or "nothing"
    raise ValueError(f"--against = {against!r}: expected {expected} for {kind}; some have other sides of their own")
  missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
  if against == cases.TRANSFORMERS and missing:
    raise ValueError(f"--against = {against!r}: {' and '.join(missing)} not installed, expected what "
                     f"pip install -e '.[test]' brings (with Python 3.11)")
  if path is not None and (Path(path).is_dir() or not Path(path).absolute().parent.is_dir()):
    raise ValueError(f"--json = {path!r}: expected a file in a folder that exists")
  if kind == ALL:  # its parts have lengths of their own
    return kind, ()
  if kind not in cases.KINDS:
    known = {MEMORY: (memory_cases.LENGTH,), EXCHANGE: (exchange.LENGTH,), OVERLAP: overlap.LENGTHS}.get(kind, ())
    return kind, kernel_cases.lengths_from(lengths or [str(length) for length in known])
  known, room = (cases.DECODE_LENGTHS, cases.NEW_TOKENS + 1) if kind == cases.DECODE else (cases.LENGTHS, 0)
  known = cases.REMAT_LENGTHS if kind == cases.REMAT else known
  return kind, cases.lengths_from(lengths or [str(length) for length in known], room)


def refuse(kind: str, given: Mapping[str, Any]) -> None:
  """Refuses flags, given with their values, that a measurement does not know: they would do nothing.

  Raises:
    ValueError: one of them is given.
  """
  for name, value in given.items():
    if kind not in KNOWN_BY.get(name, KINDS):
      raise ValueError(f"--{name} = {value!r}: {kind} knows no such flag, expected it with {', '.join(KNOWN_BY[name])} only")


def check_kernels(topology: str | None, ops: list[str], models: list[str]) -> tuple[chips.Chip, tuple[str, ...], list[str]]:
  """(chip, ops, models) of the command line.

  Raises:
    ValueError: one of them does not exist, or libtpu is not installed.
  """
  chip = chips.chip_of(topology or "")
  if importlib.util.find_spec("libtpu") is None:
    raise ValueError(f"--topology = {topology!r}: libtpu is not installed, expected what pip install -e '.[aot]' brings")
  return chip, kernel_cases.ops_from(ops), kernel_cases.models_from(models)


def say(text: str) -> None:
  print(text, flush=True)


def bench_kernels(topology: str | None, ops: list[str], models: list[str], lengths: tuple[int, ...], others: bool,
                  minutes: float | None, path: str | None) -> None:
  """Compiles, prints and writes the figures of the kernels; ends the program if one of ours did not compile."""
  chip, ops, models = check_kernels(topology, ops, models)
  wanted = [case for case in kernel_cases.all_cases(ops, lengths, models) if others or case.side == kernel_cases.OURS]
  rows = kernel_run.measure(topology, wanted, say, minutes)
  found = kernel_report.targets(rows, chip)
  print("", kernel_report.text(rows, found), sep="\n")
  if path is not None:
    report.write_json(path, rows, found)
  if any(row["ours"] and "failed" in row for row in rows):
    sys.exit("error: a program of ours did not compile")


def bench_memory(topology: str | None, lengths: tuple[int, ...], others: bool, minutes: float | None,
                 path: str | None) -> None:
  """Compiles, prints and writes what attention takes of the HBM; ends the program if ours did not compile."""
  check_kernels(topology, [], [])
  sides = memory_cases.SIDES if others else (memory_cases.OURS,)
  rows = memory_run.measure(topology, lengths, sides, say, minutes=minutes)
  found = memory_run.targets(rows)
  print("", memory_run.table(rows), report.target_lines(found), sep="\n")
  if path is not None:
    report.write_json(path, rows, found)
  if any(row["ours"] and "failed" in row for row in rows):
    sys.exit("error: a program of ours did not compile")


def bench_exchange(topology: str | None, lengths: tuple[int, ...], models: list[str], minutes: float | None,
                   path: str | None) -> None:
  """Compiles, prints and writes what spread experts take; ends the program if one did not compile."""
  _, _, models = check_kernels(topology, [], models)
  rows = exchange.measure(topology, lengths, models, say, minutes)
  print("", exchange.table(rows), sep="\n")
  if path is not None:
    report.write_json(path, rows, [])
  if any("failed" in row for row in rows):
    sys.exit("error: a program did not compile")


def bench_overlap(folder: str | None, lengths: tuple[int, ...], path: str | None) -> None:
  """Prints and writes how neighbouring queries of a run's model select."""
  rows = overlap.measure(folder, lengths, say)
  print("", overlap.table(rows), sep="\n")
  if path is not None:
    report.write_json(path, rows, [])


def bench_context(tokens: int, chunks: list[str], path: str | None) -> None:
  """Prints and writes what a long context costs."""
  if not all(chunk.isdigit() for chunk in chunks):
    raise ValueError(f"--chunks = {','.join(chunks)}: expected two different numbers of tokens")
  worker.pin(cases.THREADS)
  rows = context.measure(tokens, [int(chunk) for chunk in chunks], say)
  found = context_rows.targets(rows)
  print("", context_rows.table(rows), context_rows.EXPLANATION, report.target_lines(found), sep="\n")
  if path is not None:
    report.write_json(path, rows, found)


def refuse_resuming_nothing(resume: bool, path: str | None) -> None:
  """Raises ValueError where there is no file to go on from."""
  if resume and path is None:
    raise ValueError("--resume = True: expected --json, the file to go on from")


def bench_plan(against: str | None, python: str | None, optimizers: list[str], minutes: float | None, path: str | None,
               resume: bool) -> None:
  """Compiles, prints and writes Flash's step beside MaxText's; ends the program if ours did not compile."""
  if (against is None) != (python is None):
    raise ValueError(f"--maxtext_python = {python!r}: expected a Python with --against {MAXTEXT} and nothing without it; "
                     f"its environment: {plan_run.INSTALL}")
  if importlib.util.find_spec("libtpu") is None:
    raise ValueError("plan: libtpu is not installed, expected what pip install -e '.[aot]' brings")
  refuse_resuming_nothing(resume, path)
  known = plan_run.read_rows(path) if resume and Path(path).exists() else []

  def keep(rows: list[dict]) -> None:
    if path is not None:
      report.write_json(path, rows, plan_run.targets(rows))
  with children.ending_on_sigterm():
    rows = plan_run.measure(python, plan_cases.of_optimizers(optimizers), say, minutes or PLAN_MINUTES, known, keep)
  print("", plan_run.table(rows), report.target_lines(plan_run.targets(rows)), sep="\n")
  if any(row["ours"] and "all" not in row for row in rows):
    sys.exit("error: a program of ours did not compile")


def bench_start(repeats: int, path: str | None) -> None:
  """Prints and writes how long the first results take."""
  rows = start.measure(say, repeats)
  found = start.targets(rows)
  print("", report.target_lines(found), sep="\n")
  if path is not None:
    report.write_json(path, rows, found)


def bench_model(kind: str, lengths: tuple[int, ...], against: str | None, repeats: int, minutes: float | None,
                path: str | None) -> None:
  """Measures, prints and writes the figures of the model; ends the program if a measurement of ours failed."""
  rows = run.measure(kind, lengths, against, repeats, say, minutes)
  found = report.targets(kind, rows)
  remarks = (report.losses(rows), report.disturbances(rows))
  explained = (report.EXPLANATION,) if kind != cases.DECODE else (report.EXPLANATION, report.DECODE_EXPLANATION)
  parts = (report.table(rows), *explained, report.target_lines(found), *filter(None, remarks))
  print("", "\n\n".join(parts), sep="\n")
  if path is not None:
    report.write_json(path, rows, found)
  if any(row["ours"] and "failed" in row for row in rows):
    sys.exit("error: a measurement of ours failed")


def bench_all(names: list[str], against: str | None, repeats: int, lengths: list[str] | None, others: bool,
              minutes: float | None, path: str | None, resume: bool) -> None:
  """Runs all parts, prints how each ended and writes their figures; ends the program if one failed."""
  refuse_resuming_nothing(resume, path)
  wanted = everything.chosen(names, everything.parts(
    against or (everything.default_against() if others else None), repeats, lengths or (), others))
  for part in wanted.values():
    if "--lengths" in part.arguments:
      check([part.arguments[1]], lengths, None, None)

  known = everything.read(path) if resume and path is not None and Path(path).exists() else {}

  def made() -> str:
    return everything.made_of(report.machine(), report.versions())

  def keep(found: dict) -> None:
    if path is not None:  # in one go: whoever is stopped meanwhile has the file of before
      file = Path(f"{path}.new")
      file.write_text(json.dumps({**report.origin(), "parts": found}, indent=1) + "\n", encoding="utf-8")
      file.replace(path)
  with children.ending_on_sigterm():
    found = everything.measure(wanted, say, keep=keep, minutes=minutes, known=known, made=made)
  print("", everything.summary(found), sep="\n")
  if any("failed" in part for part in found.values()):
    sys.exit("error: a part failed")


def main(argv: list[str]) -> None:
  names = ("against", "json", "lengths", "topology", "ops", "models", "others", "repeats", "checkpoint", "tokens",
           "chunks", "parts", "maxtext_python", "optimizers", "minutes", "resume")
  value = {name: flags.FLAGS[name].value for name in names}
  try:
    kind, lengths = check(argv[1:], value["lengths"], value["against"], value["json"])
    refuse(kind, {name: value[name] for name in names if flags.FLAGS[name].present})
    if kind == CONTEXT:
      use_huge_pages()  # this program begins again
    if kind != TABLES:
      say(report.head())
    if kind == KERNELS:
      bench_kernels(value["topology"], value["ops"], value["models"], lengths, value["others"], value["minutes"],
                    value["json"])
    elif kind == MEMORY:
      bench_memory(value["topology"], lengths, value["others"], value["minutes"], value["json"])
    elif kind == EXCHANGE:
      bench_exchange(value["topology"], lengths, value["models"], value["minutes"], value["json"])
    elif kind == CONTEXT:
      bench_context(value["tokens"], value["chunks"], value["json"])
    elif kind == PLAN:
      bench_plan(value["against"], value["maxtext_python"], value["optimizers"], value["minutes"], value["json"],
                 value["resume"])
    elif kind == START:
      bench_start(value["repeats"], value["json"])
    elif kind == ALL:
      bench_all(value["parts"], value["against"], value["repeats"], value["lengths"], value["others"], value["minutes"],
                value["json"], value["resume"])
    elif kind == TABLES:
      print(tables.markdown(tables.read(argv[2:])))
    elif kind == OVERLAP:
      bench_overlap(value["checkpoint"], lengths, value["json"])
    else:
      bench_model(kind, lengths, value["against"], value["repeats"], value["minutes"], value["json"])
  except (ValueError, FileNotFoundError, run.WorkerFailed) as error:
    sys.exit(f"error: {error}")


if __name__ == "__main__":
  define_flags()
  app.run(main)
