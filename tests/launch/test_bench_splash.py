"""What splash attention is told of who sees which key: the dense mask against words, the static rule against the mask."""

import jax.numpy as jnp
import numpy as np
import pytest

from launch.benchmarks import splash
from launch.benchmarks.kernels import plans, program
from launch.benchmarks.kernels.cases import FORWARD, Case
from launch.benchmarks.kernels.chips import CHIPS
from pallas_kernels.cases import packed
from pallas_kernels.selection import Selection


@pytest.mark.parametrize("entries, picked", [(7, True), (7, False), (0, False)])
def test_the_mask_holds_the_window_and_the_selected_visible_entries(entries, picked):
  places = packed([(9, 4)], 15, 2, entries) if entries else packed([(9, 4)], 15, 99, 0)
  rng = np.random.default_rng(0)
  picks = np.stack([rng.permutation(7)[:3] for _ in range(15)])[None]
  picks[0, ::4, 1] = -1
  selection = Selection.from_indices(jnp.asarray(picks)) if picked else Selection.all(1, 15)
  got = np.asarray(splash.mask(selection, places, window=3))
  position, segment, last, owner = (np.asarray(places[name])[0] for name in (
      "positions", "segment_ids", "entry_last", "entry_segment"))
  assert got.shape == (15, 15 + entries) and got.any()
  for i in range(15):
    near = [segment[i] > 0 and segment[j] == segment[i] and 0 <= i - j < 3 for j in range(15)]
    far = [segment[i] > 0 and owner[t] == segment[i] and last[t] <= position[i] and (not picked or t in picks[0, i])
           for t in range(entries)]
    assert got[i].tolist() == near + far


@pytest.mark.parametrize("rows, entries", [((24,), 12), ((21,), 12), ((24,), 0), ((9, 4, 8), 0)],
                         ids=["HCA", "HCA and padding", "sliding", "documents"])
def test_the_rule_says_what_the_dense_mask_says(rows, entries):
  """Of one document, or without entries; documents come as numbers beside the rule, padding is nobody's."""
  places = packed([rows], 24, 2, entries) if entries else packed([rows], 24, 99, 0)
  want = np.asarray(splash.mask(Selection.all(1, 24), places, window=3))
  segments = splash.documents(places["segment_ids"][0], places["entry_segment"][0], 24 + entries + 4)
  of_queries, of_keys = np.asarray(segments.q), np.asarray(segments.kv)
  assert (0 in of_queries) == (sum(rows) < 24) and of_keys.shape == (24 + entries + 4,)
  got = splash.rule(24, len(of_keys), entries, 3, 2)[:, :] & (of_queries[:, None] == of_keys)  # as the kernel compares
  np.testing.assert_array_equal(got[:, :24 + entries], want)
  assert not got[:, 24 + entries:].any()


@pytest.mark.parametrize("op", ["attention_heavy", "attention_window", "attention"])
@pytest.mark.parametrize("queries, keys", [(512, 512), (512, 128), (256, 1024)])
def test_plans_count_the_blocks_that_the_rule_leaves(op, queries, keys):
  """Heads x blocks with any pair that sees each other; of a selection every visible entry may be one."""
  case = Case(op, "pro", 4096, FORWARD)
  window, rate = case.shapes.window, case.rate
  whole = -(-(4096 + case.entries) // 1024) * 1024
  rule = splash.rule(4096, whole, case.entries, window, rate)[:, :]
  seen = rule.reshape(4096 // queries, queries, whole // keys, keys).any((1, 3)).sum()
  blocks = (None, queries, 512), (keys, 512)
  of = lambda name, grid: plans.plan_of(name, case, program.Call(name, grid, blocks, (), 1), CHIPS[0])
  forward = of("splash_mqa_fwd_segmented_residuals", (128, 4096 // queries, 9))
  assert dict(forward.counts) == {"start": 128 * 4096 // queries, "tile": 128 * seen, "finish": 128 * 4096 // queries}
  assert forward.flops == 128 * seen * 4 * queries * keys * 512 and forward.fits
  by_keys = of("splash_mqa_dkv_no_residuals", (whole // keys, 128, 9))
  assert dict(by_keys.counts) == {"start": whole // keys, "tile": 128 * seen, "finish": whole // keys}
