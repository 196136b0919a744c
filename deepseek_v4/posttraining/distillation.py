"""The loss of on-policy distillation: KL(student || teacher) over the whole vocabulary, a chunk of tokens at a time.

Report 5.1.2: L = sum over teachers of w_i KL(pi || pi_i) on trajectories that the student sampled. With ls and lt the
log-probabilities of student and teacher and p = exp(ls), of one place

    KL = sum_v p_v (ls_v - lt_v)          dKL / dlogit_v = p_v (ls_v - lt_v - KL)

The trajectory is data: nothing is differentiated through the sampling, and nothing flows into the teacher. Logits exist for
a chunk of tokens only, made again from hidden states and heads (5.2.2); the gradient is made together with the loss.

Axis letters: B batch   S sequence   D hidden size of the student   E hidden size of the teacher   V vocabulary of a device
              T tokens of a device   C tokens of a chunk
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from deepseek_v4 import sharding
from deepseek_v4.config_checks import refuse
from deepseek_v4.model.losses import in_chunks, weighed


def reverse_kl(student_hidden: jax.Array, student_head: jax.Array, teacher_hidden: jax.Array, teacher_head: jax.Array,
               mask: jax.Array, *, chunk: int = 1024) -> jax.Array:
  """Mean of KL(student || teacher) in nats over the places that count; 0 where none does.

  Args:
    student_hidden, teacher_hidden: [B, S, D] and [B, S, Dt], what the heads multiply, any floating dtypes.
    student_head, teacher_head: [D, V] and [Dt, V]. Where the vocabularies were padded to different sizes, both
      distributions are those over the ids that both have.
    mask: [B, S], a place counts where it is above 0.
    chunk: tokens per device whose logits exist at a time.

  Returns:
    A scalar, at least float32. Its gradients by the teacher's arrays are zero.

  Raises:
    ValueError: shapes that do not belong together.
  """
  total, count = reverse_kl_sum(student_hidden, student_head, teacher_hidden, teacher_head, mask, chunk=chunk)
  return total / jnp.maximum(count, 1)


def reverse_kl_sum(student_hidden: jax.Array, student_head: jax.Array, teacher_hidden: jax.Array, teacher_head: jax.Array,
                   mask: jax.Array, *, chunk: int, vocabulary: int | None = None) -> tuple[jax.Array, jax.Array]:
  """Scalars (sum, count), at least float32, of what `reverse_kl` is the mean of; sums over teachers and passes add up.

  Args:
    student_hidden, student_head, teacher_hidden, teacher_head, mask, chunk: as `reverse_kl` takes them, dtypes too.
    vocabulary: only ids below it count; None = those that both heads have.
  """
  _check(student_hidden, student_head, teacher_hidden, teacher_head, mask, chunk)
  known = min(student_head.shape[1], teacher_head.shape[1], vocabulary or teacher_head.shape[1])
  teacher_head = fitted(teacher_head, student_head.shape[1])
  vocab_axis = sharding.axis_name("vocab")

  def run(student, head, teacher, its_head, mask):
    flat = lambda x: x.reshape(-1, *x.shape[2:])
    return _sum(flat(student), head, flat(teacher), its_head, flat(mask), (chunk, known, vocab_axis))[None]

  rows, whole = ("batch", "sequence"), (None, "vocab")
  sums = sharding.per_shard(run, (rows, whole, rows, whole, rows), ("shards",))(
    student_hidden, student_head, teacher_hidden, teacher_head, (mask > 0).astype(jnp.int32))
  return sums.sum(), (mask > 0).sum().astype(sums.dtype)


def fitted(head: jax.Array, vocab_size: int) -> jax.Array:
  """A head [Dt, V'], floating, with `vocab_size` columns, dtype kept: those beyond are cut off, missing ones are zero."""
  return jnp.pad(head[:, :vocab_size], ((0, 0), (0, max(0, vocab_size - head.shape[1]))))


def _check(student, student_head, teacher, teacher_head, mask, chunk: int) -> None:
  """Refuses arrays that do not belong together."""
  if student.ndim != 3 or mask.shape != student.shape[:2] or teacher.shape[:-1] != student.shape[:2]:
    refuse("student_hidden, teacher_hidden, mask", f"{student.shape}, {teacher.shape}, {mask.shape}",
           "[B, S, D], [B, S, Dt] and [B, S]")
  for name, hidden, head in (("student_head", student, student_head), ("teacher_head", teacher, teacher_head)):
    if head.ndim != 2 or head.shape[0] != hidden.shape[-1]:
      refuse(name, f"shape {head.shape}", f"[{hidden.shape[-1]}, V], as its hidden states are {hidden.shape[-1]} wide")
  if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
    refuse("chunk", chunk, "a whole number, at least 1")


# ---- a device's part -----------------------------------------------------------------------------------------------------
def _chunk(student_CD, head_DV, teacher_CE, teacher_head_EV, mask_C, settings):
  """KL sum of a chunk and its gradient by the student's logits; max, normaliser and KL are summed over `axis`."""
  _, known, axis = settings
  exact = jnp.promote_types(student_CD.dtype, jnp.float32)
  over = lambda reduce, x: x if axis is None else reduce(x, axis)
  first = 0 if axis is None else jax.lax.axis_index(axis) * head_DV.shape[1]
  known_V = jnp.arange(head_DV.shape[1]) + first < known
  logits_2CV = jnp.stack([jnp.matmul(h, w, preferred_element_type=exact).astype(exact) for h, w in (
    (student_CD, head_DV), (teacher_CE, teacher_head_EV))])
  logits_2CV = jnp.where(known_V, logits_2CV, -jnp.inf)
  top_2C1 = over(jax.lax.pmax, logits_2CV.max(-1, keepdims=True))
  total_2C1 = over(jax.lax.psum, jnp.exp(logits_2CV - top_2C1).sum(-1, keepdims=True))
  ls_CV, lt_CV = logits_2CV - top_2C1 - jnp.log(total_2C1)
  p_CV, ratio_CV = jnp.exp(ls_CV), jnp.where(known_V, ls_CV - lt_CV, 0)
  kl_C1 = over(jax.lax.psum, (p_CV * ratio_CV).sum(-1, keepdims=True))
  counted_C1 = mask_C[:, None] > 0
  d_logits_CV = jnp.where(counted_C1, p_CV * (ratio_CV - kl_C1), 0)
  return jnp.where(counted_C1, kl_C1, 0).sum(), d_logits_CV.astype(student_CD.dtype)


def _chunks(student_TD, teacher_TE, mask_T, settings):
  return tuple(in_chunks(x, settings[0]) for x in (student_TD, teacher_TE, mask_T))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _sum(student_TD, head_DV, teacher_TE, teacher_head_EV, mask_T, settings):
  """KL sum over T tokens. `settings`: (chunk size, ids that both vocabularies have, mesh axis of the vocabulary)."""
  def step(total, item):
    student_CD, teacher_CE, mask_C = item
    return total + _chunk(student_CD, head_DV, teacher_CE, teacher_head_EV, mask_C, settings)[0], None

  exact = jnp.promote_types(student_TD.dtype, jnp.float32)
  return jax.lax.scan(step, jnp.zeros((), exact), _chunks(student_TD, teacher_TE, mask_T, settings))[0]


def _sum_forward(student_TD, head_DV, teacher_TE, teacher_head_EV, mask_T, settings):
  exact = jnp.promote_types(student_TD.dtype, jnp.float32)

  def step(carry, item):
    total, d_head = carry
    student_CD, teacher_CE, mask_C = item
    kl, d_logits_CV = _chunk(student_CD, head_DV, teacher_CE, teacher_head_EV, mask_C, settings)
    d_head += jnp.matmul(student_CD.T, d_logits_CV, preferred_element_type=exact)
    return (total + kl, d_head), d_logits_CV @ head_DV.T

  start = jnp.zeros((), exact), jnp.zeros(head_DV.shape, exact)
  (total, d_head), d_student = jax.lax.scan(step, start, _chunks(student_TD, teacher_TE, mask_T, settings))
  d_student = d_student.reshape(-1, student_TD.shape[1])[:student_TD.shape[0]]
  return total, (d_student, d_head.astype(head_DV.dtype))


def _sum_backward(settings, saved, g):
  d_student, d_head = weighed(saved, g, settings[2])
  return d_student, d_head, None, None, None


_sum.defvjp(_sum_forward, _sum_backward)
