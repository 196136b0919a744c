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
from deepseek_v4.training.step import compiler_options
from tests.model.small import T0, abstract_variables, equations, pack, random_tokens, random_variables

# A unit repeated seven times: `full` makes groups of two repeats, the last of which lacks one. The streams of some hundred
# tokens outweigh everything that does not grow with them.
UNIT = dataclasses.replace(T0, num_hidden_layers=7, layer_types=(CSA,) * 7, mlp_layer_types=(LEARNED,) * 7,
                           num_nextn_predict_layers=0)
# The same with all kinds of layers and a prediction block; two layers are lone, and the unit has two.
SCANNED = dataclasses.replace(T0, num_hidden_layers=16, layer_types=(SLIDING,) * 2 + (CSA, HCA) * 7,
                              mlp_layer_types=(HASH,) * 2 + (LEARNED,) * 14)
LONE = dataclasses.replace(SCANNED.cut_layers(6), scan_layers=False)  # six lone layers: `full` makes groups of three
LENGTH = 512
TOKENS, SEGMENTS = pack(random_tokens(300, seed=1), random_tokens(150, seed=2), length=LENGTH)
CONFIGS = {"unit": UNIT, "scanned": SCANNED, "lone": LONE}
LAYERS = ["unit", *(pytest.param(name, marks=pytest.mark.long) for name in ("scanned", "lone"))]
IN_THE_SUITE = ("none", "mhc", "full")  # of the unit; `block` has tests elsewhere, and `offload` is `block` with a transfer
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
  policies = IN_THE_SUITE if layers == "unit" else ("none", "mhc", "block", "full")
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
