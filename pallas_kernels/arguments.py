"""What the operations refuse: arrays whose axes do not agree with each other, and numbers of another kind."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def check(op: str, **arguments: tuple[Any, str]) -> None:
  """Refuses arrays that do not fit together; nothing is computed.

  Args:
    op: name of the operation, for the message.
    arguments: name = (array or pytree of arrays, axes), such as q=(q, "B S H d"): a letter is a size that all arrays share,
      a number that size itself, "..." any axes behind. "int: B S" wants whole numbers, "any: B T ..." numbers of any kind,
      all others floating ones.

  Raises:
    ValueError: names the first array that does not fit, its dtype and shape, and what was expected.
  """
  sizes: dict[str, int] = {}
  for name, (value, axes) in arguments.items():
    kind, _, letters = axes.rpartition(": ")
    for array in jax.tree.leaves(value) or [value]:
      sizes |= _check_one(op, name, array, kind, letters.split(), sizes)


def _check_one(op: str, name: str, array: Any, kind: str, wanted: list[str], sizes: dict[str, int]) -> dict[str, int]:
  """Sizes of the letters that this array brings."""
  letters = [letter for letter in wanted if letter != "..."]
  shape = getattr(array, "shape", ())
  found = shape[:len(letters)] if "..." in wanted else shape
  expected = [sizes.get(letter, int(letter) if letter.isdigit() else letter) for letter in letters]
  if not hasattr(array, "shape") or len(found) != len(letters) or any(
      isinstance(e, int) and e != n for e, n in zip(expected, found)):
    values = ", ".join(map(str, expected + ["..."] * ("..." in wanted)))
    named = any(not letter.isdigit() for letter in letters)
    _refuse(op, name, array, f"{' '.join(wanted)} = {values}" if named else f"[{values}]")
  numbers = {"int": jnp.integer, "any": jnp.generic}.get(kind, jnp.floating)
  if not jnp.issubdtype(array.dtype, numbers):
    _refuse(op, name, array, f"{'whole' if kind == 'int' else 'floating'} numbers [{' '.join(wanted)}]")
  return {letter: size for letter, size in zip(letters, shape) if not letter.isdigit()}


def _refuse(op: str, name: str, array: Any, expected: str) -> None:
  found = f"{array.dtype}{list(array.shape)}" if hasattr(array, "shape") else type(array).__name__
  raise ValueError(f"{op}: {name} = {found}: expected {expected}")


def check_number(op: str, name: str, value: Any, least: int) -> None:
  """Refuses what is no whole number of at least `least`; numbers that are traced are not looked at.

  Raises:
    ValueError: names it.
  """
  if isinstance(value, jax.core.Tracer):
    return
  if isinstance(value, bool) or not hasattr(value, "__index__") or value < least:
    raise ValueError(f"{op}: {name} = {value!r}: expected a whole number, at least {least}")
