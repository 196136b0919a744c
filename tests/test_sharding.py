"""The table of axes knows every parameter, meshes are made or refused by name, and a layout is what its axes say."""

import dataclasses
import re
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from deepseek_v4 import config as c
from deepseek_v4 import sharding
from deepseek_v4.analysis.count import dense_layer
from deepseek_v4.training.state import abstract_state
from tests.training.small import RUN, leaves, with_model

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SIZES = {"embed": "fsdp", "lora": "fsdp", "channels": "fsdp", "expert": "expert",
         **dict.fromkeys(("heads", "index_heads", "groups", "vocab", "head_vocab", "mlp"), "tensor")}


def mesh_of(**sizes):
  sizes = {"data": 1} | sizes
  return sharding.make_mesh(c.MeshConfig(**sizes), jax.devices()[:np.prod(list(sizes.values()))])


# ---- the table ---------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module", params=["v4_pro", "v4_flash", "tiny"])
def shapes(request):
  """(run, {path: shape} of params and router) of a real config; nothing is allocated."""
  run = c.load(CONFIGS / f"{request.param}.py")
  state = abstract_state(run)
  return run, {name: x.shape for name, x in (leaves(state.params) | leaves({"router": state.router})).items()}


def test_every_parameter_is_in_the_table_and_divides(shapes):
  """On any mesh that `check_model_divides` lets pass, every split axis is a multiple of its mesh axis."""
  run, named = shapes
  m = run.model
  largest = {"fsdp": np.gcd.reduce([m.hidden_size, m.q_lora_rank, m.o_lora_rank]), "expert": m.n_routed_experts,
             "tensor": np.gcd.reduce([m.num_attention_heads, m.o_groups, m.index_n_heads, m.vocab_size,
                                      m.moe_intermediate_size])}
  used = set()
  for name, shape in named.items():
    path = name.split("/")
    axes = sharding.parameter_axes(path, len(shape))
    assert len(axes) == len(shape)
    assert axes[0] is None or "unit_" not in name  # layers are never split
    assert not [(n, axis) for n, axis in zip(shape, axes) if axis and n % largest[SIZES[axis]]], name
    sharding.parameter_spec(axes, shape, dict.fromkeys(sharding.MESH_AXES, 1))
    used.add(sharding.leaf_name(path))
  # nothing in the table is left from another time
  assert set(sharding.PARAMETER_AXES) == used


def test_big_matrices_are_split(shapes):
  """What a pod cannot hold whole: all above a megabyte of the real models is split over fsdp, expert and context, of the
  experts' one axis or another."""
  _, named = shapes
  sizes = dict.fromkeys(sharding.MESH_AXES, 2)
  for name, shape in named.items():  # of a small model no matrix is that large, and the experts' rule holds all the same
    axes = sharding.parameter_axes(name.split("/"), len(shape))
    layers = 1 if "unit_" not in name else shape[0]
    if np.prod(shape) / layers * 4 > 1 << 20 and not name.startswith("router/"):
      spec = sharding.parameter_spec(axes, shape, sizes)
      used = [axis for one in spec for axis in (one if isinstance(one, tuple) else [one]) if axis]
      assert {"fsdp", "expert", "context"} <= set(used) and len(used) == len(set(used)), name
    assert ("expert" in axes) == ("moe/experts/" in name), name


@pytest.mark.parametrize("leaf, shape, expected", [
  ("attention/q_a", (24, 6), P(("fsdp", "expert", "context"), None)),
  ("attention/q_a", (20, 6), P(("fsdp", "expert"), None)),
  ("attention/q_a", (18, 6), P("fsdp", None)),
  ("attention/q_a", (9, 6), P("fsdp", None)),  # which jit then refuses
  ("moe/experts/gate", (8, 3, 6), P(("fsdp", "expert", "context"), None, "tensor")),
  ("moe/experts/gate", (4, 8, 6), P(("fsdp", "expert"), "context", "tensor")),
  ("moe/experts/gate", (6, 8, 6), P("expert", ("fsdp", "context"), "tensor")),
  ("moe/experts/down", (6, 8, 2), P("expert", "tensor", "fsdp")),
])
def test_an_axis_that_all_do_not_divide_is_split_over_the_first_of_them(leaf, shape, expected):
  tree = jax.ShapeDtypeStruct(shape, np.float32)
  for name in ("layers", "layer_00", *leaf.split("/"))[::-1]:
    tree = {name: tree}
  (placed,) = jax.tree.leaves(sharding.parameter_shardings(tree, mesh_of(fsdp=2, expert=2, context=2)))
  assert placed.spec == expected


