"""Experts whose tokens travel: the tables beside a loop over rows, and values and gradients beside one device's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_v4 import sharding
from deepseek_v4.config import MeshConfig
from deepseek_v4.model import exchange
from deepseek_v4.model.experts import cheaper_exchange, routed
from pallas_kernels.grouped_matmul import row_tile

EXPERTS, TOP_K = 16, 3


def picks(kind, tokens, rng):
  """int32 [tokens, k]: which experts; -1 = none, as of tokens that fill a wave."""
  if kind == "random":
    return rng.integers(0, EXPERTS, (tokens, TOP_K)).astype(np.int32)
  if kind == "one expert":
    return np.full((tokens, TOP_K), 5, np.int32)
  if kind == "few experts":  # most experts, and all of some devices, get nothing
    return rng.choice([0, 3, 13], (tokens, TOP_K)).astype(np.int32)
  if kind == "one sender":  # the second half of the tokens stays without an expert
    return np.where(np.arange(tokens)[:, None] < tokens // 2, rng.integers(0, EXPERTS, (tokens, TOP_K)), -1).astype(np.int32)
  return np.full((tokens, TOP_K), -1, np.int32)


KINDS = ("random", "one expert", "few experts", "one sender", "none")


# ---- the tables --------------------------------------------------------------------------------------------------------
def apply(parts, rooms, slices):
  """What an exchange of the devices' rows must do, slice by slice, by the definition of `ragged_all_to_all`."""
  shards, out = len(parts), [np.full(room, -1) for room in rooms]
  for device, (rows, its) in enumerate(zip(parts, slices)):
    each = len(its.start) // shards
    for k, (start, sent, there) in enumerate(zip(its.start, its.sent, its.there)):
      target, taken = k // each, rows[start:start + sent]
      assert len(taken) == sent and (out[target][there:there + sent] == -1).all() and there + sent <= rooms[target]
      out[target][there:there + sent] = taken
      assert slices[target].received[device * each + k % each] == sent
  return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shards", [2, 4, 8])
