"""The folder of a run: whether there is one in it, with which settings, and whether it lost its checkpoints."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any, Mapping

from deepseek_v4.checkpoint import manifest
from deepseek_v4.training import metrics

CONFIG, CHECKPOINTS = "config.json", "checkpoints"


def check_folder(path: Path, field: str) -> None:
  """Raises ValueError, in words that name the field, if a path is no folder and cannot become one."""
  first = next(part for part in (path, *path.absolute().parents) if part.exists())
  if not first.is_dir():
    raise ValueError(f"{field} = {str(path)!r}: expected a folder" + ("" if first == path else f"; {first} is a file"))


def check_workdir(workdir: Path, config_dict: Mapping[str, Any]) -> dict[str, Any]:
  """The settings of the last start in `workdir`; none if it is new or empty.

  Args:
    config_dict: `config.to_dict` of the run that is to be in it.

  Raises:
    ValueError: the folder holds files, but no run, or a run of another kind (on text, from teachers, from rewards).
  """
  check_folder(workdir, "workdir")
  content = sorted(path.name for path in workdir.iterdir()) if workdir.is_dir() else []
  if content and not {CONFIG, CHECKPOINTS} & set(content):
    raise ValueError(f"workdir = {str(workdir)!r}: expected a new or an empty folder, or one that holds a run ({CONFIG}, "
                     f"{CHECKPOINTS}/); it holds {', '.join(content[:5])}{', ...' if content[5:] else ''}")
  try:
    stored = json.loads((workdir / CONFIG).read_text(encoding="utf-8")) if CONFIG in content else {}
  except ValueError as error:
    warnings.warn(f"{workdir / CONFIG}: unreadable, written anew ({error}); every checkpoint has its own copy", stacklevel=3)
    return {}
  manifest.refuse_other_kind(stored, config_dict, f"workdir = {str(workdir)!r}")
  return stored


def refuse_lost_checkpoints(workdir: Path, stored: Mapping[str, Any]) -> None:
  """Called when there is no checkpoint: raises FileNotFoundError if the run in `workdir` has had one, and warns if it has
  done steps but may have saved none of them."""
  every = stored.get("training", {}).get("checkpoint_every", math.inf)
  done = max((line["step"] for line in metrics.read_lines(workdir / metrics.LINES)), default=0)
  # A save waits for the one before, so behind the second the first was whole.
  if done > 2 * every:
    raise FileNotFoundError(f"{workdir} holds a run of {done} steps, and a checkpoint was due every {every}, but there is "
                            f"none in {CHECKPOINTS}/: expected it back, or another folder to start over in")
  if done:
    warnings.warn(f"{workdir} holds a run of {done} steps, but no checkpoint (one was due every {every}): it starts over",
                  stacklevel=3)


def changes(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
  """The settings that differ between two nested dictionaries, as 'name: old -> new'."""
  found = []
  for name in sorted({*before, *now}):
    old, new = before.get(name), now.get(name)
    if isinstance(old, Mapping) and isinstance(new, Mapping):
      found += changes(old, new, f"{prefix}{name}.")
    elif old != new:
      found.append(f"{prefix}{name}: {old} -> {new}")
  return found
