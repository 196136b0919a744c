"""The real TPU compiler's word on a train step over two slices."""

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


@pytest.mark.long
def test_a_step_over_two_slices_sends_its_gradients_as_they_shall_be_added():
  """float32 sums, or 16-bit numbers, of which half the bytes cross; the orthogonalised matrices are gathered alike."""
  environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
  result = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment, capture_output=True, text=True,
                          check=False, timeout=1000)
  assert result.returncode == 0, result.stderr[-3000:]
  found = json.loads(result.stdout.splitlines()[-1])
  assert found["slices"] == [[0] * 4, [1] * 4]
  exact, rounded = found["across"]["float32"], found["across"]["bfloat16"]
  print(exact, rounded)
  gradients = exact["ALL_REDUCE f32"]
  assert gradients > 10_000 and not [name for name in exact if "16" in name]
  assert exact["ALL_GATHER f32"] == rounded["ALL_GATHER f32"] > 10_000  # after Newton-Schulz
  # Rounded, a sum is an exchange of halves and a gather; what stays is one small array and the metrics.
  assert sum(n for name, n in rounded.items() if name.endswith(" u16")) <= gradients
  assert rounded["ALL_REDUCE f32"] < gradients / 100
