"""Matrices of many leaves as batches of equal shape, whole matrices on single devices, the batch spread over all (the
task of report 3.4.1).

An operation that needs whole matrices (Newton-Schulz) is local this way, and what travels is what two exchanges cost,
however long it runs. All of it is reshapes and sharding constraints. Leaves that are sharded alike travel together, as

  x_PKM   P: one axis for every mesh axis that is placed already, whole, so that a device holds 1 of each
          K: matrices of one device (of one P), from all layers and experts; with empty room between them, which is zero
          M: the matrix's axes, first those of its shorter side; some still sharded

A mesh axis is placed by splitting its size off K: for one over which the leaf is replicated, a slice on the way there and an
all-gather, or a sum with zeros, on the way back; for one that shards a matrix axis, moving it there is one all-to-all. When
all are placed, what has the same shape is joined along K, which is local.

Every device has the same room, but not as many matrices (`placement.py`): where one device has a matrix and another has
none, each asks a table whether there is work to do.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from deepseek_v4.optim import placement
from deepseek_v4.optim.assign import MatrixAxes
from deepseek_v4.optim.newton_schulz import flops


def mesh_sizes() -> dict[str, int]:
  """Sizes of the ambient mesh's axes (`jax.set_mesh`) that have more than one device; empty without a mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return {}
  return {name: size for name, size, kind in zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types)
          if size > 1 and kind == AxisType.Auto}


@dataclasses.dataclass(frozen=True)
class Layout:
  """How a leaf becomes x_PKM. Equal `stack` = leaves that travel together.

  Attributes:
    shape: Of the leaf, its sharded batch axes split into mesh axes and the rest.
    order: Permutation of those axes to P, K (not yet merged), M.
    count: K, matrices on one device.
    stack: (mesh axes of P, sizes of the shorter side, sizes of the longer, mesh axes on each axis of M or None = unknown).
  """

  shape: tuple[int, ...]
  order: tuple[int, ...]
  count: int
  stack: tuple[tuple[str, ...], tuple[int, ...], tuple[int, ...], tuple[tuple[str, ...], ...] | None]


def _names_of(spec: PartitionSpec | None, ndim: int, sizes: Mapping[str, int]) -> list[tuple[str, ...]]:
  """Mesh axes, of those in `sizes`, that shard each axis of a leaf."""
  entries = [] if spec is None else list(spec)
  entries += [None] * (ndim - len(entries))
  named = [() if entry is None else (entry,) if isinstance(entry, str) else tuple(entry) for entry in entries]
  return [tuple(name for name in names if name in sizes) for names in named]


