"""Where matrices go: none is lost, equal devices work equally, and the released models' optimizer is spread evenly."""

import math
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

import deepseek_v4 as dsv4
from deepseek_v4 import config as c
from deepseek_v4 import optim, sharding
from deepseek_v4.optim import batches
from deepseek_v4.optim.newton_schulz import COEFFICIENTS, flops
from deepseek_v4.optim.placement import Group, place, room_for
from deepseek_v4.training.state import abstract_state
from tests.training.small import leaves

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SIZES = {"data": 2, "fsdp": 3, "expert": 4}


@pytest.mark.parametrize("groups", [
  [Group(5, (), ("data", "fsdp", "expert"), 1.0)],
  [Group(50, (), ("expert", "data", "fsdp"), 1.0), Group(3, (), ("fsdp", "data", "expert"), 4.0)],
  [Group(40, ("expert",), ("data", "fsdp"), 1.0), Group(7, (), ("data", "fsdp", "expert"), 9.0)],
  [Group(0, (), ("data", "fsdp", "expert"), 1.0), Group(6, ("expert", "fsdp"), ("data",), 2.0)],
  [Group(1, ("fsdp",), ("data", "expert"), 2.0), Group(9, ("data",), ("expert", "fsdp"), 3.0)],
])
def test_every_matrix_has_one_place_and_the_work_is_what_is_placed(groups):
  """The work of each device once more, from the counts, one device after another."""
  counts, load = place(groups, SIZES)
  for group, found in zip(groups, counts):
    assert found.shape == tuple(SIZES[name] for name in group.left) and found.sum() == group.count
    assert found.max() <= room_for(group.count, found.size)
  for at in np.ndindex(*SIZES.values()):
    where = dict(zip(SIZES, at))
    work = sum(group.cost * found[tuple(where[name] for name in group.left)] for group, found in zip(groups, counts))
    assert load[at] == work


def test_small_matrices_fill_what_large_ones_leave():
  """7 matrices of 12 units, and 640 of one unit for each of 4 experts' devices. The large ones lie together in 2 of the 6
  places that an expert's matrices have: (640 + 2 x 12) / 6 units, rounded up, for each place."""
  left = ("data", "fsdp", "expert")
  (of_experts, of_large), load = place([Group(640, ("expert",), left[:2], 1.0), Group(7, (), left, 12.0)], SIZES)
  assert sorted(of_large.sum(2).reshape(-1)) == [0, 0, 0, 0, 3, 4]
  assert load.max() == 111 and sorted(of_experts.reshape(-1))[:2] == [99, 99]


def test_room_is_an_eighth_more_than_evenly_spread():
  assert [room_for(count, 8) for count in (1, 8, 9, 56, 64, 72)] == [1, 1, 2, 7, 9, 10]


def test_flops_are_those_of_three_products():
  """Gram matrix, its square, polynomial times matrix, of 2 x 3: 2 (2 2 3 + 2 2 2 + 2 2 3) a step."""
  assert flops(3, 2) == flops(2, 3) == len(COEFFICIENTS) * 2 * (12 + 8 + 12)


# ---- the released models on pods ---------------------------------------------------------------------------------------
@pytest.fixture(scope="module", params=["v4_pro", "v4_flash"])
def model(request):
  """(name, run, shapes of the parameters); nothing is allocated."""
  run = c.load(CONFIGS / f"{request.param}.py")
  return request.param, run, abstract_state(run).params


MESHES = {"v4_pro": [dict(data=4, fsdp=16, expert=32), dict(data=2, fsdp=16, expert=32), dict(fsdp=16, expert=128)],
          "v4_flash": [dict(fsdp=8, expert=16), dict(data=2, fsdp=8, expert=16), dict(fsdp=16, expert=8)]}
PODS = {"v4_pro": ["pod_pro_4k", "pod_pro_64k", "pod_pro_1m", "pod_pro_tpu7x"],
        "v4_flash": ["pod_flash_4k", "pod_flash_64k", "pod_flash_1m", "pod_flash_v6e", "pod_flash_tpu7x"]}


