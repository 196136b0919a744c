"""What the operations refuse: arrays whose axes do not agree with each other, and numbers of another kind."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def check(op: str, **arguments: tuple[Any, str]) -> None:
  """Refuses arrays that do not fit together; nothing is computed.

  Args:
    op: name of the operation, for the message.
    arguments: name = (array, axes), such as q=(q, "B S H d"): a letter is a size that all arrays share, a number that size
      itself. "int: B S" wants whole numbers, all others floating ones.

  Raises:
    ValueError: names the first array that does not fit, its dtype and shape, and what was expected.
  """
  sizes: dict[str, int] = {}
  for name, (array, axes) in arguments.items():
    kind, _, letters = axes.rpartition(": ")
    wanted = letters.split()
    shape = getattr(array, "shape", ())
    expected = [sizes.get(letter, int(letter) if letter.isdigit() else letter) for letter in wanted]
    if len(shape) != len(wanted) or any(isinstance(e, int) and e != n for e, n in zip(expected, shape)):
      _refuse(op, name, array, f"{' '.join(wanted)} = {', '.join(map(str, expected))}")
    if not jnp.issubdtype(array.dtype, jnp.integer if kind == "int" else jnp.floating):
      _refuse(op, name, array, f"{'whole' if kind == 'int' else 'floating'} numbers [{' '.join(wanted)}]")
    sizes |= {letter: size for letter, size in zip(wanted, shape) if not letter.isdigit()}


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


def expect(op: str, **arguments: tuple[Any, tuple[int, ...]]) -> None:
  """Every argument (array or pytree of arrays, leading axes) must have these leading axes; None is not checked.

  Raises:
    ValueError: it names the op, the argument, its shape, and what was expected.
  """
  for name, (value, axes) in arguments.items():
    for x in jax.tree.leaves(value):
      if x.shape[:len(axes)] != axes:
        raise ValueError(f"{op}: {name} = {x.dtype}{list(x.shape)}: expected its first axes to be {list(axes)}")
