"""A fresh state: born on its devices, the same on every mesh, moments beside their parameters; its shapes cost nothing."""

import dataclasses
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from deepseek_v4 import config as c
from deepseek_v4 import sharding
from deepseek_v4.training import state as state_lib
from tests.training.small import MODEL, RUN, at, differing, leaves, on_host, with_leaf

# Small to compile, with sizes that give themselves away in the compiled text: 24 experts of 40 x 48.
LITTLE = dataclasses.replace(RUN, model=dataclasses.replace(
  MODEL, num_hidden_layers=3, layer_types=(c.SLIDING,) * 3, mlp_layer_types=(c.HASH, c.LEARNED, c.LEARNED), hidden_size=40,
  n_routed_experts=24, moe_intermediate_size=48, num_nextn_predict_layers=0))
MESH = c.MeshConfig(data=1, fsdp=2, expert=4)


@pytest.fixture(scope="module")
def born():
  """(the compiled initialisation on a mesh, its state, the state on one device)."""
  mesh, key = sharding.make_mesh(MESH), jax.random.key(5)
  with jax.set_mesh(mesh):  # as the loop does
    compiled = state_lib.jit_init(LITTLE, mesh).lower(key).compile()
  alone = state_lib.jit_init(LITTLE).lower(key).compile()
  return compiled, compiled(key), alone(key)


def test_a_mesh_changes_no_number(born):
  _, state, alone = born
  assert differing(state, alone) == []


def test_fresh_variables_are_those_of_a_fresh_state(born):
  _, _, alone = born
  init_key, _ = jax.random.split(jax.random.key(5))
  fresh = state_lib.fresh_variables(LITTLE.model, init_key)
  assert differing(fresh, {"params": alone.params, "router": alone.router}) == []


def test_what_is_compiled_in_parts_is_the_same_state(born):
  """`init_state` has the leaves made by several programs, each where its leaves belong."""
  _, state, _ = born
  made = state_lib.init_state(LITTLE, jax.random.key(5), sharding.make_mesh(MESH))
  assert differing(made, state) == []
  assert jax.tree.map(lambda x: x.sharding, made) == jax.tree.map(lambda x: x.sharding, state)


def test_weights_are_born_where_they_belong(born):
  """No device ever holds a whole matrix: 24 experts, or 40 rows of one, occur in no shape of the program."""
  compiled, state, _ = born
  for name, x in leaves(state.params).items():
    axes, mesh = sharding.parameter_axes(name.split("/"), x.ndim), x.sharding.mesh
    assert x.sharding == jax.NamedSharding(mesh, sharding.parameter_spec(axes, x.shape, mesh.shape)), name
  experts = state.params["layers"]["unit_0"]["moe"]["experts"]["up"]
  assert {shard.data.shape for shard in experts.addressable_shards} == {(2, 3, 40, 48)}
  shapes = {tuple(map(int, s.split(","))) for s in re.findall(r"(?:f32|u32|u64)\[([\d,]+)\]", compiled.as_text())}
  assert any(shape[-3:] == (3, 40, 48) for shape in shapes)
  assert [shape for shape in shapes if np.prod(shape) >= 24 * 20 * 48] == []
  largest = 2 * 3 * 6 * 20 * 48 * 4  # one device's part of all experts, float32
  assert compiled.memory_analysis().temp_size_in_bytes < 4 * largest


def test_moments_lie_beside_their_parameters(born):
  _, state, _ = born
  params = leaves(state.params)
  found = []
  for name, x in leaves(state.opt_state).items():
    moment = re.search(r"/(?:trace|mu|nu)/(.*)", name)
    if moment is None:
      assert x.shape == () and x.sharding.is_fully_replicated, name
    else:
      assert x.shape == params[moment[1]].shape and x.sharding == params[moment[1]].sharding, name
      found.append(moment[1])
  assert set(found) == set(params)
  assert state.step.sharding.is_fully_replicated and state.key.sharding.is_fully_replicated


def test_moments_of_leaves_that_share_a_name():
  """mtp has a final_norm and an hc_head of its own: a moment must find the longest path that fits, not the shortest."""
  mesh = sharding.make_mesh(MESH)
  shapes = jax.eval_shape(lambda key: state_lib.init_state(RUN, key), jax.random.key(0))
  # give one of two leaves of the same name another place, as if the table told them apart
  params = sharding.parameter_shardings(shapes.params, mesh)
  params["mtp"]["hc_head"]["fn"] = jax.NamedSharding(mesh, P())
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sharding, "parameter_shardings", lambda tree, mesh: params)
    places = leaves(state_lib.state_shardings(shapes, mesh).opt_state)
  of = lambda end: {place.spec for name, place in places.items() if re.search(r"/(trace|mu|nu)/" + end, name)}
  assert of("mtp/hc_head/fn") == {P()} and of("hc_head/fn") == {P(("fsdp", "expert", "context"), None)}


def test_a_fresh_state(born):
  _, _, state = born
  assert int(state.step) == 0
  assert [name for name, x in on_host(state.opt_state).items() if x.any()] == []
  assert not np.array_equal(jax.random.key_data(state.key), jax.random.key_data(jax.random.key(5)))
  params, router = on_host(state.params), on_host(state.router)
  assert {x.dtype for x in params.values()} == {np.dtype("float32")}
  for name, x in params.items():
    if x.size > 500 and "position_bias" not in name:
      assert x.std() == pytest.approx(MODEL.init_std, rel=0.1) and abs(x.mean()) < 2e-3, name
  # layers and experts of one stack are drawn apart
  up = params["layers/unit_0/moe/experts/up"]
  assert len(np.unique(up[..., 0, 0])) == up[..., 0, 0].size == 48
  table = router["layers/layer_00/moe/router/hash_table"]
  assert table.any() and table.max() < 24 and (table[:, 0] != table[:, 1]).all()
  assert not router["layers/unit_0/moe/router/bias"].any()


def test_shapes_allocate_nothing_and_are_those_of_the_state(born):
  _, state, _ = born
  run = c.load(Path(__file__).resolve().parents[2] / "configs" / "v4_pro.py")
  before = {id(x) for x in jax.live_arrays()}
  state_lib.abstract_state(run)
  assert sum(x.size for x in jax.live_arrays() if id(x) not in before) < 100  # a key, or a few scalars
  shapes, arrays = leaves(state_lib.abstract_state(LITTLE, sharding.make_mesh(MESH))), leaves(state)
  assert shapes.keys() == arrays.keys()
  for name, x in arrays.items():
    assert (shapes[name].shape, shapes[name].dtype, shapes[name].sharding) == (x.shape, x.dtype, x.sharding), name


def test_a_mesh_that_does_not_fit_is_refused_before_anything_is_compiled():
  with pytest.raises(ValueError, match="model.n_routed_experts = 24: expected a multiple of mesh.expert = 5"):
    state_lib.init_state(LITTLE, jax.random.key(0), sharding.make_mesh(c.MeshConfig(data=1, expert=5), jax.devices()[:5]))


def test_helpers_of_these_tests():
  """`differing` sees one bit, in NaNs too, and `with_leaf` changes a copy."""
  tree = {"a": np.array([1.0, np.nan], np.float32), "key": jax.random.key(0)}
  other = with_leaf(tree, "a", at(0, np.nextafter(np.float32(1), np.float32(2))))
  assert differing(tree, tree) == [] and differing(tree, other) == ["a"] and tree["a"][0] == 1
  assert differing(tree, tree | {"key": jax.random.key(1)}) == ["key"]
