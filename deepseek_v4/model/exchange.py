"""Rows that travel to their experts' devices and back: expert parallelism that drops no token (report 3.1).

Every device sorts its picks by expert (`dispatch.py`), and the row of each goes to the device of its expert. It lands where
the grouped matmul wants it: an expert's rows from a tile's start on, those of one sender behind another's, so that nothing
is sorted again where it arrives. All tables follow from one gathered array, how many rows each device has for each expert;
the way back, and the gradient of either way, is the other way with sent and received sizes exchanged.

Room. N devices that send P rows each may send all of them to one, and no memory has room for that. A device has room for
`room_for(P)` rows, a quarter more than it sends itself. What exceeds it follows in passes of a quarter of that room, as many
as the fullest device of the mesh needs, counted at run time: none while no device gets a quarter more than the mean. The
first pass is differentiated as it stands; the others are a loop whose gradient lets the rows travel once more.

Axis letters: N devices of the mesh axis   E experts of all devices   P rows of a sender   C rows that a device has room for
              D hidden size   K slices of rows, one for each expert or for each sender and own expert: E in either direction
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Callable

import jax
import jax.numpy as jnp

import pallas_kernels
import pallas_kernels.grouped_matmul as grouped_matmul
from deepseek_v4 import sharding

Axes = str | tuple[str, ...]  # of the mesh, together one axis of devices

_fields = functools.partial(jax.tree_util.register_dataclass, meta_fields=[])


# ---- one exchange -----------------------------------------------------------------------------------------------------
@functools.partial(_fields, data_fields=["start", "sent", "there", "received"])
@dataclasses.dataclass(frozen=True)
class Slices:
  """What one exchange moves, int32 [K] each; K / N slices go to each device of the axis, in its order.

  Attributes:
    start: first row of each slice in the rows of its sender.
    sent: rows of each slice.
    there: where its first row lands in the receiver's rows.
    received: rows of the slices that come, K / N from each device.
  """

  start: jax.Array
  sent: jax.Array
  there: jax.Array
  received: jax.Array


def _ragged(x_MD: jax.Array, into_CD: jax.Array, slices: Slices, *, axis: Axes) -> jax.Array:
  return jax.lax.ragged_all_to_all(x_MD, into_CD, slices.start, slices.sent, slices.there, slices.received, axis_name=axis)


def _boxes(x_MD: jax.Array, into_CD: jax.Array, slices: Slices, *, axis: Axes) -> jax.Array:
  """The same for backends without a ragged exchange: a whole box of the receiver's size travels for each device."""
  shards, (rows, room) = jax.lax.axis_size(axis), (x_MD.shape[0], into_CD.shape[0])
  device_K = jnp.arange(slices.start.size) // (slices.start.size // shards)

  def of_rows(value_K):  # of the slice in which a row lies; 0 outside
    steps = jnp.zeros(rows + 1, jnp.int32).at[slices.start].add(value_K).at[slices.start + slices.sent].add(-value_K)
    return jnp.cumsum(steps)[:rows]

  place_M = jnp.arange(rows) + of_rows(device_K * room + slices.there - slices.start)
  place_M = jnp.where(of_rows(jnp.ones_like(device_K)) > 0, place_M, shards * room)
  filled = jnp.zeros(shards * room, bool).at[place_M].set(True, mode="drop")
  boxes = jnp.zeros((shards * room, x_MD.shape[1]), x_MD.dtype).at[place_M].set(x_MD, mode="drop")
  swap = functools.partial(jax.lax.all_to_all, axis_name=axis, split_axis=0, concat_axis=0)
  filled, boxes = swap(filled.reshape(shards, room)), swap(boxes.reshape(shards, room, -1))
  return jnp.where(filled.any(0)[:, None], boxes.sum(0), into_CD)


_IMPLEMENTATIONS = {"reference": _boxes, "blockwise": _boxes, "interpret": _boxes, "pallas": _ragged}


