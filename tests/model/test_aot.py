"""Recomputation through the real TPU compiler: what a policy leaves in the chip's memory, and what waits in the host's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAYERS, TOKENS, WIDTH = 7, 2048, 256
STREAMS = TOKENS * 4 * WIDTH * 2  # bytes of the streams in front of one layer
PROGRAM = f"""
import os
from deepseek_v4.planning import lower
os.environ.update(lower.ENVIRONMENT)
import dataclasses, json
import jax, jax.numpy as jnp
import deepseek_v4 as dsv4
from deepseek_v4.config import HCA, LEARNED
from tests.model.small import T0, abstract_variables

config = dataclasses.replace(T0, num_hidden_layers={LAYERS}, layer_types=(HCA,) * {LAYERS}, hidden_size={WIDTH},
                             mlp_layer_types=(LEARNED,) * {LAYERS}, num_nextn_predict_layers=0, compute_dtype="bfloat16")
on = jax.sharding.SingleDeviceSharding(lower.devices_of("v5p:2x2x1")[0])
place = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on), tree)
variables, tokens = place(abstract_variables(config)), place(jax.ShapeDtypeStruct((1, {TOKENS}), jnp.int32))

def memory(policy):
  model = dsv4.DeepseekV4(dataclasses.replace(config, remat=policy), "blockwise")
  def loss(params, router, tokens):
    losses = model.apply({{"params": params, "router": router}}, tokens, targets=tokens).losses
    return sum(total for total, _ in losses.values())
  found = jax.jit(jax.grad(loss)).lower(variables["params"], variables["router"], tokens).compile().memory_analysis()
  return [found.temp_size_in_bytes, found.host_temp_size_in_bytes]

print(json.dumps({{policy: memory(policy) for policy in ("block", "offload")}}))
"""


@pytest.mark.long
def test_offloaded_streams_wait_in_the_host():
  environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
  result = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment, capture_output=True, text=True,
                          check=False, timeout=1000)
  assert result.returncode == 0, result.stderr[-3000:]
  memory = json.loads(result.stdout.splitlines()[-1])
  print(memory)
  (block, none), (offload, host) = memory["block"], memory["offload"]
  assert none == 0 and host >= LAYERS * STREAMS
  assert block - offload > (LAYERS - 2) * STREAMS  # two may be on their way
