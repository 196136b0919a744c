"""The real TPU compiler's word on what travels in a train step: weights and gradients beside work, or between slices."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Between slices arrays are sent and received by the hosts; of each the program says what it is a part of.
PROGRAM = r"""
import os
from deepseek_v4.planning import lower
os.environ.update(lower.ENVIRONMENT)
import dataclasses, json, math, re, sys
from deepseek_v4 import config as c
from tests.training.small import RUN

def across(text):
  sizes = {}
  for dtype, shape, kind in re.findall(r'= \((\w+)\[([\d,]*)\].*? send\(.*?_xla_megascale_transfer_type="(\w+)"', text):
    numbers = math.prod(int(size) for size in shape.split(",") if size)
    sizes[f"{kind} {dtype}"] = sizes.get(f"{kind} {dtype}", 0) + numbers
  return sizes

found = {}
for how in ("float32", "bfloat16"):
  training = dataclasses.replace(RUN.training, kernels="blockwise", gradient_reduction=how)
  run = dataclasses.replace(RUN, training=training, mesh=c.MeshConfig(dcn_data=2, data=1, fsdp=2, expert=2))
  mesh = lower.mesh_on(run, "v5p:2x2x1")
  found[how] = across(lower.lower_step(run, mesh).compile().as_text())
print(json.dumps({"slices": [[d.slice_index for d in part.reshape(-1)] for part in mesh.devices], "across": found}))
"""


def said_by(program, *arguments):
  """What a Python program prints in its last line, read as JSON; without the flags that the tests give to XLA for CPUs."""
  environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
  result = subprocess.run([sys.executable, "-c", program, *arguments], cwd=ROOT, env=environment, capture_output=True,
                          text=True, check=False, timeout=1000)
  assert result.returncode == 0, result.stderr[-3000:]
  return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.long
def test_a_step_over_two_slices_sends_its_gradients_as_they_shall_be_added():
  """float32 sums, or 16-bit numbers, of which half the bytes cross; the orthogonalised matrices are gathered alike."""
  found = said_by(PROGRAM)
  assert found["slices"] == [[0] * 4, [1] * 4]
  exact, rounded = found["across"]["float32"], found["across"]["bfloat16"]
  print(exact, rounded)
  gradients = exact["ALL_REDUCE f32"]
  assert gradients > 10_000 and not [name for name in exact if "16" in name]
  assert exact["ALL_GATHER f32"] == rounded["ALL_GATHER f32"] > 10_000  # after Newton-Schulz
  # Rounded, a sum is an exchange of halves and a gather; what stays is one small array and the metrics.
  assert sum(n for name, n in rounded.items() if name.endswith(" u16")) <= gradients
  assert rounded["ALL_REDUCE f32"] < gradients / 100


TRAVELS = r"""
import os, sys
from deepseek_v4.planning import lower
os.environ.update(lower.ENVIRONMENT)
import json
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from deepseek_v4.planning.collectives import collectives, traffic
from deepseek_v4.training.step import compiler_options

devices = np.array(lower.devices_of(sys.argv[1]))
mesh = Mesh(devices, ("fsdp",))
split, whole = NamedSharding(mesh, P("fsdp")), NamedSharding(mesh, P())

def loss(weights, x):
  for weight in weights:
    x = jnp.tanh(x @ jax.lax.with_sharding_constraint(weight, whole))
  return x.astype(jnp.float32).sum()

of = lambda rows: jax.ShapeDtypeStruct((rows, 4096), jnp.bfloat16, sharding=split)
step = jax.jit(jax.grad(loss), out_shardings=[split] * 3, compiler_options=compiler_options(mesh))
traced = step.trace([of(4096)] * 3, of(devices.size * 1024))
print(json.dumps([devices.size, traffic(collectives(traced.lower(lowering_platforms=("tpu",)).compile().as_text()))]))
"""


@pytest.mark.parametrize("topology", ["v5p:4x4x4", pytest.param("TPU7x:4x4x4", marks=pytest.mark.long)])
def test_weights_and_gradients_of_a_whole_slice_travel_once_and_beside_the_matmuls(topology):
  """By the step's own compiler options, three weights split over all devices: each device receives once what it has not of
  them, and once its part of each gradient's sum; while the first is gathered there is nothing else to do."""
  devices, found = said_by(TRAVELS, topology)
  assert list(found) == ["all-gather", "reduce-scatter"]
  one = 4096 * 4096 * 2 * (devices - 1) // devices
  for kind, hidden in (("all-gather", 2), ("reduce-scatter", 1)):
    assert (found[kind]["count"], found[kind]["bytes"]) == (3, 3 * one)
    assert found[kind]["hidden"] >= hidden * one


@pytest.mark.long
def test_weights_of_a_v6e_travel_beside_the_matmuls():
  """Its first gradient is still the sum of all numbers, kept in part."""
  devices, found = said_by(TRAVELS, "v6e:8x8")
  one = 4096 * 4096 * 2 * (devices - 1) // devices
  assert {kind: row["bytes"] for kind, row in found.items()} == {
    "all-gather": 3 * one, "all-reduce": 2 * one, "reduce-scatter": 2 * one}
  assert found["all-gather"]["hidden"] >= 2 * one
