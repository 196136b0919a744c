"""The sparse form of attention against the formula: lists, chunks, runs and tiles around their borders.

Interpreted, the SparseCore's copies and sums of rows are plain JAX (see `sparse_rows`); lists, plans and all kernels are
the code that runs on a TPU. Small steps and tiles stand in for the chips' own.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import bits, tpu
from pallas_kernels.cases import packed
from pallas_kernels.selection import Selection
from pallas_kernels.sparse_attention import attend, sparse, sparse_lists, sparse_plan, sparse_rows, sparse_table, tiles
from tests.kernels.arrays import nan_where_unused, random_normals, random_picks

WIDTH, SCALE = 16, 0.25
MOVING = ("q", "window_kv", "entries", "sink")
CHIPS = (tpu.V5P, tpu.V6E, tpu.TPU7X)


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
  """A row of statistics a step, 128 places a tile (64 in float32, which is padded to 128), 128 queries a chunk; where a
  list is one tile, of 128 rows a quarter as many as there are heads straight to VMEM. A step's queries and the copies of
  each are straight-line code: few of them compile fast."""
  monkeypatch.setitem(sparse.FORWARD_STEP, "v5p", (1, 128))
  monkeypatch.setitem(sparse.BACKWARD_STEP, "v5p", (1, 128))
  monkeypatch.setitem(sparse.DIRECT, "v5p", 32)
  monkeypatch.setattr(sparse_plan, "GRANULE", 8)
  monkeypatch.setattr(sparse, "ROWS", 2**14)


def inputs(rows, length, num_entries, picks, *, heads=32, rate=2, width=WIDTH, kind="indices", dtype=jnp.float32):
  """Packed rows with NaN in unused entries; picks in any order, visible or not, -1 among them."""
  places, batch = packed(rows, length, rate, num_entries), len(rows)
  arrays = random_normals(q=(batch, length, heads, width), window_kv=(batch, length, width),
                          entries=(batch, num_entries, width), sink=(heads,))
  arrays["entries"] = nan_where_unused(arrays["entries"], places["entry_segment"])
  chosen = Selection.from_indices(jnp.asarray(random_picks(num_entries, (batch, length, picks))))
  if kind == "bits":
    words = jax.jit(lambda chosen: bits.words_of(chosen, num_entries, places))(chosen)
    chosen = Selection.from_words(words, num_entries, picks)
  arrays = {name: x if name == "sink" else x.astype(dtype) for name, x in arrays.items()}
  return {**arrays, "selection": chosen if kind != "all" else Selection.all(batch, length), **places}


def run(arrays, window, op):
  """(out, lse) and the gradients of a fixed weighted sum of both."""
  @jax.jit
  def both(moving, fixed, weights):
    values, pull = jax.vjp(lambda moving: op(**moving, **fixed, window=window, scale=SCALE), moving)
    return values, pull(weights)[0]
  shape = arrays["q"].shape
  weights = random_normals(1, out=shape, lse=shape[:3])
  return both({name: arrays[name] for name in MOVING}, {name: x for name, x in arrays.items() if name not in MOVING},
              (weights["out"].astype(arrays["q"].dtype), weights["lse"]))


def ours(q, window_kv, entries, selection, sink, **options):
  return sparse.attend(q, window_kv, entries, selection, sink, **options, interpret=True)


def formula(arrays, window):
  """Results of the formula in float32 at the same numbers."""
  wide = {name: x.astype(np.float32) if name in MOVING else x for name, x in arrays.items()}
  return run(wide, window, lambda **arguments: attend(**arguments, implementation="reference"))


def agree(arrays, window, tolerance=2e-5):
  """The sparse form equals the formula, in float32 and at the same numbers; returns its results."""
  got, want = run(arrays, window, ours), formula(arrays, window)
  for name, g, w in zip(("out", "lse", *MOVING), [*got[0], *(got[1][name] for name in MOVING)],
                        [*want[0], *(want[1][name] for name in MOVING)], strict=True):
    assert g.shape == w.shape and g.dtype == (arrays[name].dtype if name in MOVING else g.dtype)
    limit = tolerance * max(np.abs(np.asarray(w)).max(initial=0), 1)
    np.testing.assert_allclose(np.asarray(g, np.float32), w, atol=limit, rtol=0, err_msg=name)
  return got


# ---- attention --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("picks, length, kind", [(129, 260, "indices")] + [
    pytest.param(*case, marks=pytest.mark.long) for case in (
        (127, 129, "indices"), (128, 256, "indices"), (129, 300, "indices"), (129, 300, "bits"),
        (128, 128, "bits"), (1, 257, "bits"), (0, 127, "all"))])
def test_lengths_and_picks_around_the_tiles(picks, length, kind):
  """Below, at and above 128 places of a tile and 128 queries of a chunk: one to three chunks, the last one alone."""
  plan = sparse_plan.make_plan((1, length, 32, WIDTH), 150, max(picks, 1), 4, 128, 4, 128, 2**14)
  assert plan.tile == 128 and plan.chunk_queries == 128 and plan.chunks == -(-length // 128)
  agree(inputs([(length - 25, 20)], length, 150, picks, kind=kind), 128)


def test_packed_rows_and_bfloat16():
  """Two batch rows of three documents; eight roundings to bfloat16 of up to 0.4% each, as for the other forms."""
  arrays = inputs([(5, 19, 1), (13, 8)], 27, 13, 6, kind="bits", dtype=jnp.bfloat16)
  agree(arrays, 8, tolerance=4e-2)


def test_copies_arrive_before_they_are_read():
  """On an emulated TPU whose copies happen when they are waited for, with memory full of NaN: the numbers of the formula,
  and of copies that happen at once. Lists are full, so that entries come both ways."""
  length = 40
  plan = sparse_plan.make_plan((2, length, 32, WIDTH), 132, 128, 2, 8, 4, 128, 2**14, 2, 32)
  assert (plan.direct, plan.staged, plan.run) == (8, 120, 10)
  arrays = inputs([(40,), (33,)], length, 132, 128, rate=1, dtype=jnp.bfloat16)
  assert (np.asarray(arrays["selection"].picks)[:, :, plan.staged:] < length).any(2).mean() > 0.5
  (want, want_lse), _ = formula(arrays, 8)
  q, window_kv, entries, sink = (arrays.pop(name) for name in MOVING)
  selection, late = arrays.pop("selection"), pltpu.InterpretParams(dma_execution_mode="on_wait", uninitialized_memory="nan")
  run = lambda interpret: jax.jit(lambda: sparse.attend(
      q, window_kv, entries, selection, sink, **arrays, window=8, scale=SCALE, interpret=interpret))()
  results = run(late), run(True)
  for one, other in zip(*results):
    np.testing.assert_allclose(np.asarray(one, np.float32), np.asarray(other, np.float32), atol=1e-2)
  for out, lse in results:  # roundings to bfloat16, as in `test_packed_rows_and_bfloat16`
    np.testing.assert_allclose(np.asarray(out, np.float32), want, atol=4e-2 * np.abs(want).max())
    np.testing.assert_allclose(lse, want_lse, atol=4e-2 * np.abs(want_lse).max())


def test_rows_without_any_entry_and_any_number_of_heads():
  """Sixty heads; queries that pick nothing, or only what they cannot see; keys past the end are nobody's."""
  arrays = inputs([(60,)], 60, 30, 4, heads=60)
  picks = np.asarray(arrays["selection"].picks).copy()
  picks[:, 10:20] = -1
  picks[:, 20:30] = [29, 28, 27, -1]  # of later tokens
  picks[:, 30, 0] = 30  # no entry
  arrays["selection"] = Selection.from_indices(jnp.asarray(picks))
  (out, lse), gradients = agree(arrays, 0)
  assert (np.asarray(out)[0, 10:30] == 0).all() and (np.asarray(gradients["q"])[0, 10:30] == 0).all()
  np.testing.assert_allclose(lse[0, 10:30], jnp.broadcast_to(arrays["sink"], (20, 60)), rtol=1e-6)


