"""The indexer's loss where its value is known, what it trains, and the indexer's scores at exact zeros."""

import jax
import numpy as np
import pytest

from pallas_kernels.indexer import kl_loss, select
from pallas_kernels.selection import Selection
from tests.kernels import oracles

QUERIES, ENTRIES, HEADS, WIDTH, RATE = 12, 6, 3, 5, 2
PLACES = dict(
    positions=np.arange(QUERIES, dtype=np.int32)[None], segment_ids=np.ones((1, QUERIES), np.int32),
    entry_last=np.arange(RATE - 1, QUERIES, RATE, dtype=np.int32)[None], entry_segment=np.ones((1, ENTRIES), np.int32))
PICKS = np.array([[np.random.default_rng(i).permutation(ENTRIES)[:4] for i in range(QUERIES)]], np.int32)
PICKS[0, :, 1] = -1


def teacher():
  """Attention tensors, and log of the share of every entry in them: sum over heads of exp(logit - lse)."""
  rng = np.random.default_rng(0)
  q = rng.normal(size=(1, QUERIES, HEADS, WIDTH)).astype(np.float32)
  entries = rng.normal(size=(1, ENTRIES, WIDTH)).astype(np.float32)
  _, lse = oracles.attend(q, np.zeros((1, QUERIES, WIDTH)), entries, Selection.all(1, QUERIES), np.ones(HEADS),
                          window=0, scale=0.5, **PLACES)
  log_mass = np.log(np.exp(np.einsum("bshd,btd->bsht", q, entries) * 0.5 - lse[..., None]).sum(2))
  return dict(attention_queries=q, entries=entries, lse=lse.astype(np.float32)), log_mass


@pytest.mark.parametrize("implementation", ["reference", "blockwise", "interpret"])
def test_indexer_loss_where_its_value_is_known(implementation):
  """Scores equal to log p plus a constant make the loss and its gradient zero; the teacher never gets a gradient."""
  fixed, log_mass = teacher()
  student = dict(queries=(log_mass + 20)[:, :, None].astype(np.float32), weights=np.ones((1, QUERIES, 1), np.float32),
                 keys=np.eye(ENTRIES, dtype=np.float32)[None])  # one head, so that score = query channel

  @jax.jit
  def both(student, fixed, selection):
    total = lambda student, fixed: (lambda kl: (kl.sum(), kl))(kl_loss(
        **student, **fixed, selection=selection, scale=0.5, implementation=implementation, **PLACES))
    return jax.grad(total, argnums=(0, 1), has_aux=True)(student, fixed)

  for selection in (Selection.all(1, QUERIES), Selection.from_indices(jax.numpy.asarray(PICKS))):
    (d_student, d_fixed), kl = both(student, fixed, selection)
    np.testing.assert_allclose(kl, 0, atol=3e-6)
    for gradient in d_student.values():
      np.testing.assert_allclose(gradient, 0, atol=2e-5)
    # Weights that are zero, as with a fresh head: the scores are all equal, the loss is not, and the gradient leads out.
    start = {**student, "weights": 0 * student["weights"]}
    (d_start, d_fixed_start), kl = both(start, fixed, selection)
    (want,) = oracles.kl_loss(**start, **fixed, selection=selection, scale=0.5, **PLACES)
    np.testing.assert_allclose(kl, want, atol=1e-5)
    assert want.max() > 0.01
    step = 1e-4
    moved = [oracles.kl_loss(**{**start, "weights": np.full_like(start["weights"], s, np.float64)}, **fixed,
                             selection=selection, scale=0.5, **PLACES)[0] for s in (-step, step)]
    np.testing.assert_allclose(d_start["weights"][..., 0], (moved[1] - moved[0]) / (2 * step), atol=1e-4)
    for gradient in (*d_fixed.values(), *d_fixed_start.values()):
      assert (np.asarray(gradient) == 0).all()


@pytest.mark.parametrize("implementation", ["reference", "blockwise"])
def test_a_selection_that_drops_nothing_names_nothing(implementation):
  index = [np.ones(shape, np.float32) for shape in ((1, QUERIES, HEADS, WIDTH), (1, QUERIES, HEADS), (1, ENTRIES, WIDTH))]
  for top_k, kind in ((ENTRIES - 1, "indices"), (ENTRIES, "all"), (ENTRIES + 3, "all")):
    chosen = jax.eval_shape(lambda k=top_k: select(*index, top_k=k, implementation=implementation, **PLACES))
    assert chosen.kind == kind
