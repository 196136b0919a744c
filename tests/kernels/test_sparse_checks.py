"""What must hold of the sparse form whatever it computes: the checks of the masked kernel, documents cut anywhere, nothing
from the future or from another document in any bit, lists that begin with nothing, several rows and devices.

Interpreted as in `test_sparse_form`, with the same small steps: 128 places a tile, 128 queries a run.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_kernels import bits, tpu
from pallas_kernels.indexer import select
from pallas_kernels.selection import Selection
from pallas_kernels.sparse_attention import attend, attend_with, form, sparse, sparse_lists, sparse_plan, tiles
from tests.kernels import oracles, test_attention, test_kernel_checks, test_sparse_form
from tests.kernels.arrays import nan_where_unused, random_normals
from tests.kernels.test_kernel_checks import CSA

WIDTH, SCALE = 128, 128**-0.5
# A step is 128 rows, one a query and head. With few heads its code is long, the compiler's work; with many there are many
# steps, each of which costs the interpreter as much: in most tests there are some hundred, in those of a layer few.
HEADS, HEADS_OF_LAYERS = 16, 32
LENGTH, RUN = 140, 2**14  # tokens of most rows; rows gathered for 128 queries with 128 places each
MOVING = ("q", "window_kv", "entries", "sink")
PLACES = ("positions", "segment_ids", "entry_last", "entry_segment")


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
  """As in `test_sparse_form`, but three times 128 queries a chunk."""
  monkeypatch.setitem(sparse.FORWARD_STEP, "v5p", (1, 128))
  monkeypatch.setitem(sparse.BACKWARD_STEP, "v5p", (1, 128))
  monkeypatch.setitem(sparse.DIRECT, "v5p", 64)
  monkeypatch.setattr(sparse_plan, "GRANULE", 8)
  monkeypatch.setattr(sparse, "ROWS", 3 * RUN)


def long(*values):
  """Values of a parameter, or tuples of several, in the long tier only."""
  return [pytest.param(*(x if isinstance(x, tuple) else (x,)), marks=pytest.mark.long) for x in values]


def with_kind(arrays, kind):
  """The same selection of another kind, or instead of it all entries."""
  selection, places = arrays["selection"], {name: arrays[name] for name in PLACES}
  batch, num_queries, picks = selection.picks.shape
  if kind == "all":
    return arrays | {"selection": Selection.all(batch, num_queries)}
  if kind == "bits":
    num_entries = arrays["entries"].shape[1]
    words = jax.jit(lambda selection: bits.words_of(selection, num_entries, places))(selection)
    return arrays | {"selection": Selection.from_words(words, num_entries, picks)}
  return arrays


inputs = functools.partial(test_sparse_form.inputs, heads=HEADS, width=WIDTH)


def three_rows(*documents):
  """Three rows of two runs in two chunks, the first of which ends inside the second row. Most tests take these, compiled
  once; rows of one document if none are given."""
  return inputs(documents or [(LENGTH,)] * 3, LENGTH, LENGTH // 2, 30)


def ours(q, window_kv, entries, selection, sink, **options):
  return sparse.attend(q, window_kv, entries, selection, sink, **options, interpret=True)


formula = functools.partial(attend, implementation="reference")


@functools.partial(jax.jit, static_argnames=("op", "window", "_sizes"))
def _both(moving, fixed, weights, op, window, _sizes):
  values, pull = jax.vjp(lambda moving: op(**moving, **fixed, window=window, scale=SCALE), moving)
  return values, pull(weights)[0]


def random_weights(arrays):
  """Gradients that come back into (out, lse)."""
  shape = arrays["q"].shape
  return tuple(random_normals(1, out=shape, lse=shape[:3]).values())


def run(arrays, op, weights=None, window=20):
  """(out, lse) and the gradients, as NumPy. Compiled once per shape and per sizes that tests change."""
  moving = {name: arrays[name] for name in MOVING}
  fixed = {name: x for name, x in arrays.items() if name not in MOVING}
  weights = random_weights(arrays) if weights is None else weights
  sizes = sparse.ROWS, sparse_lists.DIRECT_WORDS
  return jax.tree.map(np.asarray, _both(moving, fixed, weights, op, window, sizes))


def same(got, want, tolerance=2e-5):
  """Equal to float32's rounding of some hundred summands, as a share of each array's largest number."""
  for (path, g), w in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(g, w, rtol=0, atol=tolerance * max(np.abs(w).max(initial=0), 1), err_msg=str(path))


def agree(arrays, weights=None, kind="indices"):
  """The sparse form, given this kind of selection, equals the formula, given picks."""
  want = run(with_kind(arrays, kind) if kind == "all" else arrays, formula, weights)
  same(run(with_kind(arrays, kind), ours, weights), want)


# ---- the masked kernel's checks ----------------------------------------------------------------------------------------
def layer(arrays, kind=CSA, window=8, *, indexer):
  """`test_kernel_checks.layer` with the sparse form; the indexer's formula picks numbers, its kernel sets bits."""
  return _layer(arrays, kind, window, indexer)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _layer(arrays, kind, window, indexer):
  index = {name.removeprefix("index_"): x for name, x in arrays.items() if name.startswith("index_")}
  arrays = {name: x for name, x in arrays.items() if not name.startswith("index_")}
  places = {name: arrays[name] for name in PLACES}
  chosen = Selection.all(*arrays["positions"].shape)
  if kind == CSA:
    chosen = select(**index, top_k=test_kernel_checks.PICKS, implementation=indexer, **places)
  out, _ = attend_with(form("sparse", interpret=True), **arrays, selection=chosen, window=window, scale=0.25)
  return out, chosen.mask(arrays["entries"].shape[1])


