"""Router: scores at extremes, what the bias does, hash tables, the balance loss in closed form, the bias update."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deepseek_v4 as dsv4
from deepseek_v4.config import CSA, HASH, HCA, LEARNED, SLIDING
from deepseek_v4.model.context import make_context
from deepseek_v4.model.experts import MoE
from deepseek_v4.model.router import Router, balance_loss, expert_load, hash_table, score
from deepseek_v4.training.step import update_router
from tests.model.small import T0

CONFIG = dataclasses.replace(T0, routed_scaling_factor=1.5)


def rows(tokens):
  return make_context(CONFIG, jnp.asarray(tokens), None, None, "sparse", with_losses=True)


# ---- scores -----------------------------------------------------------------------------------------------------------
def test_scores_and_gradients_at_extremes():
  """sqrt(softplus(x)): its derivative is sigmoid(x) / (2 score), and exp(x / 2) stands in where softplus underflows."""
  x = jnp.array([-200, -120, -90, -17, 0, 90, 200], jnp.float32)
  both = jax.jit(jax.vmap(jax.value_and_grad(lambda x: score(x, "sqrtsoftplus"))))
  value, gradient = both(x)
  assert value[0] <= 4e-44
  np.testing.assert_allclose(value[1:], [8.7565e-27, 2.86252e-20, 2.034684e-4, 0.8325546, 9.486833, 14.14214], rtol=1e-5)
  assert np.isfinite(gradient).all()
  np.testing.assert_allclose(gradient[jnp.array([3, 4, 5])], [1.017342e-4, 0.3002806, 0.0527046], rtol=1e-5)
  # no jump where the two forms meet
  near = np.linspace(-40.001, -39.999, 7, dtype=np.float32)
  value, gradient = both(near)
  np.testing.assert_allclose(value, np.exp(np.float64(near) / 2), rtol=1e-6)
  np.testing.assert_allclose(gradient, np.exp(np.float64(near) / 2) / 2, rtol=1e-5)
  np.testing.assert_allclose(score(x, "sigmoid"), 1 / (1 + np.exp(-np.float64(x))), rtol=1e-6, atol=1e-38)


@pytest.mark.parametrize("kind, router", [
  (LEARNED, {"bias": jnp.array([10.0, 0, 0, 0])}),
  (HASH, {"hash_table": jnp.array([[1, 2]] * 5 + [[3, 0]] + [[2, 1]] * 91)})],
  ids=["learned", "hash"])
def test_bias_or_table_chooses_and_scores_weigh(kind, router):
  """Logits 0, 1, 2, 3; experts 0 and 3 by a bias of 10 on the first one or by the table; weights from the scores alone."""
  gate = jnp.zeros((CONFIG.hidden_size, 4)).at[0].set(jnp.arange(4.0))
  variables = {"params": {"gate": gate}, "router": router}
  x = jnp.zeros((1, 1, CONFIG.hidden_size)).at[..., 0].set(1.0)
  experts, weights, _ = jax.jit(lambda v, x: Router(CONFIG, kind).apply(v, x, rows([[5]]), 0))(variables, x)
  s = np.sqrt(np.log1p(np.exp(np.arange(4.0))))
  want = {0: 1.5 * s[0] / (s[0] + s[3]), 3: 1.5 * s[3] / (s[0] + s[3])}
  got = dict(zip(np.asarray(experts[0, 0]).tolist(), np.asarray(weights[0, 0]).tolist()))
  assert got.keys() == want.keys()
  for expert, weight in want.items():
    np.testing.assert_allclose(got[expert], weight, rtol=1e-6)


@pytest.mark.parametrize("kind", [LEARNED, HASH])
def test_scores_that_underflow_leave_the_shared_expert(kind):
  """All logits -200: weights 0, not NaN; the routed part is 0, the shared expert is there, every gradient is finite."""
  config = dataclasses.replace(CONFIG, hidden_size=8, moe_intermediate_size=4)
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  params = {"router": {"gate": jnp.zeros((8, 4)).at[0].set(-200.0)},
            "experts": {"gate": normal(4, 8, 4), "up": normal(4, 8, 4), "down": normal(4, 4, 8)},
            "shared": {"gate": normal(8, 4), "up": normal(8, 4), "down": normal(4, 8)}}
  table = hash_table(97, 4, 2, 1)
  router = {"router": {"bias": jnp.array([0.0, 0.3, 0, 0.2])} if kind == LEARNED else {"hash_table": table}}
  x = normal(1, 5, 8).at[..., 0].set(1.0)
  tokens = np.array([[1, 2, 3, 50, 96]])

  @jax.jit
  def run(params, x):
    def total(params, x):
      y, experts, _, balance = MoE(config, kind, "blockwise").apply({"params": params, "router": router}, x, rows(tokens), 0)
      return (y * jnp.cos(y)).sum() + (0 if balance is None else balance[0]), (y, experts)
    return jax.grad(total, argnums=(0, 1), has_aux=True)(params, x)

  gradients, (y, experts) = run(params, x)
  gate, up, down = (np.asarray(params["shared"][name]) for name in ("gate", "up", "down"))
  g, u = np.minimum(x[0] @ gate, 10), np.clip(x[0] @ up, -10, 10)
  np.testing.assert_allclose(y[0], (g / (1 + np.exp(-g)) * u) @ down, rtol=1e-5, atol=1e-5)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
  if kind == HASH:
    np.testing.assert_array_equal(experts, table[tokens])
  else:
    assert {tuple(sorted(row)) for row in np.asarray(experts[0]).tolist()} == {(1, 3)}


# ---- hash tables ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("vocab, experts, top_k", [
  (97, 4, 2), (64, 8, 3), (5, 8, 2), (37, 6, 6), (13, 13, 1), (1000, 16, 4)])
def test_hash_table_is_distinct_and_balanced(vocab, experts, top_k):
  make = jax.jit(lambda layer: hash_table(vocab, experts, top_k, layer))  # the layer's number is traced inside a scan
  first, second = np.asarray(make(0)), np.asarray(make(1))
  for table in (first, second):
    assert table.shape == (vocab, top_k) and table.dtype == np.int32
    assert table.min() >= 0 and table.max() < experts
    assert all(len(set(row)) == top_k for row in table.tolist())
    load = np.bincount(table.reshape(-1), minlength=experts)
    assert load.max() - load.min() <= 1
  np.testing.assert_array_equal(first, make(0))
  assert (first != second).any()
  if top_k < experts:  # ids that follow each other do not share a pattern
    assert len({tuple(np.sort(row)) for row in first.tolist()}) > min(vocab, experts) // 2


def test_scanned_hash_layers_have_tables_of_their_own():
  config = dataclasses.replace(T0, num_hidden_layers=4, layer_types=(SLIDING,) * 4, num_nextn_predict_layers=0,
                               mlp_layer_types=(HASH, HASH, HASH, LEARNED))
  init = jax.jit(lambda key: dsv4.DeepseekV4(config, "reference").init(key, jnp.ones((1, 2), jnp.int32))["router"])
  layers = init(jax.random.key(0))["layers"]
  assert set(layers) == {"unit_0", "layer_03"}  # the tables are scanned
  tables = np.asarray(layers["unit_0"]["moe"]["router"]["hash_table"])
  for layer in range(3):
    np.testing.assert_array_equal(tables[layer], hash_table(97, 4, 2, layer))
  np.testing.assert_array_equal(layers["layer_03"]["moe"]["router"]["bias"], np.zeros(4))


# ---- balance ----------------------------------------------------------------------------------------------------------
def balance_by_hand(scores, experts, segment_ids):
  """(sum over documents of tokens * sum_e f_e P_e, tokens), in float64."""
  total, count, num_experts, top_k = 0.0, 0, scores.shape[-1], experts.shape[-1]
  for row in range(scores.shape[0]):
    for segment in set(segment_ids[row].tolist()) - {0}:
      place = np.flatnonzero(segment_ids[row] == segment)
      f = np.bincount(experts[row, place].reshape(-1), minlength=num_experts) * num_experts / (top_k * len(place))
      p = (scores[row, place].astype(np.float64) / scores[row, place].sum(-1, keepdims=True)).mean(0)
      total, count = total + len(place) * (f * p).sum(), count + len(place)
  return total, count


def test_balance_loss_is_the_formula_per_document():
  rng = np.random.default_rng(0)
  scores = rng.uniform(0.01, 1, (3, 20, 6)).astype(np.float32)
  experts = np.argsort(rng.random((3, 20, 6)), -1)[..., :2]
  segments = np.zeros((3, 20), np.int32)
  segments[0], segments[1, :11], segments[1, 11:12], segments[1, 14:] = 1, 1, 2, 3  # padding in the middle of the second row
  segments[2, 3:9], segments[2, 9:15] = 7, 2  # and before and behind the documents of the third
  loss = jax.jit(lambda s, e, g: balance_loss(s, e, types.SimpleNamespace(segment_ids=g, contiguous=False)))
  np.testing.assert_allclose(loss(scores, experts, segments), balance_by_hand(scores, experts, segments), rtol=1e-6)
  whole = np.ones((3, 20), np.int32)
  plain = balance_loss(scores, experts, types.SimpleNamespace(segment_ids=jnp.asarray(whole), contiguous=True))
  np.testing.assert_allclose(plain, balance_by_hand(scores, experts, whole), rtol=1e-6)
  np.testing.assert_allclose(loss(scores, experts, whole), plain, rtol=1e-6)
  # each document by itself, at the start of a row
  alone = np.zeros(2)
  for row in range(3):
    for segment in set(segments[row].tolist()) - {0}:
      place = np.flatnonzero(segments[row] == segment)
      moved = [np.zeros_like(x) for x in (scores, experts, segments)]
      for new, old in zip(moved, (scores, experts, segments)):
        new[0, :len(place)] = old[row, place]
      alone += np.asarray(loss(*moved))
  np.testing.assert_allclose(loss(scores, experts, segments), alone, rtol=1e-6)
  # perfect balance is 1 per token, whatever the scores: every document deals its picks out evenly
  segments = np.repeat(np.array([[1] * 6 + [2] * 12 + [0] * 2] * 3, np.int32), 1, 0)
  dealt = (np.arange(20)[:, None] * 2 + np.arange(2)) % 6
  total, count = loss(scores, np.broadcast_to(dealt, (3, 20, 2)), segments)
  assert count == 54
  np.testing.assert_allclose(total / count, 1, rtol=1e-6)


def test_load_counts_no_padding():
  experts = np.array([[[0, 1], [1, 2], [3, 1], [2, 0]]])
  np.testing.assert_array_equal(expert_load(jnp.asarray(experts), 5, jnp.array([[1, 1, 0, 4]])), [2, 2, 2, 0, 0])


@pytest.mark.parametrize("scan_layers", [True, False])
def test_bias_moves_towards_balance(scan_layers):
  """Layers 1, 3 and 2, 4 are scanned together; the first has a table. Each bias follows its own layer's load."""
  config = dataclasses.replace(T0, num_hidden_layers=5, layer_types=(SLIDING, CSA, HCA, CSA, HCA), scan_layers=scan_layers,
                               mlp_layer_types=(HASH,) + (LEARNED,) * 4)
  table = np.arange(194, dtype=np.int32).reshape(97, 2)
  start = np.arange(16, dtype=np.float32).reshape(4, 4)
  bias = lambda layer: {"moe": {"router": {"bias": start[layer - 1]}}}
  tree = {"layers": {"layer_00": {"moe": {"router": {"hash_table": table}}},
                     **{f"layer_{i:02d}": bias(i) for i in range(1, 5)}}, "mtp": {"block": bias(1)}}
  router = dsv4.restack(tree, config, scan_layers=scan_layers)
  assert ("unit_0" in router["layers"]) == scan_layers
  load = np.array([[9, 0, 0, 0], [4, 4, 4, 4], [16, 0, 0, 0], [3, 5, 4, 4], [1, 1, 1, 13]])
  load = {"layers": load, "mtp": np.array([0, 8, 4, 4])}
  moved = jax.device_get(jax.jit(lambda router, load: update_router(config, router, load, 0.125))(router, load))
  back = dsv4.restack(moved, config, scan_layers=False)
  np.testing.assert_array_equal(back["layers"]["layer_00"]["moe"]["router"]["hash_table"], table)
  want = {1: [0, 0, 0, 0], 2: [-1, 1, 1, 1], 3: [1, -1, 0, 0], 4: [1, 1, 1, -1]}
  for layer, sign in want.items():
    np.testing.assert_array_equal(back["layers"][f"layer_{layer:02d}"]["moe"]["router"]["bias"],
                                  start[layer - 1] + 0.125 * np.array(sign))
  np.testing.assert_array_equal(back["mtp"]["block"]["moe"]["router"]["bias"], start[0] + 0.125 * np.array([1, -1, 0, 0]))
