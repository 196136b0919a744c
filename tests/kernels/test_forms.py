"""What `implementation="pallas"` runs at which shape: the tables. That every op asks them: test_forms_traced.py."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import bits, grouped_matmul, tpu
from pallas_kernels.indexer import forms as loss_forms
from pallas_kernels.selection import Selection
from pallas_kernels.shapes import DECODE_ENTRIES, FLASH, LENGTHS, PRO
from pallas_kernels.sparse_attention import attend, blockwise, forms, kernel, kernel_backward, tiles

CHIPS = (tpu.V5P, tpu.V6E, tpu.TPU7X)


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
def test_attention_up_to_64k_tokens_is_masked_and_decoding_is_not(chip):
  for shapes in (FLASH, PRO):
    for length in LENGTHS:
      assert forms.choose(length, length // shapes.light_rate, shapes.top_k, chip.name) == "masked"
      assert forms.choose(length, length // shapes.heavy_rate, length // shapes.heavy_rate, chip.name) == "masked"
    assert forms.choose(1, DECODE_ENTRIES, shapes.top_k, chip.name) == "blockwise"
    assert forms.choose(1, DECODE_ENTRIES // 32, DECODE_ENTRIES // 32, chip.name) == "blockwise"
    assert forms.choose(length, 0, 0, chip.name) == "masked"


@pytest.mark.parametrize("entries, top_k, form", [
    (16384, 512, "masked"), (16385, 512, "sparse"), (2**18, 1024, "sparse"), (17000, 2125, "masked"),
    (17000, 2124, "sparse"), (2**18, 2**18, "masked")])
def test_attention_is_sparse_where_entries_are_many_and_the_selection_is_small(entries, top_k, form):
  for chip in CHIPS:
    assert forms.choose(4 * entries, entries, top_k, chip.name) == form
    some, every = {"v5p": (9, 6), "v6e": (16, 16), "tpu7x": (8, 4)}[chip.name]
    few = some if top_k < entries else every
    assert forms.choose(few, entries, top_k, chip.name) == form
    assert forms.choose(few - 1, entries, top_k, chip.name) == "blockwise"


@pytest.mark.parametrize("entries, top_k, v5p, v6e", [
    (20480, 4096, "masked", "masked"), (20481, 4096, "sparse", "masked"), (40961, 8192, "sparse", "sparse"),
    (40961, 40961, "masked", "masked")])
def test_attention_is_sparse_where_the_masked_form_has_no_gradient(entries, top_k, v5p, v6e):
  assert forms.choose(4 * entries, entries, top_k, "v5p") == v5p and forms.choose(4 * entries, entries, top_k, "v6e") == v6e


@pytest.mark.parametrize("entries, top_k, v5p, v6e", [
    (10752, 1024, "masked", "masked"), (10753, 1024, "sparse", "masked"), (24321, 8192, "sparse", "sparse"),
    (24321, 24321, "masked", "masked")])
def test_in_float32_that_is_sooner(entries, top_k, v5p, v6e):
  assert [forms.choose(4 * entries, entries, top_k, chip, 4) for chip in ("v5p", "tpu7x", "v6e")] == [v5p, v5p, v6e]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("heads", [64, 128])
@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
def test_the_masked_form_has_a_gradient_where_the_table_takes_it_for_a_selection(chip, heads, dtype):
  """By the kernel's own count of VMEM; that the compiler agrees: test_aot.py."""
  most = forms.MASKED_GRADIENT[jnp.dtype(dtype).itemsize][chip.name]
  q, entries = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((2, 4096, heads, 512), (2, most, 512)))
  plan = kernel_backward._plan(q, entries, tiles.Options(128, 1.0, chip, False))
  assert plan.tiles * plan.entries >= most


def test_the_indexers_loss_is_a_kernel_while_its_gradient_fits():
  """The boundary is what the compiler said: 65,536 entries compile for v5p, 131,072 take 70.6 of 63.9 MiB."""
  for chip in (tpu.V5P, tpu.TPU7X):
    assert [loss_forms.choose_loss(n, 128, chip) for n in (65536, 110592, 110593)] == ["kernel", "kernel", "blockwise"]
  assert [loss_forms.choose_loss(n, 96, tpu.V6E) for n in (131072, 2**18)] == ["kernel", "blockwise"]


def test_a_form_can_be_forced():
  """The kernel for one query, which the table gives to XLA, and XLA's form of a selection in bits, equal the formula."""
  key, shape = jax.random.key(0), (2, 1, 8, 16)
  words = bits.pack(jax.random.bernoulli(key, 0.2, (2, 1, 300)))
  arrays = dict(q=jax.random.normal(key, shape), window_kv=jnp.ones((2, 1, 16)),
                entries=jax.random.normal(key, (2, 300, 16)), sink=jnp.zeros(8))
  places = dict(positions=jnp.full((2, 1), 1000), segment_ids=jnp.ones((2, 1), int),
                entry_last=jnp.tile(jnp.arange(300), (2, 1)), entry_segment=jnp.ones((2, 300), int))
  run = lambda attend, **more: jax.jit(lambda arrays, words: attend(
      **arrays, selection=Selection.from_words(words, 300, 100), **places, window=4, scale=0.25, **more))(arrays, words)
  want = run(attend, implementation="reference")
  masked = lambda q, window_kv, entries, selection, sink, **options: kernel.attend(
      q, window_kv, entries, selection, sink, interpret=True, **options)
  gathered = lambda q, window_kv, entries, selection, sink, **options: blockwise.attend(
      q, window_kv, entries, selection, sink, key_segment=options["segment_ids"], **options)
  for got in (run(masked), run(gathered)):
    for a, b in zip(got, want):
      assert jnp.abs(a - b).max() < 2e-5


def test_rows_of_an_expert_fill_a_tile_of_the_matrix_unit():
  """On TPU few rows are one tile, many are padded by an eighth; elsewhere a tile never costs more than it must."""
  tile = grouped_matmul.row_tile
  assert [tile(rows, 4, "pallas") for rows in (4, 32, 192, 480, 2000, 100_000)] == [8, 8, 64, 128, 128, 256]
  assert [tile(rows, 4) for rows in (4, 32, 192, 480, 2000, 100_000)] == [8, 8, 8, 16, 64, 256]
