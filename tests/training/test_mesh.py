"""One step on meshes of eight devices equals the step on one device, and every device holds its part and no more."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest

from deepseek_v4 import config as c
from deepseek_v4 import optim, sharding
from deepseek_v4.model.exchange import room_for
from deepseek_v4.model.transformer import DeepseekV4
from deepseek_v4.planning.collectives import collectives
from deepseek_v4.training.state import abstract_state
from pallas_kernels.grouped_matmul import row_tile
from tests.training.small import (
  LOSSES,
  MODEL,
  RUN,
  Step,
  at,
  differing,
  gradients_of,
  leaves,
  on_host,
  random_batch,
  random_state,
  reference,
  single_step,
  with_leaf,
  with_model,
)

# Mesh, remat, accumulation. TOGETHER holds all ten pairs of axes, ALONE every axis and every policy of recomputation; one
# takes the batch in two passes, as pods do: that changes no number either. These ten meshes are the suite's.
TOGETHER = {
  "fsdp=2 context=2 tensor=2": (c.MeshConfig(data=1, fsdp=2, context=2, tensor=2), "none", 2),
  "data=2 expert=2 tensor=2": (c.MeshConfig(data=2, expert=2, tensor=2), "mhc", 1),
  "fsdp=2 expert=4": (c.MeshConfig(data=1, fsdp=2, expert=4), "none", 1),
  "data=2 fsdp=2 context=2": (c.MeshConfig(data=2, fsdp=2, context=2), "none", 1),
  "expert=2 context=4": (c.MeshConfig(data=1, expert=2, context=4), "none", 1),
}
ALONE = {"data=8": (c.MeshConfig(data=8), "none", 1), "fsdp=8": (c.MeshConfig(data=1, fsdp=8), "offload", 1),
         "expert=8": (c.MeshConfig(data=1, expert=8), "block", 1),
         "context=4": (c.MeshConfig(data=1, context=4), "full", 1),
         "tensor=2": (c.MeshConfig(data=1, tensor=2), "none", 1)}  # as many as there are groups of heads
PAIRS = {f"{axis}=2 context=4": (c.MeshConfig(**{"data": 1, axis: 2, "context": 4}), "none", 1)
         for axis in ("data", "fsdp", "tensor")}
PAIRS["data=2 fsdp=4"] = (c.MeshConfig(data=2, fsdp=4), "none", 1)
# Slices are copies too: their gradients are added up with those of `data`.
SLICES = {"dcn_data=2 fsdp=2 expert=2": (c.MeshConfig(dcn_data=2, data=1, fsdp=2, expert=2), "none", 1),
          "dcn_data=2 data=2 tensor=2": (c.MeshConfig(dcn_data=2, data=2, tensor=2), "block", 2)}
# Copies that could run two passes alone but for the axis tensor, and such that do.
SLICES["data=2 fsdp=2 tensor=2"] = (c.MeshConfig(data=2, fsdp=2, tensor=2), "mhc", 2)
SLICES["data=2 expert=2"] = (c.MeshConfig(data=2, expert=2), "block", 2)
SLICES["data=2 tensor=2"] = (c.MeshConfig(data=2, tensor=2), "none", 2)
# Where the other way for tokens to meet their experts would be taken; RUN's 2 picks are sent from 3 devices on.
OTHER_WAY = {"data=2 expert=2 tensor=2, sent": "all_to_all", "fsdp=2 expert=4, gathered": "gather",
             "expert=2 context=4, sent": "all_to_all"}
ALL = TOGETHER | ALONE | PAIRS | SLICES
ALL |= {name: ALL[name.split(",")[0]] for name in OTHER_WAY}
ALL["fsdp=2 expert=4, recomputed"] = (c.MeshConfig(data=1, fsdp=2, expert=4), "full", 1)
SUITE = TOGETHER | ALONE
MESHES = [*SUITE, *(pytest.param(name, marks=pytest.mark.long) for name in ALL if name not in SUITE)]
RATE = 5e-3  # of the first update
SHARED = "name"  # tests of one mesh run together: the program of one takes 4,000 maps of memory, and Linux allows 65,530
COLLECTIVES = "(?:all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?"


@functools.lru_cache(1)
def mesh_step(name):
  _, remat, accumulation = ALL[name]
  model = dict(remat=remat, expert_exchange=OTHER_WAY.get(name, "auto"))
  run = dataclasses.replace(with_model(RUN, **model), data=dataclasses.replace(RUN.data, accumulation=accumulation))
  return Step(run, mesh_of(name))


def mesh_of(name):
  config = ALL[name][0]
  return sharding.make_mesh(config, jax.devices()[:np.prod([getattr(config, axis) for axis in sharding.MESH_AXES])])


def batch_for(name, seed=0):
  return random_batch(ALL[name][2], seed=seed)


@functools.lru_cache(1)
def stepped(name):
  """(new state, metrics) of the reference's step on a mesh; to be read only."""
  return mesh_step(name)(random_state(), batch_for(name))


