"""The compiler's final schedules, read from short texts: loops, branches, how often each runs."""

import json

import pytest

from launch.benchmarks.kernels import schedule
from tests.launch.bench_texts import LINES, UNITS, WORK, kernel_schedule


def test_a_schedule_is_a_tree_of_loops_and_branches():
  root = kernel_schedule().root
  seen = [(region.kind, region.first, region.last, region.trips, region.bundles) for region in root.walk()]
  assert seen == [("program", 0, 0x27, None, 3), ("loop", 2, 0x26, 10, 13), ("branch", 6, 0xb, None, 6),
                  ("branch", 0xe, 0x14, None, 7), ("branch", 0x16, 0x20, None, 4), ("loop", 0x1a, 0x20, 3, 7)]
  assert root.copies == [("hbm_to_smem", 128)] and root.inner[0].copies == [("hbm_to_vmem", 2048)]
  assert schedule.Schedule.from_json(json.loads(json.dumps(kernel_schedule().as_json()))) == kernel_schedule()


def test_a_choice_and_a_loop_that_tests_first():
  lines = ["0 : { sbr.rel (%p1) target = $region2 }", "0x1 : {}", "0x2 : { a }", "0x3 : { sbr.rel target = $region3 }",
           "0x4 : {} /* Start region 2 */", "0x5 : { b } /* Start region 4 */", "0x6 : { c } /* Start region 3 */",
           "0x7 LB: > { sbr.rel (%p2) target = $region6 } /* Start region 5 */", "0x8 : > { d }",
           "0x9 : > { sbr.rel target = $region5 } /* End region 5 */", "0xa : {} /* Start region 6 */"]
  text = "\n".join(f"   {line}" for line in lines)
  root = schedule.read("x", text, UNITS).root
  assert [(region.kind, region.first, region.last) for region in root.walk()] == [
      ("program", 0, 10), ("branch", 1, 3), ("branch", 4, 5), ("loop", 7, 9), ("body", 8, 9)]


def test_newer_names_of_units_are_understood():
  renamed = schedule.read("kernel.1", LINES, UNITS.replace("MXU", "MATMUL"))
  assert renamed.root == kernel_schedule().root


def test_executions_multiply_what_is_known_and_take_what_is_given():
  root = kernel_schedule().root
  counted = schedule.counted(root, steps=8, cores=2)
  assert [region.first for region in counted] == [6, 0xe, 0x16]
  executions = schedule.executions(root, (4, 30, 2), steps=8, cores=2)
  times = {region.first: count for region, count in executions if region.kind == "branch"}
  assert times == {6: 4, 0xe: 30, 0x16: 2}
  sums = schedule.total(executions)
  assert sums["bundles"] == 2 * 3 + 8 * 13 + 4 * 6 + 30 * 7 + 2 * (4 + 3 * 7)
  assert (sums["matrix"], sums["vector"]) == (30 * 150, 4 * 80 + 30 * 60 + 2 * 3 * 80)
  assert sums["hbm_bytes"] == 2 * 128 + 8 * 2048 and sums["spills"] == 30 * 6
  assert schedule.body(counted[2]) == {"bundles": 25, "spills": 0, "fills": 0, "matrix": 0, "vector": 240}
  assert schedule.body(counted[1])["spills"] == 6 and schedule.heat(counted) == [0, 150, 0]
  with pytest.raises(ValueError):
    schedule.executions(root, (4, 30))


def test_a_branch_that_starts_many_copies_counts():
  copies = " ;; ".join("%5 = dma.hbm_to_vmem [thread:$0] /*hbm=*/%s1, /*size_in_granules=*/32" for _ in range(16))
  [first, *_] = [line for line in LINES.splitlines() if line.lstrip().startswith("0x1a ")]
  many = LINES.replace(first, first.replace("{", "{ " + copies + " ;;", 1))
  idle = UNITS.replace(" ".join(map(str, WORK[0x1a])), "0 0 0")
  few, full = (schedule.counted(schedule.read("kernel.1", text, idle).root, steps=8, cores=2) for text in (LINES, many))
  assert [region.first for region in few] == [6, 0xe] and [region.first for region in full] == [6, 0xe, 0x16]


def test_a_folder_is_read_in_the_compilers_order(tmp_path):
  for stamp, name in ((12, "second"), (7, "first.3"), (3, "TLP"), (1, "<late-finalization>")):
    (tmp_path / f"{stamp:02}-{name}-03-final_bundles.txt").write_text(LINES)
    (tmp_path / f"{stamp:02}-{name}-02-schedule-analysis_final_bundles.txt").write_text("")
    (tmp_path / f"{stamp:02}-{name}-01-final_hlo-static-per-bundle-utilization.txt").write_text(UNITS)
  assert [found.name for found in schedule.read_folder(tmp_path)] == ["first.3", "second"]
  assert schedule.read_folder(tmp_path, tuple(tmp_path.glob("*"))) == []
