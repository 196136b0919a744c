"""Sizes that do not fit each other are named before anything runs; without the check some of them give wrong numbers."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import bits
from pallas_kernels.grouped_matmul import expert_mlp, kernel_calls
from pallas_kernels.indexer import kl_loss, select
from pallas_kernels.selection import Selection
from pallas_kernels.sparse_attention import attend

BATCH, QUERIES, ENTRIES, HEADS, WIDTH = 2, 3, 5, 4, 8
f, i = functools.partial(jnp.zeros, dtype=jnp.float32), functools.partial(jnp.zeros, dtype=jnp.int32)
PLACES = dict(positions=i((BATCH, QUERIES)), segment_ids=i((BATCH, QUERIES)), entry_last=i((BATCH, ENTRIES)),
              entry_segment=i((BATCH, ENTRIES)))
ATTEND = dict(q=f((BATCH, QUERIES, HEADS, WIDTH)), window_kv=f((BATCH, QUERIES, WIDTH)), entries=f((BATCH, ENTRIES, WIDTH)),
              sink=f(HEADS), selection=Selection.all(BATCH, QUERIES), **PLACES)
INDEX = dict(queries=f((BATCH, QUERIES, 2, 4)), weights=f((BATCH, QUERIES, 2)), keys=f((BATCH, ENTRIES, 4)), **PLACES)
LOSS = dict(attention_queries=ATTEND["q"], entries=ATTEND["entries"], lse=f((BATCH, QUERIES, HEADS)),
            selection=ATTEND["selection"])
MLP = dict(x=f((16, 4)), gate=f((2, 4, 6)), up=f((2, 4, 6)), down=f((2, 6, 4)), group_sizes=i(2), tile=8)
OPS = {"attend": (functools.partial(attend, window=2, scale=1.0), ATTEND),
       "select": (functools.partial(select, top_k=2), INDEX),
       "kl_loss": (functools.partial(kl_loss, scale=1.0), INDEX | LOSS),
       "expert_mlp": (functools.partial(expert_mlp, limit=1.0), MLP)}
WORDS = i((BATCH, QUERIES, bits.LANES))


@pytest.mark.parametrize("implementation", ["reference", "interpret"])
@pytest.mark.parametrize("op, changed, said", [
    ("attend", {"entry_last": i((BATCH, ENTRIES + 1))}, r"attend: entry_segment = int32\[2, 5\]: expected B T = 2, 6"),
    ("attend", {"entry_segment": i((BATCH, ENTRIES - 1))}, r"attend: entry_segment = int32\[2, 4\]: expected B T = 2, 5"),
    ("attend", {"sink": f(1)}, r"attend: sink = float32\[1\]: expected H = 4"),
    ("attend", {"window_kv": f((BATCH, 7, WIDTH))}, r"attend: window_kv = float32\[2, 7, 8\]: expected B S d = 2, 3, 8"),
    ("attend", {"selection": Selection.all(1, QUERIES)},
     r"attend: selection.picks = int32\[1, 3, 0\]: expected B S K = 2, 3, K"),
    ("attend", {"selection": Selection.from_words(i((BATCH, QUERIES, 256)), 5000, 1)},
     r"attend: selection.words = int32\[2, 3, 256\]: .* \[2, 3, 128\]"),
    ("select", {"entry_last": i((BATCH, ENTRIES + 1))}, r"select: entry_segment = int32\[2, 5\]: expected B T = 2, 6"),
    ("select", {"weights": f((BATCH, QUERIES, 1))}, r"select: weights = float32\[2, 3, 1\]: expected B S h = 2, 3, 2"),
    ("kl_loss", {"lse": f((BATCH, QUERIES, 1))}, r"kl_loss: lse = float32\[2, 3, 1\]: expected B S H = 2, 3, 4"),
    ("kl_loss", {"selection": Selection(i((BATCH, 1, 2)))},
     r"kl_loss: selection.picks = int32\[2, 1, 2\]: expected B S K = 2, 3, K"),
    ("expert_mlp", {"x": f((20, 4))}, r"expert_mlp: x has 20 rows: expected a multiple of tile = 8"),
    ("expert_mlp", {"tile": 0}, r"expert_mlp: tile = 0: expected a whole number, at least 1"),
    ("expert_mlp", {"down": f((2, 4, 6))}, r"expert_mlp: down = float32\[2, 4, 6\]: expected E F D = 2, 6, 4"),
    ("expert_mlp", {"group_sizes": i(3)}, r"expert_mlp: group_sizes = int32\[3\]: expected E = 2"),
])
def test_sizes_that_do_not_fit_are_named(op, changed, said, implementation):
  run, arguments = OPS[op]
  with pytest.raises(ValueError, match=said):
    run(**(arguments | changed), implementation=implementation)


@pytest.mark.parametrize("words, entries", [
    (WORDS, 4097), (WORDS[0], 5), (WORDS.astype(jnp.uint32), 5), (WORDS[..., :1], 5)])
def test_words_are_those_of_their_entries(words, entries):
  with pytest.raises(ValueError, match=rf"words = .*: expected int32 \[batch, queries, .*\] for {entries} entries"):
    Selection.from_words(words, entries, 2)


def test_a_tile_that_does_not_fit_is_named():
  tile, experts = 2**15, 2
  x, dy = (jax.ShapeDtypeStruct((tile, width), jnp.bfloat16) for width in (1024, 128))
  plan = kernel_calls.weight_map(jnp.array([3, 5]), tile, tile)
  with pytest.raises(NotImplementedError, match="some_name: tile = 32768, rows of 1024 and 128 numbers of 2 bytes"):
    kernel_calls.weights_call("some_name", True, plan, tile, x, (dy,), experts)