def layout_of(shape: Sequence[int], axes: MatrixAxes, spec: PartitionSpec | None, sizes: Mapping[str, int]) -> Layout:
  """Plans one leaf; `spec` None = the sharding is not known.

  Raises:
    ValueError: a sharded axis is not a multiple of its mesh axes.
  """
  names = _names_of(spec, len(shape), sizes)
  short, long = axes
  if math.prod(shape[i] for i in short) > math.prod(shape[i] for i in long):
    short, long = long, short
  placed: list[Any] = []
  split: list[int] = []
  first: list[int] = []
  rest, matrix = [], {}
  for axis, size in enumerate(shape):
    parts = [sizes[name] for name in names[axis]]
    if size % math.prod(parts):
      raise ValueError(f"axis {axis} of {list(shape)}, sharded {spec}: expected a multiple of {math.prod(parts)}")
    if axis in short or axis in long:
      matrix[axis] = len(split)
      split.append(size)
      continue
    first += range(len(split), len(split) + len(parts))
    rest.append(len(split) + len(parts))
    split += [*parts, size // math.prod(parts)]
    placed += names[axis]
  sharded = None if spec is None or not sizes else tuple(names[axis] for axis in short + long)
  sides = (tuple(shape[axis] for axis in short), tuple(shape[axis] for axis in long))
  return Layout(tuple(split), (*first, *rest, *(matrix[axis] for axis in short + long)),
                math.prod(split[i] for i in rest), (tuple(placed), *sides, sharded))


def _to_stack(x: jax.Array, layout: Layout, sizes: Mapping[str, int]) -> jax.Array:
  """A leaf as x_PKM."""
  placed, short, long, _ = layout.stack
  x = x.reshape(layout.shape).transpose(layout.order)
  return x.reshape(*(sizes[name] for name in placed), layout.count, *short, *long)


def _from_stack(x_PKM: jax.Array, layout: Layout, shape: Sequence[int]) -> jax.Array:
  """The inverse of `_to_stack`."""
  inverse = sorted(range(len(layout.order)), key=layout.order.__getitem__)
  return x_PKM.reshape([layout.shape[i] for i in layout.order]).transpose(inverse).reshape(shape)


def _constrain(x_PKM: jax.Array, placed: Sequence[str], free: int, sharded: Sequence[tuple[str, ...]] | None) -> jax.Array:
  """Pins x_PKM: one mesh axis on each of P, `free` unsharded axes, mesh axes on those of M; does nothing where unknown."""
  if sharded is None:
    return x_PKM
  spec = PartitionSpec(*placed, *[None] * free, *(names or None for names in sharded))
  return jax.lax.with_sharding_constraint(x_PKM, spec)


@dataclasses.dataclass(frozen=True)
class Move:
  """One exchange: mesh axes that join P, what was placed before, mesh axes on M before and after."""

  names: tuple[str, ...]
  placed: tuple[str, ...]
  before: tuple[tuple[str, ...], ...] | None
  after: tuple[tuple[str, ...], ...] | None


def moves_of(stack: tuple, sizes: Mapping[str, int]) -> list[Move]:
  """The exchanges that place all mesh axes: one for all over which the leaf is replicated, first, since the others then move
  less; and one for each that shards the matrix."""
  placed, short, long, sharded = stack
  taken = {*placed, *(name for names in sharded or () for name in names)}
  left = tuple(name for name in sizes if name not in taken)
  moves = [Move(left, placed, sharded, sharded)] if left else []
  placed += left
  for axis in range(len(short) + len(long)) if sharded else ():
    for name in reversed(sharded[axis]):  # the innermost first: what stays is contiguous
      after = tuple(names[:-1] if i == axis else names for i, names in enumerate(sharded))
      moves.append(Move((name,), placed, sharded, after))
      placed, sharded = placed + (name,), after
  return moves


def replicas(stack: tuple, sizes: Mapping[str, int]) -> int:
  """Devices that hold the same part of a leaf of this stack: they share its matrices out, and gather them in the end. 1
  where its sharding is unknown."""
  placed, _, _, sharded = stack
  if sharded is None:
    return 1
  taken = {*placed, *(name for names in sharded for name in names)}
  return math.prod(size for name, size in sizes.items() if name not in taken)


def _spread(x_PKM: jax.Array, stack: tuple, sizes: Mapping[str, int]) -> jax.Array:
  """x_PKM with a padded K -> [*mesh, K, R, C], P in the mesh's order, every matrix whole on one device."""
  placed, short, long, sharded = stack
  x_PKM = _constrain(x_PKM, placed, 1, sharded)
  for move in moves_of(stack, sizes):
    parts = [sizes[name] for name in move.names]
    lead, (count, *matrix) = x_PKM.shape[:len(move.placed)], x_PKM.shape[len(move.placed):]
    x_PKM = x_PKM.reshape(*lead, *parts, count // math.prod(parts), *matrix)
    placed = move.placed + move.names
    x_PKM = _constrain(x_PKM, move.placed, len(parts) + 1, move.before)
    # Where shardings are unknown, this last one is still known: nothing may split a matrix.
    x_PKM = _constrain(x_PKM, placed, 1, move.after if sharded is not None else [()] * len(matrix))
  x_PKM = x_PKM.transpose(*(placed.index(name) for name in sizes), *range(len(sizes), x_PKM.ndim))
  return x_PKM.reshape(*x_PKM.shape[:len(sizes) + 1], math.prod(short), math.prod(long))


def _gather(x_PKM: jax.Array, stack: tuple, sizes: Mapping[str, int], plan: Plan) -> tuple[jax.Array, np.ndarray]:
  """The inverse of `_spread`, and the number of the matrix at each place of K, as `Plan.slots` tells it."""
  placed, short, long, _ = stack
  slots = plan.slots()
  moves = moves_of(stack, sizes)
  order = placed + tuple(name for move in moves for name in move.names)
  names = list(sizes)
  x_PKM = x_PKM.reshape(*x_PKM.shape[:len(sizes) + 1], *short, *long)
  x_PKM = x_PKM.transpose(*(names.index(name) for name in order), *range(len(sizes), x_PKM.ndim))
  for move in reversed(moves):
    x_PKM = _constrain(x_PKM, move.placed + move.names, 1, move.after)
    if move.after is not None and move.after == move.before:
      return _from_replicas(x_PKM, slots, int(plan.counts.sum()), move)  # the first move, so the last one back
    x_PKM = _constrain(x_PKM, move.placed, len(move.names) + 1, move.before)
    at = len(move.placed)
    count = math.prod(x_PKM.shape[at:at + len(move.names) + 1])
    x_PKM = x_PKM.reshape(*x_PKM.shape[:at], count, *x_PKM.shape[at + len(move.names) + 1:])
  return x_PKM, slots


def _from_replicas(x_PKM: jax.Array, slots: np.ndarray, matrices: int, move: Move) -> tuple[jax.Array, np.ndarray]:
  """x_PKM with what the replicas, the last part of its P, have made for each other; and `slots` of its K.

  No empty room travels: what is gathered is as much of K of each replica as the one with the most matrices has. Where that
  is more than twice as much as there is, because few of them have any, each puts its own between zeros and all are added."""
  at, own = len(move.placed), len(move.placed) + len(move.names)
  by_replica = slots.reshape(math.prod(x_PKM.shape[at:own]), -1)
  real = by_replica < matrices
  most = int(real.sum(1).max())
  summed = len(by_replica) * most > 2 * matrices
  if summed:
    index, slots = np.full((len(by_replica), matrices), by_replica.shape[1]), np.arange(matrices)
    index[np.nonzero(real)[0], by_replica[real]] = np.nonzero(real)[1]
  else:
    index = np.argsort(~real, axis=1, kind="stable")[:, :most]
    slots = np.take_along_axis(by_replica, index, 1).reshape(-1)

  def local(x: jax.Array, index: jax.Array) -> jax.Array:
    x = x.reshape(*x.shape[:at], *x.shape[own:])
    x = x.at[(slice(None),) * at + (index.reshape(-1),)].get(mode="fill", fill_value=0)
    return jax.lax.psum(x, move.names) if summed else jax.lax.all_gather(x, move.names, axis=at, tiled=True)
  matrix = [names or None for names in move.after or ()]
  before, after = (PartitionSpec(*move.placed, *names, None, *matrix) for names in (move.names, ()))
  run = jax.shard_map(local, in_specs=(before, PartitionSpec(*move.names)), out_specs=after, check_vma=False)
  return run(x_PKM, jnp.asarray(index.reshape(*x_PKM.shape[at:own], -1), jnp.int32)), slots


# ---- who works on what ------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Plan:
  """Where the matrices of one stack come to lie.

  Attributes:
    counts: int [places], matrices of each place on the mesh axes that the stack's moves place, in their order.
    real: bool [*mesh, room], which of a device's room is a matrix; its matrices come first.
  """

  counts: np.ndarray
  real: np.ndarray

  @property
  def whole(self) -> int:
    """How much of the room is a matrix on every device."""
    return int(self.real.reshape(-1, self.real.shape[-1]).all(0).sum())

  def slots(self) -> np.ndarray:
    """Number of the matrix in each place's room, int [places * room]; behind the last where it is empty."""
    room, after = np.arange(self.real.shape[-1]), np.cumsum(self.counts)
    numbers = (after - self.counts)[:, None] + room
    return np.where(room < self.counts[:, None], numbers, after[-1]).reshape(-1)


def plans_of(counts: Mapping[tuple, int], sizes: Mapping[str, int]) -> tuple[dict[tuple, Plan], np.ndarray]:
  """Spreads stacks over the mesh.

  Args:
    counts: K of each stack, all its leaves together.

  Returns:
    The plans, and float [*mesh], the FLOPs of Newton-Schulz on each device.
  """
  left = {stack: tuple(name for move in moves_of(stack, sizes) for name in move.names) for stack in counts}
  groups = [placement.Group(count, stack[0], left[stack], flops(math.prod(stack[1]), math.prod(stack[2])))
            for stack, count in counts.items()]
  found, load = placement.place(groups, sizes)
  plans = {}
  for stack, of_places in zip(counts, found):
    order = stack[0] + left[stack]
    real = np.arange(of_places.max()) < of_places[..., None]
    real = np.broadcast_to(real, (*(sizes[name] for name in stack[0]), *real.shape))
    plans[stack] = Plan(of_places.reshape(-1), real.transpose(*(order.index(name) for name in sizes), -1))
  return plans, load


def flops_of_devices(shapes: Sequence[Sequence[int]], axes: Sequence[MatrixAxes], specs: Sequence[PartitionSpec | None],
                     sizes: Mapping[str, int]) -> np.ndarray:
  """FLOPs that Newton-Schulz on leaves of these shapes costs each device of a mesh, float [*mesh]; see `map_matrices`.

  Args:
    sizes: of the mesh axes with more than one device.
  """
  layouts = [layout_of(*leaf, sizes) for leaf in zip(shapes, axes, specs)]
  return plans_of(counts_of(layouts), sizes)[1]


def counts_of(layouts: Sequence[Layout]) -> dict[tuple, int]:
  """K of each stack, all its leaves together: what `plans_of` takes."""
  counts: dict[tuple, int] = {}
  for layout in layouts:
    counts[layout.stack] = counts.get(layout.stack, 0) + layout.count
  return counts


def _take(x: jax.Array, index: np.ndarray, axis: int) -> jax.Array:
  """x at `index` along an unsharded axis, zero where that is behind its end."""
  if np.array_equal(index, np.arange(x.shape[axis])):
    return x
  return jnp.take(x, index, axis, mode="fill", fill_value=0)


def _where_real(function: Callable[[jax.Array], jax.Array], x: jax.Array, real: np.ndarray) -> jax.Array:
  """`function` of the matrices of x [*mesh, K, R, C] where `real` [*mesh, K] says that there is one; zero elsewhere.

  One matrix at a time: those that are few are large, and a loop over several would do the work of the fullest device."""
  lead = real.ndim - 1
  spec = PartitionSpec(*mesh_sizes())

  def local(x: jax.Array, real: jax.Array) -> jax.Array:
    one = lambda slot: jax.lax.cond(slot[1], function, jnp.zeros_like, slot[0])
    return jax.lax.map(one, (x.reshape(x.shape[lead:]), real.reshape(-1))).reshape(x.shape)
  return jax.shard_map(local, in_specs=(spec, spec), out_specs=spec, check_vma=False)(x, jnp.asarray(real))


def _apply(function: Callable[[jax.Array], jax.Array], spread: Sequence[jax.Array], plans: Sequence[Plan],
           sizes: Mapping[str, int]) -> list[jax.Array]:
  """`function` of the matrices of stacks [*mesh, K, R, C] of one shape: one batch of all that every device has, and one by
  one those that only some have."""
  axis = len(sizes)
  whole = [plan.whole for plan in plans]
  rest = [x.shape[axis] - count for x, count in zip(spread, whole)]
  of_all: list[Any] = [None] * len(spread)
  of_some: list[Any] = [None] * len(spread)
  if any(whole):
    batch = function(_join([x[(slice(None),) * axis + (slice(count),)] for x, count in zip(spread, whole)], axis))
    of_all = _cut(_constrain(batch, tuple(sizes), 1, [(), ()] if sizes else None), whole, axis)
  if any(rest):
    batch = _join([x[(slice(None),) * axis + (slice(count, None),)] for x, count in zip(spread, whole)], axis)
    real = np.concatenate([plan.real[..., count:] for plan, count in zip(plans, whole)], -1)
    of_some = _cut(_where_real(function, batch, real), rest, axis)
  return [_join([part for part in parts if part is not None], axis) for parts in zip(of_all, of_some)]


def _join(arrays: Sequence[jax.Array], axis: int) -> jax.Array:
  return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays, axis)


def _cut(x: jax.Array, counts: Sequence[int], axis: int) -> list[jax.Array]:
  """The inverse of `_join`: pieces of these sizes."""
  stops = [sum(counts[:i + 1]) for i in range(len(counts))]
  return [jax.lax.slice_in_dim(x, stop - count, stop, axis=axis) for stop, count in zip(stops, counts)]


def map_matrices(function: Callable[[jax.Array], jax.Array], leaves: Sequence[jax.Array], axes: Sequence[MatrixAxes],
                 specs: Sequence[PartitionSpec | None] | None = None) -> list[jax.Array]:
  """Applies `function` to all matrices of all leaves, in one batch for every matrix shape, evenly spread over all devices as
  long as its work grows like that of Newton-Schulz.

  Args:
    function: [..., R, C] -> the same shape, R <= C, each matrix by itself.
    leaves: Arrays of one dtype.
    axes: The matrix axes of each leaf; a matrix is handed over transposed where it has more rows than columns.
    specs: How each leaf is sharded on the ambient mesh; None = unknown: the partitioner finds the ways.

  Returns:
    Arrays like leaves.
  """
  sizes = mesh_sizes()
  specs = [None] * len(leaves) if specs is None else specs
  layouts = [layout_of(x.shape, pair, spec, sizes) for x, pair, spec in zip(leaves, axes, specs)]
  members: dict[Any, list[int]] = {}
  for i, layout in enumerate(layouts):
    members.setdefault(layout.stack, []).append(i)
  plans, _ = plans_of(counts_of(layouts), sizes)
  spread: dict[Any, jax.Array] = {}
  by_shape: dict[Any, list[Any]] = {}
  for stack, indices in members.items():
    x_PKM = _join([_to_stack(leaves[i], layouts[i], sizes) for i in indices], len(stack[0]))
    spread[stack] = _spread(_take(x_PKM, plans[stack].slots(), len(stack[0])), stack, sizes)
    by_shape.setdefault(spread[stack].shape[-2:], []).append(stack)
  results: list[Any] = [None] * len(leaves)
  for stacks in by_shape.values():
    done = _apply(function, [spread[stack] for stack in stacks], [plans[stack] for stack in stacks], sizes)
    for stack, x in zip(stacks, done):
      indices = members[stack]
      x_PKM, slots = _gather(x, stack, sizes, plans[stack])
      x_PKM = _take(x_PKM, np.flatnonzero(slots < plans[stack].counts.sum()), len(stack[0]))
      for i, piece in zip(indices, _cut(x_PKM, [layouts[i].count for i in indices], len(stack[0]))):
        results[i] = _from_stack(piece, layouts[i], leaves[i].shape)
  return results
