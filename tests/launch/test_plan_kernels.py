"""What kernels of a traced program cost: calls found in a jaxpr, and their FLOPs by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from deepseek_v4.config import ModelConfig
from launch.benchmarks.kernels import chips
from launch.plans import kernels
from pallas_kernels import grouped_matmul, indexer, sparse_attention
from pallas_kernels.selection import Selection

MODEL = ModelConfig(num_attention_heads=16, head_dim=256, hidden_size=256, moe_intermediate_size=128, n_routed_experts=4,
                    num_experts_per_tok=2, index_topk=128, index_n_heads=8, compute_dtype="bfloat16")
MESH = {"dcn_data": 1, "data": 1, "fsdp": 1, "expert": 1, "context": 1, "tensor": 1}
V5P = chips.chip_of("v5p:2x2x1")
wide = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
whole = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)


def one_pass(tokens, **changes):
  return dataclasses.replace(kernels.Pass(MODEL, 2, tokens, tokens, "sparse", MESH), **changes)


def attention(tokens, entries, backward=False):
  """The calls of attention over two rows, two passes of a scan."""
  def run(q, kv, c, sink, ids, last, segment):
    def attend(q):
      return sparse_attention.attend(q, kv, c, Selection.all(2, tokens), sink, positions=ids, segment_ids=ids + 1,
                                     entry_last=last, entry_segment=segment, window=128, scale=1.0,
                                     implementation="interpret")[0]
    step = lambda q, _: (jax.vjp(attend, q)[1](q)[0] if backward else attend(q), None)
    return jax.lax.scan(step, q, None, length=2)[0]
  jaxpr = jax.make_jaxpr(run)(wide(2, tokens, 16, 256), wide(2, tokens, 256), wide(2, entries, 256),
                              jax.ShapeDtypeStruct((16,), jnp.float32), whole(2, tokens), whole(2, entries),
                              whole(2, entries))
  return list(kernels.traced_calls(jaxpr.jaxpr))


def test_entries_that_are_one_tile_are_met_with_the_window():
  """2 rows of 256 queries and 16 heads; two matmuls of 256 numbers; each block meets 2 x 128 near keys and the 128 places of
  its one tile, whether there are that many entries or not."""
  (call,) = attention(256, 64)
  local = kernels.local_of(call, one_pass(256))
  assert (call.call.name, call.times, local.entries, local.op) == ("masked_attention", 2, 64, "attention")
  assert kernels.cost(call, local, V5P).flops == 2 * 256 * 16 * 2 * 2 * 256 * (256 + 128)


def test_a_layer_without_entries_meets_its_window_only():
  (call,) = attention(256, 0)
  local = kernels.local_of(call, one_pass(256))
  assert (local.entries, local.op) == (0, "attention_window")
  assert kernels.cost(call, local, V5P).flops == 2 * 256 * 16 * 2 * 2 * 256 * 256


def test_tiles_behind_the_causal_edge_are_not_visited():
  """4,096 tokens and 1,024 entries: two tiles of 512, the second only for the half of the queries that see more than 512."""
  calls = attention(4096, 1024, backward=True)
  backward = calls[-1]
  assert backward.call.name == "masked_attention_backward"
  local = kernels.local_of(backward, one_pass(4096))
  tiles = 512 + 512 / 2
  wanted = 2 * 4096 * 16 * 5 * 2 * 256 * (256 + tiles)
  assert kernels.cost(backward, local, V5P).flops == pytest.approx(wanted, rel=0.01)  # the edge lies inside a block


def test_heavily_compressed_entries_are_told_by_their_number():
  (call,) = attention(4096, 32)
  assert kernels.local_of(call, one_pass(4096)).op == "attention_heavy"


def test_experts_have_their_share_of_the_picks():
  """4 experts on 2 devices, 512 tokens of each device with 2 picks: 1,024 rows, 512 of each of two experts."""
  matrices = wide(2, 256, 128), wide(2, 256, 128), wide(2, 128, 256)
  run = lambda x, *others: grouped_matmul.expert_mlp(x, *others, tile=256, limit=10.0, implementation="interpret")
  jaxpr = jax.make_jaxpr(run)(wide(2048, 256), *matrices, whole(2))
  hidden, down = kernels.traced_calls(jaxpr.jaxpr)
  one = one_pass(512, mesh=MESH | {"expert": 2})
  assert kernels.local_of(hidden, one) == kernels.local_of(hidden, one_pass(512, mesh=MESH | {"fsdp": 2}))
  assert kernels.local_of(hidden, one).rows == 1024
  assert kernels.cost(hidden, kernels.local_of(hidden, one), V5P).flops == 2 * 1024 * 256 * 2 * 128
  found = kernels.total([hidden, down], {"experts_hidden": 3, "experts_down": 1}, one, V5P, {})
  assert found["experts_hidden"]["flops"] == 3 * 2 * 1024 * 256 * 2 * 128 and found["experts_down"]["calls"] == 1


def test_a_selection_is_bound_by_the_vector_unit():
  def run(q, weights, keys, ids, last, segment):
    return indexer.select(q, weights, keys, top_k=128, positions=ids, segment_ids=ids + 1, entry_last=last,
                          entry_segment=segment, implementation="interpret").words
  jaxpr = jax.make_jaxpr(run)(wide(2, 2048, 8, 128), jax.ShapeDtypeStruct((2, 2048, 8), jnp.float32), wide(2, 512, 128),
                              whole(2, 2048), whole(2, 512), whole(2, 512))
  call = next(call for call in kernels.traced_calls(jaxpr.jaxpr) if call.call.name == "index_select")
  cost = kernels.cost(call, kernels.local_of(call, one_pass(2048)), V5P)
  pairs = 2 * sum(n // 4 for n in range(1, 2049))
  # 270 cycles of a core for 8 queries, 512 entries and 64 heads; two cores at 1.75 GHz.
  assert cost.seconds >= pairs * 8 * 270 / (8 * 512 * 64) / 2 / 1.75e9 * 0.999


def test_bundles_bound_a_kernel_that_nothing_else_bounds_higher():
  (call,) = attention(256, 64)
  one = one_pass(256)
  alone = kernels.cost(call, kernels.local_of(call, one), V5P).seconds
  found = kernels.total([call], {"masked_attention": 2}, one, V5P, {call.signature: 1.75e9})
  assert found["masked_attention"]["seconds"] == 2.0 and alone < 1  # of a clock of 1.75 GHz
