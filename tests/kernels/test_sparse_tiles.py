"""The sparse form of attention with each chip's own steps and tiles, around their borders; interpreted, in the long tier.

`test_sparse_form.py` has small ones in their place, which compile fast.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import bits, tpu
from pallas_kernels.sparse_attention import sparse, sparse_lists, tiles
from tests.kernels.test_sparse_form import CHIPS, agree, chosen, inputs

PLACES = 1024  # of a list's tile, on all chips


@pytest.mark.long
@pytest.mark.parametrize("picks", [PLACES - 1, PLACES, PLACES + 1])
@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
def test_lists_around_a_tile_of_each_chip(chip, picks, monkeypatch):
  """One tile of places, or two; rows that the kernel copies by itself where heads and list allow it. Queries are not a
  multiple of any step. bfloat16: four roundings of up to 0.4% each in a row."""
  monkeypatch.setattr(tpu, "current_chip", lambda interpret: chip)
  assert sparse.FORWARD_STEP[chip.name][1] == PLACES
  arrays = inputs([(30, 9)], 41, 1100, picks, heads=16, rate=1, dtype=jnp.bfloat16)
  agree(arrays, 8, tolerance=4e-2)


@pytest.mark.long
@pytest.mark.parametrize("num_entries", [32 * sparse_lists.DIRECT_WORDS, 40_000])
def test_lists_of_long_rows(num_entries):
  """As many words as are listed in one level, and more; as many entries as a release picks."""
  options = tiles.Options(128, 1.0, tpu.V5P, True)
  masks = np.concatenate([chosen(kind, 6, num_entries, PLACES) for kind in ("scattered", "neighbours", "words")])
  got = np.asarray(jax.jit(lambda words: sparse_lists.from_words([words], PLACES, options))(bits.pack(jnp.asarray(masks))))
  for mask, row in zip(masks, got, strict=True):
    count = mask.sum()
    np.testing.assert_array_equal(np.sort(row[:count]), np.flatnonzero(mask))
    assert (row[count:] == -1).all()