@pytest.mark.parametrize("count, sizes, expected", [
  (256, dict(expert=64, fsdp=2), ("fsdp", "expert")), (256, dict(expert=32, context=8), ("expert", "context")),
  (256, dict(fsdp=2, expert=64, context=2), ("fsdp", "expert", "context")),
  (256, dict(fsdp=8, context=64), ("context",)), (256, dict(expert=8, context=64), ("expert",)),
  (384, dict(fsdp=8, expert=128, context=2), ("expert",)), (384, dict(fsdp=8, context=128), ("context",)),
  (384, dict(fsdp=128, expert=3), ("fsdp", "expert")), (8, dict(data=4, tensor=2), ()), (6, dict(fsdp=4), ()),
  (6, dict(expert=4), ("expert",))])  # refused by `check_model_divides`
def test_experts_are_split_over_expert_and_what_else_divides_them_most(count, sizes, expected):
  assert sharding.split_over("expert", count, dict.fromkeys(sharding.MESH_AXES, 1) | sizes) == expected


def test_names():
  assert sharding.leaf_name(("layers", "unit_0", "attention", "q_b")) == "attention/q_b"
  assert sharding.leaf_name(("params", "layers", "layer_03", "moe", "experts", "up")) == "moe/experts/up"
  assert sharding.leaf_name(("router", "mtp", "block", "moe", "router", "bias")) == "moe/router/bias"
  assert sharding.leaf_name(("mtp", "hc_head", "fn")) == "hc_head/fn"
  assert sharding.leaf_name(("mtp", "block", "attn_hc", "fn_pre")) == "attn_hc/fn_pre"


def test_axes_of_scanned_and_single_layers():
  path = ("layers", "unit_0", "moe", "experts", "down")
  assert sharding.parameter_axes(path, 4) == (None, "expert", "mlp", "embed")
  assert sharding.parameter_axes(path, 3) == ("expert", "mlp", "embed")
  with pytest.raises(ValueError, match="parameter layers/unit_0/moe/experts/down: 5 axes, expected 3, or one more"):
    sharding.parameter_axes(path, 5)
  with pytest.raises(ValueError, match="parameter layers/layer_00/attention/q_c: not in the table"):
    sharding.parameter_axes(("layers", "layer_00", "attention", "q_c"), 2)


def test_specs():
  assert sharding.spec((sharding.MeshAxes(("expert", "context")), None, "mlp")) == P(("expert", "context"), None, "tensor")
  assert sharding.spec(("embed", "vocab")) == P(None, "tensor")
  assert sharding.spec((None, "batch", "sequence")) == P(None, ("dcn_data", "data", "fsdp", "expert"), "context")
  assert sharding.spec(()) == P()


@pytest.mark.parametrize("axes", [("heads", "vocab"), ("batch", "channels"), ("expert", "batch"), ("head_vocab", "mlp"),
                                  ("shards", "sequence"), ("expert", "sequence"), ("heads", None, "heads")])
def test_two_axes_on_one_mesh_axis_are_refused(axes):
  with pytest.raises(ValueError, match=re.escape(f"logical axes {axes}: two of them lie on one mesh axis")):
    sharding.spec(axes)