# ---- the same numbers --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", MESHES)
def test_losses_and_gradients(name):
  """float32 sums in another order: a few 1e-7 each. Two gradients are nearly zero by cancellation, see `matrices`: 1e-7 of
  the global norm, which is 1 after clipping."""
  state, metrics = stepped(name)
  expected_state, expected = reference()
  for key in (*LOSSES, "loss", "grad_norm"):
    assert metrics[key] == pytest.approx(float(expected[key]), rel=3e-6), key
  for key in ("tokens", "finite", "learning_rate", "max_load_violation"):
    assert metrics[key] == expected[key], key
  expected_grads, grads = gradients_of(expected_state), gradients_of(state)
  assert grads.keys() == expected_grads.keys()
  for key, g in expected_grads.items():
    assert np.linalg.norm(grads[key] - g) <= 2e-5 * np.linalg.norm(g) + 1e-7, key


@pytest.mark.parametrize("name", [name if name in ("fsdp=2 context=2 tensor=2", "expert=2 context=4") else
                                  pytest.param(name, marks=pytest.mark.long) for name in TOGETHER | ALONE | PAIRS])
def test_logits(name):
  """The head's logits of all places of documents, by weights that lie as the step's do; float32 sums in another order."""
  mesh, places = mesh_of(name), jax.tree.map(lambda x: x.sharding, abstract_state(RUN, mesh_of(name)))
  with jax.set_mesh(mesh):
    found = logits({"params": places.params, "router": places.router})
  expected, real = logits_alone(), (random_batch()["segment_ids"][0] > 0)[..., None]
  assert np.abs(expected).max() > 1
  np.testing.assert_allclose(found * real, expected * real, rtol=0, atol=1e-5 * np.abs(expected).max())


def logits(places=None):
  """[B, S, V] of `random_state()` on `random_batch()`; `places`: shardings of the variables, on the ambient mesh."""
  state, batch = random_state(), random_batch()
  rows = [batch[key][0] for key in ("tokens", "positions", "segment_ids")]
  run = jax.jit(lambda variables, *rows: DeepseekV4(MODEL, "blockwise").apply(variables, *rows).logits)
  return np.asarray(run(jax.device_put({"params": state.params, "router": state.router}, places), *rows))


logits_alone = functools.cache(logits)  # on one device


def matrices(tree, name, axes):
  """The float64 matrices [n, R, C] of a leaf that Muon updates."""
  rows, columns = axes[name]
  x = np.asarray(tree[name], np.float64)
  batch = x.ndim - len(rows) - len(columns)
  x = np.moveaxis(x, rows + columns, range(batch, x.ndim))
  return x.reshape(-1, np.prod(x.shape[batch:batch + len(rows)]), np.prod(x.shape[batch + len(rows):]))


def tolerance(gradient):
  """Allowed RMS difference of an update, as a share of 0.18 lr, its own RMS at full rank.

  Newton-Schulz returns the singular vectors of the gradient at length 1, whatever their singular values s: an error e of the
  gradient becomes e / s, and where s is noise itself at most 8e4 e. Gradients agree to about 3e-6 of their norm.
    1e-3  s above 1e-4 of the norm: at most 3e-2 in a single direction, far less on average
    5e-2  smaller s, or gradient and noise cancelled to below 1e-4: experts with fewer tokens than rows; mHC's fn_res, as
          logits that shift a whole row or column change no doubly stochastic matrix; the first layer's fn_pre, whose scale
          the norm behind it removes
    inf   no gradient but noise: the first layer's fn_res, which mixes streams that are still equal
  """
  norm = np.linalg.norm(gradient)
  if norm < 1e-8:
    return np.inf
  smallest = np.linalg.svd(gradient, compute_uv=False)[-1]
  return 1e-3 if smallest > 1e-4 * norm and norm > 1e-4 else 5e-2


