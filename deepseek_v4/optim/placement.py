"""Which device of a mesh orthogonalises how many matrices of each kind, so that all of them work for equally long
(the task of report 3.4.1).

A group of equal matrices with fewer members than there are devices would, padded with zeros, cost every device a matrix.
Here the largest matrices are placed first, each on the device with the least work so far, and what is small and plentiful,
the experts, fills up what they leave.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import math
from typing import Mapping, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Group:
  """Equal matrices of which the devices of some mesh axes have their own already.

  Attributes:
    count: matrices of each coordinate of the axes in `placed`.
    placed: mesh axes that are settled; the others' coordinates get the same number of matrices for each of theirs.
    left: the other mesh axes, in the order in which `counts` of the answer names them.
    cost: work for one matrix.
  """

  count: int
  placed: tuple[str, ...]
  left: tuple[str, ...]
  cost: float


def room_for(count: int, places: int) -> int:
  """The most matrices of a group that one of its places may get: an eighth more than evenly spread, since empty room is
  exchanged too."""
  even = -(-count // places)
  return even + even // 8


def place(groups: Sequence[Group], sizes: Mapping[str, int]) -> tuple[list[np.ndarray], np.ndarray]:
  """Spreads all groups over a mesh.

  Args:
    groups: any order.
    sizes: of the mesh axes; `placed` and `left` of each group are together all of them.

  Returns:
    For each group int [sizes of left]: matrices at each place; and float [sizes]: the work of each device.
  """
  names, shared = list(sizes), {name for group in groups for name in group.placed}
  load = np.zeros(tuple(sizes.values()))
  found: list[np.ndarray] = [np.zeros(0, int)] * len(groups)
  for i in sorted(range(len(groups)), key=lambda i: -groups[i].cost):
    group = groups[i]
    shape = tuple(sizes[name] for name in group.left)
    # [sizes of left]: the busiest of the devices that would all get one more
    busiest = load.max(tuple(names.index(name) for name in group.placed))
    kept = [name for name in names if name not in group.placed]
    busiest = busiest.transpose([kept.index(name) for name in group.left])
    # Where places are equal, those that others cannot tell apart come together: the axes that others have placed go fastest.
    slow = sorted(range(len(shape)), key=lambda axis: group.left[axis] in shared)
    rank = np.arange(math.prod(shape)).reshape([shape[axis] for axis in slow]).transpose(np.argsort(slow))
    places = [(busiest[at], int(rank[at]), at) for at in itertools.product(*map(range, shape))]
    heapq.heapify(places)
    counts, most = np.zeros(shape, int), room_for(group.count, len(places))
    for _ in range(group.count):
      work, place, at = heapq.heappop(places)
      counts[at] += 1
      if counts[at] < most:
        heapq.heappush(places, (work + group.cost, place, at))
    found[i] = counts
    order = [group.left.index(name) for name in kept]
    load += group.cost * np.expand_dims(counts.transpose(order), [names.index(name) for name in group.placed])
  return found, load
