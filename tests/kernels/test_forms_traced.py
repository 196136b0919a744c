"""That `implementation="pallas"` asks the tables: which kernels each op holds when it is traced for a chip.

Traced for an abstract device, so nothing is compiled or run; test_forms.py says what the tables must hold. An op without any
kernel has to be, equation for equation, what `implementation="blockwise"` is.
"""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params

from pallas_kernels import bits, grouped_matmul, hyper_connections, indexer, tpu
from pallas_kernels.selection import Selection
from pallas_kernels.sparse_attention import attend

CHIPS = {"v5p": ("TPU v5p", 2), "v6e": ("TPU v6e", 1), "tpu7x": ("TPU7x", 1)}  # kind of device, TensorCores

MASKED, SPARSE = {"masked_attention"}, {"entry_tables", "list_entries", "gather_rows", "attend_rows"}
MASKED_GRADIENT, SPARSE_GRADIENT = MASKED | {"masked_attention_backward"}, SPARSE | {"attend_rows_backward", "add_rows"}
LOSS = {"index_loss"}


def called_in(jaxpr):
  """Names of the kernels and SparseCore programs in a jaxpr."""
  for equation in jaxpr.eqns:
    if equation.primitive.name in ("pallas_call", "mpmd_map"):
      yield equation.params["name"]
    for inner in jaxprs_in_params(equation.params):
      yield from called_in(inner)


def called(chip, fn, arrays, gradient=False):
  """Names of the kernels that fn(**arrays), or its gradient in all floating arrays, calls on a chip; or "blockwise"."""
  jaxpr = traced(chip, fn, arrays, gradient)
  names = set(called_in(jaxpr))
  if not names:
    plain = traced(chip, functools.partial(fn, implementation="blockwise"), arrays, gradient)
    assert without_addresses(jaxpr) == without_addresses(plain)
  return names or "blockwise"


def without_addresses(jaxpr):
  """The text of a jaxpr; functions that it names stand at other places in memory when it is traced again."""
  return re.sub(r" at 0x[0-9a-f]+", "", str(jaxpr))


def traced(chip, fn, arrays, gradient):
  """Jaxpr of fn(**arrays), or of its gradient, on a chip."""
  kind, cores = CHIPS[chip]
  mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=jax.sharding.AbstractDevice(kind, cores, "tpu"))
  floating = {name: x for name, x in arrays.items() if jnp.issubdtype(x.dtype, jnp.floating)}
  whole = {name: x for name, x in arrays.items() if name not in floating}
  total = lambda floating, whole: sum(jnp.sum(x.astype(jnp.float32)) for x in jax.tree.leaves(fn(**floating, **whole))
                                      if jnp.issubdtype(x.dtype, jnp.floating))
  with jax.sharding.use_abstract_mesh(mesh):
    return jax.make_jaxpr(jax.grad(total) if gradient else total)(floating, whole).jaxpr