@functools.partial(_fields, data_fields=["out", "back"])
@dataclasses.dataclass(frozen=True)
class Route:
  """The slices of one exchange, and those that bring the same rows back."""

  out: Slices
  back: Slices

  def reversed(self) -> "Route":
    """The way back of what went this way."""
    return Route(self.back, self.out)


def move(x_MD: jax.Array, into_CD: jax.Array, slices: Slices, *, axis: Axes, implementation: str) -> jax.Array:
  """`into_CD` with the rows that come to this device from all devices of a mesh axis; no gradient.

  Args:
    x_MD, into_CD: [M, D] and [C, D] of one dtype, the rows of this device and room for those that come.
    implementation: "pallas": `ragged_all_to_all`; the others run anywhere.
  """
  return pallas_kernels.pick("exchange", implementation, _IMPLEMENTATIONS)(x_MD, into_CD, slices, axis=axis)


def travel(x_MD: jax.Array, room: int, route: Route, **options: Any) -> jax.Array:
  """[room, D] in x's dtype: the rows that came to this device, 0 where none did. The gradient travels back; options as for
  `move`."""
  rows = x_MD.shape[0]

  def onto(x, count, slices):
    return move(x, jnp.zeros((count, x.shape[1]), x.dtype), slices, **options)

  @jax.custom_vjp
  def go(x_MD, route):
    return onto(x_MD, room, route.out)

  go.defvjp(lambda x, route: (go(x, route), route), lambda route, d_CD: (onto(d_CD, rows, route.back), None))
  return go(x_MD, route)


# ---- who sends what where ---------------------------------------------------------------------------------------------
@functools.partial(_fields, data_fields=["counts_NE", "first_NE", "place_NE", "most"])
@dataclasses.dataclass(frozen=True)
class Table:
  """The whole exchange, the same on every device of the axis.

  Attributes:
    counts_NE: int32, like the other two; rows of each sender for each expert.
    first_NE: the first of them among the sender's rows.
    place_NE: the same where they arrive, among all that the receiver gets.
    most: int32 [], rows of the fullest device, tiles that are partly empty included.
  """

  counts_NE: jax.Array
  first_NE: jax.Array
  place_NE: jax.Array
  most: jax.Array


