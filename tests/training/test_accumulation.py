"""Eight rows in one pass, or in four passes of two: the same losses, gradients and bias updates."""

import dataclasses
import functools

import numpy as np
import pytest

from deepseek_v4 import config as c
from deepseek_v4.training.step import loss_counts
from tests.training.small import (
  LENGTHS,
  LOSSES,
  RUN,
  Step,
  differing,
  gradients_of,
  random_batch,
  random_state,
  with_model,
)

# Programs that compile in seconds. All kinds of layers and the prediction block take a batch in two passes in test_mesh.py,
# and in four in the long tier.
ONE = with_model(RUN, num_hidden_layers=1, layer_types=(c.CSA,), mlp_layer_types=(c.LEARNED,), num_nextn_predict_layers=0)
RUNS = {"one layer": ONE, "all kinds": RUN}

ORDERS = {
  "unequal passes": range(8),  # 82, 3, 63 and 50 tokens
  "a pass without a token": (2, 2, 0, 3, 5, 6, 4, 7),  # the empty row twice instead of row 1
}


@functools.cache
def passes(accumulation, name="one layer"):
  run = RUNS[name]
  return Step(dataclasses.replace(run, data=dataclasses.replace(run.data, accumulation=accumulation)))


@pytest.mark.parametrize("case", ORDERS)
@pytest.mark.parametrize("name", ["one layer", pytest.param("all kinds", marks=pytest.mark.long)])
def test_four_passes_equal_one(name, case):
  batches = {n: random_batch(n, [LENGTHS[row] for row in ORDERS[case]]) for n in (1, 4)}
  (expected_state, expected), (state, metrics) = (passes(n, name)(random_state(RUNS[name]), x) for n, x in batches.items())
  assert metrics.keys() == expected.keys()
  losses = LOSSES if name == "all kinds" else ("next_token", "balance", "indexer")
  for key in (*losses, "loss", "grad_norm"):
    assert metrics[key] == pytest.approx(float(expected[key]), rel=3e-6), key
  for key in ("tokens", "finite", "learning_rate", "max_load_violation"):
    assert metrics[key] == expected[key], key
  expected_grads, grads = gradients_of(expected_state), gradients_of(state)
  for key, g in expected_grads.items():  # tolerance as between meshes
    assert np.linalg.norm(grads[key] - g) <= 2e-5 * np.linalg.norm(g) + 1e-7, key
  assert differing(state.router, expected_state.router) == []
  assert int(state.step) == 1


def test_means_of_the_passes_would_be_something_else():
  """What the test above could not tell apart from the truth, it would not test: averaging the passes' own means is off."""
  losses, state = [name for name in LOSSES if name != "mtp"], random_state(ONE)
  means, counts = [], []
  for rows in np.split(np.arange(8), 4):
    batch = random_batch()
    batch["segment_ids"][:, np.setdiff1d(np.arange(8), rows)] = 0
    _, metrics = passes(1)(state, batch)
    means.append([float(metrics[name]) for name in losses])
    counts.append([float(loss_counts(ONE.model, batch)[name]) for name in losses])
  whole = passes(1)(state, random_batch())[1]
  whole = np.array([float(whole[name]) for name in losses])
  assert (np.abs(np.mean(means, 0) / whole - 1) > 0.01).all()
  np.testing.assert_allclose(np.average(means, axis=0, weights=counts), whole, rtol=1e-2)  # a count of 0 is taken as 1