CHECKS = [(test_kernel_checks.test_a_token_moves_nothing_before_itself, CSA),
          (test_kernel_checks.test_an_entry_is_seen_when_its_window_is_closed,)]
LONG_CHECKS = [(test_kernel_checks.test_changing_a_document_moves_no_other, CSA),
               *((test_kernel_checks.test_a_packed_row_equals_its_documents_alone, documents, CSA)
                 for documents in ((14, 16), (1, 3, 5, 7, 9, 7))),
               *((test_kernel_checks.test_any_cut_of_the_queries_gives_the_same_rows, CSA, chunk)
                 for chunk in (1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 40)),
               *((test_kernel_checks.test_tokens_one_by_one_behind_a_first_call, CSA, first) for first in (1, 8, 17, 33)),
               *((test_kernel_checks.test_a_prefix_gives_the_prefix_of_the_outputs, CSA, length)
                 for length in (1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 31, 32, 33))]
BY_INDEXER = [*((check, "reference") for check in CHECKS), *long(
    *((check, "interpret") for check in CHECKS),
    *((check, indexer) for check in LONG_CHECKS for indexer in ("reference", "interpret")))]


@pytest.mark.parametrize("check, indexer", BY_INDEXER, ids=lambda x: x if isinstance(x, str) else "-".join(
    [x[0].__name__.removeprefix("test_"), *map(str, x[1:])]))
def test_what_holds_of_the_masked_kernel(monkeypatch, check, indexer):
  monkeypatch.setattr(test_kernel_checks, "layer", functools.partial(layer, indexer=indexer))
  monkeypatch.setattr(test_kernel_checks, "HEADS", HEADS_OF_LAYERS)
  check[0](*check[1:])


