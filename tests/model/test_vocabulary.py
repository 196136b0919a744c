"""Embedding and head that devices share give what one device gives, against NumPy in float64, values and gradients."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_v4 import sharding
from deepseek_v4.config import MeshConfig, ModelConfig
from deepseek_v4.model.losses import cross_entropy
from deepseek_v4.model.vocabulary import Embedding
from tests.model.small import T0

VOCAB, WIDTH = 48, 16
MESHES = [{}, dict(fsdp=4), dict(tensor=2), dict(fsdp=2, tensor=2), dict(fsdp=2, expert=2, context=2), dict(data=2, fsdp=2)]
NAME = lambda sizes: " ".join(f"{axis}={size}" for axis, size in sizes.items()) or "one device"


def on_mesh(run, sizes):
  sizes = {"data": 1} | sizes
  mesh = sharding.make_mesh(MeshConfig(**sizes), jax.devices()[:np.prod(list(sizes.values()))])
  return sharding.OnMesh(jax.jit(run), mesh)


class Model(nn.Module):
  """So that the table has the name that the layout's table knows."""

  config: ModelConfig

  @nn.compact
  def __call__(self, tokens):
    return Embedding(self.config, name="embed")(tokens)


def looked_up(sizes, tokens, table, d_rows, **changes):
  """Rows and the table's gradient for this gradient of the rows."""
  model = Model(dataclasses.replace(T0, vocab_size=table.shape[0], hidden_size=table.shape[1], **changes))

  def both(table, d_rows):
    rows, pull = jax.vjp(lambda table: model.apply({"params": {"embed": {"embedding": table}}}, tokens), table)
    return rows, pull(d_rows.astype(rows.dtype))[0]
  return jax.device_get(on_mesh(both, sizes)(table, d_rows))


@pytest.mark.parametrize("shape, sizes", [*(((VOCAB, WIDTH), sizes) for sizes in MESHES), ((47, 15), MESHES[3])],
                         ids=lambda value: NAME(value) if isinstance(value, dict) else str(value))
def test_rows_of_a_split_table(shape, sizes):
  """Rows are copied, so they are the table's own numbers; a row's gradient sums up to 32 numbers of float32. The last table
  cannot be split."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, shape[0], (8, 12)).astype(np.int32)
  tokens[:, :4] = 5
  table, d_rows = (rng.normal(size=shape).astype(np.float32) for shape in (shape, (8, 12, shape[1])))
  rows, d_table = looked_up(sizes, tokens, table, d_rows)
  np.testing.assert_array_equal(rows, table[tokens])
  wanted = np.zeros(table.shape)
  np.add.at(wanted, tokens, d_rows.astype(np.float64))
  np.testing.assert_allclose(d_table, wanted, atol=1e-5)


@pytest.mark.parametrize("sizes", [{}, dict(fsdp=2, tensor=2)], ids=NAME)
def test_a_frequent_row_gets_all_of_its_gradient_in_bfloat16(sizes):
  """1,000 times 1: in bfloat16 a sum would stop at 256, where 1 is less than half of the distance to the next number."""
  tokens = np.full((4, 250), 7, np.int32)
  _, d_table = looked_up(sizes, tokens, np.ones((VOCAB, WIDTH), np.float32), np.ones((4, 250, WIDTH), np.float32),
                         compute_dtype="bfloat16")
  assert d_table.dtype == np.float32
  np.testing.assert_array_equal(d_table[7], 1000)
  assert np.abs(d_table).sum() == 1000 * WIDTH


@pytest.mark.parametrize("chunk_size", [1, 6, 100])
@pytest.mark.parametrize("vocab, sizes", [*((VOCAB, sizes) for sizes in MESHES), (11, dict(fsdp=4)), (8, dict(fsdp=4))],
                         ids=lambda value: NAME(value) if isinstance(value, dict) else str(value))
def test_cross_entropy_of_a_split_head(vocab, sizes, chunk_size):
  """Whatever the chunks: fewer tokens than devices, a last one filled up, all at once; 11 columns are not split by
  four, and 8 are so few for 80 tokens that they are gathered."""
  rng = np.random.default_rng(0)
  hidden, head = rng.normal(size=(8, 10, WIDTH)), rng.normal(size=(WIDTH, vocab))
  targets = rng.integers(-1, vocab, (8, 10)).astype(np.int32)
  targets[0, :3] = -1

  def run(hidden, head):
    value, pull = jax.vjp(lambda h, w: cross_entropy(h, w, targets, chunk_size=chunk_size), hidden, head)
    return value, pull((jnp.asarray(2.0), jnp.asarray(1.0)))

  with jax.enable_x64(True):
    (total, count), (d_hidden, d_head) = jax.device_get(on_mesh(run, sizes)(hidden, head))
  counted, logits = targets >= 0, hidden @ head
  p = np.exp(logits - logits.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  of_target = np.take_along_axis(p, np.maximum(targets, 0)[..., None], -1)[..., 0]
  np.testing.assert_allclose(total, -np.log(of_target[counted]).sum(), rtol=1e-12)
  assert count == counted.sum()
  d_logits = 2 * (p - np.eye(vocab)[np.maximum(targets, 0)]) * counted[..., None]
  np.testing.assert_allclose(d_hidden, d_logits @ head.T, atol=1e-12)
  np.testing.assert_allclose(d_head, np.einsum("bsd,bsv->dv", hidden, d_logits), atol=1e-11)