def work(shapes, params, mesh, names):
  """(FLOPs of each device by the table of what is a matrix where, those that the planner promises, of all matrices) for the
  leaves of `params`, by name, in these shapes."""
  axes = matrix_axes_of(params)
  specs = leaves(jax.tree.map(lambda place: place.spec, sharding.parameter_shardings(params, mesh)))
  sizes = {name: size for name, size in mesh.shape.items() if size > 1}
  chosen = [name for name in axes if name in shapes and names in name]
  leaf = lambda name: (shapes[name], axes[name], specs[name])
  sides = lambda name: [math.prod(shapes[name][i] for i in side) for side in axes[name]]
  of_one = lambda r, k: len(COEFFICIENTS) * (4 * min(r, k) ** 2 * max(r, k) + 2 * min(r, k) ** 3)
  total = sum(math.prod(shapes[name]) // math.prod(sides(name)) * of_one(*sides(name)) for name in chosen)
  counts = batches.counts_of([batches.layout_of(*leaf(name), sizes) for name in axes if name in shapes])
  plans, _ = batches.plans_of(counts, sizes)
  wanted = {batches.layout_of(*leaf(name), sizes).stack for name in chosen}
  done = sum(plans[stack].real.sum(-1) * of_one(math.prod(stack[1]), math.prod(stack[2])) for stack in wanted)
  promised = batches.flops_of_devices(*zip(*map(leaf, chosen)), sizes)
  return done, promised, total


@pytest.mark.parametrize("number", range(3))
def test_newton_schulz_is_spread_evenly_over_a_pod(model, number):
  check_spread(*model, MESHES[model[0]][number])


def test_newton_schulz_is_spread_evenly_over_the_pods_of_the_configs(model):
  for pod in PODS[model[0]]:
    mesh = c.load(CONFIGS / f"{pod}.py").mesh
    check_spread(*model, {axis: getattr(mesh, axis) for axis in sharding.MESH_AXES})


def test_all_pods_of_the_configs_are_looked_at():
  assert sorted(sum(PODS.values(), [])) == sorted(path.stem for path in CONFIGS.glob("pod_*.py"))


def test_what_replicas_gather_of_each_other_is_about_a_layer(model):
  """Orthogonalised matrices, over slices and over `data`, by the stack that travels: of the pods of the configs on two
  slices in no block of the walk more than the dense weights of a layer, and where it ends (what no scan holds, the
  prediction block, the last repeats) 1.35 times as many; on meshes that no config has 1.75 times."""
  name, run, params = model
  shapes = {path: x.shape for path, x in leaves(params).items()}
  units = {path.split("/")[1] for path in shapes if "/unit_" in path}
  dense = max(sum(math.prod(shape[1:]) for path, shape in shapes.items() if f"/{unit}/" in path and "/experts/" not in path)
              for unit in units)
  pods = [c.load(CONFIGS / f"{pod}.py").mesh for pod in PODS[name]]
  on_slices = [{axis: getattr(mesh, axis) for axis in sharding.MESH_AXES} | {"dcn_data": 2} for mesh in pods]
  for axes in (*MESHES[name], *on_slices):
    walked, rest = gathered_of(run, params, shapes, axes)
    few = axes in on_slices
    assert walked <= (1 if few else 1.75) * dense and rest <= (1.35 if few else 1.75) * dense, (axes, walked, rest, dense)


def gathered_of(run, params, shapes, axes):
  """The most numbers of a stack that replicas gather on a device, in a block of the walk and of all that is not walked."""
  sizes = tuple(axes.get(axis, 1) for axis in sharding.MESH_AXES)
  mesh = AbstractMesh(sizes, sharding.MESH_AXES, axis_types=(AxisType.Auto,) * len(sizes))
  places, over = sharding.parameter_shardings(params, mesh), {axis: n for axis, n in mesh.shape.items() if n > 1}
  with jax.sharding.use_abstract_mesh(mesh):
    length, end = optim.block_of(run.optimizer, params, places)
  specs = leaves(jax.tree.map(lambda place: place.spec, places))
  found = {}
  for path, pair in matrix_axes_of(params).items():
    experts = "/unit_" in path and "/moe/experts/" in path
    for walked, repeats in ((True, length * experts), (False, shapes[path][0] - end * experts)):
      if not repeats:
        continue
      stack = batches.layout_of((repeats, *shapes[path][1:]), pair, specs[path], over).stack
      if (copies := batches.replicas(stack, over)) > 1:
        size = repeats * math.prod(shapes[path][1:]) * copies / mesh.size
        found[walked, stack] = found.get((walked, stack), 0) + size
  return tuple(max((x for (of, _), x in found.items() if of == walked), default=0) for walked in (True, False))


def matrix_axes_of(params):
  """{path: MatrixAxes} of the leaves that Muon updates."""
  is_axes = lambda x: isinstance(x, optim.MatrixAxes)
  return {"/".join(sharding.path_names(path)): pair for path, pair in jax.tree_util.tree_leaves_with_path(
    optim.matrix_axes(params), is_leaf=is_axes) if is_axes(pair)}


def check_spread(name, run, params, axes):
  """As an update walks. Of everything a chip does at most 1.2 times the mean, if it waits for the busiest one in every
  block, and 2% of a step's FLOPs at the run's batch; of the routed experts at most 1.1 times their mean."""
  sizes = tuple(axes.get(axis, 1) for axis in sharding.MESH_AXES)
  mesh = AbstractMesh(sizes, sharding.MESH_AXES, axis_types=(AxisType.Auto,) * len(sizes))
  with jax.sharding.use_abstract_mesh(mesh):
    length, end = optim.block_of(run.optimizer, params, sharding.parameter_shardings(params, mesh))
  assert 0 < length <= end
  shapes = {name: x.shape for name, x in leaves(params).items()}
  walked = {name: (length, *shape[1:]) for name, shape in shapes.items() if "/unit_" in name and "/moe/experts/" in name}
  rest = shapes | {name: (shapes[name][0] - end, *shape[1:]) for name, shape in walked.items()}
  everything, experts = ([work(part, params, mesh, of) for part in (walked, rest)] for of in ("", "moe/experts"))
  blocks = (end // length, 1)
  for done, promised, total in everything:
    np.testing.assert_array_equal(done, promised)
    assert done.sum() == total
  total, of_experts = (sum(n * part[2] for n, part in zip(blocks, parts)) for parts in (everything, experts))
  busiest = sum(n * part[0].max() for n, part in zip(blocks, everything))
  of_expert = sum(n * part[0] for n, part in zip(blocks, experts)).max()
  step = run.stages[0].sequence_length * run.stages[0].batch_size * 6 * dsv4.count(run.model, 4096).parameters.total_active
  print(name, axes, length, end, busiest / (total / mesh.size), of_expert / (of_experts / mesh.size),
        busiest * mesh.size / step)
  assert busiest <= 1.2 * total / mesh.size
  assert of_expert <= 1.1 * of_experts / mesh.size
  assert busiest * mesh.size <= 0.02 * step
