"""How a room of wrong inputs is written down, and the one check that all of them go through."""

import dataclasses
import re
import warnings
from pathlib import Path
from typing import Any, Callable

import jax
import pytest
from absl import app, flags

KEY = jax.eval_shape(lambda: jax.random.key(0)).dtype  # of a typed key, made without a program

# Which errors a person may see. SystemExit holds the message of a main; the flag errors are those that absl shows with it.
SAID = (ValueError, FileNotFoundError, NotImplementedError, SystemExit, flags.Error, app.UsageError)


@dataclasses.dataclass(frozen=True)
class Wrong:
  """One wrong input.

  Attributes:
    field: what it is called.
    value: what it is, as the message shows it.
    expected: a part of what the message says it should have been.
    call: meets it; gets an empty folder.
    cause: what is wrong, where the same is expected of inputs that are wrong in different ways; else `expected` tells them
      apart.
  """

  field: str
  value: str
  expected: str
  call: Callable[[Path], Any]
  cause: str = ""

  @property
  def kind(self) -> tuple[str, str]:
    """(field, cause), without the place in the field: what makes two wrong inputs two."""
    return re.sub(r"\[[^\]]*\]", "", self.field), self.cause or self.expected

  def __str__(self) -> str:
    return f"{self.field} = {self.value}: {self.expected}"[:90]


def table(*rows: tuple[Any, ...]) -> tuple[Wrong, ...]:
  """The wrong inputs of a room: field, value, expected, call and, where it is needed, cause of each."""
  return tuple(Wrong(*row) for row in rows)


def check(wrong: Wrong, folder: Path, compiled: list[str]) -> None:
  """It is refused, in words that name field, value and expectation, and nothing has been compiled until then."""
  jax.clear_caches()  # a program that an earlier test compiled would not be seen
  before = len(compiled)
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # a damaged checkpoint is also warned of
    with pytest.raises(SAID) as refused:
      wrong.call(folder)
  said = str(refused.value)
  missing = [part for part in (wrong.field, wrong.value, wrong.expected) if part not in said]
  assert not missing, f"{missing} not in: {said}"
  assert len(compiled) == before, f"{len(compiled) - before} programs were compiled before it was refused"
