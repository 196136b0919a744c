"""Where a program lies in memory, read from the files that XLA writes before it makes code of it."""

import os
import time

import pytest

from deepseek_v4.planning import layout

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


PROGRAM, ASSIGNED, REPORT, NEXT = (f"module_0001.jit_step.cl_1.after_optimizations{end}.txt" for end in (
  "", "-buffer-assignment", "-memory-usage-report", "_after_buffer_assignment"))

STEP = "HloModule step\n\nENTRY %main {\n}\n\n"


def test_a_layout_is_found_when_it_is_whole(tmp_path):
  """That is: when the compiler has begun the file behind it, or has left it alone for some seconds, both texts ended."""
  assert layout.found(tmp_path / "nowhere") is None
  (tmp_path / "module_0000.jit_seed.cl_1.after_optimizations_before_buffer_assignment.txt").write_text("HloModule seed")
  for name, text in ((PROGRAM, STEP), (ASSIGNED, ASSIGNMENT.format(page="")), (REPORT, "")):
    assert layout.found(tmp_path) is None, name
    (tmp_path / name).write_text(text)
  assert layout.found(tmp_path) is None  # just written
  memory, text = (tmp_path / NEXT).touch() or layout.found(tmp_path)
  assert text == STEP and memory == layout.memory(ASSIGNMENT.format(page=""))
  (tmp_path / NEXT).unlink()

  def rest():
    for name in (PROGRAM, ASSIGNED, REPORT):
      os.utime(tmp_path / name, times=(time.time() - 2 * layout.REST,) * 2)
  assert layout.found(tmp_path) is None
  rest()
  assert layout.found(tmp_path) == layout.found(tmp_path, "step") == (memory, text)
  assert layout.found(tmp_path, "another") is None
  for name in (PROGRAM, ASSIGNED):
    whole = (tmp_path / name).read_text()
    (tmp_path / name).write_text(whole[:-3])
    rest()
    assert layout.found(tmp_path) is None, name
    (tmp_path / name).write_text(whole)
