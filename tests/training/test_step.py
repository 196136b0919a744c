"""One optimizer step on one device: what goes into its means, what comes out, and what a non-finite number does."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_v4 import config as c
from deepseek_v4 import optim, sharding
from deepseek_v4.model.groups import group_layers, join_layers, split_layers
from deepseek_v4.training import step as step_lib
from deepseek_v4.training.state import TrainState, abstract_state
from tests.training.small import (
  LENGTHS,
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

RATE = 5e-3  # of the first of two warm-up steps to 1e-2


def documents(batch):
  """(segment, loss mask) of every document, by a walk over the rows."""
  segment_ids, mask = (batch[name].reshape(-1, batch[name].shape[-1]) for name in ("segment_ids", "loss_mask"))
  for row, flags in zip(segment_ids, mask):
    for segment in sorted(set(row.tolist()) - {0}):
      yield segment, flags[row == segment]


# ---- counts and weights ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("accumulation", [1, 4])
def test_counts_are_those_of_a_walk_over_the_documents(accumulation):
  batch = random_batch(accumulation)
  expected = {"next_token": 0, "mtp": 0, "balance": 0, "indexer": 0}
  for _, mask in documents(batch):
    expected["next_token"] += mask[1:].sum()
    expected["mtp"] += mask[2:].sum()  # the token after next, which must count
    expected["balance"] += len(mask)
    expected["indexer"] += max(len(mask) - (MODEL.csa_compress_rate - 1), 0)  # queries that see an entry
  assert jax.device_get(step_lib.loss_counts(MODEL, batch)) == expected


@pytest.mark.parametrize("names", [(1, 2), (7, 50)])
def test_counts_of_check_a11(names):
  first, second = names
  segment_ids = np.array([[[first] * 5 + [second] * 4 + [0] * 3]], np.int32)
  positions = np.array([[[*range(5), *range(4), 0, 0, 0]]], np.int32)
  batch = {"tokens": np.ones_like(positions), "segment_ids": segment_ids, "positions": positions,
           "loss_mask": np.ones_like(positions)}  # a mask that marks too much: padding and first tokens are still no targets
  counts = step_lib.loss_counts(MODEL, batch)
  assert (counts["next_token"], counts["mtp"]) == (7, 5)


def test_nothing_counted_divides_by_one():
  empty = {name: np.zeros((1, 2, 8), np.int32) for name in random_batch()}
  assert jax.device_get(step_lib.loss_counts(MODEL, empty)) == dict.fromkeys(LOSSES, 1)


def test_a_bias_moves_by_its_own_layers_load():
  """unit_1 of the model is layers 1 and 3; the hash layers 0 and 2 have tables, which stay."""
  router = random_state().router
  load = np.array([[9] * 8, [0, 0, 4, 4, 4, 4, 8, 8], [5] * 8, [7, 1, 4, 4, 4, 4, 4, 4]], np.int32)  # mean 4 in 1 and 3
  mtp = np.array([3, 0, 0, 0, 0, 0, 0, 0], np.int32)
  new = step_lib.update_router(MODEL, router, {"layers": jnp.asarray(load), "mtp": jnp.asarray(mtp)}, 0.25)
  moved = {name: new_x - x for (name, x), new_x in zip(on_host(router).items(), on_host(new).values())}
  np.testing.assert_allclose(moved["layers/unit_1/moe/router/bias"] / 0.25,
                             [[1, 1, 0, 0, 0, 0, -1, -1], [-1, 1, 0, 0, 0, 0, 0, 0]], atol=1e-6)
  np.testing.assert_allclose(moved["mtp/block/moe/router/bias"] / 0.25, [-1] + [1] * 7, atol=1e-6)
  assert not moved["layers/unit_0/moe/router/hash_table"].any()


# ---- what a step returns -----------------------------------------------------------------------------------------------
def test_metrics_and_state_of_a_step():
  new, metrics = jax.device_get(reference())
  assert metrics["finite"] and int(new.step) == 1
  assert metrics["tokens"] == sum(map(sum, LENGTHS))
  assert metrics["learning_rate"] == np.float32(RATE)
  weights = {"next_token": 1, "mtp": 0.3, "balance": 0.1, "indexer": 0.5}
  assert metrics["loss"] == pytest.approx(sum(weights[name] * metrics[name] for name in LOSSES), rel=1e-6)
  assert all(metrics[name] > 0.05 for name in LOSSES)
  # clipped to norm 1, and the norm is the one before
  clipped = np.sqrt(sum(np.square(x, dtype=np.float64).sum() for x in gradients_of(new).values()))
  assert metrics["grad_norm"] > 2 and clipped == pytest.approx(RUN.optimizer.clip_norm, rel=1e-5)
  # every parameter has a gradient, and moves
  before = on_host(random_state().params)
  assert gradients_of(new).keys() == before.keys()
  assert [name for name, x in gradients_of(new).items() if not np.abs(x).max()] == []
  assert [name for name, x in on_host(new.params).items() if np.array_equal(x, before[name])] == []


def test_biases_move_by_the_speed_and_tables_stay():
  before, after = on_host(random_state().router), on_host(reference()[0].router)
  for name, x in before.items():
    if name.endswith("hash_table"):
      assert np.array_equal(after[name], x)
    else:
      steps = (after[name] - x) / RUN.loss.bias_update_speed
      np.testing.assert_allclose(steps, np.sign(steps), atol=1e-4)
      assert (steps > 0.5).any() and (steps < -0.5).any()


def test_the_same_step_twice_is_the_same_bit_for_bit():
  assert differing(reference(), single_step()(random_state(), random_batch())) == []


def test_the_state_is_consumed():
  state = single_step().put(random_state())
  single_step().compiled(state, random_batch())
  alive = [name for name, x in leaves((state.params, state.router, state.opt_state)).items() if not x.is_deleted()]
  assert alive == []


@pytest.mark.parametrize("step, mtp_weight", [(5, 0.3), (6, 0.1)])
def test_the_mtp_weight_drops_with_the_first_update_of_the_cosine(step, mtp_weight):
  """Ten steps, the last four on the cosine: updates 6 to 9."""
  new, metrics = single_step()(random_state().replace(step=np.int32(step)), random_batch())
  total = metrics["next_token"] + mtp_weight * metrics["mtp"] + 0.1 * metrics["balance"] + 0.5 * metrics["indexer"]
  assert metrics["loss"] == pytest.approx(float(total), rel=1e-6)
  # inside the jitted step XLA may round the cosine's product otherwise: one unit in the last place
  assert metrics["learning_rate"] == pytest.approx(float(optim.make_schedule(RUN.optimizer, 10)(step)), rel=1e-6)
  assert int(new.step) == step + 1


# ---- what must not matter ----------------------------------------------------------------------------------------------
def test_padding_counts_nowhere():
  """Other ids, positions and mask where nothing is: the same bits, loads and biases included.

  Padding passes through experts, where it may lie between tokens: the sums of an expert's gradient change their order.
  """
  batch, rng = random_batch(), np.random.default_rng(1)
  empty = batch["segment_ids"] == 0
  for name in ("tokens", "positions", "loss_mask"):
    other = rng.integers(0, 2 if name == "loss_mask" else 32, batch[name].shape)
    batch[name] = np.where(empty, other, batch[name]).astype(np.int32)
  other = single_step()(random_state(), batch)
  assert [name for name in differing(reference(), other) if "/moe/experts/" not in name and "grad_norm" not in name] == []
  expected, found = gradients_of(reference()[0]), gradients_of(other[0])
  for name, x in expected.items():
    np.testing.assert_allclose(found[name], x, rtol=0, atol=1e-6 * np.abs(x).max(), err_msg=name)


def test_names_of_documents_do_not_matter():
  batch = random_batch()
  ids = batch["segment_ids"]
  batch["segment_ids"] = np.where(ids > 0, 97 - 13 * ids, 0).astype(np.int32)
  assert differing(reference(), single_step()(random_state(), batch)) == []


def test_the_order_of_rows_does_not_matter():
  order = [3, 0, 7, 5, 1, 6, 2, 4]
  _, metrics = single_step()(random_state(), {name: x[:, order] for name, x in random_batch().items()})
  for name in (*LOSSES, "grad_norm"):
    assert metrics[name] == pytest.approx(float(reference()[1][name]), rel=1e-5), name
  assert metrics["max_load_violation"] == reference()[1]["max_load_violation"]


def test_a_batch_without_a_token_only_decays():
  batch = {**random_batch(), **{name: np.zeros((1, 8, 32), np.int32) for name in ("segment_ids", "positions", "loss_mask")}}
  state = random_state()
  new, metrics = single_step()(state, batch)
  assert metrics["finite"] and metrics["tokens"] == 0 and metrics["grad_norm"] == 0
  assert [float(metrics[name]) for name in LOSSES] == [0.0] * 4
  decays = leaves(optim.decay_mask(state.params))
  after = on_host(new.params)
  for name, x in leaves(state.params).items():
    np.testing.assert_allclose(after[name], x * (1 - RATE * 0.1 * decays[name]), rtol=3e-7, atol=1e-9, err_msg=name)
  assert differing(new.router, state.router) == []


# ---- numbers that are not finite ---------------------------------------------------------------------------------------
BROKEN = {
  "NaN in one element of an expert": ("layers/unit_0/moe/experts/up", at((1, 3, 0, 0), np.nan)),
  "infinity in a norm": ("final_norm/scale", at(0, np.inf)),
  "NaN in the prediction block only": ("mtp/block/attention/sink", at(2, np.nan)),
  "a head that overflows": ("lm_head/kernel", at(slice(None), 3e38)),
}


@pytest.mark.parametrize("case", BROKEN)
def test_not_finite_gives_the_old_state_back(case):
  state = random_state()
  state = state.replace(step=np.int32(4), params=with_leaf(state.params, *BROKEN[case]))
  new, metrics = single_step()(state, random_batch())
  assert not metrics["finite"]
  assert differing(new, state) == []
  # and a finite state is not held back afterwards by anything the broken step left behind
  assert differing(reference(), single_step()(random_state(), random_batch())) == []


def test_a_moment_that_is_not_finite_gives_the_old_state_back():
  """Loss and gradients are finite here: only the new parameters show it."""
  state = random_state()
  name = next(name for name in leaves(state.opt_state) if name.endswith("/trace/layers/unit_1/attention/kv"))
  state = state.replace(opt_state=with_leaf(state.opt_state, name, at((0, 0, 0), np.inf)))
  new, metrics = single_step()(state, random_batch())
  assert not metrics["finite"] and np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"])
  assert differing(new, state) == []


@pytest.fixture(scope="module")
def two_layers():
  """A run of two sliding layers, scanned, on a mesh of two devices, and its search for what is not finite."""
  model = dataclasses.replace(MODEL, num_hidden_layers=2, layer_types=(c.SLIDING,) * 2, mlp_layer_types=(c.LEARNED,) * 2,
                              num_nextn_predict_layers=0)
  run = dataclasses.replace(RUN, model=model)
  mesh = sharding.make_mesh(c.MeshConfig(data=1, fsdp=2), jax.devices()[:2])
  find = step_lib.find_non_finite(run, mesh)
  batch = jax.device_put(random_batch(), sharding.batch_sharding(mesh))
  places = jax.tree.map(lambda x: x.sharding, step_lib.abstract_state(run, mesh))
  return random_state(run), lambda state: find(jax.device_put(state, places), batch)


def test_the_first_tensor_that_is_not_finite_is_named(two_layers):
  state, find = two_layers
  broken = lambda path, change: find(state.replace(params=with_leaf(state.params, path, change)))
  assert find(state) is None
  # the second of the scanned layers, by its number
  assert broken("layers/unit_0/attention/q_b", at((1, 0, 0, 0), np.nan)) == "parameter layers/01/attention/q_b"
  assert broken("layers/unit_0/moe/experts/down", at((0, 7, 0, 0), np.inf)) == "parameter layers/00/moe/experts/down"
  assert broken("embed/embedding", at((63, 0), -np.inf)) == "parameter embed/embedding"
  assert broken("lm_head/kernel", at(slice(None), 3e38)) == "loss next_token"


def test_a_broken_gradient_is_named_where_the_backward_pass_meets_it(two_layers):
  """o_a of layer 1 is small by as much as o_b is large: only what flows back from o_b to o_a overflows.

  Everything before it is broken as well (embedding, layer 0, the queries), everything after it is not.
  """
  state, find = two_layers
  times = lambda *factors: lambda x: x * np.float32(factors).reshape(-1, *[1] * (x.ndim - 1))
  params = with_leaf(state.params, "layers/unit_0/attention/o_a", times(1, 1e-37))
  params = with_leaf(params, "layers/unit_0/attention/o_b", times(1, 1e37))
  params = with_leaf(params, "lm_head/kernel", lambda x: x * np.float32(1e6))
  assert find(state.replace(params=params)) == "gradient layers/01/attention/o_a"


def test_gradients_whose_norm_overflows_are_told_from_those_that_are_not_finite(two_layers):
  """logits = hidden @ head stay: hidden is 1e22 times larger, the head as much smaller, its gradient as much larger."""
  state, find = two_layers
  params = with_leaf(state.params, "final_norm/scale", lambda x: x * np.float32(1e22))
  params = with_leaf(params, "lm_head/kernel", lambda x: x * np.float32(1e-22))
  assert find(state.replace(params=params)) == "gradient norm over all parameters"


def test_a_broken_moment_is_named_by_the_parameter_it_would_spoil(two_layers):
  state, find = two_layers
  name = next(name for name in leaves(state.opt_state) if name.endswith("/trace/layers/unit_0/moe/shared/up"))
  state = state.replace(opt_state=with_leaf(state.opt_state, name, at((1, 0, 0), np.nan)))
  assert find(state) == "updated parameter layers/01/moe/shared/up"


# ---- layers one by one ------------------------------------------------------------------------------------------------
# Two layers of a kind that compiles fast; and all kinds with the prediction block.
TWO_HCA = with_model(RUN, num_hidden_layers=2, layer_types=(c.HCA,) * 2, mlp_layer_types=(c.LEARNED,) * 2,
                     num_nextn_predict_layers=0)


@pytest.mark.parametrize("scanned", [pytest.param(TWO_HCA, id="HCA"), pytest.param(RUN, id="all", marks=pytest.mark.long)])
def test_unrolled_and_recomputed_layers_give_the_same_step(scanned):
  """Every loss, gradient and bias update as with the scanned unit."""
  run = with_model(scanned, scan_layers=False, remat="block")
  groups, unrolled = group_layers(scanned.model), group_layers(run.model)

  def regrouped(tree, old, new):
    return {**tree, "layers": join_layers(split_layers(tree["layers"], old), new)}

  start = random_state(scanned)
  moments = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract_state(run).opt_state)
  state, metrics = Step(run)(TrainState(start.step, regrouped(start.params, groups, unrolled),
                                        regrouped(start.router, groups, unrolled), moments, start.key), random_batch())
  expected_state, expected = reference() if scanned is RUN else Step(scanned)(start, random_batch())
  assert metrics.keys() == expected.keys()
  losses = LOSSES if scanned is RUN else ("next_token", "balance")
  for name in (*losses, "loss", "grad_norm"):
    assert metrics[name] == pytest.approx(float(expected[name]), rel=3e-6), name
  got = {name: np.asarray(x) for name, x in gradients_of(state).items()}
  want = gradients_of(expected_state)
  for i in range(scanned.model.num_hidden_layers):
    (key, index), (flat, _) = groups.key_of(i), unrolled.key_of(i)
    ours = {name.removeprefix(f"layers/{flat}/"): g for name, g in got.items() if name.startswith(f"layers/{flat}/")}
    assert ours
    for name, g in ours.items():  # tolerance as between meshes
      other = want[f"layers/{key}/{name}"]
      other = other if index is None else other[index]
      assert np.linalg.norm(g - other) <= 2e-5 * np.linalg.norm(other) + 1e-7, (i, name)
  assert differing(regrouped(state.router, unrolled, groups), expected_state.router) == []
