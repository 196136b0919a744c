"""Sizes that a mesh does not divide, meshes that the devices do not fill, and what else does not go with several devices."""

import dataclasses

import jax
import pytest

from deepseek_v4 import config as c
from deepseek_v4 import sharding
from deepseek_v4.posttraining.rollout import check_mesh
from deepseek_v4.training.state import abstract_state, init_state
from deepseek_v4.training.step import make_train_step
from launch import processes
from tests.bad_input.table import KEY, check, table
from tests.bad_input.test_shapes import CACHE, TOKENS, model
from tests.training.small import RUN, with_model


def mesh(count=8, **sizes):
  """A mesh over the first devices."""
  return sharding.make_mesh(c.MeshConfig(**{"data": 1} | sizes), jax.devices()[:count])


def made(count=8, **sizes):
  return lambda _: mesh(count, **sizes)


def with_data(**changes):
  return dataclasses.replace(RUN, data=dataclasses.replace(RUN.data, **changes))


def run_on(run, use=abstract_state, **sizes):
  """The run on a mesh of exactly these sizes."""
  def call(_):
    count = 1
    for size in sizes.values():
      count *= size
    use(run, mesh(count, **sizes))
  return call


def on_mesh(call, **sizes):
  """A call with a mesh around it."""
  def run(folder):
    with jax.set_mesh(mesh(**sizes)):
      call(folder)
  return run


WRONG = table(
  ("mesh", "'fsdp': 3", "the number of devices, 8", made(fsdp=3)),
  ("mesh", "'data': 2", "the number of devices, 8", made(data=2, expert=2)),
  ("mesh", "8 devices", "a multiple of 3", made(data=-1, tensor=3)),
  ("mesh", "5 devices", "a multiple of 2", made(5, data=-1, context=2)),
  ("mesh", "-1", "at most one axis with -1", made(data=-1, fsdp=-1)),
  ("tensor", "0", "at least 1, or -1", made(tensor=0)),
  ("model.num_attention_heads", "8", "a multiple of mesh.tensor = 3", run_on(RUN, tensor=3)),
  ("model.o_groups", "2", "a multiple of mesh.tensor = 4", run_on(RUN, tensor=4)),
  ("model.vocab_size", "65", "a multiple of mesh.tensor = 2", run_on(with_model(RUN, vocab_size=65), tensor=2)),
  ("model.index_n_heads", "5", "a multiple of mesh.tensor = 2", run_on(with_model(RUN, index_n_heads=5), tensor=2)),
  ("model.moe_intermediate_size", "15", "a multiple of mesh.tensor = 2",
   run_on(with_model(RUN, moe_intermediate_size=15), tensor=2)),
  ("model.hidden_size", "32", "a multiple of mesh.fsdp = 3", run_on(RUN, fsdp=3)),
  ("model.q_lora_rank", "15", "a multiple of mesh.fsdp = 2", run_on(with_model(RUN, q_lora_rank=15), fsdp=2)),
  ("model.o_lora_rank", "9", "a multiple of mesh.fsdp = 2", run_on(with_model(RUN, o_lora_rank=9), fsdp=2)),
  ("model.n_routed_experts", "8", "a multiple of mesh.expert = 3", run_on(RUN, expert=3)),
  ("data.batch_size / data.accumulation", "6", "data x fsdp x expert = 8",
   run_on(with_data(batch_size=6), data=2, fsdp=2, expert=2)),
  ("data.batch_size / data.accumulation", "4", "data x fsdp x expert = 8",
   run_on(with_data(accumulation=2), data=8)),
  ("data.sequence_length", "31", "a multiple of mesh.context = 2", run_on(with_data(sequence_length=31), context=2)),
  ("data.sequence_length / mesh.context", "4", "at least 7", run_on(RUN, context=8)),
  ("model.n_routed_experts", "8", "a multiple of mesh.expert = 5", run_on(RUN, make_train_step, expert=5)),
  ("model.hidden_size", "32", "a multiple of mesh.fsdp = 5", run_on(
    RUN, lambda run, mesh: init_state(run, jax.ShapeDtypeStruct((), KEY), mesh), fsdp=5)),
  ("length of tokens", "6", "a multiple of mesh.context = 8", on_mesh(model(TOKENS), context=8)),
  ("length of tokens / mesh.context", "3", "at least 7", on_mesh(model(TOKENS), context=2, data=4)),
  ("cache", "not 2", "a mesh with context = 1", on_mesh(
    model(TOKENS, cache=CACHE), context=2, data=4)),
  ("mesh.context", "2", "1, as replies are decoded", lambda _: check_mesh(mesh(context=2, data=4), 8, "decode_batch")),
  ("distillation.decode_batch", "12", "data x fsdp x expert = 8",
   lambda _: check_mesh(mesh(data=2, fsdp=2, expert=2), 12, "distillation.decode_batch")),
  ("mesh.emulated_devices", "7", "a multiple of 2 processes", lambda _: processes.emulated_share(
    7, processes.Join("host:1", 2, 0))),
  ("mesh.emulated_devices", "8", "0 with --distributed", lambda _: processes.emulated_share(8, processes.Join())),
  ("logical axis", "'rows'", "one of batch, sequence", lambda _: sharding.spec(("rows",))),
  ("logical axes", "('heads', 'vocab')", "two of them lie on one mesh axis", lambda _: sharding.spec(("heads", "vocab"))),
  ("parameter", "layers/layer_00/attention/w", "not in the table", lambda _: sharding.parameter_axes(
    ("layers", "layer_00", "attention", "w"), 2)),
  ("parameter lm_head/kernel", "4 axes", "expected 2", lambda _: sharding.parameter_axes(("lm_head", "kernel"), 4)),
)


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_refused(wrong, tmp_path, compiled):
  check(wrong, tmp_path, compiled)
