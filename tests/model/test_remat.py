"""Recomputation policies: the same numbers from all of them, each at its price in memory and in repeated work."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deepseek_v4 as dsv4
from deepseek_v4.config import CSA, HASH, HCA, LEARNED, REMAT_POLICIES, SLIDING
from deepseek_v4.model import two_levels
from deepseek_v4.model.losses import next_token_targets
from deepseek_v4.training import trainable
from deepseek_v4.training.step import compiler_options
from tests.model.small import T0, abstract_variables, equations, pack, random_tokens, random_variables

# A unit repeated seven times: `full` makes groups of two repeats, the last of which lacks one. The streams of some hundred
# tokens outweigh everything that does not grow with them.
UNIT = dataclasses.replace(T0, num_hidden_layers=7, layer_types=(SLIDING,) * 7, mlp_layer_types=(LEARNED,) * 7,
                           num_nextn_predict_layers=0)
INDEXED = dataclasses.replace(UNIT, layer_types=(CSA,) * 7)
# The same with all kinds of layers and a prediction block; two layers are lone, and the unit has two.
SCANNED = dataclasses.replace(T0, num_hidden_layers=16, layer_types=(SLIDING,) * 2 + (CSA, HCA) * 7,
                              mlp_layer_types=(HASH,) * 2 + (LEARNED,) * 14)
LONE = dataclasses.replace(SCANNED.cut_layers(6), scan_layers=False)  # six lone layers: `full` makes groups of three
LENGTH = 512
TOKENS, SEGMENTS = pack(random_tokens(300, seed=1), random_tokens(150, seed=2), length=LENGTH)
CONFIGS = {"unit": UNIT, "indexed": INDEXED, "scanned": SCANNED, "lone": LONE}
LAYERS = ["unit", *(pytest.param(name, marks=pytest.mark.long) for name in ("indexed", "scanned", "lone"))]
# Of the unit; `offload` is `block` with a transfer. Compressed layers recompute in the suite elsewhere: `full` in
# test_variants.py, `block` in training/test_step.py, `mhc` in training/test_mesh.py.
IN_THE_SUITE = ("none", "mhc", "full")
WEIGHTS = {"next_token": 1.0, "mtp": 0.3, "balance": 0.5, "indexer": 0.7}


def objective(config, kernels="blockwise"):
  """(params, router) -> (weighted losses, experts of each token)."""
  model = dsv4.DeepseekV4(config, kernels)

  def run(params, router):
    tokens, segments = jnp.asarray(TOKENS), jnp.asarray(SEGMENTS)
    targets = next_token_targets(tokens, segments, jnp.ones_like(tokens))
    out = model.apply({"params": params, "router": router}, tokens, None, segments, targets=targets)
    means = {name: total / count for name, (total, count) in out.losses.items()}
    return sum(weight * means[name] for name, weight in WEIGHTS.items() if name in means), out.routing["experts"]
  return run


@functools.cache
def variables(config):
  return random_variables(config)


@functools.cache
def compiled(config, policy):
  """The gradient's program."""
  run = jax.value_and_grad(objective(dataclasses.replace(config, remat=policy)), has_aux=True)
  jitted = jax.jit(run, compiler_options=compiler_options(None))
  return jitted.lower(*map(abstract_variables(config).get, ("params", "router"))).compile()


@functools.cache
def results(config, policy):
  return jax.device_get(compiled(config, policy)(*map(variables(config).get, ("params", "router"))))


@pytest.mark.parametrize("layers, policy", [
  pytest.param(layers, policy, marks=[pytest.mark.long] * (layers != "unit" or policy not in IN_THE_SUITE))
  for layers in CONFIGS for policy in REMAT_POLICIES[1:]])
def test_no_policy_changes_a_number(layers, policy):
  """float32 through the same operations, which XLA fuses and so rounds differently: 1e-6 of each, more after many layers.
  The first layer's streams are equal, and so some gradients there zero by cancellation: 1e-7 of the global norm."""
  config = CONFIGS[layers]
  (loss, experts), gradients = results(config, policy)
  (wanted_loss, wanted_experts), wanted = results(config, "none")
  np.testing.assert_array_equal(experts, wanted_experts)
  np.testing.assert_allclose(loss, wanted_loss, rtol=1e-5)
  norm = np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(wanted)))
  for (path, leaf), (_, want) in zip(*(jax.tree_util.tree_leaves_with_path(tree) for tree in (gradients, wanted))):
    tolerance = max(2e-4 * np.abs(want).max(), 1e-7 * norm)
    np.testing.assert_allclose(leaf, want, rtol=0, atol=tolerance, err_msg=jax.tree_util.keystr(path))