@pytest.mark.parametrize("sink", [0.0, *long(-1e30, 3.0)])
def test_minus_one_anywhere_and_tiles_with_nothing(sink):
  """-1 at the back, all over the first tile of the list, interleaved, everywhere, around one pick; a first tile full of
  entries that are hidden; NaN in unused memory, and a huge entry that nobody picks. `front` and `hidden` bring the first key
  when a tile without any has passed; with a sink of -1e30 that key alone must make the sum."""
  queries, num_entries, picks, used = test_attention.QUERIES, 256, 160, 250
  rng = np.random.default_rng(0)
  distinct = lambda n: np.stack([rng.permutation(200)[:n] for _ in range(queries)])
  rows = {name: np.full((queries, picks), -1) for name in ("back", "front", "interleaved", "nothing", "one", "hidden")}
  rows["back"][:, :150] = distinct(150)
  rows["front"][:, -4:] = distinct(4)
  rows["interleaved"][:, ::3] = distinct(54)
  rows["one"][:, 140] = distinct(1)[:, 0]
  rows["hidden"][:, :40], rows["hidden"][:, -9:] = 205 + np.arange(40), distinct(9)
  batch, nothing = len(rows), list(rows).index("nothing")
  entries = rng.normal(size=(batch, num_entries, WIDTH)).astype(np.float32)
  entries[:, used:-1], entries[:, -1] = np.nan, 1e6
  segment = np.ones((batch, num_entries), np.int32)
  segment[:, used:-1], segment[:, 205:245] = 0, 2
  arrays = dict(
      q=rng.normal(size=(batch, queries, HEADS, WIDTH)).astype(np.float32), entries=entries,
      window_kv=np.full((batch, queries, WIDTH), np.nan, np.float32), sink=np.full(HEADS, sink, np.float32),  # window 0
      positions=np.tile(np.arange(1000, 1000 + queries, dtype=np.int32), (batch, 1)),
      segment_ids=np.ones((batch, queries), np.int32), entry_segment=segment,
      entry_last=np.tile(np.arange(num_entries, dtype=np.int32), (batch, 1)),
      selection=Selection.from_indices(jnp.asarray(np.stack(list(rows.values())))))
  (out, lse), gradients = run(arrays, ours, window=0)
  want_out, want_lse = oracles.attend(**arrays, window=0, scale=SCALE)
  np.testing.assert_allclose(out, want_out, atol=1e-5)
  np.testing.assert_allclose(lse, want_lse, atol=1e-5, rtol=1e-6)
  assert (out[nothing] == 0).all() and (gradients["q"][nothing] == 0).all()
  assert all(np.isfinite(x).all() for x in gradients.values())
  assert (gradients["entries"][:, 205:] == 0).all() and (gradients["window_kv"] == 0).all()
  turned = np.random.default_rng(2).permutation(picks)
  shuffled = run(arrays | {"selection": Selection.from_indices(arrays["selection"].picks[..., turned])}, ours, window=0)
  np.testing.assert_allclose(shuffled[0][0], out, atol=2e-6)


# ---- documents and time ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("offset", [0, *long(*range(1, 43))])
def test_documents_cut_anywhere(offset):
  """Two documents in each row; the offsets of the three rows together are all of 0 to 128."""
  agree(three_rows(*((cut, LENGTH - cut) for cut in (offset, offset + 43, offset + 86))))


@pytest.mark.long
@pytest.mark.parametrize("offset", range(128))
def test_three_documents_cut_anywhere(monkeypatch, offset):
  """One row of three chunks, borders at this offset in two of them; from bits."""
  monkeypatch.setattr(sparse, "ROWS", RUN)
  agree(inputs([(offset, 128, 132 - offset)], 260, 130, 30), kind="bits")


def negated(arrays, tokens, entries):
  """The arrays with the sign of these tokens' and entries' numbers turned, bool [B, S] and [B, T]."""
  turn = lambda x, mask: np.where(mask.reshape(*mask.shape, *(1,) * (x.ndim - 2)), -x, x)
  return arrays | {name: turn(arrays[name], mask) for name, mask in
                   (("q", tokens), ("window_kv", tokens), ("entries", entries))}


def equal_where(got, base, tokens, entries):
  """Bit for bit: results, and gradients of everything but the sink."""
  for g, b, mask in [*((g, b, tokens) for g, b in zip(got[0], base[0])),
                     *((got[1][name], base[1][name], mask) for name, mask in
                       (("q", tokens), ("window_kv", tokens), ("entries", entries)))]:
    np.testing.assert_array_equal(g[mask], b[mask])


@pytest.mark.parametrize("kind, places", [("indices", (1, 128, 63)), *long(
    *((kind, places) for kind in ("indices", "bits") for places in ((0, 2, 3), (127, 129, 19), (120, 130, 139))))])
