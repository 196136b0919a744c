"""Kills, stops, starves and damages a run again and again; its curve must end up that of the undisturbed run, bit for bit.

python -m launch.faults --kills 50 --json FILE [--stops 8] [--full_disks 3] [--seed 0] [--workdir DIR]
                        [--config FILE] [--set KEY=VALUE]...

SIGKILL, SIGTERM and Ctrl-C at random moments, full disks (a limit on the size of files), and after every other SIGKILL one
kind of damage to the newest checkpoint. Every start is the real command. About ten seconds a fault on two CPU cores.
The exit code is 1 if anything was not as it must be.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from absl import app, flags

from deepseek_v4.training.workdir import check_folder
from launch.benchmarks import report
from launch.fault_runs import run

# A run that is cheap to start (its corpus are the files of this package) and saves often.
OVERRIDES = ("data.source=text", f"data.path={run.ROOT / 'deepseek_v4'}", "data.held_out_percent=10", "training.steps=60",
             "optimizer.decay_steps=10", "training.log_every=1", "training.eval_every=6", "training.eval_batches=2",
             "training.checkpoint_every=4", "training.keep_checkpoints=3")


def define_flags() -> None:
  flags.DEFINE_integer("kills", 10, "SIGKILLs; if any, then at least two for every kind of damage.", lower_bound=0)
  flags.DEFINE_integer("stops", 4, "SIGTERMs and SIGINTs, in turn.", lower_bound=0)
  flags.DEFINE_integer("full_disks", 1, "Starts that cannot write a checkpoint.", lower_bound=0)
  flags.DEFINE_integer("seed", 0, "Decides which fault happens when.")
  flags.DEFINE_string("config", str(run.ROOT / "configs" / "debug.py"), "Python file with get_config().")
  flags.DEFINE_multi_string("set", [], "KEY=VALUE replaces a setting of the run; repeatable.")
  flags.DEFINE_string("workdir", None, "Folder for the runs; None = one that is deleted afterwards.")
  flags.DEFINE_string("json", None, "Where the rows go.")


def main(argv: list[str]) -> None:
  if argv[1:]:
    raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
  names = ("kills", "stops", "full_disks", "seed", "config", "set", "workdir", "json")
  value = {name: flags.FLAGS[name].value for name in names}
  if value["json"] is not None and not Path(value["json"]).absolute().parent.is_dir():
    sys.exit(f"error: --json = {value['json']!r}: expected a file in a folder that exists")
  if not value["kills"] + value["stops"] + value["full_disks"]:
    sys.exit("error: --kills, --stops, --full_disks = 0: expected one of them above 0")
  if value["workdir"] is not None:
    try:
      check_folder(Path(value["workdir"]), "--workdir")
    except ValueError as error:
      sys.exit(f"error: {error}")
    if Path(value["workdir"]).exists():
      sys.exit(f"error: --workdir = {value['workdir']!r}: expected a folder that does not exist yet")
  with tempfile.TemporaryDirectory(prefix="faults_") as scratch:
    settings = run.Settings(value["config"], (*OVERRIDES, *value["set"]), Path(value["workdir"] or scratch).absolute(),
                            value["seed"])
    rows = run.measure(settings, value["kills"], value["stops"], value["full_disks"], lambda text: print(text, flush=True))
  wrong = [row for row in rows if row["problem"]]
  if value["json"] is not None:
    report.write_json(value["json"], rows, [])
  faults = [row for row in rows if "moment" in row]
  print(f"{len(faults)} faults in {rows[-1]['run']} runs; {len(wrong)} things were not as they must be")
  if wrong:
    sys.exit(1)


if __name__ == "__main__":
  define_flags()
  app.run(main)
