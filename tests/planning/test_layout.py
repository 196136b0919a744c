"""Where a program lies in memory, read before the compiler makes code of it: beside what the compiled program says."""

import json

import pytest

from deepseek_v4.planning import layout
from tests.planning.test_aot import plan, python

MIB = 2**20

# An update in place and a scan that keeps 64 results of 4 MiB, as XLA writes them down: of libtpu 0.0.42 and, with "page",
# of 0.0.50; color 1 is on-chip memory.
ASSIGNMENT = """BufferAssignment:
allocation 0: size 512,{page} thread-local:
allocation 1: size 4194304,{page} parameter 0, shape |f32[1024,1024]| at ShapeIndex {{}}, maybe-live-out:
 value: <3 param @0> (size=4194304,offset=0): f32[1024,1024]{{1,0:T(8,128)}}
allocation 2: size 4194304,{page} maybe-live-out:
allocation 3: size 4194304,{page} parameter 1, shape |f32[1024,1024]| at ShapeIndex {{}}:
allocation 4: size 512,{page} constant:
allocation 9: size 32,{page} output shape is |(f32[1024,1024], f32[1024,1024])|, maybe-live-out:
allocation 15: size 270647328,{page} preallocated-temp:
allocation 16: size 4, color 2,{page} preallocated-temp:
allocation 18: size 6291456, color 1,{page} preallocated-temp:
"""


@pytest.mark.parametrize("page", ["", " page 0,"])
def test_memory_is_read_from_a_buffer_assignment(page):
  found = layout.memory(ASSIGNMENT.format(page=page))
  assert {name: found[name] for name in ("arguments", "outputs", "aliased", "temporaries")} == {
    "arguments": 8 * MIB, "outputs": 8 * MIB + 32, "aliased": 4 * MIB, "temporaries": 270647328 + 512}
  assert found["peak"] == 12 * MIB + 32 + 270647328 + 512 and found["all"] == found["peak"] + layout.CODE_BYTES


BOTH = """
import os, sys, tempfile
os.environ["JAX_PLATFORMS"] = "cpu"
from deepseek_v4.planning import layout, lower, read
os.environ.update(lower.ENVIRONMENT)
import jax, jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
place = SingleDeviceSharding(lower.devices_of("v5p:2x2x1")[0])
def f(w, x):
  x, kept = jax.lax.scan(lambda x, _: (jnp.tanh(x @ w),) * 2, x, length=64)
  return w - x, kept.sum(0)
of = lambda f, *shape: jax.jit(f, donate_argnums=0).lower(*[jax.ShapeDtypeStruct(shape, "float32", sharding=place)] * 2)
lowered = of(f, 1024, 1024)
compiled = lowered.compile()
with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
  sizes, text = layout.laid_out(lowered, folder)
want = read.memory(compiled)
same = all(sizes[name] == want[name] for name in ("arguments", "outputs", "aliased"))
print("same", same, "near", 256 * 2**20 < sizes["temporaries"] <= want["temporaries"], "dots", text.count(" convolution("))
with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
  try:
    layout.laid_out(of(lambda x, y: (x + 1, y @ x), 2**18, 2**18), folder)
  except jax.errors.JaxRuntimeError as error:
    print("refused" if "RESOURCE_EXHAUSTED" in str(error) else error)
sys.stdout.flush()
os._exit(0)
"""


def test_a_layout_says_what_the_compiled_program_says_and_a_refusal_is_raised():
  """The scan keeps 64 arrays of 4 MiB, which lie in the region of temporaries; 256 GiB twice are in no chip."""
  result = python("-c", BOTH)
  assert result.stdout.splitlines()[-2:] == ["same True near True dots 1", "refused"], result.stdout + result.stderr[-3000:]


@pytest.mark.long
def test_a_plan_by_layout_has_the_figures_of_the_compiled_one(tmp_path):
  found = []
  for number, options in enumerate(([], ["--layout"])):
    path = tmp_path / f"{number}.json"
    result = plan("debug", "--topology", "v5p:2x2x1", "--json", str(path), *options, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    found.append(json.loads(path.read_text()))
  compiled, laid_out = found
  for name in ("kernels", "traffic", "flops", "bounds", "hbm_bytes_moved", "state", "utilization", "mesh"):
    assert compiled[name] == laid_out[name], name
  for name in ("arguments", "outputs", "aliased"):
    assert compiled["memory"][name] == laid_out["memory"][name], name
  assert laid_out["memory"]["temporaries"] <= compiled["memory"]["temporaries"]
  assert (compiled["layout"], laid_out["layout"]) == (False, True)
