"""Chunked cross entropy and the norms against their formulas in float64, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_v4.config import LossConfig
from deepseek_v4.model.losses import cross_entropy
from deepseek_v4.model.norm import rms_norm
from deepseek_v4.training.step import loss_counts, loss_weights
from tests.model.small import ROW, T0, packed_model, random_tokens, traced_model


@pytest.mark.parametrize("chunk_size", [1, 5, 100])
def test_chunked_cross_entropy(chunk_size):
  """Whatever the chunks: 14 tokens in chunks of 1, of 5 (the last one filled up), and in one."""
  rng = np.random.default_rng(0)
  hidden, head = rng.normal(size=(2, 7, 6)), 3 * rng.normal(size=(6, 11))
  targets = rng.integers(-1, 11, (2, 7)).astype(np.int32)
  targets[0, :3] = -1
  counted = targets >= 0
  with jax.enable_x64(True):
    @jax.jit
    def run(hidden, head):
      value, pull = jax.vjp(lambda h, w: cross_entropy(h, w, targets, chunk_size=chunk_size), hidden, head)
      return value, pull((2.0, 1.0))

    (total, count), (d_hidden, d_head) = jax.device_get(run(hidden, head))
  logits = hidden @ head
  p = np.exp(logits - logits.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  of_target = np.take_along_axis(p, np.maximum(targets, 0)[..., None], -1)[..., 0]
  np.testing.assert_allclose(total, -np.log(of_target[counted]).sum(), rtol=1e-12)
  assert count == counted.sum()
  d_logits = 2 * (p - np.eye(11)[np.maximum(targets, 0)]) * counted[..., None]
  np.testing.assert_allclose(d_hidden, d_logits @ head.T, atol=1e-12)
  np.testing.assert_allclose(d_head, np.einsum("bsd,bsv->dv", hidden, d_logits), atol=1e-12)


def test_a_loss_in_bfloat16_is_weighted_in_float32():
  """Gradients of w * loss in bfloat16 are w * gradients: 1/3 as bfloat16 would be 0.2% off, every gradient alike."""
  rng = np.random.default_rng(0)
  hidden, head = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((1, 64, 32), (32, 50)))
  targets = rng.integers(0, 50, (1, 64)).astype(np.int32)

  @jax.jit
  def run(weight):
    return jax.grad(lambda h, w: weight * cross_entropy(h, w, targets, chunk_size=16)[0], argnums=(0, 1))(hidden, head)

  for got, whole in zip(run(1 / 3), run(1.0)):
    got, want = np.asarray(got, np.float64), np.asarray(whole, np.float64) / 3
    # Each number is rounded by up to 0.4%, up and down; their mean over thousands is not.
    assert abs((got * want).sum() / (want * want).sum() - 1) < 3e-4


def test_indexer_loss_is_the_distance_from_the_attention_that_the_trace_shows():
  """p: the attention's weight on the picked entries, all heads together, normalised once; q: softmax of the index scores."""
  tokens = random_tokens(1, ROW)
  found = traced_model("reference")(tokens)
  want = 0.0
  for i, picks in enumerate(found["layers/01/indexer/selected"][0]):
    picks = picks[picks >= 0]
    if picks.size:
      p = found["layers/01/attention/entry_weight"][0, i].astype(np.float64).sum(0)[picks]
      scores = found["layers/01/indexer/scores"][0, i].astype(np.float64)[picks]
      p, q = p / p.sum(), np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
      want += (p * np.log(p / q)).sum()
  total, count = packed_model("blockwise")(tokens, np.ones_like(tokens)).losses["indexer"]
  np.testing.assert_allclose(total, want, rtol=1e-4)
  assert count == ROW - 3 and total > 1  # the first three tokens see no entry


def test_loss_weights_and_counts():
  """The prediction block's loss enters with its weight, and with the smaller one once the learning rate decays."""
  losses = {"next_token": 4.0, "mtp": 5.0, "balance": 1.1, "indexer": 0.3}
  total = lambda weight, decaying=False: float(sum(w * losses[name] for name, w in loss_weights(
      LossConfig(mtp_weight=weight, mtp_weight_final=0.05), decaying).items()))
  np.testing.assert_allclose(total(0.1) - total(0.0), 0.1 * 5.0, rtol=1e-6)
  np.testing.assert_allclose(total(0.1, decaying=True) - total(0.0), 0.05 * 5.0, rtol=1e-6)
  np.testing.assert_allclose(total(0.0), 4.0 + 1e-4 * 1.1 + 0.01 * 0.3, rtol=1e-6)
  # documents of 5 and 4 tokens in one pass, of 2 and 6 in the next; the first target of the 6 is masked
  segments = np.array([[[1, 1, 1, 1, 1, 2, 2, 2, 2, 0]], [[1, 1, 2, 2, 2, 2, 2, 2, 0, 0]]], np.int32)
  positions = np.array([[[0, 1, 2, 3, 4, 0, 1, 2, 3, 0]], [[0, 1, 0, 1, 2, 3, 4, 5, 0, 1]]], np.int32)
  mask = (segments > 0).astype(np.int32)
  mask[1, 0, 3] = 0
  batch = dict(tokens=segments, segment_ids=segments, positions=positions, loss_mask=mask)
  counts = jax.device_get(jax.jit(lambda batch: loss_counts(T0, batch))(batch))
  assert counts == {"next_token": 4 + 3 + 1 + 4, "mtp": 3 + 2 + 0 + 4, "balance": 17, "indexer": 2 + 1 + 0 + 3}
  nothing = jax.device_get(jax.jit(lambda batch: loss_counts(T0, batch))({name: 0 * x for name, x in batch.items()}))
  assert set(map(float, nothing.values())) == {1.0}  # so that nothing is divided by zero


@pytest.mark.parametrize("weighted", [True, False])
def test_rms_norm(weighted):
  rng = np.random.default_rng(0)
  x, scale, g = 5 * rng.normal(size=(3, 4, 6)), rng.normal(size=6) if weighted else None, rng.normal(size=(3, 4, 6))
  x[0, 0] = 0  # a token without content
  formula = lambda x, s: x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * (1 if s is None else s)
  with jax.enable_x64(True):
    value, pull = jax.vjp(lambda *a: rms_norm(a[0], a[1] if weighted else None, 1e-6), *((x, scale) if weighted else (x,)))
    gradients = jax.device_get(pull(jnp.asarray(g)))
  np.testing.assert_allclose(value, formula(x, scale), atol=1e-12)
  for i, gradient in enumerate(gradients):
    v = rng.normal(size=gradient.shape) * (1 if i else (np.abs(x).sum(-1, keepdims=True) > 0))
    moved = [(formula(x + s * v, scale) if i == 0 else formula(x, scale + s * v)) for s in (-1e-6, 1e-6)]
    np.testing.assert_allclose((gradient * v).sum(), (((moved[1] - moved[0]) / 2e-6) * g).sum(), rtol=1e-7)
  np.testing.assert_allclose(gradients[0][0, 0], g[0, 0] * (1 if scale is None else scale) * 1e3, rtol=1e-12)
  narrow = jax.eval_shape(lambda x, s: rms_norm(x, s, 1e-6), jnp.zeros((2, 6), jnp.bfloat16), jnp.zeros(6))
  assert narrow.dtype == jnp.bfloat16
