"""The least work of a case, counted by hand, and how often a kernel's regions run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch.benchmarks.kernels import bounds, cases, plans
from launch.benchmarks.kernels.cases import FORWARD, GRADIENT, Case
from launch.benchmarks.kernels.chips import CHIPS
from pallas_kernels.indexer import kernel, tiles
from tests.launch.bench_texts import V5P, attention_call


def test_the_least_work_equals_a_count_by_hand():
  case = Case("attention", "pro", 8192, FORWARD)
  see = [min(t + 1, 128) + min((t + 1) // 4, 1024) for t in range(8192)]
  least = bounds.least(case)
  assert least.flops == 4 * 128 * 512 * sum(see)
  assert bounds.least(dataclasses.replace(case, direction=GRADIENT)).flops == 14 * 128 * 512 * sum(see)
  rows, keys, words = 8192 * 128 * 512 * 2, (8192 + 2048) * 512 * 2, 8192 * 128 * 4
  assert least.bytes == 2 * rows + 8192 * 128 * 4 + keys + words
  picked = sum(min((t + 1) // 4, 1024) for t in range(8192))
  assert least.row_bytes == least.bytes + (picked - 2048) * 1024
  both = bounds.least(dataclasses.replace(case, direction=GRADIENT))
  assert both.row_bytes == both.bytes + 2 * (picked - 2048) * 1024  # each pass reads the rows once more
  heavy = bounds.least(Case("attention_heavy", "pro", 8192, FORWARD))
  assert heavy.flops == 4 * 128 * 512 * sum(min(t + 1, 128) + (t + 1) // 128 for t in range(8192))


def test_the_sparse_forms_bound_where_all_picks_are_taken():
  case = Case("attention", "pro", 2**20, FORWARD)
  least = bounds.least(case)
  found = [max(least.flops / chip.flops_per_cycle, least.row_bytes / chip.bytes_per_cycle) / case.tokens for chip in CHIPS]
  assert found == pytest.approx([1280, 1400, 781], rel=0.15)


def test_the_selections_vector_bound_per_token():
  case = Case("select", "pro", 65536, FORWARD)
  assert bounds.least(case).vector / case.tokens == pytest.approx(539, rel=0.01)
  forward, both = (bounds.least(Case("kl_loss", "pro", 65536, direction)) for direction in (FORWARD, GRADIENT))
  picked = sum(min((t + 1) // 4, 1024) for t in range(65536)) / 65536
  assert both.vector == 2 * forward.vector  # the backward pass scores again
  assert forward.vector / 65536 == pytest.approx(picked * 64 * 270 / (8 * 512 * 64))


def rounds_of(blocks, top_k):
  """Rounds in which the kernel finds the thresholds of each block of queries, scores [32, T]."""
  sizes = tiles.Sizes.of(32, blocks[0].shape[1], kernel.TILE["v5p"], 1)
  passes, found = [], []

  @jax.jit
  def threshold(ranks):
    fold = kernel._over_slots(ranks, jnp.int32(len(ranks) // kernel._slots(sizes)), sizes)
    def count(test):
      jax.debug.callback(lambda: passes.append(1))
      return kernel._counter(fold)(test)
    return kernel._threshold(fold, count, top_k)

  for scores in blocks:
    passes.clear()
    ranks = np.array(scores, np.float32).view(np.int32)
    ranks = np.where(ranks < 0, ranks ^ 0x7fffffff, ranks)
    low, reach, _ = threshold(jnp.asarray(ranks.reshape(32, -1, sizes.entries).swapaxes(0, 1)))
    jax.effects_barrier()
    np.testing.assert_array_equal(np.ravel(reach), (ranks >= low).sum(1))
    assert (np.asarray(reach) == top_k).all()
    found.append(len(passes) / 2)
  return found


def test_rounds_of_the_threshold_search():
  """The plan takes as many for every block as those need that see all of 64K tokens: 7.66 in the mean of 32 of them, 7.0 to
  7.5 where they see an eighth to a half; scores as the formula makes them, with weights of both signs or of one, need at
  most 15% more. The mean of these eight blocks is 7.75 (7.25 for 512 entries); of any eight it scatters by a third of a
  round."""
  rng, entries = np.random.default_rng(0), 16384
  normals = [rng.normal(size=(32, entries)) for _ in range(8)]
  q, k, w = (rng.normal(size=size).astype(np.float32) for size in ((32, 16, 16), (entries, 16), (32, 16)))
  dots = np.maximum(np.einsum("shc,tc->sth", q, k, optimize=True), 0)
  rounds = rounds_of([*normals, *((dots * weights[:, None]).sum(2) for weights in (w, np.abs(w)))], 1024)
  assert np.mean(rounds[:-2]) == pytest.approx(plans.ROUNDS, rel=0.05)
  assert np.mean(rounds[-2:]) <= 1.15 * plans.ROUNDS
  assert np.mean(rounds_of(normals, 512)) <= 1.05 * plans.ROUNDS


def test_every_case_has_positive_bounds():
  for case in cases.all_cases(tuple(cases.BY_NAME), (4096, 65536)):
    least = bounds.least(case)
    assert least.flops >= 0 and 0 < least.bytes <= least.row_bytes


def test_visited_tiles_are_those_that_a_block_sees():
  case = Case("attention", "pro", 16384, FORWARD)
  plan = plans.plan_of("masked_attention", case, attention_call(V5P), V5P)
  tiles = [-(-((block + 1) * 8 // 4) // 512) for block in range(2048)]
  assert dict(plan.counts) == {"start": 2048, "tile": sum(tiles), "finish": 2048}
  assert plan.visits == sum(tiles) and plan.steps == 2048 * 8 and plan.units == 1
  assert plan.flops == 4 * 1024 * 512 * (512 * sum(tiles) + 256 * 2048)
  assert plans.plan_of("unheard of", case, attention_call(V5P), V5P) is None


def test_a_window_alone_has_a_part_for_tiles_that_never_runs():
  case = Case("attention_window", "pro", 16384, FORWARD)
  plan = plans.plan_of("masked_attention", case, attention_call(V5P, entries=128), V5P)
  assert dict(plan.counts) == {"start": 2048, "tile": 0, "finish": 2048} and (plan.hot, plan.steps) == ("start", 2048)
  assert plan.flops == 4 * 1024 * 512 * 256 * 2048


def test_sparse_cases_are_the_last_queries_of_their_context():
  found = [case.length for case in cases.all_cases(("attention_sparse",), (4096,), ("pro",)) if case.direction == FORWARD]
  assert found == [2**16, 2**20]
  case = Case("attention_sparse", "pro", 2**20, FORWARD)
  assert (case.tokens, case.entries) == (cases.SHARE, 2**18)
  least = bounds.least(case)
  assert least.flops == 4 * 128 * 512 * (1024 + 128) * case.tokens  # all see more than they pick
  assert bounds.visible(case)[-1] == 2**18 and least.bytes == least.row_bytes