def test_nothing_comes_from_the_future(kind, places):
  """Of a sum over the tokens before a place of each row: no bit of a result or gradient moves, and later tokens get none."""
  arrays = with_kind(three_rows(), kind)
  tokens, entries = (np.asarray(arrays[name]) >= np.array(places)[:, None] for name in ("positions", "entry_last"))
  weights = tuple(x * ~tokens.reshape(3, LENGTH, *(1,) * (x.ndim - 2)) for x in random_weights(arrays))
  base, moved = run(arrays, ours, weights), run(negated(arrays, tokens, entries), ours, weights)
  equal_where(moved, base, ~tokens, ~entries)
  np.testing.assert_array_equal(moved[1]["sink"], base[1]["sink"])
  assert (moved[0][0][tokens] != base[0][0][tokens]).any(-1).all()
  for name, mask in (("q", tokens), ("window_kv", tokens), ("entries", entries)):
    assert (moved[1][name][mask] == 0).all(), name


@pytest.mark.parametrize("kind, numbers", [("indices", (1, 2, 3)), *long(
    ("indices", (2, 3, 1)), ("indices", (3, 1, 2)), ("bits", (1, 2, 3)), ("bits", (2, 3, 1)), ("bits", (3, 1, 2)))])
def test_nothing_comes_from_another_document(kind, numbers):
  """No bit of a result or gradient moves with another document of the row, before or after; nor with another row's."""
  arrays = with_kind(three_rows((90, 3, 40), (20, 107, 5), (1, 2, 130)), kind)
  base = run(arrays, ours)
  tokens, entries = (np.asarray(arrays[name]) == np.array(numbers)[:, None] for name in ("segment_ids", "entry_segment"))
  moved = run(negated(arrays, tokens, entries), ours)
  equal_where(moved, base, ~tokens, ~entries)
  assert (moved[0][0][tokens] != base[0][0][tokens]).any(-1).all()


# ---- rows of the batch, devices ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind, runs, chunks", long(
    *((kind, runs, chunks) for kind in ("bits", "indices", "all") for runs, chunks in ((1, 6), (2, 3), (3, 2), (6, 1)))))
