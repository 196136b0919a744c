"""Compiles both sides of each case, one after another in processes of their own, and puts them side by side."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence

from deepseek_v4 import config
from deepseek_v4.planning import layout
from deepseek_v4.planning.read import SHARE
from launch.benchmarks.kernels.chips import chip_of
from launch.benchmarks.maxtext import cases, read
from launch.benchmarks.maxtext.cases import ADAMW, MUON, OURS, THEIRS, Case
from launch.plans.compiler import until
from launch.plans.measure import ticking

ROOT = Path(__file__).resolve().parents[3]
INSTALL = f"python3.12 -m venv FOLDER && FOLDER/bin/pip install '{cases.PACKAGE}'"
GIB, GB, TERA = 2**30, 1e9, 1e12
# Neither side looks for TPUs, nor for who else holds one, nor for its project in a cloud.
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
               "DECOUPLE_GCLOUD": "TRUE"}
# What our step is made of, and what reads either side's program.
LIBRARIES = ("deepseek_v4", "pallas_kernels")
PROGRAM = "train_step"  # of either side
READERS = (*(f"deepseek_v4/planning/{name}.py" for name in ("collectives", "dots", "hlo", "layout", "read")),
           *(f"launch/benchmarks/maxtext/{name}.py" for name in ("read", "theirs")))

Row = dict[str, Any]


def library_of(python: str | None) -> tuple[str, str, dict[str, str]]:
  """The libtpu file of the environment of a Python that has MaxText, its version, and those there of MaxText and JAX. If
  there is none, our own file and no further versions.

  Raises:
    ValueError: it does not exist, or has no MaxText.
  """
  file = lambda origin: str(Path(origin).with_name("libtpu.so"))
  if python is None:
    return file(importlib.util.find_spec("libtpu").origin), importlib.metadata.version("libtpu"), {}
  script = ("import importlib.util as u, importlib.metadata as m, json; "
            "versions = {name: m.version(name) for name in ('maxtext', 'jax')}; "
            "print(json.dumps([u.find_spec('libtpu').origin, m.version('libtpu'), versions]))")
  try:
    done = subprocess.run([python, "-c", script], capture_output=True, text=True, timeout=120)
  except OSError as error:
    raise ValueError(f"--maxtext_python = {python!r}: {error.strerror}, expected the Python of an environment with "
                     f"MaxText: {INSTALL}") from error
  if done.returncode:
    raise ValueError(f"--maxtext_python = {python!r}: {done.stderr.strip().splitlines()[-1]}, expected the Python of an "
                     f"environment with MaxText: {INSTALL}")
  origin, version, versions = json.loads(done.stdout.strip().splitlines()[-1])
  return file(origin), version, versions


def made_of(case: Case, side: str, versions: Mapping[str, str]) -> str:
  """Digest of what a side's row follows from beside libtpu: of ours both libraries' code, the run's settings and JAX's
  version; of MaxText's its and its JAX's version, and what it is told; of either the code that reads its program."""
  files = [ROOT / name for name in READERS]
  if side == OURS:
    files += [ROOT / "launch/benchmarks/maxtext/ours.py"]
    files += sorted(path for folder in LIBRARIES for path in (ROOT / folder).rglob("*.py"))
    told = [config.to_dict(config.load(ROOT / cases.CONFIG, case.ours)), importlib.metadata.version("jax")]
  else:
    told = [case.theirs, versions.get("maxtext"), versions.get("jax")]
  found = hashlib.sha256(json.dumps(told).encode())
  for path in files:
    found.update(path.relative_to(ROOT).as_posix().encode() + b"\n" + path.read_bytes())
  return found.hexdigest()[:12]


def read_rows(path: str) -> list[Row]:
  """The rows of a file that this bench wrote.

  Raises:
    ValueError: it is no such file.
  """
  with contextlib.suppress(ValueError, TypeError, KeyError):  # no JSON; or JSON of something else
    rows = json.loads(Path(path).read_text(encoding="utf-8"))["rows"]
    if all({"case", "side", "libtpu_sha256"} <= set(row) for row in rows):
      return rows
  raise ValueError(f"--json = {path!r}: expected, with --resume, a file that launch.bench plan wrote")


def measure(python: str | None, wanted: Sequence[Case], say: Callable[[str], None], minutes: float,
            known: Sequence[Row] = (), keep: Callable[[list[Row]], None] = lambda rows: None) -> list[Row]:
  """A row for each side of each case.

  Args:
    python: of MaxText's environment, whose libtpu both sides then use; None: our side alone, with its own.
    minutes: the most that one compilation may take.
    known: rows of an earlier call; what the same libtpu said of the same code and settings is not asked again.
    keep: is given all rows so far after each compilation, and those of `known` that are not wanted here.

  Raises:
    ValueError: as `library_of`.
  """
  (library, version, versions), rows = library_of(python), []
  digest = hashlib.sha256(Path(library).read_bytes()).hexdigest()[:12]
  sides = (OURS,) if python is None else (OURS, THEIRS)
  jobs = [(case, side) for case in wanted for side in sides if (case.optimizer, side) != (cases.DEFAULT_MUON, OURS)]
  found = {(row["case"], row["side"]): row for row in known if row["libtpu_sha256"] == digest and _holds(row, versions)}
  for number, (case, side) in enumerate(jobs, 1):
    say(f"{number}/{len(jobs)} {case.name}, {side}")
    if (row := found.pop((case.name, side), None)) is None:
      row = {"case": case.name, "side": side, "ours": side == OURS, "optimizer": case.optimizer, "tokens": case.tokens,
             "chips": case.chips, "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
             "libtpu": version, "libtpu_sha256": digest, "digest": made_of(case, side, versions),
             **_compiled(case, side, python, library, say, minutes)}
    rows.append(row)
    keep([*rows, *found.values()])
    say("  " + line(row))
  return rows


def _holds(row: Row, versions: Mapping[str, str]) -> bool:
  """Whether an earlier row says what the same libtpu would say now. Where MaxText's versions are not known now, because no
  row of it is asked for, those in the row are taken."""
  case = next((case for case in cases.CASES if case.name == row["case"]), None)
  return case is not None and "failed" not in row and row.get("digest") == made_of(
    case, row["side"], versions or row.get("versions", {}))


def command_of(case: Case, side: str, python: str | None, folder: str) -> list[str]:
  """What compiles one side."""
  if side == THEIRS:
    return [python, str(Path(__file__).with_name("theirs.py")), folder, *case.theirs]
  config = str(ROOT / cases.CONFIG)
  return [sys.executable, "-m", "launch.benchmarks.maxtext.ours", folder, config, case.topology, *case.ours]


def _compiled(case: Case, side: str, python: str | None, library: str, say: Callable[[str], None], minutes: float) -> Row:
  """Figures of one side. Its compiler is left as soon as the program is laid out: code is not compared."""
  with tempfile.TemporaryDirectory() as folder:
    dump, said = Path(folder) / "dump", Path(folder) / "said"
    flags = " ".join(f"--{name}={str(value).lower() if value is True else value}"
                     for name, value in layout.flags_for(dump).items())
    environment = {**os.environ, **ENVIRONMENT, "TPU_LIBRARY_PATH": library, "XLA_FLAGS": flags}
    if side == OURS:
      environment["PYTHONPATH"] = str(ROOT)
    with said.open("w", encoding="utf-8") as output, ticking(say):
      outcome = until(command_of(case, side, python, folder), lambda: layout.found(dump, PROGRAM), 60 * minutes,
                      env=environment, stdout=output, stderr=output)
    took = {"seconds": outcome.seconds, "host_bytes": outcome.host_bytes}
    path = Path(folder) / "figures.json"
    figures = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if "refused" in figures:  # also after it was laid out
      return took | figures
    if outcome.program is not None:
      return took | figures | read.of_program(case, *outcome.program[::-1], chip_of(case.topology).hbm_bytes)
    if outcome.code is None:
      return {"failed": f"more than {minutes:g} minutes"}
    lines = said.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return {"failed": f"exit code {outcome.code}: {' '.join(lines[-3:])[-400:]}"}


# ---- what is said of it -----------------------------------------------------------------------------------------------
def line(row: Row) -> str:
  """One row in words."""
  if said := row.get("failed") or row.get("refused"):
    return f"{'failed' if 'failed' in row else 'refused by the compiler'}: {said}"
  return (f"arguments {row['arguments'] / GIB:.1f}, temporaries {row['temporaries'] / GIB:.1f}, all {row['all'] / GIB:.1f} "
          f"GiB; matmuls {row['matmuls'] / TERA:.0f} TFLOP, travels {row['travels'] / GB:.0f} GB; {row['seconds']:.0f} s")


def newton_schulz(rows: Sequence[Row], side: str, optimizer: str) -> float | None:
  """FLOPs that a chip executes for it: the matmuls of a step with Muon without those of the same step with AdamW."""
  found = {row["optimizer"]: row["matmuls"] for row in rows if row["side"] == side and row["tokens"] == 4096
           and "matmuls" in row}
  return found[optimizer] - found[ADAMW] if {optimizer, ADAMW} <= set(found) else None


def table(rows: Sequence[Row]) -> str:
  """Both sides of each case under each other, with ours over theirs where both compiled."""
  titles, widths = ("arguments", "temp.", "all", "matmuls", "N.-Sch.", "travels"), (10, 8, 8, 9, 9, 9)
  lines = [f"{'GiB, TFLOP and GB of a chip':34}" + "".join(f"{title:>{width}}" for title, width in zip(titles, widths))]
  numbers = lambda row: [row["arguments"] / GIB, row["temporaries"] / GIB, row["all"] / GIB, row["matmuls"] / TERA,
                         row["newton_schulz"] and row["newton_schulz"] / TERA, row["travels"] / GB]
  show = lambda values, digits: "".join(f"{'-' if value is None else f'{value:.{digits}f}':>{width}}"
                                        for value, width in zip(values, widths))
  found = [row | {"newton_schulz": newton_schulz(rows, row["side"], row["optimizer"]) or None} for row in rows]
  for name in dict.fromkeys(row["case"] for row in found):
    lines.append(name)
    pair = [row for row in found if row["case"] == name]
    lines += [f"  {row['side']:32}" + (show(numbers(row), 1) if "all" in row else line(row)) for row in pair]
    if len(pair) == 2 and all("all" in row for row in pair):
      ratios = [None if None in two else two[0] / two[1] for two in zip(*map(numbers, pair))]
      lines.append(f"  {'ours / theirs':32}" + show(ratios, 2))
  return "\n".join(lines)


def targets(rows: Sequence[Row]) -> list[Row]:
  """What was to be reached, for our rows that are here."""
  found = []

  def add(row, what, bound, value):
    found.append({"target": f"{row['case']}: {what}, at most", "bound": bound, "value": value,
                  "reached": value is not None and value <= bound})

  for row in (row for row in rows if row["ours"] and row["optimizer"] in (ADAMW, MUON)):
    value = {name: row[name] / unit if name in row else None
             for name, unit in (("all", chip_of(row["case"].split()[0]).hbm_bytes), ("temporaries", GIB), ("travels", GB))}
    if row["tokens"] != 4096:
      add(row, "share of the HBM that a program may use", SHARE, value["all"])
      continue
    add(row, "GiB of temporaries", cases.TEMPORARIES, value["temporaries"])
    add(row, "GB that travel", cases.TRAVELS[row["optimizer"]], value["travels"])
    if row["optimizer"] == MUON:
      work = newton_schulz(rows, OURS, MUON)
      add(row, "TFLOP of Newton-Schulz", cases.NEWTON_SCHULZ, None if work is None else work / TERA)
  return found
