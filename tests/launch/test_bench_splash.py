"""The dense mask that splash attention needs, against the rule in words."""

import jax.numpy as jnp
import numpy as np
import pytest

from launch.benchmarks import splash
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
