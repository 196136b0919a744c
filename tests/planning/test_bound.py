"""Time bounds by hand arithmetic; the model's FLOPs against the count of every single token."""

import dataclasses

import numpy as np
import pytest

from deepseek_v4.analysis.count import count, parameters
from deepseek_v4.config import CSA, HASH, HCA, LEARNED, SLIDING, DataConfig, ModelConfig, RunConfig
from deepseek_v4.planning import bound

MODEL = ModelConfig(
  vocab_size=64, hidden_size=32, num_hidden_layers=4, layer_types=(SLIDING, CSA, HCA, CSA),
  mlp_layer_types=(HASH, LEARNED, LEARNED, LEARNED), csa_compress_rate=4, hca_compress_rate=8, num_attention_heads=4,
  head_dim=16, qk_rope_head_dim=8, q_lora_rank=16, o_groups=2, o_lora_rank=8, sliding_window=8, index_n_heads=2,
  index_head_dim=8, index_topk=5, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, hc_mult=2,
  rope_scaling=None, max_position_embeddings=128, num_nextn_predict_layers=0)
RATES = bound.Rates(flops=100.0, hbm=10.0, links=4.0)


def work(**changes):
  return dataclasses.replace(bound.Work(matmul_flops=800.0, kernel_flops=50.0, kernel_seconds=2.0, hbm_bytes=30.0,
                                        exposed_bytes=6.0, hidden_bytes=8.0), **changes)


@pytest.mark.parametrize("changes, step", [
  ({}, 8 + 2 + 3),  # matmuls and kernels are longest; 6 bytes in and 6 out at 4 a second come on top
  ({"hbm_bytes": 200.0}, 20 + 3), ({"hidden_bytes": 30.0}, 15 + 3), ({"exposed_bytes": 0.0}, 10)])
def test_a_step_takes_its_longest_part_and_what_it_waits_for(changes, step):
  found = bound.seconds(work(**changes), RATES)
  assert (found["matmuls"], found["kernels"], found["compute"], found["step"]) == (8, 2, 10, step)


def test_utilization_is_what_was_needed_over_what_could_be_done():
  assert bound.utilization(2000.0, 4, RATES, 10.0) == 0.5


@pytest.mark.parametrize("length", [1, 7, 64])
def test_forward_flops_are_the_mean_over_every_token(length):
  by_token = [count(MODEL, place).flops_per_token for place in range(1, length + 1)]
  found = bound.forward_flops(MODEL, length)
  for part in ("attention", "indexer"):
    assert np.isclose(found[part], np.mean([flops[part] for flops in by_token]), rtol=1e-12), part
  assert found["matmuls"] == sum(flops for part, flops in by_token[0].items() if part not in ("attention", "indexer"))


def test_matmuls_are_twice_the_active_matmul_parameters():
  """Norms, biases and sinks are parameters, and nothing is multiplied with them in a matmul."""
  active = parameters(MODEL).active
  vectors = active["norms"] + 4 * (16 + 16 + 4)  # of queries and keys, and the sinks
  vectors += 3 * 4  # the routers' biases; hash routing has none
  vectors += 2 * (4 * 2 * 16 + 16) + (8 * 16 + 16) + 2 * (4 * 2 * 8 + 8)  # compressors: position biases and norms
  vectors += 4 * 2 * (2 * 2 + 2 * 2 + 3) + 2 + 1  # hyper-connections: bases and scales
  assert bound.forward_flops(MODEL, 8)["matmuls"] == 2 * (sum(active.values()) - vectors)


def test_dense_attention_sees_every_entry_and_scores_none():
  found, length = bound.forward_flops(MODEL, 64, "dense"), 64
  keys = [4 * min(n, 8) + 2 * (n // 4) + n // 8 for n in range(1, length + 1)]
  assert found["indexer"] == 0 and np.isclose(found["attention"], 4 * 4 * 16 * np.mean(keys), rtol=1e-12)


def test_a_step_is_three_forward_passes_of_the_whole_batch():
  run = RunConfig(model=MODEL, data=DataConfig(sequence_length=64, batch_size=12, accumulation=3))
  assert bound.step_flops(run) == 3 * 12 * 64 * sum(bound.forward_flops(MODEL, 64).values())
