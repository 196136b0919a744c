"""Compiles the real step of a run for a slice of TPUs that need not be there, and says what it takes.

python -m launch.plan --config configs/v4_pro_slice.py --topology v5p:2x2x1 [--stage NAME] [--set KEY=VALUE]... [--json FILE]
                      [--step train|prefill|decode] [--bundles] [--layout]
                      [--search [--compiles 4] [--jobs 1] [--remat NAMES] [--minutes 30]]

Of a run with stages it is the step of one of them, with the batch that it ends with: the first unless --stage says another
(a name, or a place from 0). The mesh is the run's own; one without -1 may be smaller than the slice. With mesh.dcn_data=N it
is compiled for N such slices; what crosses between them is bounded as if it stayed inside. Kernels are on where
the run says "auto". A step of four layers takes minutes.

It fits if arguments, outputs, temporaries and code leave a tenth of what the compiler lets a program use. Bounds are least
times by the chip's published rates (`deepseek_v4/planning/bound.py`, `launch/plans/kernels.py`); nothing is measured.
--bundles bounds kernels by the bundles of the compiler's schedule, too: a second process compiles each of them alone.
--layout leaves the compiler as soon as the program and its place in memory are settled, in a tenth of the time: a GiB is
kept for the machine code that is not made, and what only its making would refuse is not seen. Temporaries are then as laid
out; of whole programs libtpu 0.0.42 reports about 1.5 times as many (`planning/read.py`), so that fewer fit.

--step prefill and decode plan what `launch.generate` runs again and again: --chunk_size tokens more, or one, for each of
data.batch_size rows, in a cache with room for data.sequence_length of them that is nearly full.

--search tries meshes over the whole slice, accumulation and remat policies (see `launch/plans/search.py`): all are estimated
from shapes, the --compiles best are compiled, each in a process of its own, --jobs at a time, and those that fit are ranked.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

from absl import app, flags

from launch import children, use_huge_pages


def define_flags() -> None:
  flags.DEFINE_string("config", None, "Python file with get_config().", required=True)
  flags.DEFINE_string("topology", None, "The slice: v5p:2x2x1, v5p:4x4x4, v6e:4x4, TPU7x:2x2x1, ...", required=True)
  flags.DEFINE_string("stage", "", "Of a run with stages: the one to plan, by its name or its place from 0.")
  flags.DEFINE_multi_string("set", [], "KEY=VALUE replaces a setting, for example mesh.expert=64; repeatable.")
  flags.DEFINE_string("json", None, "File for the figures.")
  flags.DEFINE_enum("step", "train", ["train", "prefill", "decode"], "What is compiled.")
  flags.DEFINE_integer("chunk_size", 512, "Tokens of a row that a prefill step feeds.", lower_bound=1)
  flags.DEFINE_enum("storage", "compute", ["compute", "mixed"], "How the cache of a prefill or decode step is stored.")
  flags.DEFINE_bool("bundles", False, "Compile every kernel alone, too, and bound its time by the compiler's schedule.")
  flags.DEFINE_bool("layout", False, "Leave the compiler before it makes machine code.")
  flags.DEFINE_bool("search", False, "Try meshes, accumulation and remat policies of a train step.")
  flags.DEFINE_integer("compiles", 4, "Of a search: how many candidates are compiled.", lower_bound=1)
  flags.DEFINE_integer("jobs", 1, "Of a search: how many are compiled at a time; each may take 10 GB, 5 with --layout.",
                       lower_bound=1)
  flags.DEFINE_list("remat", ["block", "full"], "Of a search: the policies to try.")
  flags.DEFINE_integer("minutes", 30, "Of a search: the most that one compilation may take.", lower_bound=1)


def wanted_of(run_config: Any) -> Any:
  """What the flags ask for of a run: one of its stages, with kernels."""
  from deepseek_v4.training import stages
  from launch.plans import measure
  values = flags.FLAGS
  run_config = stages.of_stage(run_config, values["stage"].value)
  if run_config.training.kernels == "auto":
    training = dataclasses.replace(run_config.training, kernels="pallas")
    run_config = dataclasses.replace(run_config, training=training)
  return measure.Wanted(run_config, values["topology"].value, values["step"].value, values["chunk_size"].value,
                        values["storage"].value, values["bundles"].value, values["layout"].value)


def accumulation_of(run_config: Any, stage: str) -> str:
  """What --set calls the number of passes of a run's stage."""
  names = [one.name for one in run_config.stages]
  if not names:
    return "data.accumulation"
  return f"stages.{stage if stage in names else names[int(stage or 0)]}.accumulation"


def searched(run_config: Any, wanted: Any, say: Any) -> dict[str, Any]:
  """The search's figures, said as a table."""
  from launch.plans import search
  values = flags.FLAGS
  command = ["--config", values["config"].value, "--topology", wanted.topology, "--stage", values["stage"].value]
  command += [part for text in values["set"].value for part in ("--set", text)]
  command += [f"--{name}" for name in ("bundles", "layout") if values[name].value]
  found = search.search(wanted, command, accumulation_of(run_config, values["stage"].value), tuple(values["remat"].value),
                        values["compiles"].value, values["jobs"].value, 60 * values["minutes"].value, say)
  say(search.table(found))
  return {"rows": found}


def main(argv: list[str]) -> None:
  if argv[1:]:
    raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
  path = flags.FLAGS["json"].value
  if path is not None and (Path(path).is_dir() or not Path(path).absolute().parent.is_dir()):
    sys.exit(f"error: --json = {path!r}: expected a file in a folder that exists")
  children.end_with_parent()  # which may be a search
  os.environ["JAX_PLATFORMS"] = "cpu"  # the slice is described, not used
  from deepseek_v4 import config
  from deepseek_v4.planning import lower
  from deepseek_v4.training import stages
  from launch.benchmarks.report import head
  from launch.plans import compiler, measure, report
  os.environ.update(lower.ENVIRONMENT)
  import jax
  say = lambda line: print(line, flush=True)
  say(head())
  try:
    run_config = config.load(flags.FLAGS["config"].value, flags.FLAGS["set"].value)
    for line in stages.table(run_config):
      say(line)
    wanted = wanted_of(run_config)
    with children.ending_on_sigterm():
      if flags.FLAGS["search"].value:
        figures = searched(run_config, wanted, say)
      else:
        figures = {"config": flags.FLAGS["config"].value, **measure.measured(wanted, say)}
        say(report.text(figures))
  except (ValueError, FileNotFoundError, NotImplementedError, jax.errors.JaxRuntimeError, compiler.NoProgram) as error:
    sys.exit(f"error: {error}")
  if path is not None:
    Path(path).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
  use_huge_pages()
  define_flags()
  app.run(main)