def temporaries(config, policy):
  return compiled(config, policy).memory_analysis().temp_size_in_bytes


def flops(config, policy):
  """Of the program's text: a loop's body counts once."""
  return compiled(config, policy).cost_analysis()["flops"]


@pytest.mark.parametrize("layers", LAYERS)
def test_each_policy_trades_memory_for_work(layers):
  policies = IN_THE_SUITE if layers in ("unit", "indexed") else ("none", "mhc", "block", "full")
  memory, work = ([measure(CONFIGS[layers], policy) for policy in policies] for measure in (temporaries, flops))
  for policy, size in zip(policies, memory):
    print(f"{policy:8} {size / 2**20:4.0f} MiB")  # of the 16 scanned layers: README's column
  assert all(more > less for more, less in zip(memory, memory[1:])), memory
  assert all(less < more for less, more in zip(work, work[1:])), work


@pytest.mark.parametrize("repeats, unit, length", [(1, 1, 1), (2, 2, 1), (7, 1, 2), (9, 1, 3), (20, 2, 4), (29, 2, 3)])
def test_groups_keep_the_fewest_streams(repeats, unit, length):
  """Flash repeats two layers 20 times and Pro 29 times; 13 and 16 streams at a time, not 40 and 58."""
  assert two_levels.group_length(repeats, unit) == length
  assert two_levels.lone_length(repeats) == int(np.ceil(np.sqrt(repeats)))


# ---- what is frozen under `full` ----------------------------------------------------------------------------------------
WIDTH, REPEATS = 6, 7


def toy(name):
  """A layer as `two_levels` has them: a matrix and, squared in its report, what a vector sees of the detached streams."""
  def layer(params, fixed, context, x):
    seen = jax.lax.stop_gradient(x) @ params["seen_by"]
    return x + jnp.tanh(x @ params[name]) * fixed["scale"] + context, {"loss": (seen**2).sum(), "count": jnp.int32(3)}
  return layer


def toy_loss(loop, params, x):
  """From the reports, weighted by repeat, and with all that reaches them from the streams."""
  fixed = ({"scale": jnp.linspace(0.5, 1, REPEATS)},) * 2
  x, reports = loop([toy("first"), toy("second")], params, fixed, jnp.float32(0.1), x)
  return sum((jnp.arange(1, REPEATS + 1) * report["loss"]).sum() for report in reports), x


def one_by_one(layers, params, fixed, context, x):
  found = [[] for _ in layers]
  for r in range(REPEATS):
    for j, layer in enumerate(layers):
      x, report = layer(*jax.tree.map(lambda leaf, r=r: leaf[r], (params[j], fixed[j])), context, x)
      found[j].append(report)
  return x, [jax.tree.map(lambda *leaves: jnp.stack(leaves), *reports) for reports in found]


def toy_gradient(loop, trained, with_streams):
  """(loss of the named leaves, the leaves); the loss is of the reports, and maybe of the streams behind the loop."""
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32) / 3
  params = [{name: normal(REPEATS, WIDTH, WIDTH), "seen_by": normal(REPEATS, WIDTH)} for name in ("first", "second")]
  x = normal(1, 5, 2, WIDTH)

  def loss(leaves):
    own = tuple({name: leaves.get((j, name), leaf) for name, leaf in tree.items()} for j, tree in enumerate(params))
    total, out = toy_loss(loop, own, leaves.get((0, "x"), x))
    return total + (out**2).sum() if with_streams else total
  everything = {(j, name): leaf for j, tree in enumerate(params) for name, leaf in tree.items()} | {(0, "x"): x}
  return loss, {name: everything[name] for name in trained}


VECTORS = ((0, "seen_by"), (1, "seen_by"))
TRAINED = {"vectors": VECTORS, "one vector": VECTORS[:1], "a matrix": ((1, "second"),), "streams": ((0, "x"),),
           "all": (*VECTORS, (0, "first"), (1, "second"), (0, "x"))}


@functools.cache
def toy_truth(with_streams):
  """The gradient of everything by autodiff through the layers one by one."""
  loss, leaves = toy_gradient(one_by_one, TRAINED["all"], with_streams)
  return jax.jit(jax.grad(loss))(leaves)


