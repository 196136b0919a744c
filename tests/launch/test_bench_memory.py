"""The memory bench without a compiler: its cases, what it reads from an answer, its table."""

import pytest

from launch.benchmarks.memory import cases, run
from launch.benchmarks.memory.cases import CSA, KINDS, OURS, SIDES, SPLASH, Case


def test_cases_are_all_kinds_and_sides():
  found = cases.all_cases((65536,), 8)
  assert [(case.kind, case.side) for case in found] == [(kind, side) for kind in KINDS for side in SIDES]
  assert [case.entries for case in found[::len(SIDES)]] == [16384, 512, 0]
  assert found[0].operand_bytes == 4 * 65536 * 16 * 512 * 2  # four arrays of 1 GiB


@pytest.mark.parametrize("topology, devices", [("v5p:2x2x2", 8), ("v6e:2x4", 8), ("TPU7x:2x2x1", 8)])
def test_devices_of_a_topology(topology, devices):
  assert run.devices_of(topology) == devices


def test_rows_and_the_target():
  words = ("JaxRuntimeError: RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
           "(970.43G) exceeds available HBM (95.74G).")
  case, gib = Case(CSA, OURS, 65536, 8), 2**30
  row = run.row_of(case, {"ok": True, "seconds": 3.0, "memory": {"temp": gib // 2, "total": 5 * gib}})
  assert (row["beside"], row["operand_bytes"]) == (gib // 2, 4 * gib)
  large = run.row_of(Case(CSA, SPLASH, 65536, 8), {"ok": False, "error": words})
  assert large["needed"] == 970.43 * gib
  failed = run.row_of(Case(CSA, SPLASH, 65536, 8), {"ok": False, "error": "ValueError: no\nmore"})
  assert "needed" not in failed
  lines = run.table([row, large, failed]).splitlines()
  assert lines[1].endswith("4.00                  0.50") and lines[2].endswith("does not fit: 970")
  assert lines[3].endswith("ValueError: no")
  [target] = run.targets([row, large, failed])
  assert target["reached"] and target["value"] == 0.5
  assert run.targets([])[0]["reached"] is None and not run.targets([row | {"beside": 2 * gib}])[0]["reached"]
