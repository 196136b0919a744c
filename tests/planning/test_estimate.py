"""The estimate from shapes: its parts by hand, and that it moves as it must."""

import dataclasses
import math

import jax
import pytest

from deepseek_v4 import sharding
from deepseek_v4.config import MeshConfig
from deepseek_v4.planning import bound, estimate, state
from deepseek_v4.training.state import abstract_state
from tests.training.small import MODEL, RUN

RATES = bound.Rates(1e12, 1e11, 1e10)


def estimated(axes, remat="block", accumulation=1, **data):
  run = dataclasses.replace(RUN, model=dataclasses.replace(MODEL, remat=remat),
                            data=dataclasses.replace(RUN.data, accumulation=accumulation, **data))
  sizes = {"data": 1} | axes
  devices = jax.devices()[:math.prod(sizes.values())]
  mesh = sharding.make_mesh(MeshConfig(**sizes), devices)
  return estimate.estimate(run, mesh, RATES, state.by_kind(state.placed(abstract_state(run), mesh)))


def test_streams_that_are_kept():
  of = lambda remat, layers: estimate.kept_streams(dataclasses.replace(RUN, model=dataclasses.replace(
    MODEL, remat=remat, num_hidden_layers=layers, layer_types=MODEL.layer_types[:2] * (layers // 2),
    mlp_layer_types=MODEL.mlp_layer_types[:2] * (layers // 2))))
  assert of("block", 4) == 5 and of("offload", 4) == 2
  # 32 repeats of two layers: eight groups of four repeats keep 8 and, while one is made again, 8 of its layers.
  assert of("full", 64) == 16


def test_matmuls_are_the_models_and_what_is_made_again():
  one = estimated({}, remat="none")
  tokens = RUN.data.batch_size * RUN.data.sequence_length
  assert one.work.matmul_flops == 3 * tokens * sum(bound.forward_flops(MODEL, RUN.data.sequence_length).values())
  assert estimated({}).work.matmul_flops == one.work.matmul_flops * 4 / 3
  assert estimated({"fsdp": 2, "tensor": 2}).work.matmul_flops == one.work.matmul_flops / 3
  assert (one.work.exposed_bytes, one.work.hidden_bytes) == (0, 0)


def test_more_passes_hold_less_and_send_more():
  few, many = (estimated({"fsdp": 2, "expert": 2}, accumulation=passes, sequence_length=64, batch_size=64)
               for passes in (2, 8))
  assert many.bytes < few.bytes and many.work.exposed_bytes == 4 * few.work.exposed_bytes
  assert many.work.hidden_bytes == few.work.hidden_bytes


def test_the_vocabulary_s_matrices_stay_split_over_fsdp():
  """Over expert they are gathered twice in float32, and their gradients are summed; over fsdp a token's hidden state and its
  gradient travel to each other device, for either loss."""
  over = lambda **axes: estimated(axes, accumulation=1).work
  numbers = 2 * MODEL.vocab_size * MODEL.hidden_size
  assert over(expert=2).exposed_bytes - over(fsdp=2).exposed_bytes == pytest.approx(numbers / 2 * (2 * 4 + 4))
  tokens = RUN.data.batch_size * RUN.data.sequence_length // 2
  assert over(fsdp=2).hidden_bytes - over(expert=2).hidden_bytes == pytest.approx(2 * tokens * MODEL.hidden_size * 8)


def test_sizes_that_do_not_divide_are_refused():
  with pytest.raises(ValueError, match="data.batch_size / data.accumulation = 1"):
    estimated({"data": 2}, accumulation=8)