def room_for(rows: int, experts: int, tile: int) -> int:
  """Rows that a device has room for, where each sends `rows`: a quarter more, and a tile that each of its experts may leave
  partly empty."""
  return grouped_matmul.padded_rows(rows + rows // 4, experts, tile)


def room_of_others(room: int, tile: int) -> int:
  """The same in the passes after the first."""
  return -(-room // (4 * tile)) * tile


def make_table(counts_NE: jax.Array, tile: int) -> Table:
  """From how many rows each device has for each expert, int32 [N, E]; every device owns E / N experts in their order."""
  before = lambda x, axis: jnp.cumsum(x, axis) - x
  taken_NE = (-(-counts_NE.sum(0) // tile) * tile).reshape(counts_NE.shape[0], -1)  # [devices, own experts]
  place_NE = before(taken_NE, 1).reshape(-1) + before(counts_NE, 0)
  return Table(counts_NE, before(counts_NE, 1), place_NE, taken_NE.sum(1).max())


def route_of(table: Table, start: jax.Array | int, room: int, own: jax.Array | int) -> tuple[Route, jax.Array]:
  """The exchange of what lands in rows [start, start + room) of each receiver, and how many rows of each of its experts the
  device gets, int32 [E / N].

  Args:
    start, room: multiples of the tile.
    own: place of the device on the axis.
  """
  shards, experts = table.counts_NE.shape
  of_pass = lambda place: jnp.clip(place - start, 0, room)
  there_NE = of_pass(table.place_NE)
  sent_NE = of_pass(table.place_NE + table.counts_NE) - there_NE
  start_NE = jnp.where(sent_NE > 0, table.first_NE + there_NE + start - table.place_NE, 0)
  mine = lambda x_NE: x_NE[own]  # [E], by receiver
  ours = lambda x_NE: jax.lax.dynamic_slice_in_dim(x_NE, own * (experts // shards), experts // shards, 1)
  out = Slices(mine(start_NE), mine(sent_NE), mine(there_NE), ours(sent_NE).reshape(-1))
  back = Slices(ours(there_NE).reshape(-1), ours(sent_NE).reshape(-1), ours(start_NE).reshape(-1), mine(sent_NE))
  return Route(out, back), ours(sent_NE).sum(0)


# ---- through the experts and back -------------------------------------------------------------------------------------
def through_experts(mlp: Callable[..., jax.Array], x_PD: jax.Array, counts_E: jax.Array, matrices: Any, *, axis: Axes,
                    tile: int, implementation: str) -> jax.Array:
  """Each row through its expert, on whichever device of the axis that is; differentiable in rows and matrices.

  Args:
    mlp: (rows [C, D], matrices, int32 [E / N] rows of each own expert) -> [C, D]; rows as in `grouped_matmul.expert_mlp`.
    x_PD: floating, dtype kept, sorted by expert; rows behind the last one of an expert stay here and come out as 0.
    counts_E: int32, rows of each expert.
    matrices: pytree of the device's own experts' weights.
  """
  rows = x_PD.shape[0]
  room = room_for(rows, counts_E.size // jax.lax.axis_size(axis), tile)
  less = room_of_others(room, tile)
  options = dict(axis=axis, implementation=implementation)

  def first(x_PD, matrices, table):
    route, sizes = route_of(table, 0, room, jax.lax.axis_index(axis))
    return travel(mlp(travel(x_PD, room, route, **options), matrices, sizes), rows, route.reversed(), **options)

  def others(table, one, result):
    """`result` after each further pass: one(result, how rows come here, how they return onto others, sizes) -> result."""
    def step(number, result):
      route, sizes = route_of(table, room + number * less, less, jax.lax.axis_index(axis))
      fetch = lambda x_PD: move(x_PD, jnp.zeros((less, x_PD.shape[1]), x_PD.dtype), route.out, **options)
      back = lambda y_CD, into_PD: move(y_CD, into_PD, route.back, **options)
      return one(result, fetch, back, sizes)
    return jax.lax.fori_loop(0, -(-jnp.maximum(table.most - room, 0) // less), step, result)

  def completed(y_PD, x_PD, matrices, table):
    one = lambda y_PD, fetch, back, sizes: back(mlp(fetch(x_PD), matrices, sizes), y_PD)
    return others(table, one, y_PD)

  @jax.custom_vjp
  def all_passes(x_PD, matrices, table):
    return completed(first(x_PD, matrices, table), x_PD, matrices, table)

  def forward(x_PD, matrices, table):
    y_PD, pull = jax.vjp(lambda *moving: first(*moving, table), x_PD, matrices)
    return completed(y_PD, x_PD, matrices, table), (pull, x_PD, matrices, table)

  def backward(saved, d_PD):
    pull, x_PD, matrices, table = saved

    def one(sums, fetch, back, sizes):
      d_x, d_own = jax.vjp(lambda *moving: mlp(*moving, sizes), fetch(x_PD), matrices)[1](fetch(d_PD))
      return back(d_x, sums[0]), jax.tree.map(jnp.add, sums[1], d_own)
    return *others(table, one, pull(d_PD)), None

  all_passes.defvjp(forward, backward)
  table = make_table(jax.lax.all_gather(counts_E, axis), tile)
  # All devices of a slice take as many passes, so that no collective of one group meets another group elsewhere in the
  # program; they would wait for the slowest group a few lines further down anyway. Other slices need not be asked.
  table = dataclasses.replace(table, most=jax.lax.pmax(table.most, sharding.SLICE_AXES))
  return all_passes(x_PD, matrices, table)
