"""Eight rows in one pass, or in four passes of two: the same losses, gradients and bias updates."""

import dataclasses
import functools

import numpy as np
import pytest

from deepseek_v4.training.step import loss_counts
from tests.training.small import (
  LENGTHS,
  LOSSES,
  MODEL,
  RUN,
  Step,
  differing,
  gradients_of,
  random_batch,
  random_state,
  reference,
  single_step,
)

ORDERS = {
  "unequal passes": range(8),  # 82, 3, 63 and 50 tokens
  "a pass without a token": (2, 2, 0, 3, 5, 6, 4, 7),  # the empty row twice instead of row 1
}


@functools.cache
def four_passes():
  return Step(dataclasses.replace(RUN, data=dataclasses.replace(RUN.data, accumulation=4)))


@functools.cache
def both(case):
  """((state, metrics) of one pass, of four passes)."""
  batches = [random_batch(accumulation, [LENGTHS[row] for row in ORDERS[case]]) for accumulation in (1, 4)]
  return tuple(step(random_state(), batch) for step, batch in zip((single_step(), four_passes()), batches))


@pytest.mark.parametrize("case", ORDERS)
def test_four_passes_equal_one(case):
  (expected_state, expected), (state, metrics) = both(case)
  for name in (*LOSSES, "loss", "grad_norm"):
    assert metrics[name] == pytest.approx(float(expected[name]), rel=3e-6), name
  for name in ("tokens", "finite", "learning_rate", "max_load_violation"):
    assert metrics[name] == expected[name], name
  expected_grads, grads = gradients_of(expected_state), gradients_of(state)
  for name, g in expected_grads.items():  # tolerance as between meshes
    assert np.linalg.norm(grads[name] - g) <= 2e-5 * np.linalg.norm(g) + 1e-7, name
  assert differing(state.router, expected_state.router) == []
  assert int(state.step) == 1


def test_means_of_the_passes_would_be_something_else():
  """What the test above could not tell apart from the truth, it would not test: averaging the passes' own means is off."""
  means, counts = [], []
  for rows in np.split(np.arange(8), 4):
    batch = random_batch()
    batch["segment_ids"][:, np.setdiff1d(np.arange(8), rows)] = 0
    _, metrics = single_step()(random_state(), batch)
    means.append([float(metrics[name]) for name in LOSSES])
    counts.append([float(loss_counts(MODEL, batch)[name]) for name in LOSSES])
  whole = np.array([float(reference()[1][name]) for name in LOSSES])
  assert (np.abs(np.mean(means, 0) / whole - 1) > 0.01).all()
  np.testing.assert_allclose(np.average(means, axis=0, weights=counts), whole, rtol=1e-2)  # a count of 0 is taken as 1
