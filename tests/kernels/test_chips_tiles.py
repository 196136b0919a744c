"""The masked kernel with the chips' own tiles, in bfloat16 and float32: one less, as many and one more than a block of
queries and a tile of entries hold, forward and backward; and both forms at the released models' heads and width.

The entries on both sides of a tile's edge and the last used one weigh as much as hundreds of others, and each of them has a
channel of its own, so that none can be missed or taken in vain unnoticed.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import tpu
from pallas_kernels.selection import Selection
from pallas_kernels.shapes import FLASH, PRO
from pallas_kernels.sparse_attention import attend, attend_with, form, kernel, kernel_backward, sparse, sparse_plan, tiles
from tests.kernels import oracles
from tests.kernels.arrays import nan_where_unused, random_normals, random_picks

HEADS, WIDTH, WINDOW = 8, 16, 20
CHIPS = {chip.name: chip for chip in (tpu.V5P, tpu.V6E, tpu.TPU7X)}
# As a share of an array's largest number. bfloat16: operands, probabilities and results are rounded one after another by up
# to 0.4%, as in the cases of the walk; float32: sums of up to some thousand summands.
TOLERANCE = {"bfloat16": 4e-2, "float32": 2e-5}
LSE_TOLERANCE = {"bfloat16": 2e-2, "float32": 2e-5}  # no share: logits of 6 are rounded by up to 0.2%
MOVING = ("q", "window_kv", "entries", "sink")


def inputs(queries, num_entries, *, heads=HEADS, width=WIDTH, dtype="float32", picks=0, edges=()):
  """The last tokens of a long document, of whose entries the last ten are later than the first of them, and the last three
  unused memory. Without picks everything visible is selected. Every query's logit of an entry of `edges` is about 6."""
  arrays = random_normals(q=(1, queries, heads, width), window_kv=(1, queries, width), entries=(1, num_entries, width),
                          sink=(heads,))
  chosen = jnp.asarray(random_picks(num_entries, (1, queries, picks)))
  entry, query = (np.arange(n, dtype=np.int32)[None] for n in (num_entries, queries))
  segment = (entry < num_entries - 3).astype(np.int32)
  if edges:  # a channel each, 0 in all other keys
    own = slice(len(edges))
    for name, value in (("q", 8.0), ("window_kv", 0.0), ("entries", 0.0)):
      arrays[name][..., own] = value
    arrays["entries"][0, np.array(edges), np.arange(len(edges))] = 3.0
  arrays["entries"] = nan_where_unused(arrays["entries"], segment)
  arrays = {name: x if name == "sink" else x.astype(dtype) for name, x in arrays.items()}
  return arrays | dict(selection=Selection.from_indices(chosen) if picks else Selection.all(1, queries),
                       positions=query + max(num_entries - 10, 0), segment_ids=np.ones_like(query), entry_last=entry,
                       entry_segment=segment)


def run(arrays, op, scale=0.25):
  """out, lse and the gradients of a fixed weighted sum of both, by name."""
  @jax.jit
  def both(moving, fixed):
    values, pull = jax.vjp(lambda moving: op(**moving, **fixed, window=WINDOW, scale=scale), moving)
    weights = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size)).reshape(x.shape).astype(x.dtype), values)
    return dict(zip(("out", "lse"), values)) | {f"d {name}": x for name, x in pull(weights)[0].items()}
  return both({name: arrays[name] for name in MOVING}, {name: x for name, x in arrays.items() if name not in MOVING})


def same(got, want, dtype):
  for name, w in want.items():
    limit = LSE_TOLERANCE[dtype] if name == "lse" else TOLERANCE[dtype] * np.abs(w).max()
    np.testing.assert_allclose(np.asarray(got[name], np.float32), w, rtol=0, atol=limit, err_msg=name)


