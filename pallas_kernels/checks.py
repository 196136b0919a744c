"""Sizes that an op's arguments must share: what does not fit is named before anything is traced into a program."""

from __future__ import annotations

from typing import Any

import jax


def expect(op: str, **arguments: tuple[Any, tuple[int, ...]]) -> None:
  """Every argument (array or pytree of arrays, leading axes) must have these leading axes; None is not checked.

  Raises:
    ValueError: it names the op, the argument, its shape, and what was expected.
  """
  for name, (value, axes) in arguments.items():
    for x in jax.tree.leaves(value):
      if x.shape[:len(axes)] != axes:
        raise ValueError(f"{op}: {name} = {x.dtype}{list(x.shape)}: expected its first axes to be {list(axes)}")
