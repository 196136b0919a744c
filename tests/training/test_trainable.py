"""What trains and what does not: real steps of a small model, bit for bit; groups against sums in float64."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from deepseek_v4 import config as c
from deepseek_v4 import sharding
from deepseek_v4.training import trainable
from deepseek_v4.training.state import abstract_state
from tests.training.small import MODEL, RUN, Step, differing, leaves, on_host, random_batch, random_state

# One layer has a leaf of every group but that of the prediction block, and compiles in seconds.
ONE = dataclasses.replace(RUN, model=dataclasses.replace(
  MODEL, num_hidden_layers=1, layer_types=(c.CSA,), mlp_layer_types=(c.LEARNED,), num_nextn_predict_layers=0))


def run_of(**training):
  return dataclasses.replace(ONE, training=dataclasses.replace(ONE.training, attention_mode="dense", **training))


@functools.cache
def step_of(what):
  return Step(run_of(trainable=what, watch_gradients=True))


@functools.cache
def started():
  """A state with moments of all leaves: that of one step in which everything trained."""
  return jax.device_get(step_of("all")(random_state(ONE), random_batch(seed=1))[0])


@pytest.mark.parametrize("what", ["indexer", "all_but_indexer"])
def test_what_is_frozen_stays_bit_for_bit(what):
  """Values, moments and, where only the indexer trains, the router's bias; no weight decay either."""
  before = started()
  after, metrics = step_of(what)(before, random_batch())
  assert metrics["finite"] and int(after.step) == 2
  for tree, old in ((after.params, before.params), (after.opt_state, before.opt_state)):
    names = [name for name in leaves(old) if "/count" not in name]  # all other leaves of its state are moments
    changed = {name for name in differing(tree, old)} & set(names)
    assert changed == {name for name in names if ("/indexer/" in name) == (what == "indexer")}
  assert bool(differing(after.router, before.router)) == (what != "indexer")
  counts = {int(x) for name, x in on_host(after.opt_state).items() if name.endswith("count")}
  assert counts == {2}  # the schedule's and AdamW's go on


def test_only_its_own_loss_counts_in_the_indexers_warm_up():
  _, metrics = step_of("indexer")(started(), random_batch())
  assert metrics["loss"] == metrics["indexer"] > 0 and metrics["next_token"] > 0
  assert "balance" not in metrics
  assert metrics["grad_norm"] == pytest.approx(float(metrics["grad_norm/indexer"]), rel=1e-5)
  _, others = step_of("all_but_indexer")(started(), random_batch())
  weights = {"next_token": 1, "balance": 0.1}
  assert others["loss"] == pytest.approx(sum(w * float(others[name]) for name, w in weights.items()), rel=1e-6)
  assert "indexer" not in others and "grad_norm/indexer" not in others
  # frozen weights say the same in all of them
  assert others["next_token"] == pytest.approx(float(metrics["next_token"]), rel=1e-6)


def test_the_indexers_gradient_is_that_of_its_loss_wherever_it_trains():
  """With all losses together it is indexer_weight = 0.5 times the one alone: nothing else reaches it."""
  batch, state = random_batch(), random_state(ONE)
  (_, both), (_, alone) = (step_of(what)(state, batch) for what in ("all", "indexer"))
  # float32 sums of gradients in programs that are fused otherwise
  assert float(both["grad_norm/indexer"]) == pytest.approx(0.5 * float(alone["grad_norm/indexer"]), rel=1e-4)


def test_norms_of_groups_make_the_whole():
  _, metrics = step_of("all")(random_state(ONE), random_batch())
  norms = {name: float(x) for name, x in metrics.items() if name.startswith("grad_norm/")}
  assert set(norms) == {f"grad_norm/{group}" for _, group in trainable.GROUPS if group != "mtp"}
  assert all(value > 0 for value in norms.values())
  # float32 sums in another order
  assert np.sqrt(sum(x**2 for x in norms.values())) == pytest.approx(float(metrics["grad_norm"]), rel=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("what", ["indexer", "all_but_indexer"])
def test_a_mesh_freezes_the_same(what):
  mesh = sharding.make_mesh(c.MeshConfig(data=2, fsdp=2, tensor=2), jax.devices())
  before, batch = started(), random_batch()
  after, metrics = Step(run_of(trainable=what, watch_gradients=True), mesh)(before, batch)
  _, wanted = step_of(what)(before, batch)
  frozen = {name for name in leaves(before.params) if ("/indexer/" in name) != (what == "indexer")}
  assert not frozen & set(differing(after.params, before.params))
  # float32 sums in another order, as between meshes in test_mesh.py
  for name in wanted:
    assert float(metrics[name]) == pytest.approx(float(wanted[name]), rel=2e-5, abs=1e-7), name


# ---- trees -------------------------------------------------------------------------------------------------------------
def test_every_leaf_of_the_model_has_a_group():
  params = abstract_state(RUN).params
  groups = trainable.members(params)
  assert set(groups) == {group for _, group in trainable.GROUPS}
  assert sum(map(len, groups.values())) == len(jax.tree.leaves(params))
  with pytest.raises(ValueError, match="parameter layers/unit_0/moe/gates: in no group of"):
    trainable.group_of(("layers", "unit_0", "moe", "gates"))


def test_parts_and_wholes():
  params = random_state().params
  for what in ("all", "indexer", "all_but_indexer"):
    part = trainable.trained_part(what, params)
    names = {name for name in leaves(params) if what == "all" or ("/indexer/" in name) == (what == "indexer")}
    assert set(leaves(part)) == names
    doubled = trainable.with_frozen(jax.tree.map(lambda x: 2 * x, part), params)
    for name, x in leaves(params).items():
      np.testing.assert_array_equal(leaves(doubled)[name], 2 * x if name in names else x)


def test_small_gradients_have_a_norm():
  """Squares of 1e-30 are 0 in float32; a norm of 0 says that there is no gradient at all."""
  tree = lambda x: {"lm_head": {"kernel": x}, "embed": {"embedding": np.zeros(3, np.float32)}}
  norms = jax.jit(trainable.norms)(tree(np.array([3e-30, -4e-30], np.float32)))
  assert float(norms["grad_norm/head"]) == pytest.approx(5e-30) and float(norms["grad_norm/embedding"]) == 0


def test_the_log_says_what_trains():
  shapes = abstract_state(ONE).params
  whole = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(shapes))
  mine = sum(int(np.prod(x.shape)) for name, x in leaves(shapes).items() if "/indexer/" in name)
  assert trainable.describe(run_of(trainable="indexer"), shapes) == (
    f"trains {mine:,} parameters (indexer {mine:,}); {whole - mine:,} are frozen")
  text = trainable.describe(run_of(), shapes)
  assert text.startswith(f"trains {whole:,} parameters (") and text.endswith("; 0 are frozen") and "head " in text


def test_patience_is_counted_in_a_row():
  watch = trainable.Watch(3, "")
  for step, zero in enumerate((1, 1, 0, 1, 1), 1):
    watch.look(step, {"grad_norm/head": 0.0 if zero else 1e-9, "grad_norm/mtp": 1.0, "loss": 0.0})
  with pytest.raises(FloatingPointError, match="steps 4 to 6: the gradient of head was exactly 0 in every one"):
    watch.look(6, {"grad_norm/head": 0.0, "grad_norm/mtp": 1.0})
  trainable.Watch(1, "").look(1, {"loss": 0.0, "grad_norm": 0.0})  # nothing is watched