def test_an_unknown_axis_is_refused_with_the_known_ones():
  with pytest.raises(ValueError, match="logical axis 'embedding': expected one of batch, sequence, .*lora"):
    sharding.spec(("embedding", None))


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("pod_*.py")), ids=lambda path: path.stem)
def test_no_pod_gathers_more_than_a_layer_has(path):
  """What is whole but for tensor where it is used: an expert's matrix, of Flash none; a layer's dense weights; what fsdp
  leaves of embedding and head."""
  run = c.load(path)
  m, sizes = run.model, {axis: getattr(run.mesh, axis) for axis in sharding.MESH_AXES}
  product = lambda axes: int(np.prod([sizes[axis] for axis in axes]))
  places, memory = product(sharding.split_over("expert", m.n_routed_experts, sizes)), product(sharding.MEMORY_AXES)
  assert "pro" in path.stem or places == memory
  assert "flash" in path.stem or places in (64, 128)  # of 384, by powers of two
  of_an_expert = m.n_routed_experts // places * m.hidden_size * m.moe_intermediate_size
  assert of_an_expert // sizes["tensor"] <= dense_layer(m)
  assert "fsdp" in sharding.split_over("head_vocab", m.vocab_size, sizes)
  assert m.vocab_size * m.hidden_size // (sizes["fsdp"] * sizes["tensor"]) <= dense_layer(m)


# ---- meshes ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("sizes, expected", [
  ({}, (1, 8, 1, 1, 1, 1)),
  (dict(data=1, fsdp=-1), (1, 1, 8, 1, 1, 1)),
  (dict(data=-1, fsdp=2, tensor=2), (1, 2, 2, 1, 1, 2)),
  (dict(data=2, expert=-1), (1, 2, 1, 4, 1, 1)),
  (dict(data=2, fsdp=2, expert=2, tensor=-1), (1, 2, 2, 2, 1, 1)),
  (dict(data=2, context=-1), (1, 2, 1, 1, 4, 1)),
  (dict(dcn_data=2, data=-1, fsdp=2), (2, 2, 2, 1, 1, 1)),
  (dict(dcn_data=-1, data=1, expert=2), (4, 1, 1, 2, 1, 1)),
])
def test_meshes(sizes, expected):
  mesh = sharding.make_mesh(c.MeshConfig(**sizes))
  assert mesh.axis_names == ("dcn_data", "data", "fsdp", "expert", "context", "tensor")
  assert mesh.devices.shape == expected
  assert mesh.devices.reshape(-1).tolist() == jax.devices()


def of_slices(*slices):
  """Devices as they come from several slices of CPUs: the emulated ones, each with the number of its slice."""
  return [types.SimpleNamespace(id=d.id, slice_index=i, platform="cpu", device_kind="cpu", process_index=0)
          for d, i in zip(jax.devices(), slices)]


def test_slices_lie_along_their_axis_in_whatever_order_their_devices_come(monkeypatch):
  monkeypatch.setattr(sharding, "Mesh", lambda devices, names, **_: devices)  # of devices that are not JAX's
  placed = sharding.make_mesh(c.MeshConfig(dcn_data=2, data=1, fsdp=2, tensor=2), of_slices(1, 0, 1, 0, 0, 1, 0, 1))
  assert placed.shape == (2, 1, 2, 1, 1, 2)
  assert [[d.id for d in part.reshape(-1)] for part in placed] == [[1, 3, 4, 6], [0, 2, 5, 7]]