def agree(arrays, op, dtype, scale=0.25):
  """The op equals the formula in float32 at the same numbers; returns its results."""
  wide = {name: x.astype(np.float32) if name in MOVING else x for name, x in arrays.items()}
  got = run(arrays, op, scale)
  same(got, run(wide, functools.partial(attend, implementation="reference"), scale), dtype)
  return got


def plans(chip, queries, num_entries, dtype):
  """Those of forward and backward."""
  shape, options = (1, queries, HEADS, WIDTH), tiles.Options(WINDOW, 1.0, chip, True)
  return [tiles.make_plan(shape, num_entries, jnp.dtype(dtype).itemsize, options, *table[chip.name], whole)
          for table, whole in ((kernel.TILE, False), (kernel_backward.TILE, True))]


def edges():
  """(chip, dtype, tile, queries, entries): 127 to 129 queries, of which a block holds 128 with 8 heads; entries around whole
  tiles. One of 1,024 bfloat16 or 512 float32 entries is taken from 16,384 entries on."""
  for chip, dtype in [(chip, dtype) for chip in CHIPS for dtype in TOLERANCE]:
    for widest in sorted({kernel.TILE[chip][1], kernel_backward.TILE[chip][1]}):
      tile = widest * 2 // jnp.dtype(dtype).itemsize
      whole, middle = (17 * widest, 12) if widest == 1024 else (2 * tile, 128)
      yield from ((chip, dtype, tile, middle + more, whole + more) for more in (-1, 0, 1))


IN_SUITE = (("v5p", "bfloat16", 512, 129, 1025),)  # float32 at the edges of small tiles: `test_attention_kernel`


@pytest.mark.parametrize("chip, dtype, tile, queries, entries", [
    case if case in IN_SUITE else pytest.param(*case, marks=pytest.mark.long) for case in edges()])
def test_the_chips_own_tiles_end_anywhere(monkeypatch, chip, dtype, tile, queries, entries):
  both = plans(CHIPS[chip], queries, entries, dtype)
  assert tile in [plan.entries for plan in both] and all(plan.queries == 128 for plan in both)
  monkeypatch.setattr(tpu, "current_chip", lambda interpret: CHIPS[chip])
  last = entries - 4
  behind = last // tile * tile
  arrays = inputs(queries, entries, dtype=dtype, edges=sorted({0, tile - 1, tile, behind - 1, behind, last}))
  agree(arrays, functools.partial(attend, implementation="interpret"), dtype)


def long(*values):
  return [pytest.param(*value, marks=pytest.mark.long) for value in values]


@pytest.mark.parametrize("name, shapes, dtype, step", [
    ("masked", PRO, "float32", 2), ("sparse", FLASH, "bfloat16", 2),
    *long(*((name, shapes, dtype, 8) for name in ("masked", "sparse") for shapes in (FLASH, PRO) for dtype in TOLERANCE))],
    ids=lambda x: f"{x.heads} heads" if hasattr(x, "heads") else str(x))
def test_values_at_the_released_heads_and_width(monkeypatch, name, shapes, dtype, step):
  """64 and 128 heads of width 512, in the long tier with a chip's own blocks and steps; one query more than four steps,
  so that the sparse form copies some rows by itself. Values also against float64 loops."""
  if step < 8:  # the code of a step grows with its queries and their copies, and so does the time to compile it
    monkeypatch.setitem(sparse.FORWARD_STEP, "v5p", (step, 1024))
    monkeypatch.setitem(sparse.BACKWARD_STEP, "v5p", (step, 1024))
    monkeypatch.setitem(sparse.DIRECT, "v5p", 64)
    monkeypatch.setattr(sparse_plan, "GRANULE", 8)
  arrays = inputs(4 * step + 1, 40, heads=shapes.heads, width=shapes.width, dtype=dtype, picks=12)
  scale = shapes.width**-0.5
  op = functools.partial(attend_with, form(name, interpret=True))
  got = agree(arrays, op, dtype, scale)
  same(got, dict(zip(("out", "lse"), oracles.attend(**arrays, window=WINDOW, scale=scale))), dtype)