@pytest.mark.parametrize("name", MESHES)
def test_parameters_after_the_update(name):
  state, expected_state = stepped(name)[0], reference()[0]
  params, expected, grads = on_host(state.params), on_host(expected_state.params), gradients_of(expected_state)
  axes = {"/".join(sharding.path_names(path)): pair for path, pair in jax.tree_util.tree_leaves_with_path(
    optim.matrix_axes(random_state().params), is_leaf=lambda x: isinstance(x, optim.MatrixAxes))}
  allowed = []
  for key, p in expected.items():
    if key not in axes:  # AdamW's g / (|g| + 1e-4): the error of g over 1e-4
      np.testing.assert_allclose(params[key], p, rtol=0, atol=1e-3 * RATE, err_msg=key)
      continue
    differences = matrices(params, key, axes) - matrices(expected, key, axes)
    for i, (gradient, difference) in enumerate(zip(matrices(grads, key, axes), differences)):
      allowed.append(tolerance(gradient))
      assert np.sqrt(np.square(difference).mean()) <= allowed[-1] * 0.18 * RATE, f"matrix {i} of {key}"
  # almost all are held to the small tolerance, and one leaf to none
  assert sum(a == np.inf for a in allowed) == 1 and np.mean([a == 1e-3 for a in allowed]) > 0.8
  assert differing(state.router, expected_state.router) == []
  assert int(state.step) == 1


@pytest.mark.parametrize("name", MESHES)
def test_the_next_step_takes_the_state_as_it_comes_back(name):
  """The compiled step refuses other shardings than its own. Noise directions (see `tolerance`) blur the second loss."""
  state = stepped(name)[0]
  state = jax.device_put(state, jax.tree.map(lambda x: x.sharding, state), may_alias=False)  # a copy that may be consumed
  batch = jax.device_put(batch_for(name, seed=1), sharding.batch_sharding(mesh_of(name)))
  state, metrics = mesh_step(name).compiled(state, batch)
  _, expected = single_step().compiled(single_step().put(reference()[0]), random_batch(seed=1))
  assert int(state.step) == 2
  for key in (*LOSSES, "loss", "grad_norm"):
    assert metrics[key] == pytest.approx(float(expected[key]), rel=1e-3), key


@pytest.mark.parametrize("name", MESHES)
def test_not_finite_gives_the_old_state_back(name):
  state = random_state()
  state = state.replace(params=with_leaf(state.params, "layers/unit_1/moe/experts/gate", at((0, 5, 1, 1), np.nan)))
  new, metrics = mesh_step(name)(state, batch_for(name))
  assert not metrics["finite"]
  assert differing(new, state) == []


