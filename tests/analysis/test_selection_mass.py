"""Mass on the indexer's picks against loops in float64 from logits on, and in cases that can be said in words."""

import math

import jax
import numpy as np
import pytest

from deepseek_v4.analysis.selection_mass import model_mass, selection_mass
from deepseek_v4.analysis.trace import trace
from deepseek_v4.model.transformer import DeepseekV4
from tests.training.small import random_batch, random_state
from tests.training.test_trainable import ONE


def by_loops(window, entries, sink, scores, seen, top_k):
  """(held, best, even) of logits window [B,S,H,N], entries [B,S,H,T], sink [H] and scores [B,S,T]; `seen` [B,S,T]."""
  found = []
  for b in range(entries.shape[0]):
    for s in range(entries.shape[1]):
      visible = [t for t in range(entries.shape[3]) if seen[b, s, t]]
      if len(visible) <= top_k:
        continue
      mass = dict.fromkeys(visible, 0.0)
      for h in range(entries.shape[2]):
        total = math.exp(sink[h]) + sum(math.exp(x) for x in window[b, s, h])
        total += sum(math.exp(entries[b, s, h, t]) for t in visible)
        for t in visible:
          mass[t] += math.exp(entries[b, s, h, t]) / total
      whole = sum(mass.values())
      picked = sorted(visible, key=lambda t: (-scores[b, s, t], t))[:top_k]
      found.append((sum(mass[t] for t in picked) / whole, sum(sorted(mass.values())[-top_k:]) / whole, top_k / len(visible)))
  return np.mean(found, 0)


@pytest.mark.parametrize("top_k", [1, 3, 8])
def test_mass_is_that_of_the_joint_softmax_summed_over_heads(top_k):
  rng = np.random.default_rng(top_k)
  window, entries, sink = rng.normal(size=(2, 6, 3, 4)), 2 * rng.normal(size=(2, 6, 3, 12)), rng.normal(size=3)
  scores = np.round(rng.normal(size=(2, 6, 12)), 1)  # with ties
  seen = np.arange(12) < rng.integers(0, 13, (2, 6, 1))
  hidden = np.where(seen[:, :, None], entries, -np.inf)
  logits = np.concatenate([np.broadcast_to(sink[:, None], (2, 6, 3, 1)), window, hidden], -1)
  weight = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  mass = selection_mass(weight[..., 5:], np.where(seen, scores, -np.inf), top_k)
  # sums of a few float64 numbers in another order
  expected = by_loops(window, entries, sink, scores, seen, top_k)
  np.testing.assert_allclose((mass.held, mass.best, mass.even), expected, rtol=1e-12)
  assert mass.held <= mass.best and mass.queries == (seen.sum(-1) > top_k).sum()


def test_scores_that_are_the_mass_hold_the_best():
  weight = np.random.default_rng(0).dirichlet(np.ones(10), (1, 5, 2))
  mass = selection_mass(weight, weight.sum(2), 4)
  assert mass.held == mass.best > mass.even == 0.4


def test_heads_count_by_their_mass_on_entries():
  """A head that looks at its window hardly counts: heads are not normalised one by one."""
  weight = np.array([[[[0.0, 0.9], [0.001, 0.0]]]])
  assert selection_mass(weight, np.array([[[0.0, 1.0]]]), 1).held == pytest.approx(0.9 / 0.901)


def test_who_sees_no_more_than_the_picks_is_left_out():
  weight = np.full((1, 3, 1, 4), 0.1)
  scores = np.array([[[0, -np.inf, -np.inf, -np.inf], [0, 1, -np.inf, -np.inf], [0, 1, 2, 3]]])
  assert selection_mass(weight, scores, 2).queries == 1
  assert selection_mass(weight, scores, 2).held == pytest.approx(0.5)
  assert math.isnan(selection_mass(weight, scores, 4).held) and selection_mass(weight, scores, 4).queries == 0


@pytest.mark.parametrize("weight, scores, top_k, said", [
  ((1, 2, 3, 4), (1, 2, 3), 1, "expected .batch, queries, heads, entries."), ((2, 3, 4), (2, 4), 1, "entry_weight"),
  ((1, 2, 3, 4), (1, 2, 4), 0, "top_k = 0: expected at least 1")])
def test_what_does_not_fit_is_refused(weight, scores, top_k, said):
  with pytest.raises(ValueError, match=said):
    selection_mass(np.zeros(weight), np.zeros(scores), top_k)


def test_of_a_model_it_is_that_of_its_dense_attention():
  batch, state = {name: x[0, :2] for name, x in random_batch().items()}, random_state(ONE)
  model, variables = DeepseekV4(ONE.model, "reference"), {"params": state.params, "router": state.router}
  arguments = (variables, batch["tokens"], batch["positions"], batch["segment_ids"])
  found = model_mass(model, *arguments)
  traced = jax.jit(lambda *x: trace(model, *x, attention_mode="dense"))(*arguments)
  expected = selection_mass(traced["layers/00/attention/entry_weight"], traced["layers/00/indexer/scores"], 2)
  assert list(found) == [0] and found[0].queries == expected.queries > 20
  # float32 programs that XLA fuses otherwise
  assert found[0].held == pytest.approx(expected.held, rel=1e-4) and found[0].best == pytest.approx(expected.best, rel=1e-4)
