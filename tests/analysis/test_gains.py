"""Composite gains of mHC: by hand, on random maps with and without Sinkhorn, and on a trained model."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from deepseek_v4 import config as c
from deepseek_v4.analysis.gains import Gains, composite_gains, model_gains
from deepseek_v4.model.transformer import DeepseekV4
from pallas_kernels.hyper_connections import reference

SUBLAYERS, TOKENS, STREAMS = 60, 256, 4
# One token, two streams. B is the transpose: B1 = [[1, 0], [3, 1]], B2 = [[1, 2], [0, 1]].
FIRST, SECOND = np.array([[[[1.0, 3.0], [0.0, 1.0]]]]), np.array([[[[1.0, 0.0], [2.0, 1.0]]]])


def test_the_product_in_order_by_hand():
  """B2 B1 = [[7, 2], [3, 1]]: rows 9 and 4, columns 10 and 3. The other order, B1 B2 = [[1, 2], [3, 7]]: 10 and 9."""
  assert composite_gains([FIRST, SECOND]) == Gains(9.0, 10.0, 9.0, 10.0)
  assert composite_gains([SECOND, FIRST]) == Gains(10.0, 9.0, 10.0, 9.0)


def test_a_sum_of_signs_counts_by_its_absolute_value():
  assert composite_gains([np.array([[[[1.0, 0.0], [-6.0, -2.0]]]])]) == Gains(5.0, 8.0, 5.0, 8.0)


def test_mean_of_gains_and_gain_of_the_mean():
  """Two tokens whose maps move everything to stream 0, or everything to stream 1: each 2 backwards, their mean 1."""
  to_0, to_1 = np.array([[1.0, 1.0], [0.0, 0.0]]), np.array([[0.0, 0.0], [1.0, 1.0]])
  comb = np.stack([to_0, to_1])[None]  # columns sum to 1, so rows of B do
  assert composite_gains([comb]) == Gains(1.0, 2.0, 1.0, 1.0)


def test_padding_is_left_out():
  comb = np.concatenate([FIRST, 1e6 * FIRST], 1)
  assert composite_gains([comb], np.array([[3, 0]])) == composite_gains([FIRST])
  with pytest.raises(ValueError, match="segment_ids are all 0"):
    composite_gains([comb], np.zeros((1, 2), int))


@pytest.mark.parametrize("combs, message", [
  ([], "combs is empty"),
  ([np.ones((2, 3, 4))], r"combs\[0\] has shape"),
  ([np.ones((1, 2, 4, 3))], r"combs\[0\] has shape"),
  ([np.ones((1, 2, 4, 4)), np.ones((1, 3, 4, 4))], r"combs\[1\] has shape \(1, 3, 4, 4\): expected \(1, 2, 4, 4\)"),
])
def test_wrong_maps_are_refused(combs, message):
  with pytest.raises(ValueError, match=message):
    composite_gains(combs)


def logits(scale, shared=0.0, seed=0):
  """[L, 1, S, N, N] normal logits; `shared` is the scale of a part that all sublayers have in common."""
  rng = np.random.default_rng(seed)
  base = rng.normal(size=(1, 1, 1, STREAMS, STREAMS))
  return (shared * base + scale * rng.normal(size=(SUBLAYERS, 1, TOKENS, STREAMS, STREAMS))).astype(np.float32)


@pytest.mark.parametrize("scale, shared", [(1, 0), (4, 0), (6, 0), (0.3, 6)], ids=str)
def test_sinkhorn_keeps_sixty_maps_tame(scale, shared):
  """Independent logits, and sublayers that resemble each other, whose errors add up in one direction (worst found: 1.33)."""
  combs = jax.jit(lambda x: reference.sinkhorn(x, iterations=20, eps=1e-6))(logits(scale, shared))
  gains = composite_gains(combs)
  for forward in (gains.forward, gains.forward_of_mean):
    assert forward == pytest.approx(1, abs=1e-3)
  for backward in (gains.backward, gains.backward_of_mean):
    assert 1 - 1e-3 <= backward <= 1.7


@pytest.mark.parametrize("scale", [1, 4, 6])
def test_without_sinkhorn_sixty_maps_explode(scale):
  """The same logits, exponentiated and nothing more."""
  with np.errstate(over="ignore"):  # infinity is above 10 too
    gains = composite_gains(np.exp(np.float64(logits(scale))))
  assert gains.forward >= 10 and gains.backward >= 10


def test_free_maps_around_the_identity_explode():
  """The hyper-connections before mHC: I + 0.2 N, gains of about 100."""
  gains = composite_gains(np.eye(STREAMS) + 0.2 * np.float64(logits(1)))
  assert 10 <= gains.forward <= 1000 and 10 <= gains.backward <= 1000


@pytest.mark.long
def test_a_trained_model():
  """The tiny config on short rows of real text, streams fully mixed or not at first: training keeps the gains in bounds."""
  from deepseek_v4.training.data import make_dataset
  from deepseek_v4.training.state import init_state
  from deepseek_v4.training.step import make_train_step

  tiny = c.load(Path(__file__).resolve().parents[2] / "configs" / "tiny.py")
  run = dataclasses.replace(tiny, data=dataclasses.replace(tiny.data, sequence_length=128, batch_size=4),
                            optimizer=dataclasses.replace(tiny.optimizer, warmup_steps=5, decay_steps=0))
  batches = iter(make_dataset(run.data, run.model.vocab_size))
  state, step, losses = init_state(run, jax.random.key(0)), make_train_step(run), []
  for _ in range(40):
    batch = next(batches)
    state, metrics = step(state, batch)
    losses.append(float(metrics["loss"]))
  assert losses[-1] < losses[0] - 1
  rows = {name: x[0] for name, x in batch.items()}
  gains = model_gains(DeepseekV4(run.model), {"params": state.params, "router": state.router}, rows["tokens"],
                      rows["positions"], rows["segment_ids"])
  print(gains)
  for forward in (gains.forward, gains.forward_of_mean):
    assert forward == pytest.approx(1, abs=1e-3)
  for backward in (gains.backward, gains.backward_of_mean):
    assert backward <= 1.7