def floats(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def places(queries, entries, batch=1):
  """Positions and documents of queries and of entries."""
  numbers = lambda n: jax.ShapeDtypeStruct((batch, n), jnp.int32)
  return dict(positions=numbers(queries), segment_ids=numbers(queries), entry_last=numbers(entries),
              entry_segment=numbers(entries))


def chosen(kind, queries, entries, top_k, batch=1):
  """({name: array}, function of it that makes the selection of this kind)."""
  if kind == "all":
    return {}, lambda: Selection.all(batch, queries)
  if kind == "bits":
    words = jax.ShapeDtypeStruct((batch, queries, bits.num_words(entries)), jnp.int32)
    return {"picked": words}, lambda picked: Selection.from_words(picked, entries, top_k)
  return {"picked": jax.ShapeDtypeStruct((batch, queries, top_k), jnp.int32)}, lambda picked: Selection.from_indices(picked)


def attention(kind, queries, entries, top_k=64, batch=1):
  """(attend with implementation="pallas", its arrays), 8 heads."""
  picked, choose = chosen(kind, queries, entries, top_k, batch)
  arrays = dict(q=floats(batch, queries, 8, 128), window_kv=floats(batch, queries, 128), entries=floats(batch, entries, 128),
                sink=floats(8), **places(queries, entries, batch), **picked)
  def run(implementation="pallas", **given):
    mine = {name: given.pop(name) for name in picked}
    return attend(**given, selection=choose(**mine), window=128, scale=1.0, implementation=implementation)
  return run, arrays


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("kind", ["all", "bits", "indices"])
def test_attention(chip, kind):
  few = {"v5p": 6, "v6e": 16, "tpu7x": 4}[chip] if kind == "all" else {"v5p": 9, "v6e": 16, "tpu7x": 8}[chip]
  assert called(chip, *attention(kind, few - 1, 300)) == "blockwise"
  assert called(chip, *attention(kind, few, 300)) == MASKED
  assert called(chip, *attention(kind, 64, 16384), gradient=True) == MASKED_GRADIENT
  listed = {"list_entries"} if kind == "indices" else set()  # these are lists already
  many = attention(kind, 64, 16385)
  assert called(chip, *many) == (MASKED if kind == "all" else SPARSE - listed)
  assert called(chip, *many, gradient=True) == (MASKED_GRADIENT if kind == "all" else SPARSE_GRADIENT - listed)


@pytest.mark.parametrize("chip", CHIPS)
def test_other_borders_of_attention(chip):
  """An eighth of the entries; where the masked form has no gradient; queries of one row, not of the batch."""
  assert called(chip, *attention("bits", 64, 17000, top_k=2125)) == MASKED
  assert called(chip, *attention("bits", 64, 17000, top_k=2124)) == SPARSE
  most = {"v5p": 20480, "v6e": 40960, "tpu7x": 20480}[chip]
  assert called(chip, *attention("bits", 64, most, top_k=most // 4)) == MASKED
  assert called(chip, *attention("bits", 64, most + 1, top_k=most // 4)) == SPARSE
  assert called(chip, *attention("bits", 1, 300, batch=64)) == "blockwise"
  assert called(chip, *attention("bits", 1, 20000)) == "blockwise"  # few queries before many entries


@pytest.mark.parametrize("kind, name", [("TPU v5", "v5p"), ("TPU v5p", "v5p"), ("TPU v6 lite", "v6e"), ("TPU v6e", "v6e"),
                                        ("TPU7x", "tpu7x")])
def test_a_chip_by_every_name_that_its_devices_have(kind, name):
  mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=jax.sharding.AbstractDevice(kind, 1, "tpu"))
  with jax.sharding.use_abstract_mesh(mesh):
    assert tpu.current_chip(interpret=False).name == name


@pytest.mark.parametrize("chip", CHIPS)
def test_sliding_layers(chip):
  """They have no entries; few queries of a row are plain XLA, too."""
  assert called(chip, *attention("all", 64, 0), gradient=True) == MASKED_GRADIENT
  assert called(chip, *attention("all", 1, 0)) == "blockwise"


@pytest.mark.parametrize("chip", CHIPS)
def test_the_indexers_selection_and_loss(chip):
  def index(queries, entries):
    return dict(queries=floats(1, queries, 2, 128), weights=floats(1, queries, 2), keys=floats(1, entries, 128),
                **places(queries, entries))
  select = functools.partial(indexer.select, top_k=64, implementation="pallas")
  for queries in (1, 64):
    assert called(chip, lambda **given: select(**given).words, index(queries, 300)) == {"index_select"}
  most = {"v5p": 110592, "v6e": 241664, "tpu7x": 110592}[chip]
  for entries, forward, gradient in ((most, LOSS, LOSS | {"index_loss_backward"}), (most + 1, *2 * ("blockwise",))):
    picked, choose = chosen("bits", 64, entries, 64)
    def loss(picked, choose=choose, implementation="pallas", **given):
      return indexer.kl_loss(**given, selection=choose(picked), scale=1.0, implementation=implementation)
    arrays = dict(index(64, entries), attention_queries=floats(1, 64, 8, 128), entries=floats(1, entries, 128),
                  lse=floats(1, 64, 8), **picked)
    assert called(chip, loss, arrays) == forward
    assert called(chip, loss, arrays, gradient=True) == gradient


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("tokens", [1, 64])
def test_hyper_connections(chip, tokens):
  streams = floats(1, tokens, 4, 256)
  mixed = dict(streams=streams, update=floats(1, tokens, 256), post=floats(1, tokens, 4), comb=floats(1, tokens, 4, 4))
  weights = dict(fn=floats(1024, 24), base=floats(24), scale=floats(3))
  options = dict(norm_eps=1e-6, eps=1e-6, iterations=2, implementation="pallas")
  ops = {"collapse": (functools.partial(hyper_connections.collapse, **options), dict(streams=streams, **weights)),
         "expand": (functools.partial(hyper_connections.expand, implementation="pallas"), mixed),
         "expand_collapse": (functools.partial(hyper_connections.expand_collapse, **options), mixed | weights)}
  for name, op in ops.items():
    forward = {f"hyper_{name}"} | (set() if name == "expand" else {"sinkhorn"})
    assert called(chip, *op) == forward
    assert called(chip, *op, gradient=True) == forward | {f"hyper_{name}_backward"}


@pytest.mark.parametrize("chip", CHIPS)
def test_experts(chip):
  """A few rows of an expert and many are the same kernels."""
  forward = {"experts_hidden", "experts_down"}
  for tile in (8, 256):
    arrays = dict(x=floats(4 * tile, 256), gate=floats(3, 256, 128), up=floats(3, 256, 128), down=floats(3, 128, 256),
                  group_sizes=jax.ShapeDtypeStruct((3,), jnp.int32))
    run = functools.partial(grouped_matmul.expert_mlp, tile=tile, limit=7.0, implementation="pallas")
    assert called(chip, run, arrays) == forward
    assert called(chip, run, arrays, gradient=True) == forward | {
      "experts_d_hidden", "experts_d_down", "experts_d_gate_up", "experts_d_rows"}
