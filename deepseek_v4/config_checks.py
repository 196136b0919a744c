"""What the dataclasses of `config` refuse, with the field's name, its value and what was expected. No JAX here."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from typing import Any, Sequence


def refuse(field: str, value: Any, expected: str) -> typing.NoReturn:
  """Raises the error that every bad setting ends in."""
  raise ValueError(f"{field} = {value!r}: expected {expected}")


def at_least(config: Any, bound: float, *fields: str) -> None:
  """Finite numbers not below `bound`.

  Raises:
    ValueError: names the first that is.
  """
  for name in fields:
    value = getattr(config, name)
    if not (value >= bound and math.isfinite(value)):
      refuse(name, value, f"at least {bound}")


def positive(config: Any, *fields: str) -> None:
  """Finite numbers above 0.

  Raises:
    ValueError: names the first that is not.
  """
  for name in fields:
    value = getattr(config, name)
    if not (value > 0 and math.isfinite(value)):
      refuse(name, value, "a finite number above 0")


def one_of(config: Any, field: str, choices: Sequence[Any]) -> None:
  """One of a few values.

  Raises:
    ValueError: it is none of them.
  """
  if getattr(config, field) not in choices:
    refuse(field, getattr(config, field), f"one of {', '.join(map(repr, choices))}")


def options_of(annotation: Any) -> tuple[Any, ...]:
  """The types that an annotation permits: those of a union, or the one."""
  union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
  return typing.get_args(annotation) if union else (annotation,)


def _fits(value: Any, option: Any) -> bool:
  if typing.get_origin(option) is tuple:
    return isinstance(value, (tuple, list)) and all(isinstance(item, typing.get_args(option)[0]) for item in value)
  if option in (int, float):
    return isinstance(value, (int, float) if option is float else int) and not isinstance(value, bool)
  return isinstance(value, option)


def typed(config: Any) -> None:
  """Every field of a dataclass holds what its annotation says: whole numbers where it says int, numbers where float.

  Raises:
    ValueError: names the first that does not.
  """
  for name, annotation in typing.get_type_hints(type(config)).items():
    if name in fields_of(config) and not any(_fits(getattr(config, name), o) for o in options_of(annotation)):
      names = [getattr(option, "__name__", str(option)) for option in options_of(annotation)]
      refuse(name, getattr(config, name), " or ".join(names).replace("NoneType", "None"))


def fields_of(config: Any) -> list[str]:
  """Names of a dataclass's fields."""
  return [field.name for field in dataclasses.fields(config)]