def test_rows_of_the_batch_in_several_chunks(monkeypatch, kind, runs, chunks):
  """Three rows of two runs: chunks of a part of a row, of a row, across the border of two rows, and one of all. Across the
  border, from picks, is what the tests of documents and time have in the suite."""
  monkeypatch.setattr(sparse, "ROWS", RUN * runs)
  plan = sparse_plan.make_plan((3, LENGTH, HEADS, WIDTH), LENGTH // 2, 30, 4, 20, 1, 128, sparse.ROWS)
  assert (plan.runs, plan.chunk, plan.chunks) == (2, runs, chunks)
  agree(three_rows((LENGTH,), (31, 90), (1, 2, 127, 9)), kind=kind)


@pytest.mark.parametrize("kind, heads, length", [("indices", 64, 20), *long(
    ("bits", 64, 20), *((kind, heads, LENGTH) for kind in ("indices", "bits") for heads in (4, 64)))])
def test_heads_on_two_devices(kind, heads, length):
  """Values and gradients of everything equal those of one device."""
  arrays = with_kind(inputs([(length - 7, 5)], length, length // 2, 10, heads=heads), kind)
  by_head = {"q": P(None, None, "heads"), "sink": P("heads")}

  def split(**arguments):
    options = {name: arguments.pop(name) for name in ("window", "scale")}
    mesh = jax.make_mesh((2,), ("heads",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    return jax.shard_map(lambda arguments: ours(**arguments, **options), mesh=mesh, out_specs=P(None, None, "heads"),
                         in_specs=({name: by_head.get(name, P()) for name in arguments},), check_vma=False)(arguments)

  same(run(arrays, split), run(arrays, ours))


# ---- gradients of lse --------------------------------------------------------------------------------------------------
def test_gradient_of_lse_alone():
  """Only lse is used; of its sum the sink gets its own share of every softmax."""
  arrays = three_rows((31, 90), (LENGTH,), (100,))
  out, lse = random_weights(arrays)
  weights = np.zeros_like(out), np.ones_like(lse)
  (out, values), gradients = run(arrays, ours, weights)
  same(((out, values), gradients), run(arrays, formula, weights))
  want = np.exp(np.asarray(arrays["sink"], np.float64) - values).sum((0, 1))
  np.testing.assert_allclose(gradients["sink"], want, rtol=1e-5)


# ---- words that are no power of two ------------------------------------------------------------------------------------
def in_order_of_words(mask):
  """Entries of bool [T] as NumPy orders them: by word, then by bit (see `bits`)."""
  entry = np.flatnonzero(mask)
  return entry[np.lexsort((entry // 128 % 32, entry // 4096 * 128 + entry % 128))]


@pytest.mark.parametrize("num_entries, top_k, direct", [(20000, 600, 1024), *long(
    (12288, 256, 128), (12000, 600, 1024), (12000, 600, 128), (20000, 256, 1024), (20000, 256, 128), (20000, 600, 128),
    (12000, 256, 1024), (20480, 600, 1024), (8193, 256, 1024))])
def test_lists_of_three_and_five_groups_of_words(monkeypatch, num_entries, top_k, direct):
  """384 and 640 words, in one level and in two: full rows, empty ones, the first and last entries, whole words, any."""
  monkeypatch.setattr(sparse_lists, "DIRECT_WORDS", direct)
  rng, entry = np.random.default_rng(0), np.arange(num_entries)
  by_word = in_order_of_words(np.ones(num_entries, bool))
  sets = [[], entry[:1], entry[-1:], entry[:top_k], entry[-top_k:], by_word[:top_k], by_word[-top_k:], entry[::128][:top_k],
          by_word[::32][:top_k], by_word[31::32][-top_k:]]
  sets += [rng.choice(num_entries, count, False) for count in (top_k, top_k, top_k - 1, 127, 128, 129, 7)]
  mask = np.zeros((len(sets), num_entries), bool)
  for row, chosen in zip(mask, sets):
    row[np.asarray(chosen, int)] = True
  words = bits.pack(jnp.asarray(mask))
  assert words.shape[1] == 128 * -(-num_entries // 4096)
  places, options = tpu.round_up(top_k, 128), tiles.Options(128, SCALE, tpu.V5P, True)
  got = np.asarray(jax.jit(lambda words: sparse_lists.from_words([words], places, options))(words))
  for row, chosen in zip(got, mask):
    want, count = in_order_of_words(chosen), chosen.sum()
    if words.shape[1] > direct:  # the words come in the order of words that have a bit for each of them
      row, want = np.append(np.sort(row[:count]), row[count:]), np.sort(want)
    np.testing.assert_array_equal(row, np.pad(want, (0, places - count), constant_values=-1))


@pytest.mark.parametrize("num_entries, top_k, direct", long(
    *((*case, direct) for case in ((12000, 256), (20000, 256), (20000, 600)) for direct in (128, 1024))))
def test_attention_over_three_and_five_groups_of_words(monkeypatch, num_entries, top_k, direct):
  """The last tokens of a long context, the last of whose entries are hidden or unused memory; full lists among them. Two
  runs, each a chunk of its own, so that the lists of two chunks are made together."""
  monkeypatch.setattr(sparse_lists, "DIRECT_WORDS", direct)
  monkeypatch.setattr(sparse, "ROWS", 2**12)
  queries = LENGTH
  entry = np.arange(num_entries, dtype=np.int32)
  arrays = random_normals(q=(1, queries, 4, WIDTH), window_kv=(1, queries, WIDTH), entries=(1, num_entries, WIDTH),
                          sink=(4,))
  arrays |= dict(positions=2 * num_entries - 300 + 2 * np.arange(queries, dtype=np.int32)[None],
                 segment_ids=np.ones((1, queries), np.int32), entry_last=2 * entry[None] + 1,
                 entry_segment=(entry[None] < num_entries - 100).astype(np.int32))
  arrays["entries"] = nan_where_unused(arrays["entries"], arrays["entry_segment"])
  rng = np.random.default_rng(0)
  picks = np.stack([rng.permutation(num_entries - (200 if number % 2 else 0))[:top_k] for number in range(queries)])
  picks[3, 5:] = -1
  arrays = with_kind(arrays | {"selection": Selection.from_indices(jnp.asarray(picks[None]))}, "bits")
  chosen = arrays["selection"]
  assert chosen.words.shape[2] == 128 * -(-num_entries // 4096) and chosen.mask(num_entries)[0, 1].sum() == top_k
  plan = sparse_plan.make_plan(arrays["q"].shape, num_entries, top_k, 4, 20, 1, 128, sparse.ROWS)
  assert plan.chunks > 1
  same(run(arrays, ours), run(arrays, formula))  # the formula's mask of as many picks would fill the memory
