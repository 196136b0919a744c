"""The real TPU compiler's word on recomputation and on experts that are spread over a slice."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.benchmarks import exchange

ROOT = Path(__file__).resolve().parents[2]
LAYERS, TOKENS, WIDTH = 7, 2048, 256
STREAMS = TOKENS * 4 * WIDTH * 2  # bytes of the streams in front of one layer
PROGRAM = f"""
import os
from deepseek_v4.planning import lower, read
os.environ.update(lower.ENVIRONMENT)
import dataclasses, json
import jax, jax.numpy as jnp
import deepseek_v4 as dsv4
from deepseek_v4 import sharding
from deepseek_v4.config import CSA, LEARNED, REMAT_POLICIES, MeshConfig
from tests.model.small import T0, abstract_variables

config = dataclasses.replace(
    T0, num_hidden_layers={LAYERS}, layer_types=(CSA,) * {LAYERS}, mlp_layer_types=(LEARNED,) * {LAYERS},
    num_nextn_predict_layers=0, hidden_size={WIDTH}, head_dim=128, index_head_dim=128, index_topk=64,
    moe_intermediate_size=128, compute_dtype="bfloat16")
mesh = sharding.make_mesh(MeshConfig(data=1), lower.devices_of("v5p:2x2x1")[:1])
on = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
place = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on), tree)
variables, tokens = place(abstract_variables(config)), place(jax.ShapeDtypeStruct((1, {TOKENS}), jnp.int32))

def figures(policy):
  model = dsv4.DeepseekV4(dataclasses.replace(config, remat=policy), "pallas")
  def loss(params, router, tokens):
    losses = model.apply({{"params": params, "router": router}}, tokens, targets=tokens).losses
    return sum(total for total, _ in losses.values())
  compiled = sharding.OnMesh(jax.jit(jax.grad(loss)), mesh).lower(*variables.values(), tokens).compile()
  memory = compiled.memory_analysis()
  return memory.temp_size_in_bytes, memory.host_temp_size_in_bytes, read.kernels(compiled)

print(json.dumps({{policy: figures(policy) for policy in REMAT_POLICIES}}))
"""


@pytest.mark.long
def test_kernels_run_again_and_streams_wait_in_the_host_as_the_policy_says():
  environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
  result = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment, capture_output=True, text=True,
                          check=False, timeout=1000)
  assert result.returncode == 0, result.stderr[-3000:]
  figures = json.loads(result.stdout.splitlines()[-1])
  for policy, (chip, host, _) in figures.items():
    print(f"{policy:8} {chip / 2**20:4.0f} MiB of the chip, {host / 2**20:3.0f} MiB of the host")  # README's column
  (mhc, _, once), (block, none, twice), (offload, host, _) = (figures[name] for name in ("mhc", "block", "offload"))
  assert figures["none"][0] > mhc > block > figures["full"][0] and none == 0
  # All the layers' streams are in the host's memory; on the chip two may be on their way.
  assert host >= LAYERS * STREAMS and block - offload > (LAYERS - 2) * STREAMS
  again = {"masked_attention", "experts_hidden", "experts_down"}
  mixing = {name for name in once if name.startswith(("hyper_", "sinkhorn"))}
  # A newer compiler sees for itself that the selection need not run again.
  assert {name for name in twice.keys() - mixing if twice[name] == 2} - {"index_select"} == again
  assert {once[name] for name in once.keys() - mixing} == {1}
  assert once["hyper_collapse"] == once["hyper_expand_collapse"] == 2


@pytest.mark.long
def test_rows_travel_and_weights_stay():
  """Flash's experts over eight chips: rows move by ragged exchanges, four of the first pass and five in the loops of further
  ones, and nothing else does but how many they are; gathering moves more and takes more memory."""
  gathered, sent = exchange.measure("v5p:2x2x2", (4096,), ("flash",), print)
  print(exchange.table([gathered, sent]))
  assert sent["traffic"].pop("ragged-all-to-all")["count"] == 9
  counts = 8 * 256 * 4  # bytes of one number for each device and expert
  assert sum(found["bytes"] + found["more"] for found in sent["traffic"].values()) <= 2 * counts
  assert "ragged-all-to-all" not in gathered["traffic"] and sent["temporaries"] < gathered["temporaries"]