# ---- who holds what ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", MESHES)
def test_every_device_holds_its_part(name):
  """Before and after the step, moments included: the sizes of the shards are those that the table of axes promises."""
  sizes = {axis: getattr(ALL[name][0], axis) for axis in ("fsdp", "expert", "context", "tensor")}
  memory = sizes["fsdp"] * sizes["expert"] * sizes["context"]  # of which the eight experts take all
  parts = {**dict.fromkeys(("expert", "lora", "channels"), memory), "head_vocab": sizes["fsdp"] * sizes["tensor"],
           **dict.fromkeys(("heads", "index_heads", "groups", "vocab", "mlp"), sizes["tensor"])}
  new = stepped(name)[0]
  (places, _), _ = mesh_step(name).compiled.input_shardings
  params, moments, before = leaves(new.params), leaves(new.opt_state), leaves(places.params)
  for key, x in params.items():
    axes = sharding.parameter_axes(key.split("/"), x.ndim)
    # what the experts and the vocabulary leave
    parts["embed"] = 1 if "/experts/" in key else memory // sizes["fsdp"] if key == "lm_head/kernel" else memory
    shard = tuple(n // parts[axis] if axis else n for n, axis in zip(x.shape, axes))
    copies = [m for m_key, m in moments.items() if m_key.endswith(f"/{key}") and (
      "mtp/" in key or "mtp/" not in m_key)]  # mtp has leaves of the same names as the model
    assert len(copies) in (1, 2), key
    assert {m.sharding.shard_shape(m.shape) for m in (x, *copies)} == {shard}, key
    assert {s.data.shape for s in x.addressable_shards} == {shard}, key
    assert before[key].shard_shape(x.shape) == shard, key
  experts = params["layers/unit_0/moe/experts/down"]
  assert experts.sharding.shard_shape(experts.shape)[1] == MODEL.n_routed_experts // memory


def loops(text):
  """{name of a computation: its text} of all computations, and the names of those inside a loop's body or condition."""
  name_of = lambda part: re.split(r"[ (]", part.removeprefix("ENTRY ").lstrip("%"), maxsplit=1)[0]
  computations = {name_of(part): part for part in re.split(r"\n(?=\S)", text)}
  inside = set(re.findall(r"(?:body|condition)=%?([\w.\-]+)", text))
  waiting = list(inside)
  while waiting:
    for called in re.findall(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)", computations.get(waiting.pop(), "")):
      if called not in inside:
        inside.add(called)
        waiting.append(called)
  return computations, inside


@pytest.mark.parametrize("name", ["fsdp=2 expert=4", pytest.param("fsdp=2 expert=4, gathered", marks=pytest.mark.long)])
def test_expert_weights_stay_and_newton_schulz_is_alone(name):
  """In the compiled step of fsdp=2 expert=4, one expert of eight on each device: nothing gathers the matrices of several, no
  loop of Newton-Schulz communicates."""
  text = mesh_step(name).compiled.as_text()
  d, f = MODEL.hidden_size, MODEL.moe_intermediate_size
  shapes = {shape for kind, _, arrays in moving(text, mesh_of(name)) if kind == "all-gather" for _, shape in arrays}
  assert {np.prod(shape[:-2]) for shape in shapes if shape[-2:] in ((d, f), (f, d))} == {1}  # a shared expert's
  computations, inside = loops(text)
  newton_schulz = {name for name in inside if "RC,...SC->...RS" in computations[name]}
  communicates = [name for name in newton_schulz if re.search(rf" (?:{COLLECTIVES})\(", computations[name])]
  assert newton_schulz and communicates == []


@pytest.mark.parametrize("name", ["fsdp=2 expert=4"])
def test_tokens_are_sent_to_their_experts_and_not_gathered(name):
  """Over fsdp and expert together, which split the experts: rows of tokens move in boxes, and what is gathered is how many
  they are (and dense weights)."""
  length, experts = RUN.data.sequence_length, MODEL.n_routed_experts
  picks, width = length * MODEL.num_experts_per_tok, MODEL.hidden_size
  room = room_for(picks, 1, row_tile(picks, 1, "blockwise"))
  moved = moving(mesh_step(name).compiled.as_text(), mesh_of(name))
  of = lambda kind: {shape for k, axes, arrays in moved if k == kind and axes == {"fsdp", "expert"} for _, shape in arrays}
  assert (8, experts) in of("all-gather")
  assert not {shape for shape in of("all-gather") if shape[-3:-1] == (8, length)}
  assert {shape[-2:] for shape in of("all-to-all")} >= {(rows, width) for rows in (picks, room)}


# ---- what travels along a split sequence -------------------------------------------------------------------------------
def moving(text, mesh):
  """[(kind, mesh axes, [(dtype, shape) of each result])] of a compiled step."""
  found = []
  for one in collectives(text):
    places = np.array(np.unravel_index(one.devices, mesh.devices.shape))
    found.append((one.kind, frozenset(a for a, at in zip(mesh.axis_names, places) if len(set(at)) > 1), one.arrays))
  return found


# Of each mesh: kind and mesh axes -> (how many, numbers in their results), as XLA for CPUs writes them down: what a loop
# over layers holds stands once, and a gradient that a TPU would reduce-scatter is an all-reduce. An upper bound each: more
# means that something travels which did not.
TRAFFIC = {
  "fsdp=2 context=2 tensor=2": {
    "all-gather context": (14, 1552), "all-gather context fsdp": (60, 17120), "all-gather fsdp": (5, 1120),
    "all-gather tensor": (7, 5760), "all-reduce context": (11, 15943), "all-reduce context fsdp": (4, 148),
    "all-reduce context fsdp tensor": (5, 3333), "all-reduce context tensor": (3, 321), "all-reduce fsdp": (9, 14406),
    "all-reduce fsdp tensor": (6, 98), "all-reduce tensor": (36, 58580), "all-to-all context": (18, 13568),
    "all-to-all context fsdp": (51, 205632), "all-to-all fsdp": (20, 15616), "all-to-all tensor": (14, 24448),
    "collective-permute context": (26, 3096), "reduce-scatter fsdp": (2, 512)},
  "data=2 expert=2 tensor=2": {
    "all-gather data": (5, 21632), "all-gather data tensor": (4, 9728), "all-gather expert": (131, 72704),
    "all-gather tensor": (16, 3968), "all-reduce data": (2, 9216), "all-reduce data expert": (6, 17684),
    "all-reduce data expert tensor": (2, 3138), "all-reduce data tensor": (1, 1024), "all-reduce expert": (6, 136),
    "all-reduce tensor": (36, 120424), "all-to-all expert": (18, 13568), "all-to-all tensor": (19, 33024),
    "collective-permute tensor": (4, 8), "reduce-scatter expert": (9, 12672)},
  "fsdp=2 expert=4": {
    "all-gather expert": (2, 2048), "all-gather expert fsdp": (60, 23232), "all-gather fsdp": (5, 1120),
    "all-reduce expert": (3, 3074), "all-reduce expert fsdp": (24, 23915), "all-reduce fsdp": (6, 98),
    "all-to-all expert": (14, 13056), "all-to-all expert fsdp": (49, 428800), "all-to-all fsdp": (16, 15104),
    "reduce-scatter fsdp": (2, 512)},
  "data=2 fsdp=2 context=2": {
    "all-gather context": (14, 2576), "all-gather context fsdp": (60, 23136), "all-gather data": (8, 27136),
    "all-gather fsdp": (5, 1120), "all-reduce context": (10, 20744), "all-reduce context data": (1, 3072),
    "all-reduce context data fsdp": (5, 3359), "all-reduce context fsdp": (2, 134), "all-reduce data": (2, 9216),
    "all-reduce data fsdp": (5, 20422), "all-reduce fsdp": (6, 98), "all-to-all context": (14, 13056),
    "all-to-all context fsdp": (49, 204992), "all-to-all fsdp": (16, 15104), "collective-permute context": (22, 3088),
    "reduce-scatter fsdp": (2, 512)},
  "expert=2 context=4": {
    "all-gather context": (12, 1376), "all-gather context expert": (62, 27328), "all-reduce context": (8, 21062),
    "all-reduce context expert": (10, 9639), "all-reduce expert": (5, 20422), "all-to-all context": (14, 13056),
    "all-to-all context expert": (49, 428800), "all-to-all expert": (14, 13056), "collective-permute context": (22, 6176)},
}


@pytest.mark.parametrize("name", TOGETHER)
def test_what_travels_over_each_axis(name):
  """By count and by size."""
  found = {}
  for kind, axes, arrays in moving(mesh_step(name).compiled.as_text(), mesh_of(name)):
    key = " ".join((kind, *sorted(axes)))
    count, numbers = found.get(key, (0, 0))
    found[key] = (count + 1, numbers + sum(int(np.prod(shape)) for _, shape in arrays))
  more = {key: (had, TRAFFIC[name].get(key)) for key, had in found.items()
          if any(a > b for a, b in zip(had, TRAFFIC[name].get(key, (0, 0))))}
  assert not more, f"{name}: found and allowed: {more}"


@pytest.mark.parametrize("name", TOGETHER)
def test_weights_are_gathered_layer_by_layer_inside_the_loop(name):
  """Of the scanned layers one repeat at a time, where it is used; a stack of both repeats nowhere. By two weights whose
  shapes no other one has."""
  text, mesh = mesh_step(name).compiled.as_text(), mesh_of(name)
  computations, inside = loops(text)
  of = lambda names: {shape for part in names for kind, axes, arrays in moving(computations[part], mesh)
                      if kind == "all-gather" and axes != {"data"} for _, shape in arrays}
  heads = MODEL.num_attention_heads // mesh.shape["tensor"]
  q_b, compressor = (MODEL.q_lora_rank, heads, MODEL.head_dim), (2, MODEL.hidden_size, MODEL.head_dim)
  for weight in (q_b, compressor):
    assert (1, *weight) in of(inside) and (1, *weight) not in of(set(computations) - inside), weight
    assert (2, *weight) not in of(computations), weight


@pytest.mark.parametrize("name", [name for name in TOGETHER if "fsdp" in name])
def test_what_is_gathered_fits_in_a_layer(name):
  """No gather holds more than the dense weights of a layer, none an expert's matrix, and embedding and head stay split over
  fsdp (and tensor): these are as small as a layer here only because the vocabulary is. Larger in a real model can be what
  copies gather of orthogonalised matrices (tests/optim/test_placement.py)."""
  mesh, gathered = mesh_of(name), set()
  dense = sum(x.size for path, x in leaves(random_state().params).items()
              if path.startswith("layers/unit_0/") and "/experts/" not in path) // 2  # of two such layers
  for kind, axes, arrays in moving(mesh_step(name).compiled.as_text(), mesh):
    for _, shape in arrays:
      if axes == {"data"}:
        continue
      assert kind != "all-gather" or np.prod(shape) <= dense, (kind, axes, shape)
      if kind == "all-gather":
        gathered.add(shape)
  width, inner, vocab = MODEL.hidden_size, MODEL.moe_intermediate_size, MODEL.vocab_size // mesh.shape["tensor"]
  fsdp = mesh.shape["fsdp"]
  assert {(vocab, width // fsdp), (width, vocab // fsdp)} <= gathered  # over expert and context
  if mesh.shape["tensor"] == 1:  # else other weights have these shapes
    assert not {(vocab, width), (width, vocab)} & gathered
    assert {np.prod(shape[:-2]) for shape in gathered if shape[-2:] in ((width, inner), (inner, width))} == {1}  # shared


@pytest.mark.parametrize("name", ["fsdp=2 context=2 tensor=2"])
def test_what_travels_along_a_split_sequence(name):
  """Over context entries, index keys and the ends of documents are gathered, and a few places are sent to neighbours,
  forward and back, once in each kind of layer. Nothing as large as the streams or one of their projections moves."""
  rows, model = 2, MODEL  # rows of a device in a pass
  parts, length, d = 2, RUN.data.sequence_length, MODEL.head_dim
  moved = moving(mesh_step(name).compiled.as_text(), mesh_of(name))
  of = lambda kind: [array for k, axes, arrays in moved if k == kind and axes == {"context"} for array in arrays]
  floats = lambda arrays: sorted(shape for dtype, shape in arrays if dtype == "f32")
  csa, hca = (rows, length // 4, d), (rows, length // 8, d)
  vocabulary = 2 * [(model.hidden_size, model.vocab_size // 4)]  # the head and, its equal here, the embedding
  ends = (parts, rows, 2, model.n_routed_experts + 1)  # of the balance loss: in HCA's layers and the prediction block
  assert floats(of("all-gather")) == sorted([csa, csa[:2] + (model.index_head_dim,), hca, ends, ends, *vocabulary])
  window, pending = (rows, 7, d), lambda series: (rows, 7, 2, series, d)
  once = [window, pending(2), pending(2), window, pending(1), window, (rows, 1, model.hidden_size)]  # CSA, HCA, prediction
  assert floats(of("collective-permute")) == sorted(2 * once)
  # Integers: where the entries lie, documents at the borders. Never those of a row's tokens.
  integers = [shape for kind in ("all-gather", "collective-permute") for dtype, shape in of(kind) if dtype != "f32"]
  assert integers and max(np.prod(shape) for shape in integers) <= rows * length // 4
  # Weights travel over context and fsdp together, tokens over context never: each of these is split over fsdp as well.
  gathered = {axes for kind, axes, _ in moved if kind == "all-gather" and "context" in axes}
  assert gathered == {frozenset(["context"]), frozenset(["fsdp", "context"])}