@pytest.mark.parametrize("sizes, slices, message", [
  (dict(), [0] * 4 + [1] * 4, "mesh.dcn_data = 1: expected 2, the number of slices"),
  (dict(dcn_data=4, data=2), [0] * 4 + [1] * 4, "mesh.dcn_data = 4: expected 2, the number of slices"),
  (dict(dcn_data=2, data=4), [0] * 3 + [1] * 5, "'context': 1, 'tensor': 1}: expected slices of equal size, "
   "not of [3, 5] devices"),
  (dict(dcn_data=16, data=1), None, "the product must be the number of devices, 8"),
])
def test_slices_that_do_not_fit_are_refused(sizes, slices, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    sharding.make_mesh(c.MeshConfig(**sizes), None if slices is None else of_slices(*slices))


@pytest.mark.parametrize("sizes, message", [
  (dict(data=3), "the product must be the number of devices, 8"),
  (dict(data=16), "the product must be the number of devices, 8"),
  (dict(data=-1, fsdp=3), "8 devices are not a multiple of 3"),
  (dict(data=-1, tensor=16), "8 devices are not a multiple of 16"),
  (dict(data=4, context=4), "the product must be the number of devices, 8"),
])
def test_meshes_that_do_not_fit_are_refused(sizes, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    sharding.make_mesh(c.MeshConfig(**sizes))


@pytest.mark.parametrize("field, value, axis, size", [
  ("num_attention_heads", 2, "tensor", 4),
  ("o_groups", 1, "tensor", 2),
  ("index_n_heads", 3, "tensor", 2),
  ("vocab_size", 67, "tensor", 2),
  ("moe_intermediate_size", 18, "tensor", 4),
  ("hidden_size", 36, "fsdp", 8),
  ("q_lora_rank", 20, "fsdp", 8),
  ("o_lora_rank", 4, "fsdp", 8),
  ("n_routed_experts", 6, "expert", 4),
])
def test_sizes_that_a_mesh_does_not_divide_are_refused_by_name(field, value, axis, size):
  """Before anything is traced, by the functions that a run calls first."""
  others = dict(o_groups=4) if axis == "tensor" and size == 4 and field != "num_attention_heads" else {}
  run = with_model(RUN, **others | {field: value})
  mesh = mesh_of(**{axis: size})
  message = f"model.{field} = {value}: expected a multiple of mesh.{axis} = {size}"
  for check in (sharding.check_divides, abstract_state):
    with pytest.raises(ValueError, match=re.escape(message)):
      check(run, mesh)
  sharding.check_divides(run, mesh_of())


@pytest.mark.parametrize("batch_size, accumulation, sizes", [
  (8, 2, dict(data=8)), (8, 4, dict(data=2, fsdp=2)), (4, 1, dict(data=2, fsdp=2, expert=2)), (12, 1, dict(expert=8)),
  (6, 1, dict(dcn_data=2, fsdp=2)),
])
def test_batches_that_a_mesh_does_not_divide_are_refused(batch_size, accumulation, sizes):
  run = dataclasses.replace(RUN, data=dataclasses.replace(RUN.data, batch_size=batch_size, accumulation=accumulation))
  message = (f"data.batch_size / data.accumulation = {batch_size // accumulation}: expected a multiple of dcn_data x data x "
             f"fsdp x expert = {np.prod(list(sizes.values()))}")
  with pytest.raises(ValueError, match=re.escape(message)):
    sharding.check_divides(run, mesh_of(**sizes))
  sharding.check_divides(run, mesh_of(tensor=2))  # tensor does not split a batch


@pytest.mark.parametrize("length, context, message", [
  (30, 4, "data.sequence_length = 30: expected a multiple of mesh.context = 4"),
  (32, 8, "data.sequence_length / mesh.context = 4: expected at least 7, the tokens before a part"),
])
def test_sequences_that_a_mesh_cannot_split_are_refused(length, context, message):
  """Seven tokens are read by the window of 8, by HCA's windows of 8, and by CSA's two of 4."""
  run = dataclasses.replace(RUN, data=dataclasses.replace(RUN.data, sequence_length=length))
  for check in (sharding.check_divides, abstract_state):
    with pytest.raises(ValueError, match=re.escape(message)):
      check(run, mesh_of(context=context))
  sharding.check_divides(run, mesh_of())
  sharding.check_divides(RUN, mesh_of(context=4))


@pytest.mark.parametrize("changes, reach", [
  (dict(), 7), (dict(sliding_window=12), 11), (dict(csa_compress_rate=5), 9), (dict(hca_compress_rate=9), 8),
  (dict(layer_types=(c.HCA,) * 4, csa_compress_rate=5), 7), (dict(layer_types=(c.SLIDING,) * 4, sliding_window=1), 1)])
def test_how_far_a_layer_reads_back(changes, reach):
  assert dataclasses.replace(RUN.model, **changes).local_reach == reach


# ---- layouts in a traced function --------------------------------------------------------------------------------------
def test_without_a_mesh_everything_is_the_identity():
  x = np.ones((2, 2))
  assert sharding.constrain(x, ("no such axis", "either")) is x
  assert sharding.gathered(x, ("layers", "layer_00", "attention", "q_a")) is x
  assert sharding.per_shard(len, (), ()) is len
  assert sharding.batch_shards() == 1 and sharding.axis_name("heads") is None
  assert sharding.weight_axes("expert", 4) == () and not sharding.splits_weights()
  with pytest.raises(ValueError, match="logical axis 'expert': expected one that lies on one mesh axis, not on .'fsdp', "):
    sharding.axis_name("expert")


def test_an_axis_of_one_device_needs_no_sum():
  with jax.set_mesh(mesh_of(data=2, tensor=2)):
    assert sharding.axis_name("heads") == "tensor" and sharding.axis_name("sequence") is None
    assert sharding.batch_shards() == 2 and not sharding.splits_weights()
  with jax.set_mesh(mesh_of(context=2)):
    assert sharding.splits_weights() and sharding.weight_axes("expert", 4) == ("context",)


def test_a_batch_lies_over_data_fsdp_and_expert_in_this_order():
  mesh = mesh_of(data=2, fsdp=2, expert=2)
  x = jax.device_put(np.arange(16).reshape(1, 8, 2), sharding.batch_sharding(mesh))
  rows = {shard.device: shard.data[0, :, 0].tolist() for shard in x.addressable_shards}
  assert [rows[d] for d in mesh.devices.reshape(-1)] == [[2 * row] for row in range(8)]


def test_inside_a_copy_its_axes_are_not_there():
  """Sums over the batch are a copy's own; results come one for each copy, and other axes are split as ever."""
  mesh = mesh_of(dcn_data=2, data=2, fsdp=2)
  x = np.arange(16.0, dtype=np.float32).reshape(1, 8, 2)
  seen = []

  def fn(whole, rows):
    seen.append((sharding.copies(), sharding.batch_shards(), rows["x"].shape))
    doubled = sharding.per_shard(lambda x: seen.append(x.shape) or 2 * x, ((None, "batch"),), (None, "batch"))(rows["x"])
    return {"sum": sharding.constrain(doubled, (None, "batch", None)).sum() + whole, "rows": doubled}

  with jax.set_mesh(mesh):
    out = jax.jit(lambda w, x: sharding.per_copy(fn)(w, {"x": x}))(np.float32(1), x)
  assert (("dcn_data", "data"), 2, (1, 2, 2)) in seen and (1, 1, 2) in seen
  np.testing.assert_array_equal(out["rows"][:, 0].reshape(8, 2), 2 * x[0])
  np.testing.assert_array_equal(out["sum"], 2 * x.reshape(4, -1).sum(1) + 1)


def test_per_shard_gives_each_device_its_part_and_sums_gradients_of_what_is_whole():
  mesh = mesh_of(data=2, tensor=2)
  x, w = np.arange(8.0, dtype=np.float32).reshape(4, 2), np.array([1.0, 3.0], np.float32)
  seen = []

  def fn(x, w):
    seen.append((x.shape, w.shape))
    return x * w

  with jax.set_mesh(mesh):
    run = sharding.per_shard(fn, (("batch", "heads"), ("heads",)), ("batch", "heads"))
    out, grad = jax.jit(lambda x, w: (run(x, w), jax.grad(lambda w: (run(x, w) ** 2).sum())(w)))(x, w)
  assert set(seen) == {((2, 1), (1,))}
  np.testing.assert_array_equal(out, x * w)
  np.testing.assert_allclose(grad, (2 * x * x * w).sum(0))


@pytest.mark.parametrize("leaf, shape, placed, whole", [
  ("experts", (4, 6, 8), P(("fsdp", "expert"), "context", "tensor"), (1, 6, 4)),
  ("experts", (2, 6, 8), P("expert", ("fsdp", "context"), "tensor"), (1, 6, 4)),
  ("shared", (8, 6), P(("fsdp", "expert", "context"), "tensor"), (8, 3)),
], ids=["of an expert", "of an expert, too few for fsdp", "of all others"])
def test_a_gathered_weight_is_whole_but_for_tensor_and_its_experts(leaf, shape, placed, whole):
  mesh = mesh_of(fsdp=2, expert=2, tensor=2)
  path = ("layers", "layer_00", "moe", leaf, "up")
  with jax.set_mesh(mesh):
    place = jax.NamedSharding(mesh, sharding.parameter_spec(sharding.parameter_axes(path, len(shape)), shape, mesh.shape))
    assert place.spec == placed
    y = jax.jit(lambda w: sharding.gathered(w, path), in_shardings=place)(np.ones(shape, np.float32))
  assert y.sharding.shard_shape(y.shape) == whole