def test_every_row_comes_to_its_expert_once_and_back(shards, kind):
  """Rows are numbers. Over all passes each arrives once, its expert's from a tile's start on, and returns to its place."""
  tokens, tile, experts = 20, 8, EXPERTS // shards
  rng = np.random.default_rng(shards)
  sorted_picks = [np.sort(picks(kind, tokens, rng).reshape(-1)) for _ in range(shards)]
  sorted_picks = [np.concatenate([p[p >= 0], p[p < 0]]) for p in sorted_picks]
  counts = np.array([[(p == e).sum() for e in range(EXPERTS)] for p in sorted_picks], np.int32)
  rows, room = tokens * TOP_K, exchange.room_for(tokens * TOP_K, experts, tile)
  less = exchange.room_of_others(room, tile)
  table = exchange.make_table(jnp.asarray(counts), tile)
  assert table.most == (-(-counts.sum(0) // tile) * tile).reshape(shards, -1).sum(1).max()
  parts, back = [np.arange(rows) + 1000 * d for d in range(shards)], [np.full(rows, -1) for _ in range(shards)]
  seen = []
  for first, size in [(0, room), *((first, less) for first in range(room, int(table.most), less))]:
    found = [jax.tree.map(np.asarray, exchange.route_of(table, first, size, own)) for own in range(shards)]
    routes, sizes = zip(*found)
    there = apply(parts, [size] * shards, [route.out for route in routes])
    for own, (arrived, own_sizes) in enumerate(zip(there, sizes)):
      start = 0
      for e, count in enumerate(own_sizes):
        assert {sorted_picks[row // 1000][row % 1000] for row in arrived[start:start + count]} <= {own * experts + e}
        start += -(-count // tile) * tile
      assert (arrived >= 0).sum() == own_sizes.sum() and start <= size
    seen += [row for arrived in there for row in arrived if row >= 0]
    for device, returned in enumerate(apply(there, [rows] * shards, [route.back for route in routes])):
      back[device] = np.where(returned >= 0, returned, back[device])
  wanted = [row for device, p in enumerate(sorted_picks) for row in np.flatnonzero(p >= 0) + 1000 * device]
  assert sorted(seen) == wanted
  assert all((b[p >= 0] == part[p >= 0]).all() for b, p, part in zip(back, sorted_picks, parts))


def test_room_is_a_quarter_more_than_is_sent():
  """4,096 tokens with 6 picks, 6 of Pro's 384 experts on each of 64 devices: 30,720 rows, and a tile for each expert."""
  tile = row_tile(24576, 6, "pallas")
  assert exchange.room_for(24576, 6, tile) == 30720 + 6 * tile == 32256
  assert exchange.room_of_others(32256, tile) == 8192  # the next multiple of a tile


@pytest.mark.parametrize("shards, dtype, form", [
  (2, jnp.bfloat16, "gather"), (4, jnp.bfloat16, "gather"), (5, jnp.bfloat16, "all_to_all"),
  (64, jnp.bfloat16, "all_to_all"), (6, jnp.float32, "gather"), (8, jnp.float32, "all_to_all")])
def test_the_cheaper_way_is_taken(shards, dtype, form):
  """6 picks. Gathered, a token's channels go to all other devices in `dtype` and come back in float32; sent, each pick's
  go and come in `dtype`, one in `shards` of them to nobody."""
  size = jnp.dtype(dtype).itemsize
  gathered, sent = (shards - 1) * (size + 4), 6 * (shards - 1) / shards * 2 * size
  assert (sent < gathered) == (form == "all_to_all")
  choose = functools.partial(cheaper_exchange, top_k=6, experts=384 // shards, shards=shards, dtype=dtype)
  assert choose(4096, rounding=False) == form
  assert choose(4096, rounding=True) == choose(32, rounding=False) == "gather"


# ---- values and gradients ----------------------------------------------------------------------------------------------
def arrays_for(rng, rows, length, d=6, f=4):
  shapes = (rows, length, d), (rows, length, TOP_K), (EXPERTS, d, f), (EXPERTS, d, f), (EXPERTS, f, d)
  return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


@functools.cache
def on_mesh(sizes, form, wave=None):
  """The jitted (experts, x, weights, matrices) -> gradients, y of the experts on a mesh (None: one device)."""
  tokens = ("batch", "sequence")
  sizes = dict(sizes)
  mesh = sharding.make_mesh(MeshConfig(**sizes), jax.devices()[:np.prod(list(sizes.values()))])

  def both(experts, x, weights, *matrices):
    own = sharding.weight_axes("expert", EXPERTS)
    axes = (tokens, tokens, tokens, (own, None, "mlp"), (own, None, "mlp"), (own, "mlp", None))

    def total(x, weights, *matrices):
      one = functools.partial(routed, limit=1.0, kernels="blockwise", expert_axis=own or None,
                              width_axis=sharding.axis_name("mlp"), exchange=form, wave=wave)
      y = sharding.per_shard(one, axes, tokens)(x, experts, weights, *matrices)
      return (y ** 2).sum(), y
    return jax.grad(total, argnums=range(5), has_aux=True)(x, weights, *matrices)
  return sharding.OnMesh(jax.jit(both), mesh)


MESHES = [dict(data=1, expert=2), dict(data=1, expert=4), dict(data=1, expert=8), dict(data=2, expert=4),
          dict(data=1, fsdp=2, expert=2, tensor=2), dict(data=1, expert=4, context=2)]
NAME = lambda sizes: " ".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [
  pytest.param(sizes, id=NAME(sizes), marks=[pytest.mark.long] * (sizes not in (MESHES[1], MESHES[4]))) for sizes in MESHES])
def test_rows_that_travel_give_what_one_device_gives(sizes, kind):
  """float32; weights' gradients are sums of up to 500 products of order 10 in another order. With all picks on one expert
  of four devices the rows come in a dozen passes."""
  rng = np.random.default_rng(0)
  arrays = arrays_for(rng, 8, 20)
  experts = picks(kind, 160, rng).reshape(8, 20, TOP_K)
  wanted, y = jax.device_get(on_mesh((("data", 1),), "gather")(experts, *arrays))
  got, y_sent = jax.device_get(on_mesh(tuple(sizes.items()), "all_to_all")(experts, *arrays))
  np.testing.assert_allclose(y_sent, y, atol=2e-6 * max(np.abs(y).max(), 1))
  for one, other in zip(wanted, got):
    np.testing.assert_allclose(other, one, atol=5e-6 * max(np.abs(one).max(), 1))


@pytest.mark.parametrize("kind", ["random", "one expert"])
def test_waves_of_rows_that_travel(kind):
  """7 of a device's 40 tokens at a time; the last wave has 5, and two that pick nothing."""
  rng = np.random.default_rng(1)
  arrays = arrays_for(rng, 8, 20)
  experts = picks(kind, 160, rng).reshape(8, 20, TOP_K)
  wanted, y = jax.device_get(on_mesh((("data", 1),), "all_to_all")(experts, *arrays))
  got, y_sent = jax.device_get(on_mesh((("data", 1), ("expert", 4)), "all_to_all", wave=28)(experts, *arrays))
  np.testing.assert_allclose(y_sent, y, atol=2e-6 * np.abs(y).max())
  for one, other in zip(wanted, got):
    np.testing.assert_allclose(other, one, atol=5e-6 * np.abs(one).max())


def test_boxes_hold_what_a_ragged_exchange_moves():
  """Of `ragged_all_to_all`'s own example (its docstring): rows of `into` that nothing comes to stay."""
  mesh = sharding.make_mesh(MeshConfig(data=1, expert=2), jax.devices()[:2])
  rows = jnp.array([1, 2, 2, 3, 4, 0], jnp.float32)[:, None]
  into = jnp.full((8, 1), 9.0)
  of = lambda *numbers: jnp.array(numbers, jnp.int32)
  slices = exchange.Slices(start=of(0, 1, 0, 1), sent=of(1, 2, 1, 1), there=of(0, 0, 1, 2), received=of(1, 1, 2, 1))
  run = functools.partial(exchange._IMPLEMENTATIONS["blockwise"], axis="expert")
  with jax.set_mesh(mesh):
    out = jax.jit(sharding.per_shard(run, (("expert",),) * 3, ("expert",)))(rows, into, slices)
  np.testing.assert_array_equal(out[:, 0], [1, 3, 9, 9, 2, 2, 4, 9])