def test_no_entries_at_all():
  agree(inputs([(9, 4)], 16, 0, 0, rate=32), 3)


def test_what_cannot_be_is_said():
  arrays = inputs([(20,)], 20, 10, 3)
  with pytest.raises(ValueError, match="entries of float16"):
    ours(**{**arrays, "entries": arrays["entries"].astype(jnp.float16)}, window=8, scale=SCALE)
  with pytest.raises(ValueError, match="window = 600"):
    ours(**inputs([(600,)], 600, 300, 3, heads=1), window=600, scale=SCALE)


# ---- lists ------------------------------------------------------------------------------------------------------------
def chosen(kind, queries, num_entries, most):
  """Random sets of up to `most` entries, every third of that size: scattered, neighbours, or all bits of few words."""
  rng, mask = np.random.default_rng(0), np.zeros((queries, num_entries), bool)
  entry = np.arange(num_entries)
  by_word = np.lexsort((entry // 128 % 32, entry // 4096 * 128 + entry % 128))
  for number, row in enumerate(mask):
    count = rng.integers(0, most + 1) if number % 3 else most
    first = rng.integers(0, num_entries - count + 1)
    row[{"scattered": rng.choice(num_entries, count, False), "neighbours": entry[first:first + count],
         "words": by_word[first:first + count]}[kind]] = True
  return mask


@pytest.mark.parametrize("direct", [1024, pytest.param(128, marks=pytest.mark.long)])
def test_lists_name_every_entry_once(direct, monkeypatch):
  """More queries than a kernel's 128; in one level, and in the long tier in two, as below."""
  monkeypatch.setattr(sparse_lists, "DIRECT_WORDS", direct)
  options = tiles.Options(128, SCALE, tpu.V5P, True)
  masks = np.concatenate([chosen(kind, 50, 9000, 200) for kind in ("scattered", "neighbours", "words")])
  got = np.asarray(jax.jit(lambda words: sparse_lists.from_words([words], 256, options))(bits.pack(jnp.asarray(masks))))
  for mask, row in zip(masks, got):
    count = mask.sum()
    np.testing.assert_array_equal(np.sort(row[:count]), np.flatnonzero(mask))
    assert (row[count:] == -1).all()


def test_lists_of_two_chunks_read_words_where_they_lie(monkeypatch):
  """In two levels, as attention asks for them: chunks in another order than in the table of all queries' words."""
  monkeypatch.setattr(sparse_lists, "DIRECT_WORDS", 128)
  options, size = tiles.Options(128, SCALE, tpu.V5P, True), 50
  masks = np.stack([chosen(kind, size, 9000, 200) for kind in ("scattered", "neighbours", "words")])

  @jax.jit
  def lists(masks):
    words = bits.pack(masks)
    row = jnp.concatenate([chunk * size + jnp.arange(size, dtype=jnp.int32) for chunk in (2, 0)])
    table = sparse_lists.as_table(words.reshape(-1, words.shape[2]))
    return sparse_lists.from_words([words[2], words[0]], 256, options, (table, row))

  got = np.asarray(lists(jnp.asarray(masks)))
  assert got.shape == (2 * size, 256)
  for mask, row in zip(np.concatenate([masks[2], masks[0]]), got):
    count = mask.sum()
    np.testing.assert_array_equal(np.sort(row[:count]), np.flatnonzero(mask))
    assert (row[count:] == -1).all()


def test_bits_by_rank():
  """Every rank of random words, of one bit, and of all bits."""
  words = np.random.default_rng(1).integers(-2**31, 2**31, 40).astype(np.int32)
  words = np.concatenate([words, [0, 1, -1, -2**31, 5]]).astype(np.int32)
  places = [np.flatnonzero(np.uint32(np.int64(word) & 0xFFFFFFFF) >> np.arange(32, dtype=np.uint32) & 1) for word in words]
  np.testing.assert_array_equal(sparse_lists.bit_count(jnp.asarray(words)), [len(bits) for bits in places])
  for rank in range(32):
    got = sparse_lists.bit_of_rank(jnp.asarray(words), jnp.full(len(words), rank))
    for place, bit in zip(places, got):
      assert rank >= len(place) or bit == place[rank]


# ---- rows -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_tables_keep_every_bit(dtype):
  """Two batch rows of 650 entries, more than one block; what nobody may see, NaN, becomes zero."""
  x = random_normals(x=(2, 650, 512))["x"].astype(dtype)
  seen = np.random.default_rng(0).random((2, 650)) < 0.8
  options = tiles.Options(8, SCALE, tpu.V5P, True)
  table, pieces = sparse_table.make_tables(
      jnp.asarray(np.where(seen[..., None], x, np.asarray(np.nan, dtype))), jnp.asarray(seen), options, True)
  assert table.dtype.itemsize == 4 and pieces.shape == (table.shape[0], table.shape[1] // 128, 128)
  np.testing.assert_array_equal(pieces.reshape(table.shape), table)
  want = np.where(seen[..., None], x.astype(np.float32), 0).reshape(-1, 512)
  np.testing.assert_array_equal(np.asarray(sparse_table.unpack(table), np.float32)[:1300], want)


def test_words_lie_where_their_tiles_do():
  words = np.random.default_rng(0).integers(0, 2**31, (13, 300), np.int32)
  table = np.asarray(sparse_lists.as_table(jnp.asarray(words)))
  row, word = np.indices(words.shape)
  np.testing.assert_array_equal(table[sparse_lists._place(row, word, 300)], words)


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
def test_units_hold_every_row_and_fit_the_shared_memory(chip):
  for num_rows in (1, 4096, 16385, 262144):
    units = sparse_rows.Units.of(num_rows, 512, chip)
    assert units.number * units.rows >= num_rows and units.number & (units.number - 1) == 0
    assert units.rows * 512 * 4 <= {"v5p": 2**22, "v6e": 2**21, "tpu7x": 2**22}[chip.name]


def test_sums_by_unit_are_sums_by_row():
  units, rng = sparse_rows.Units(4, 128), np.random.default_rng(0)
  index, rows = rng.integers(-1, 300, 1000), rng.normal(size=(1000, 8)).astype(np.float32)
  want = np.zeros((300, 8))
  np.add.at(want, index[index >= 0], rows[index >= 0])
  sums = sparse_rows.add_rows(units.zeros(8), jnp.asarray(index, jnp.int32), jnp.asarray(rows), tpu.V5P, True)
  np.testing.assert_allclose(units.table(sums, 300), want, atol=1e-5)


def test_sections_are_whole_batches_with_little_behind_the_last_row():
  for rows in (1, 63, 64, 2560, 4608, 5120, 8000, 10**5 + 1):
    for batch in (16, 64, 128):
      section, share = sparse_rows.sections(rows, batch)
      assert section % batch == 0 and share % section == 0 and section <= 2048 and share >= rows
      assert share - rows < batch or share < 1.05 * rows  # where batches have no divisor in range


# ---- plans ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("heads, top_k, direct", [(128, 1024, 384), (64, 512, 192), (16, 1024, 32), (128, 128, 64),
                                                  (128, 2000, 0)])
def test_a_kernel_copies_rows_by_itself_where_a_list_is_one_tile(heads, top_k, direct, monkeypatch):
  """In proportion to the heads, whose matmuls hide the starts; at most half of them; what SMEM has room for; long runs."""
  monkeypatch.setattr(sparse_plan, "GRANULE", 32)
  plan = sparse_plan.make_plan((1, 1024, heads, 512), 4096, top_k, 2, 128, 8, 1024, 2**18, 2, 384)
  assert (plan.direct, plan.staged) == (direct, plan.places - direct)
  wide = sparse_plan.make_plan((1, 1024, heads, 512), 4096, top_k, 2, 512, 8, 1024, 2**18, 2, 384)
  assert wide.direct == min(direct, 128)
  assert sparse_plan.make_plan((1, 16, heads, 512), 4096, top_k, 2, 128, 8, 1024, 2**18, 2, 384).direct == 0


@pytest.mark.parametrize("runs, most, chunk", [(128, 1, 1), (128, 2, 2), (128, 4, 4), (18, 3, 2), (26, 13, 13), (6, 6, 6)])
def test_cores_share_the_runs_of_a_chunk(runs, most, chunk):
  """Two cores: an even number of runs, unless chunks become less than half as large; of 128 queries with 1,024 rows each."""
  plan = sparse_plan.make_plan((1, runs * 128, 128, 512), 16384, 1024, 2, 128, 8, 1024, most * 2**17, 2)
  assert plan.chunk == chunk


@pytest.mark.parametrize("queries, top_k, heads, workers", [
    (queries, top_k, heads, workers) for queries in (128, 256, 384) for top_k in (512, 1024) for heads in (8, 16, 64, 128)
    for workers in (32, 64)])
def test_staged_rows_are_whole_batches_of_all_subcores(queries, top_k, heads, workers, monkeypatch):
  """Else the gathered array is longer than what the attention reads, and XLA copies it."""
  monkeypatch.setattr(sparse_plan, "GRANULE", 32)
  plan = sparse_plan.make_plan((1, queries, heads, 512), 16384, top_k, 2, 128, 8, 1024, 2**18, 2, 384)
  rows = plan.chunk_queries * plan.staged
  assert rows % workers == 0 and sparse_rows.sections(rows // workers, 64)[1] * workers == rows
