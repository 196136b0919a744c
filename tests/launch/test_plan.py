"""What `launch.plan` prints of a compiled step; the compiler itself: tests/planning/test_aot.py."""

from launch import plan

GIB = 2**30


def figures(**changes):
  memory = {"arguments": 3 * GIB, "outputs": 3 * GIB, "aliased": 3 * GIB, "temporaries": 2 * GIB, "code": 0, "all": 5 * GIB}
  return {"seconds": 61.2, "devices": 8, "hbm_bytes": 6 * GIB, "memory": memory, "kernels": {"attend": 2}, "traffic": {
    "all-gather": {"count": 4, "started": 3, "bytes": 3 * GIB // 2, "more": 0},
    "ragged-all-to-all": {"count": 9, "started": 8, "bytes": 2 * GIB, "more": GIB // 4}}} | changes


def test_memory_kernels_and_collectives_are_printed():
  lines = [line.split() for line in plan.text(figures()).splitlines()]
  for wanted in (["temporaries", "2.00"], ["of", "6.00:", "fits"], ["attend", "2"], ["all-gather", "1.50", "4", "3"],
                 ["ragged-all-to-all", "2.00", "9", "8", "+", "0.25"]):
    assert wanted in lines
  small = plan.text(figures(hbm_bytes=4 * GIB, kernels={}, traffic={}))
  assert "DOES NOT FIT" in small and small.splitlines().count("  none") == 2
