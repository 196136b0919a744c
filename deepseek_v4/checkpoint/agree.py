"""What the processes of a run tell each other in words: what the first one sees, and whether anybody failed.

All processes call these functions together and in the same order; in a single process they cost nothing.
"""

from __future__ import annotations

import json
from typing import Any, Callable, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

T = TypeVar("T")


def texts_of_all(text: str) -> list[str]:
  """The texts of all processes, by process."""
  if jax.process_count() == 1:
    return [text]
  mine = np.frombuffer(text.encode("utf-8", "surrogateescape"), np.uint8)
  lengths = np.asarray(multihost_utils.process_allgather(np.array([len(mine)], np.int32))).reshape(-1)
  padded = np.zeros(max(int(lengths.max()), 1), np.uint8)
  padded[:len(mine)] = mine
  rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(lengths), -1)
  return [row[:n].tobytes().decode("utf-8", "surrogateescape") for row, n in zip(rows, lengths, strict=True)]


def of_first(value: Any) -> Any:
  """The first process's value, which JSON must be able to hold; disks show hosts different things for a while."""
  return value if jax.process_count() == 1 else json.loads(texts_of_all(json.dumps(value))[0])


def unless_any_fails(action: Callable[[], T], failure: type[Exception]) -> T:
  """What `action()` returns, if it raises `failure` in no process; else all raise the message of the first that did.

  `action` must not make the processes wait for each other.
  """
  values, problem = [], ""
  try:
    values.append(action())
  except failure as error:
    if jax.process_count() == 1:
      raise
    problem = f"process {jax.process_index()}: {error}"
  problem = next(filter(None, texts_of_all(problem)), "")
  if problem:
    raise failure(problem)
  return values[0]