@pytest.mark.parametrize("trained, with_streams", [(name, s) for name in TRAINED for s in (True, False)
                                                   if s or name not in ("a matrix", "streams")])
def test_whatever_trains_gets_its_gradient(trained, with_streams):
  """Against autodiff through the layers one by one; float32 in another order of summation."""
  loss, leaves = toy_gradient(two_levels.run, TRAINED[trained], with_streams)
  found = jax.jit(jax.grad(loss))(leaves)
  assert found.keys() == set(TRAINED[trained])
  for name in found:
    g = toy_truth(with_streams)[name]
    np.testing.assert_allclose(found[name], g, rtol=1e-4, atol=1e-5 * np.abs(g).max(), err_msg=str(name))
    assert np.abs(g).max() > 0.1 or not (with_streams or name in VECTORS)  # reports see the streams detached


@pytest.mark.parametrize("trained, products", [("all", 5), ("a matrix", 4.5), ("vectors", 3)])
def test_no_gradient_is_made_of_what_is_frozen(trained, products):
  """Products with or for a layer's matrix in the traced program: forward, again for the group, again for the layer, and,
  where they are asked for, the gradients of the streams (of each of two layers) and of the matrix (of one or both)."""
  loss, leaves = toy_gradient(two_levels.run, TRAINED[trained], trained != "vectors")
  program = jax.make_jaxpr(jax.grad(loss))(leaves).jaxpr
  shapes = [{v.aval.shape for v in (*e.invars, *e.outvars)} for e in equations(program) if e.primitive.name == "dot_general"]
  assert sum((WIDTH, WIDTH) in found for found in shapes) == 2 * products


def test_the_indexer_s_warm_up_has_no_backward_pass_through_the_layers():
  """Of the model itself: attention is dense, all but the indexer is frozen."""
  config = dataclasses.replace(INDEXED, remat="full")
  model, abstract = dsv4.DeepseekV4(config, "blockwise"), abstract_variables(config)

  def count(what, mode):
    def loss(trained, variables):
      params = trainable.with_frozen(trained, variables["params"])
      targets = jnp.zeros((1, LENGTH), jnp.int32)
      out = model.apply({"params": params, "router": variables["router"]}, targets, targets=targets, attention_mode=mode)
      return out.losses["indexer"][0] + (out.losses["next_token"][0] if what == "all" else 0)
    program = jax.make_jaxpr(jax.grad(loss))(trainable.trained_part(what, abstract["params"]), abstract)
    return sum(e.primitive.name == "dot_general" for e in equations(program.jaxpr))
  # Of the 5 products with a matrix (see above) 3 are left; with gradients through the streams of frozen layers it were 4.
  assert count("indexer", "dense") < 0.7 * count("all", "dense")


@pytest.mark.parametrize("layers, blocks", [("unit", 1), pytest.param("lone", 7, marks=pytest.mark.long)])
def test_offloaded_streams_leave_the_device_and_come_back(layers, blocks):
  """Of each block in the program once in each direction, and nothing else. What TPUs' compiler makes of it: test_aot.py."""
  run = jax.grad(objective(dataclasses.replace(CONFIGS[layers], remat="offload")), has_aux=True)
  program = jax.make_jaxpr(run)(*map(abstract_variables(CONFIGS[layers]).get, ("params", "router")))
  moved = [e.outvars[0].aval for e in equations(program.jaxpr) if e.primitive.name == "device_put"]
  for space in ("Host", "Device"):
    shapes = [x.shape for x in moved if str(x.memory_space).endswith(space)]
    assert shapes == [(1, LENGTH, T0.hc_mult, T0.hidden_size)] * blocks


@pytest.mark.parametrize("layers", LAYERS)
def test_parameters_and_traces_have_the_same_names_with_every_policy(layers):
  """Shapes only: nothing is computed."""
  def names(policy):
    model = dsv4.DeepseekV4(dataclasses.replace(CONFIGS[layers], remat=policy), "blockwise")
    made = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
    traced = jax.eval_shape(lambda variables: dsv4.trace(model, variables, TOKENS, None, SEGMENTS), made)
    return jax.tree.map(lambda x: x.shape, (made, traced))
  wanted = names("none")
  assert all(names(policy) == wanted for policy in REMAT_POLICIES[1:])
