"""Reverse KL over the whole vocabulary against its formula in float64 NumPy: values, gradients, meshes, memory.

Letters: B batch   S sequence   D, E hidden sizes of student and teacher   V vocabulary
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deepseek_v4 as dsv4
from deepseek_v4.config import MeshConfig
from deepseek_v4.posttraining.distillation import reverse_kl_sum
from deepseek_v4.sharding import make_mesh
from tests.model.small import equations

B, S, D, E, V = 2, 12, 6, 10, 1000


def arrays(vocab=V, teacher_vocab=None, seed=0, rows=B, length=S):
  """(student hidden, head, teacher hidden, head, mask), float64; KL of about a nat, a third of the places left out."""
  rng = np.random.default_rng(seed)
  normal = lambda *shape: rng.normal(size=shape)
  return (normal(rows, length, D), normal(D, vocab) / 2, normal(rows, length, E), normal(E, teacher_vocab or vocab) / 3,
          (rng.random((rows, length)) < 0.7).astype(np.int32))


def log_softmax(x):
  x = x - x.max(-1, keepdims=True)
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


def dense(student, head, teacher, teacher_head, mask):
  """(mean KL, its gradient by the student's hidden states and head) by the formula, [B, S, V] and all."""
  known = min(head.shape[1], teacher_head.shape[1])
  ls, lt = log_softmax((student @ head)[..., :known]), log_softmax((teacher @ teacher_head)[..., :known])
  p = np.exp(ls)
  kl = (p * (ls - lt)).sum(-1)
  d_logits = np.zeros((*mask.shape, head.shape[1]))
  d_logits[..., :known] = p * (ls - lt - kl[..., None]) * mask[..., None] / mask.sum()
  return (kl * mask).sum() / mask.sum(), d_logits @ head.T, np.einsum("bsd,bsv->dv", student, d_logits)


def value_and_gradients(found, chunk):
  """Of reverse_kl in float64, by all four arrays."""
  with jax.enable_x64(True):
    run = jax.value_and_grad(lambda *a: dsv4.distillation.reverse_kl(*a, found[4], chunk=chunk), argnums=(0, 1, 2, 3))
    return jax.device_get(jax.jit(run)(*found[:4]))


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_value_and_gradient_are_those_of_the_formula(chunk):
  """24 places in chunks of 1, of 7 (the last one filled up), and in one; the teacher is of another width."""
  found = arrays()
  value, gradients = value_and_gradients(found, chunk)
  want, *wanted = dense(*found)
  np.testing.assert_allclose(value, want, rtol=1e-12)
  for gradient, w in zip(gradients, wanted):
    np.testing.assert_allclose(gradient, w, atol=1e-14)
  assert want > 0.5 and not gradients[2].any() and not gradients[3].any()  # nothing flows into the teacher


def test_gradient_is_that_of_finite_differences():
  found = arrays()
  _, gradients = value_and_gradients(found, 5)
  rng = np.random.default_rng(1)
  for i in (0, 1):
    for _ in range(3):
      v = rng.normal(size=found[i].shape)
      moved = [dense(*found[:i], found[i] + s * v, *found[i + 1:])[0] for s in (-1e-5, 1e-5)]
      # central differences: an error of order 1e-10 times a third derivative of order 1
      assert abs((gradients[i] * v).sum() - (moved[1] - moved[0]) / 2e-5) < 1e-6


def test_equal_models_have_no_distance_and_no_gradient():
  student, head, *_, mask = arrays()
  value, gradients = value_and_gradients((student, head, student, head, mask), 7)
  assert value == 0 and not any(g.any() for g in gradients)
  narrow = [jnp.asarray(x, jnp.bfloat16) for x in (student, head)]
  run = jax.jit(jax.value_and_grad(lambda *a: dsv4.distillation.reverse_kl(*a, *narrow, mask, chunk=7), argnums=(0, 1)))
  value, gradients = run(*narrow)
  assert value == 0 and value.dtype == jnp.float32 and gradients[0].dtype == jnp.bfloat16
  assert not any(np.asarray(g, np.float32).any() for g in gradients)


@pytest.mark.parametrize("vocab, teacher_vocab", [(40, 48), (48, 40)])
def test_vocabularies_padded_to_other_sizes(vocab, teacher_vocab):
  """Both distributions are those over the ids that both have; a column that the teacher lacks is left alone."""
  found = arrays(vocab, teacher_vocab)
  value, gradients = value_and_gradients(found, 7)
  want, *wanted = dense(*found)
  np.testing.assert_allclose(value, want, rtol=1e-12)
  for gradient, w in zip(gradients, wanted):
    np.testing.assert_allclose(gradient, w, atol=1e-14)
  assert not gradients[1][:, min(vocab, teacher_vocab):].any()


def test_several_teachers_one_after_another_are_all_at_once():
  """Sums of each teacher's rows over the count of all add up to the loss of the rows together, gradients too."""
  student, head, teacher, _, mask = arrays(vocab=50, rows=4)
  rng = np.random.default_rng(2)
  heads = [rng.normal(size=(E, 50)) for _ in range(2)]
  weights, count = (0.5, 2.0), mask.sum()
  of = lambda x, i: x[2 * i:2 * i + 2]

  def one(student, head, i):
    total, counted = reverse_kl_sum(of(student, i), head, of(teacher, i), heads[i], of(mask, i), chunk=5)
    return weights[i] * total / count, counted

  with jax.enable_x64(True):
    run = jax.jit(jax.value_and_grad(one, argnums=(0, 1), has_aux=True), static_argnums=2)
    parts = jax.device_get([run(student, head, i) for i in (0, 1)])
  # jointly: the rows' own heads in one formula
  ls = log_softmax(student @ head)
  lt = log_softmax(np.concatenate([of(teacher, i) @ heads[i] for i in (0, 1)]))
  w = np.repeat(weights, 2)[:, None] * mask / count
  p = np.exp(ls)
  kl = (p * (ls - lt)).sum(-1)
  d_logits = p * (ls - lt - kl[..., None]) * w[..., None]
  assert sum(int(counted) for (_, counted), _ in parts) == count
  np.testing.assert_allclose(sum(value for (value, _), _ in parts), (w * kl).sum(), rtol=1e-12)
  np.testing.assert_allclose(sum(g[0] for _, g in parts), d_logits @ head.T, atol=1e-14)
  np.testing.assert_allclose(sum(g[1] for _, g in parts), np.einsum("bsd,bsv->dv", student, d_logits), atol=1e-14)


@pytest.mark.parametrize("mesh", [dict(data=2, context=2, tensor=2), dict(data=1, fsdp=2, tensor=4)],
                         ids=["data context tensor", "fsdp tensor"])
def test_devices_share_the_work(mesh):
  """Rows, sequence and vocabulary split: the numbers of one device, and nothing as wide as the vocabulary is gathered."""
  found = arrays(vocab=64, teacher_vocab=60, length=16)
  want, *wanted = dense(*found)
  devices = make_mesh(MeshConfig(**mesh))
  rows, head = (dsv4.sharding.spec(axes) for axes in (("batch", "sequence"), (None, "vocab")))
  with jax.enable_x64(True), jax.set_mesh(devices):
    placed = [jax.device_put(x, jax.sharding.NamedSharding(devices, spec)) for x, spec in zip(found, (rows, head, rows))]
    run = jax.jit(jax.value_and_grad(lambda *a: dsv4.distillation.reverse_kl(*a, found[4], chunk=3), argnums=(0, 1)))
    program = run.lower(*placed, found[3]).compile()
    value, gradients = jax.device_get(program(*placed, found[3]))
  np.testing.assert_allclose(value, want, rtol=1e-12)
  for gradient, w in zip(gradients, wanted):
    np.testing.assert_allclose(gradient, w, atol=1e-14)
  gathered = [line for line in program.as_text().splitlines() if " all-gather(" in line or " all-gather-start(" in line]
  assert not [line for line in gathered if "64]" in line.split("all-gather")[0]], gathered


def test_nothing_of_the_size_of_sequence_times_vocabulary():
  """In the traced program of loss and gradients, and in what the compiled one needs beside its arguments."""
  length, vocab, chunk = 4096, 4099, 64
  shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, length, 16), (16, vocab), (1, length, 24), (24, vocab))]
  mask = jax.ShapeDtypeStruct((1, length), jnp.int32)
  run = jax.value_and_grad(lambda *a: dsv4.distillation.reverse_kl(*a, chunk=chunk), argnums=(0, 1))
  sizes = [math.prod(v.aval.shape) for e in equations(jax.make_jaxpr(run)(*shapes, mask).jaxpr) for v in e.outvars]
  assert 2 * chunk * vocab == max(sizes) < length * vocab / 16  # logits of student and teacher of one chunk
  needed = jax.jit(run).lower(*shapes, mask).compile().memory_analysis().temp_size_in_bytes
  assert 0 < needed < 4 * length * vocab / 4


@pytest.mark.parametrize("change, said", [
  (lambda a: (a[0][0], *a[1:]), "student_hidden, teacher_hidden, mask = "),
  (lambda a: (*a[:2], a[2][:, :3], *a[3:]), r"expected \[B, S, D\], \[B, S, Dt\] and \[B, S\]"),
  (lambda a: (a[0], a[1].T, *a[2:]), r"student_head = 'shape \(1000, 6\)': expected \[6, V\]"),
  (lambda a: (*a[:3], a[1], a[4]), r"teacher_head = 'shape \(6, 1000\)': expected \[10, V\]"),
])
def test_arrays_that_do_not_belong_together(change, said):
  with pytest.raises(ValueError, match=said):
    dsv4.distillation.reverse_kl(*change(arrays()))


@pytest.mark.parametrize("chunk", [0, True, 2.0])
def test_chunks_of_no_tokens(chunk):
  with pytest.raises(ValueError, match="chunk = .*: expected a whole number, at least 1"):
    dsv4.distillation.reverse_kl(*arrays(), chunk=chunk)
