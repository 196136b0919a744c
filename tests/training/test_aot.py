"""The real TPU compiler's word on a train step over two slices."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import os
from deepseek_v4.planning import lower
os.environ.update(lower.ENVIRONMENT)
import dataclasses, json, sys
import numpy as np
from deepseek_v4 import config as c
from deepseek_v4.planning.collectives import collectives
from tests.training.small import RUN

training = dataclasses.replace(RUN.training, kernels="blockwise", gradient_reduction=sys.argv[1])
run = dataclasses.replace(RUN, training=training, mesh=c.MeshConfig(dcn_data=2, data=1, fsdp=2, expert=2))
mesh = lower.mesh_on(run, "v5p:2x2x1")
compiled = lower.lower_step(run, mesh).compile()
across = {}
for one in collectives(compiled.as_text()):
  if len({mesh.devices.reshape(-1)[place].slice_index for place in one.devices}) > 1:
    for dtype, shape in one.arrays:
      across[dtype] = across.get(dtype, 0) + int(np.prod(shape))
print(json.dumps({"slices": [[d.slice_index for d in part.reshape(-1)] for part in mesh.devices], "across": across}))
"""


@pytest.mark.long
@pytest.mark.parametrize("how", ["float32", "bfloat16"])
def test_a_step_over_two_slices_compiles(how):
  environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
  result = subprocess.run([sys.executable, "-c", PROGRAM, how], cwd=ROOT, env=environment, capture_output=True, text=True,
                          check=False, timeout=1000)
  assert result.returncode == 0, result.stderr[-3000:]
  found = json.loads(result.stdout.splitlines()[-1])
  print(found)
  assert found["slices"] == [[0] * 4, [1] * 4]
