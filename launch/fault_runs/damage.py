"""Kinds of damage to a run's checkpoints, as broken disks, full quotas and interrupted copies leave them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Callable

UNFINISHED = ".orbax-checkpoint-tmp"


def steps(checkpoints: Path) -> list[int]:
  """Steps with a folder that Orbax gave its final name, oldest first; there may be damage in them."""
  return sorted(int(path.name) for path in checkpoints.glob("*") if path.name.isdigit())


def _largest(folder: Path) -> Path:
  return max((path for path in folder.rglob("d/*") if path.is_file()), key=lambda path: path.stat().st_size)


def cut(file: Path) -> None:
  """Drops the second half of a file."""
  file.write_bytes(file.read_bytes()[:file.stat().st_size // 2])


def flip(file: Path, rng: random.Random) -> None:
  """Turns one bit of a file."""
  content = bytearray(file.read_bytes())
  content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
  file.write_bytes(content)


def _empty_step(checkpoints: Path, step: int, rng: random.Random) -> Path:
  made = checkpoints / str(step + 1)
  made.mkdir()
  return made


def _unfinished_step(checkpoints: Path, step: int, rng: random.Random) -> Path:
  made = checkpoints / f"{step + 2}{UNFINISHED}"
  made.mkdir(exist_ok=True)
  return made


def _half_written(checkpoints: Path, step: int, rng: random.Random) -> Path:
  files = sorted(path for path in (checkpoints / str(step)).rglob("*") if path.is_file())
  # What is written last is what an interrupted copy lacks; the manifest of the arrays is always among it.
  for file in {*rng.sample(files, len(files) // 2), checkpoints / str(step) / "state" / "manifest.ocdbt"}:
    file.unlink()
  return checkpoints / str(step)


def _in_step(action: Callable[[Path, random.Random], None]) -> Callable[[Path, int, random.Random], Path]:
  def apply(checkpoints: Path, step: int, rng: random.Random) -> Path:
    action(checkpoints / str(step), rng)
    return checkpoints / str(step)
  return apply


# name -> function(checkpoints, newest step, rng) that does it and returns the path that the next start has to name
KINDS: dict[str, Callable[[Path, int, random.Random], Path]] = {
  "empty step folder": _empty_step,
  "unfinished step folder": _unfinished_step,
  "half-written step": _half_written,
  "_METADATA cut in half": _in_step(lambda path, rng: cut(path / "state" / "_METADATA")),
  "array file cut in half": _in_step(lambda path, rng: cut(_largest(path))),
  "array file empty": _in_step(lambda path, rng: _largest(path).write_bytes(b"")),
  "bit of an array file flipped": _in_step(lambda path, rng: flip(_largest(path), rng)),
  "bit of the manifest flipped": _in_step(lambda path, rng: flip(path / "manifest" / "manifest.json", rng)),
  "manifest missing": _in_step(lambda path, rng: (path / "manifest" / "manifest.json").unlink()),
}
NOT_IN_THE_NEWEST = ("empty step folder", "unfinished step folder")  # these leave the newest step sound
PERHAPS_HARMLESS = ("bit of an array file flipped",)  # a file may hold bytes that nobody reads
