"""The runs that miniatures are made of: finished ones are taken, those with other settings refused; two shares of held-out
text, one to choose by and one to judge by."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence

from deepseek_v4.config import DataConfig, RunConfig, to_dict
from deepseek_v4.training import metrics, sources
from deepseek_v4.training.workdir import changes, check_folder, check_workdir

PLAN, SECONDS = "plan.json", "seconds.json"
CHOOSING, JUDGING = "choosing", "judging"
ADVICE = "expected another --workdir, or the whole --workdir deleted: later runs may have been made from this one"


# ---- what is there already ------------------------------------------------------------------------------------------------
def refuse_other_plan(workdir: Path, plan: Mapping[str, Any]) -> None:
  """Makes the folder of a miniature and writes its plan into it; see `finished` for what the runs in it have been made with.

  Args:
    plan: what decides about the runs and their text, and stands in no run's own settings.

  Raises:
    ValueError: the folder is a file, or was made with another plan.
  """
  check_folder(workdir, "--workdir")
  file, now = workdir / PLAN, json.loads(json.dumps(plan))
  if file.is_file():
    refuse_changes(workdir, json.loads(file.read_text(encoding="utf-8")), now)
  workdir.mkdir(parents=True, exist_ok=True)
  metrics.write_json(file, now)


def finished(run_config: RunConfig, folder: Path) -> bool:
  """Whether the run in a folder is done; False where there is none yet, or one that is to go on.

  Raises:
    ValueError: a run is there, done or not, that was made with other settings: figures would not be those of this program.
  """
  now = json.loads(json.dumps(to_dict(run_config)))  # lists for tuples, as in the file
  stored = check_workdir(folder, now)
  if stored:
    refuse_changes(folder, stored, now)
  return bool(stored) and (folder / metrics.SUMMARY).is_file()


def refuse_other_runs(run_configs: Mapping[Path, RunConfig]) -> None:
  """Looks at all runs of a miniature before any is trained.

  Args:
    run_configs: {folder: settings} of runs of which later ones go on from earlier ones or have them as teachers.

  Raises:
    ValueError: see `finished`; or a run is done that was made from one which is not.
  """
  done = {folder: finished(run_config, folder) for folder, run_config in run_configs.items()}
  for folder, run_config in run_configs.items():
    teachers = run_config.distillation.teachers if run_config.distillation else ()
    for needed in (run_config.training.init_from, *(teacher.checkpoint for teacher in teachers)):
      if done[folder] and needed is not None and not done.get(Path(needed), True):
        raise ValueError(f"--workdir: {folder} is finished, and was made from {needed}, which is not; {ADVICE}")


def refuse_changes(path: Path, stored: Mapping[str, Any], now: Mapping[str, Any]) -> None:
  """Raises ValueError, in words that name each, if settings differ from those that something was made with."""
  if differing := changes(stored, now):
    raise ValueError(f"--workdir: {path} was made with other settings (there -> expected): {'; '.join(differing)}; {ADVICE}")


def trained(run_config: RunConfig, folder: Path, train: Callable[..., Any], say: Callable[[str], None]) -> float | None:
  """Trains a run, or goes on with it, unless it is done.

  Args:
    train: (run config, folder), such as `loop.train`.

  Returns:
    Seconds that it took; None if it was not made in one go.

  Raises:
    ValueError: see `finished`.
  """
  file = folder / SECONDS
  if not finished(run_config, folder):
    say(f"\n==== {folder.parent.name}: {folder.name}")
    new, started = not folder.exists(), time.perf_counter()
    train(run_config, folder)
    metrics.write_json(file, {"seconds": time.perf_counter() - started if new else None})
  return json.loads(file.read_text(encoding="utf-8"))["seconds"] if file.is_file() else None


def minutes_target(text: str, bound: float, seconds: Sequence[Sequence[float | None]]) -> dict[str, Any]:
  """A target's row of the slowest repetition's minutes; no value where a run was not made in one go.

  Args:
    seconds: of the runs of each repetition, see `trained`.
  """
  known = not any(one is None for of_runs in seconds for one in of_runs)
  minutes = max(sum(one or 0 for one in of_runs) for of_runs in seconds) / 60 if known else None
  return {"target": f"{text}, at most {bound:g} (not known if it was interrupted)", "bound": bound, "value": minutes,
          "reached": None if minutes is None else minutes <= bound}


# ---- text -----------------------------------------------------------------------------------------------------------------
def shares(data: DataConfig, folder: Path) -> dict[str, DataConfig]:
  """Two parts of a source's held-out text, with no document in both: {CHOOSING, JUDGING: settings to read it with}.

  The largest document first, each goes to the part that is smaller so far; one that is there twice counts once. Nearly all
  of a part is held out once more, so that it is read as held-out text is.

  Args:
    data: of a run on text.
    folder: for the parts, as JSON lines.
  """
  texts = sorted(set(sources.read_texts(data, "held_out").texts), key=lambda text: (-len(text), text))
  parts: dict[str, list[bytes]] = {CHOOSING: [], JUDGING: []}
  for text in texts:
    min(parts.values(), key=lambda part: sum(map(len, part))).append(text)
  folder.mkdir(parents=True, exist_ok=True)
  found = {}
  for name, part in parts.items():
    file = folder / f"{name}.jsonl"
    unfinished = file.with_suffix(".unfinished")
    unfinished.write_text("".join(json.dumps({"text": text.decode()}) + "\n" for text in part), encoding="utf-8")
    unfinished.rename(file)
    found[name] = DataConfig(source="jsonl", path=str(file), tokenizer=data.tokenizer, sequence_length=data.sequence_length,
                             batch_size=data.batch_size, accumulation=data.accumulation, held_out_percent=99)
  return found
