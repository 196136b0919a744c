"""The bench of the kernels without a compiler: schedules and programs from short texts, bounds, plans, rows, mistakes."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from launch.benchmarks.kernels import bounds, cases, compile, plans, program, report, rows, run, schedule
from launch.benchmarks.kernels.cases import BLOCKWISE, DECODE, FORWARD, GRADIENT, OURS, SPLASH, Case
from launch.benchmarks.kernels.chips import CHIPS, chip_of
from pallas_kernels.shapes import PRO

ROOT = Path(__file__).resolve().parents[2]
V5P, V6E, TPU7X = CHIPS

# ---- the compiler's text ----------------------------------------------------------------------------------------------
# A grid of 8 steps (two more of the pipeline) with a start, a tile, and a finish that loops three times.
LINES = """\
     0   :  { %s0 = smov 0 }
   0x1   :  { %2 = dma.hbm_to_smem /*hbm=*/%s1, /*size_in_granules=*/4 }
   0x2 LB: > { %s1 = sphi 0 } /* Start region 9 */
   0x3   : > { %4 = shalt.err (!%p) /* BoundsCheck 0 for %5 = dma.hbm_to_vmem /*hbm=*/%s1, /*size_in_granules=*/64
hlo: kernel
 */ }
   0x4   : > { %5 = dma.hbm_to_vmem [thread:$0]  (%p1), /*hbm=*/%s1, /*size_in_granules=*/64, /*vmem=*/%s3 /*
base_bounds: (1, 2) */ }
   0x5   : > { %6 = sbr.rel (%p1) target = $region3 }
   0x6   : > {}
   0x7   : > {}
   0x8   : > {}
   0x9   : > {}
   0xa   : > { %7 = vadd }
   0xb   : > { %7 = vadd }
   0xc PF: > { %8 = sld } /* Start/End empty region 3 :: Start region 4 */
   0xd   : > { %9 = sbr.rel (!%p2) target = $region5 }
   0xe   : > {}
   0xf   : > {}
  0x10   : > {}
  0x11   : > {}
  0x12   : > { %7 = vmatmul }
  0x13   : > { %7 = vmatmul }
  0x14   : > { %7 = vmatmul }
  0x15 PF: > { %8 = sbr.rel (%p3) target = $region6 } /* Start/End empty region 5 */
  0x16   : > {}
  0x17   : > {}
  0x18   : > {}
  0x19   : > {}
  0x1a LB: >> { %8 = vadd } /* Start region 7 */
  0x1b   : >> { %p4 = scmp.ge.s32.totalorder (%p9), %s5, 3 /* loop exit test */ }
  0x1c   : > { %9 = sbr.rel (!%p4) target = $region7 }
  0x1d   : >> {}
  0x1e   : >> {}
  0x1f   : >> {}
  0x20   : >> {} /* End region 7 :: End region 8 */
  0x21 PF: > { %p5 = scmp.ge.s32.totalorder %s5, 10 /* loop exit test */ } /* Start/End empty region 6 */
  0x22   :  { %9 = sbr.rel (!%p5) target = $region9 }
  0x23   : > {}
  0x24   : > {}
  0x25   : > {}
  0x26   : > {} /* End region 9 */
  0x27   :  { %s0 = smov 0 }
"""
WORK = {0xa: (0, 40, 0), 0xb: (0, 40, 0), 0x12: (50, 20, 0), 0x13: (50, 20, 3), 0x14: (50, 20, 3), 0x1a: (0, 80, 0)}
UNITS = "== CAPACITY:\nMXU, VALU, VSTORE:SPILL\n 4 4 1\n== UTILIZATION:\n" + "\n".join(
    " ".join(map(str, WORK.get(number, (0, 0, 0)))) for number in range(0x28))


def kernel_schedule():
  return schedule.read("kernel.1", LINES, UNITS)


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


def test_cores_share_a_kernel_only_where_an_axis_is_long_enough():
  def grid(*sizes, semantics):
    run = pl.pallas_call(lambda out: None, grid=sizes, out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
                         compiler_params=pltpu.CompilerParams(dimension_semantics=semantics))
    [call] = program.calls(jax.make_jaxpr(lambda: run())().jaxpr)
    return call.parallel
  assert grid(1, 6, semantics=("parallel", "arbitrary")) == 1 == grid(4, 6, semantics=("arbitrary", "arbitrary"))
  assert grid(4, 6, semantics=("parallel", "arbitrary")) == 4 and grid(2, 3, semantics=("parallel", "parallel")) == 6


def test_a_folder_is_read_in_the_compilers_order(tmp_path):
  for stamp, name in ((12, "second"), (7, "first.3"), (3, "TLP"), (1, "<late-finalization>")):
    (tmp_path / f"{stamp:02}-{name}-03-final_bundles.txt").write_text(LINES)
    (tmp_path / f"{stamp:02}-{name}-02-schedule-analysis_final_bundles.txt").write_text("")
    (tmp_path / f"{stamp:02}-{name}-01-final_hlo-static-per-bundle-utilization.txt").write_text(UNITS)
  assert [found.name for found in schedule.read_folder(tmp_path)] == ["first.3", "second"]
  assert schedule.read_folder(tmp_path, tuple(tmp_path.glob("*"))) == []


# ---- programs ---------------------------------------------------------------------------------------------------------
HLO = """\
HloModule jit_f

%fused (p0: f32[64,8], p1: s32[]) -> f32[1,8] {
  %p0 = f32[64,8]{1,0:T(8,128)} parameter(0)
  %p1 = s32[]{:T(128)} parameter(1)
  ROOT %ds = f32[1,8]{1,0:T(8,128)} dynamic-slice(%p0, %p1, %p1), dynamic_slice_sizes={1,8}
}

%condition (t: (s32[], f32[64,8])) -> pred[] {
  %t.1 = (s32[]{:T(128)}, f32[64,8]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%t.1), index=0
  %n = s32[]{:T(128)} constant(5)
  ROOT %less = pred[]{:T(512)} compare(%i, %n), direction=LT
}

%loop (t: (s32[], f32[64,8])) -> (s32[], f32[64,8]) {
  %t = (s32[]{:T(128)}, f32[64,8]{1,0:T(8,128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%t), index=0
  %x = f32[64,8]{1,0:T(8,128)} get-tuple-element(%t), index=1
  %part = f32[1,8]{1,0:T(8,128)} fusion(%x, %i.1), kind=kLoop, calls=%fused
  %kernel.1 = bf16[16,128]{1,0:T(8,128)(2,1)} custom-call(%part), custom_call_target="tpu_custom_call", CONFIG
  ROOT %again = (s32[]{:T(128)}, f32[64,8]{1,0:T(8,128)}) tuple(%i.1, %x)
}

ENTRY %main (a: f32[64,8]) -> f32[64,8] {
  %a = f32[64,8]{1,0:T(8,128)} parameter(0)
  %near = f32[64,8]{1,0:T(8,128)S(1)} copy(%a)
  %zero = s32[]{:T(128)} constant(0)
  %start = (s32[]{:T(128)}, f32[64,8]{1,0:T(8,128)}) tuple(%zero, %a)
  %w = (s32[]{:T(128)}, f32[64,8]{1,0:T(8,128)}) while(%start), condition=%condition, body=%loop
  ROOT %r = f32[64,8]{1,0:T(8,128)} get-tuple-element(%w), index=1
}
"""
HLO = HLO.replace("CONFIG", """\
backend_config={"used_scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"4096"}]}""")


def test_a_program_is_its_instructions_times_their_loops():
  padded = 64 * 128 * 4  # eight lanes take a row of 128
  slice_ = 8 * 128 * 4
  assert program.parts(HLO) == [
      program.Part("near", False, 1, True, padded, 0),  # what is written to VMEM costs no HBM
      program.Part("part", False, 5, True, slice_ + slice_, 0),
      program.Part("kernel.1", True, 5, True, slice_ + 16 * 128 * 2, 4096)]


def test_an_array_updated_in_place_costs_its_update():
  fused = """
%fused.1 (p0: f32[64,8], p1: f32[1,8], p2: s32[]) -> f32[64,8] {
  %p0.1 = f32[64,8]{1,0:T(8,128)} parameter(0)
  %p1.1 = f32[1,8]{1,0:T(8,128)} parameter(1)
  %p2.1 = s32[]{:T(128)} parameter(2)
  %view = f32[64,8]{1,0:T(8,128)} bitcast(%p0.1)
  %write = f32[64,8]{1,0:T(8,128)} dynamic-update-slice(%view, %p1.1, %p2.1, %p2.1)
  ROOT %again.1 = f32[64,8]{1,0:T(8,128)} bitcast(%write)
}

%loop ("""
  update = """  %written = f32[64,8]{1,0:T(8,128)} fusion(%x, %part, %i.1), kind=kLoop, calls=%fused.1
  %kernel.1 ="""
  text = HLO.replace("\n%loop (", fused).replace("  %kernel.1 =", update)
  assert program.parts(text)[2] == program.Part("written", False, 5, True, 2 * 8 * 128 * 4, 0)


def test_a_loop_of_unknown_length_counts_once_and_says_so():
  parts = program.parts(HLO.replace("constant(5)", "parameter(1)"))
  assert [(part.times, part.certain) for part in parts] == [(1, True), (1, False), (1, False)]


def _kernel(ids, x, y, out):
  out[...] = x[...] + y[...]


def test_pallas_calls_say_what_their_pipeline_moves():
  def run(ids, x, y):
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1, grid=(4, 6),
        in_specs=[pl.BlockSpec((8, 128), lambda i, j, ids: (i, 0)),
                  pl.BlockSpec((8, 128), lambda i, j, ids: (ids[i * 6 + j], 0))],
        out_specs=pl.BlockSpec((8, 128), lambda i, j, ids: (i // 2, 0)))
    return pl.pallas_call(_kernel, grid_spec=grid, out_shape=jax.ShapeDtypeStruct((32, 128), jnp.float32), name="named",
                          compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")))(ids, x, y)

  array = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)
  traced = jax.make_jaxpr(jax.jit(run))(array(24, dtype=jnp.int32), array(32, 128), array(64, 128))
  [call] = program.calls(traced.jaxpr)
  block = 8 * 128 * 4
  assert (call.name, call.grid, call.parallel) == ("named", (4, 6), 4)
  window = lambda moves, listed=False: program.Window(block, moves, listed)
  assert call.windows == (window(4), window(None, True), window(2))
  assert program.window_bytes(call, 24, visits=10) == program.window_bytes(call, 24, visits=(10,)) == block * (4 + 10 + 2)
  assert program.window_bytes(call, 24, visits=1000) == block * (4 + 24 + 2)
  assert program.call_from_json(json.loads(json.dumps(dataclasses.asdict(call)))) == call


# ---- bounds and plans -------------------------------------------------------------------------------------------------
def test_the_least_work_equals_a_count_by_hand():
  case = Case("attention", "pro", 8192, FORWARD)
  see = [min(t + 1, 128) + min((t + 1) // 4, 1024) for t in range(8192)]
  least = bounds.least(case)
  assert least.flops == 4 * 128 * 512 * sum(see)
  assert bounds.least(dataclasses.replace(case, direction=GRADIENT)).flops == 14 * 128 * 512 * sum(see)
  rows, keys, words = 8192 * 128 * 512 * 2, (8192 + 2048) * 512 * 2, 8192 * 128 * 4
  assert least.bytes == 2 * rows + 8192 * 128 * 4 + keys + words
  picked = sum(min((t + 1) // 4, 1024) for t in range(8192))
  assert least.row_bytes == least.bytes + (picked - 2048) * 1024
  heavy = bounds.least(Case("attention_heavy", "pro", 8192, FORWARD))
  assert heavy.flops == 4 * 128 * 512 * sum(min(t + 1, 128) + (t + 1) // 128 for t in range(8192))


def test_the_sparse_forms_bound_where_all_picks_are_taken():
  case = Case("attention", "pro", 2**20, FORWARD)
  least = bounds.least(case)
  found = [max(least.flops / chip.flops_per_cycle, least.row_bytes / chip.bytes_per_cycle) / case.tokens for chip in CHIPS]
  assert found == pytest.approx([1280, 1400, 781], rel=0.15)


def test_the_selections_vector_bound_per_token():
  case = Case("select", "pro", 65536, FORWARD)
  assert bounds.least(case).vector / case.tokens == pytest.approx(539, rel=0.01)


def test_every_case_has_positive_bounds():
  for case in cases.all_cases(tuple(cases.BY_NAME), (4096, 65536)):
    least = bounds.least(case)
    assert least.flops >= 0 and 0 < least.bytes <= least.row_bytes


def attention_call(chip, length=16384, rows=1024, entries=512):
  blocks = (None, rows, 512), (None, rows // 128, 128), (None, entries, 512), (None, 256, 512)
  return program.Call("masked_attention", (chip.cores, length // (rows // 128) // chip.cores, None), blocks, (), chip.cores)


def test_visited_tiles_are_those_that_a_block_sees():
  case = Case("attention", "pro", 16384, FORWARD)
  plan = plans.plan_of("masked_attention", case, attention_call(V5P), V5P)
  tiles = [-(-((block + 1) * 8 // 4) // 512) for block in range(2048)]
  assert dict(plan.counts) == {"start": 2048, "tile": sum(tiles), "finish": 2048}
  assert plan.visits == sum(tiles) and plan.steps == 2048 * 8 and plan.units == 1
  assert plan.flops == 4 * 1024 * 512 * (512 * sum(tiles) + 256 * 2048)
  assert plans.plan_of("unheard of", case, attention_call(V5P), V5P) is None


def test_a_window_alone_has_a_part_for_tiles_that_never_runs():
  case = Case("attention_window", "pro", 16384, FORWARD)
  plan = plans.plan_of("masked_attention", case, attention_call(V5P, entries=128), V5P)
  assert dict(plan.counts) == {"start": 2048, "tile": 0, "finish": 2048} and (plan.hot, plan.steps) == ("start", 2048)
  assert plan.flops == 4 * 1024 * 512 * 256 * 2048


# ---- rows -------------------------------------------------------------------------------------------------------------
def answer(**changes):
  call = attention_call(V5P)
  part = program.Part("masked_attention.1", True, 1, True, 10**9, 12 * 2**20)
  found = dataclasses.replace(kernel_schedule(), name="masked_attention.1")
  return {"ok": True, "seconds": 3.0, "memory": {"temp": 2**20}, "cost": {}, "matmul_flops": 0,
          "parts": [dataclasses.asdict(part)], "calls": [dataclasses.asdict(call)], "schedules": [found.as_json()]} | changes


def test_a_row_holds_schedule_bounds_and_their_ratio():
  case = Case("attention", "pro", 16384, FORWARD)
  row = rows.row_of(case, json.loads(json.dumps(answer())), V5P)
  plan = plans.plan_of("masked_attention", case, attention_call(V5P), V5P)
  kernel = row["kernels"]["masked_attention"]
  bundles = 2 * 3 + plan.steps * 13 + 2048 * 6 + plan.visits * 7 + 2048 * 25
  assert row["schedule_cycles"] == bundles / 2  # two cores
  assert (kernel["hot_bundles"], kernel["unit_bundles"], kernel["spills"], kernel["guessed"]) == (7, 7, 6, False)
  assert kernel["fixed_ratio"] == 6 / 4096
  assert kernel["step_bundles"] == pytest.approx(13, abs=0.01)
  assert row["time_cycles"] == max(bundles / 2, plan.flops / V5P.flops_per_cycle)
  assert row["ratio"] == row["time_cycles"] / row["matrix_cycles"] >= 1
  assert row["tokens_per_second_per_chip"] == pytest.approx(16384 / (row["time_cycles"] / 1.75e9))
  assert row["vmem_bytes"] == 12 * 2**20 and row["temp_bytes"] == 2**20
  assert report.guesses([row]) == ""


def test_a_kernel_that_changed_is_guessed_and_named():
  content = answer()
  content["schedules"][0]["root"]["inner"][0]["inner"].pop()
  row = rows.row_of(Case("attention", "pro", 16384, FORWARD), json.loads(json.dumps(content)), V5P)
  assert row["kernels"]["masked_attention"]["guessed"] and row["kernels"]["masked_attention"]["hot_bundles"] == 7
  assert report.guesses([row]).startswith("No plan fits masked_attention (launch/benchmarks/kernels/plans.py)")


def test_a_failure_is_a_row_that_says_why():
  row = rows.row_of(Case("select", "pro", 4096, FORWARD), {"ok": False, "error": "E1001: too much VMEM\nmore"}, V6E)
  assert row["failed"].startswith("E1001") and "select forward pro 4,096  ours  E1001: too much VMEM" in report.table([row])


def row(case, time, **changes):
  figures = {"time_cycles": time, "cycles_per_token": time / case.tokens, "kernels": {}, "ours": case.side == OURS,
             "case": case.name, "side": case.side, "op": case.op, "model": case.model, "direction": case.direction,
             "chip": "v5p", "length": case.length, "taken": "masked", "matrix_cycles": 1.0, "hbm_ratio": 1.2}
  return figures | changes


def test_lost_rows_are_named():
  case = Case("attention", "pro", 4096, FORWARD)
  others = [row(dataclasses.replace(case, side=side), time) for side, time in ((BLOCKWISE, 8.0), (SPLASH, 3.0))]
  assert report.with_ratios([row(case, 2.0), *others])[0]["others"] == 1.5
  lost = report.with_ratios([row(case, 6.0), *others])
  assert report.losses(lost) == "Slower than the fastest other side: attention forward pro 4,096 (0.50, taken: masked)."
  assert report.losses(report.with_ratios([row(case, 2.0), *others])) == ""
  text = report.text(lost, report.targets(lost, V5P))
  assert "not measured  v5p: selection at 64K" in text and "Slower than" in text


def test_a_row_says_which_form_its_op_takes():
  take = lambda op, length: [rows.taken(Case(op, "pro", length, FORWARD), chip) for chip in CHIPS]
  assert take("attention", 16384) == take("attention_heavy", 65536) == take("attention_window", 4096) == ["masked"] * 3
  assert take("attention", DECODE) == take("attention_heavy", DECODE) == ["blockwise"] * 3
  assert take("attention", 2**20) == ["sparse"] * 3
  assert take("expand_collapse", DECODE) == ["kernel", "blockwise", "kernel"]
  assert take("select", DECODE) == take("experts", DECODE) == ["kernel"] * 3


def test_targets_say_yes_no_or_not_measured():
  case = Case("attention", "pro", 4096, FORWARD)
  kernels = {"masked_attention": {"unit_bundles": 7600, "fixed_ratio": 1.05, "guessed": False}}
  mixing = row(Case("expand", "pro", 4096, FORWARD), 2.0, hbm_ratio=1.25)
  select = row(Case("select", "pro", 65536, FORWARD), 3.0, matrix_cycles=2.0)
  sparse = row(Case("attention_sparse", "pro", 65536, FORWARD), 2.0, ratio=1.8)
  backward = row(Case("attention_sparse", "pro", 65536, GRADIENT), 2.0, ratio=3.0)
  decode = row(Case("collapse", "pro", DECODE, FORWARD), 2.0, hbm_ratio=3.0)
  found = report.targets([row(case, 2.0, kernels=kernels), mixing, select, sparse, backward, decode], V5P)
  assert [(target["value"], target["reached"]) for target in found] == [
      (7600, False), (None, None), (1.05, True), (1.8, False), (None, None), (1.5, True), (1.25, True), (3.0, False)]


def test_the_sparse_form_must_not_grow_with_the_context():
  """The worst model counts; a row without its other length and the gradient's rows say nothing; a failure neither."""
  sparse = lambda model, length, time, direction=FORWARD: row(
      Case("attention_sparse", model, length, direction), time, ratio=1.0)
  growth = lambda *rows: next((target["value"], target["reached"]) for target in report.targets(rows, TPU7X)
                              if "1M over that at 64K" in target["target"])
  pro, flash = (sparse("pro", 2**16, 100.0), sparse("pro", 2**20, 109.0)), sparse("flash", 2**16, 50.0)
  assert growth(*pro, flash) == (pytest.approx(0.09), True)
  assert growth(*pro, flash, sparse("flash", 2**20, 58.5)) == (pytest.approx(0.17), False)
  assert growth(pro[0], flash, sparse("pro", 2**20, 90.0, GRADIENT)) == (None, None)
  assert growth(pro[0], pro[1] | {"failed": "too large"}) == (None, None)


# ---- the compiler's process -------------------------------------------------------------------------------------------
def aborts():
  os.write(2, b"F0000 00:00:00.1 7 emitter.cc:12] Check failed: it fits\n*** SIGABRT ***\n")
  os.abort()


def sleeps():
  time.sleep(60)


def raises():
  raise ValueError("size = 3: expected an even number")


@pytest.fixture(scope="module")
def answers():
  aborted, raised, slept = (compile.Request(name, f"tests.launch.test_bench_kernels:{name}")
                            for name in ("aborts", "raises", "sleeps"))
  lines = []
  with compile.Compiler("v5p:2x2x1", schedules=False) as compiler:
    found = compiler.compile_all([aborted, raised], lines.append)
    compiler.timeout = 1
    return found + compiler.compile_all([slept], lines.append), lines


def test_a_compiler_that_aborts_raises_or_hangs_is_told_and_replaced(answers):
  (aborted, raised, slept), lines = answers
  assert aborted["error"].startswith("the compiler ended the process by SIGABRT: F0000 00:00:00.1 7 emitter.cc:12] Check")
  assert raised == {"ok": False, "error": "ValueError: size = 3: expected an even number"}
  assert slept["error"].startswith("took more than 1 s")
  assert lines[0].startswith("[1/2] aborts: the compiler ended the process") and lines[1].endswith("about 0 s left")


def test_what_does_not_fit_is_left_out_and_said(monkeypatch):
  wanted = [Case("attention", "pro", 65536, GRADIENT), Case("expand", "pro", 4096, FORWARD)]
  lines = []
  monkeypatch.setattr(compile.Compiler, "compile", lambda self, request: {"ok": False, "error": "fake"})
  found = run.measure("v6e:2x2", wanted, lines.append)
  assert [row["case"] for row in found] == ["expand forward pro 4,096"]
  assert lines[0] == "left out, more than the HBM of one v6e device: attention gradient pro 65,536"
  assert lines[1] == "[1/1] expand forward pro 4,096, ours: fake, about 0 s left"
  assert len(run.measure("v5p:2x2x1", wanted, lines.append)) == 2


# ---- the SparseCore ---------------------------------------------------------------------------------------------------
BESIDE = """\
HloModule m

ENTRY %main (t: s32[64,256], n: s32[4096]) -> s32[4096,256] {
  %t = s32[64,256]{1,0:T(8,128)} parameter(0)
  %n = s32[4096]{0:T(1024)} parameter(1)
  %gather_rows.3 = ((s32[64,256]{1,0:T(8,128)}, s32[4096]{0}, token[]), s32[4096,256]{1,0:T(8,128)}) call-start(%t, %n)
  %attend.1 = f32[8,128]{1,0:T(8,128)} custom-call(%t), custom_call_target="tpu_custom_call"
  %done.3 = s32[4096,256]{1,0:T(8,128)} call-done(%gather_rows.3)
  %add_rows.4 = ((f32[64,512]{1,0:T(8,128)}, s32[4096]{0:T(1024)}), f32[64,512]{1,0:T(8,128)}) call-start(%s, %n)
  %done.4 = f32[64,512]{1,0:T(8,128)} call-done(%add_rows.4)
  %add_rows_and_gather.5 = (ARGUMENTS, s32[4096,256]{1,0}, f32[64,512]{1,0}) call-start(%t, %n, %s, %m, %r)
  ROOT %done.5 = (s32[4096,256]{1,0}, f32[64,512]{1,0}) call-done(%add_rows_and_gather.5)
}
""".replace("ARGUMENTS", "(s32[64,256]{1,0}, s32[4096]{0}, f32[64,512]{1,0}, s32[32]{0}, f32[32,512]{1,0})")


def test_calls_of_the_sparse_core_are_told_apart():
  """A gather reads the rows that it writes, not its table; a kernel between its start and its end runs beside it."""
  gather, attend, add, both = program.parts(BESIDE)
  assert (gather.sparse_core, gather.overlaps, gather.hbm_bytes) == (True, True, 2 * 4096 * 1024 + 4096 * 4)
  assert (attend.sparse_core, attend.kernel) == (False, True)
  assert (add.sparse_core, add.overlaps, add.hbm_bytes) == (True, False, 2 * 64 * 2048 + 4096 * 4)
  assert both.hbm_bytes == gather.hbm_bytes + 2 * 64 * 2048 + 32 * (4 + 2048)


def test_a_gather_of_single_numbers_reads_a_granule_for_each():
  """However little of the table a number is, the least that a copy reads comes with it."""
  text = BESIDE.replace("s32[4096,256]{1,0:T(8,128)}) call-start(%t, %n)", "s32[4096]{0:T(1024)}, u32[]) call-start(%t, %n)")
  gather = program.parts(text)[0]
  assert (gather.sparse_core, gather.hbm_bytes) == (True, 4096 * program.GRANULE + 2 * 4096 * 4)


def test_calls_that_a_newer_compiler_starts_empty():
  start = "%start.3 = ((), (), (s32[1]{0:T(128)S(2)})) call-start()\n  "
  text = BESIDE.replace("%gather_rows.3 = (", start + "%gather_rows.3 = (")
  text = text.replace("call-start(%t, %n)", "call-update(%start.3, %t, %n)")
  start, *others = program.parts(text)
  assert (start.sparse_core, start.hbm_bytes) == (False, 0)
  assert others == program.parts(BESIDE)


def test_what_runs_beside_a_kernel_takes_only_hbm():
  case = Case("attention_sparse", "pro", 2**16, FORWARD)
  beside = program.Part("gather_rows.1", False, 1, True, 10**11, 0, True, True)
  alone = dataclasses.replace(beside, name="gather_rows.2", hbm_bytes=10**10, overlaps=False)
  kernel = program.Part("something", True, 1, True, 10**10, 0)
  row = rows.row_of(case, json.loads(json.dumps(
      answer(parts=[dataclasses.asdict(part) for part in (beside, alone, kernel)], calls=[], schedules=[]))), V6E)
  assert row["serial_cycles"] == pytest.approx(12e10 / V6E.bytes_per_cycle) == row["time_cycles"]
  slow = answer(parts=[dataclasses.asdict(part) for part in (beside, alone)], matmul_flops=10**8 * V6E.flops_per_cycle,
                calls=[], schedules=[])
  row = rows.row_of(case, json.loads(json.dumps(slow)), V6E)
  assert row["serial_cycles"] == pytest.approx(11e10 / V6E.bytes_per_cycle + 1e8)
  assert row["time_cycles"] == pytest.approx(max(10e10 / V6E.bytes_per_cycle, 1e8) + 1e10 / V6E.bytes_per_cycle)


def test_sparse_cases_are_the_last_queries_of_their_context():
  found = [case.length for case in cases.all_cases(("attention_sparse",), (4096,), ("pro",)) if case.direction == FORWARD]
  assert found == [2**16, 2**20]
  case = Case("attention_sparse", "pro", 2**20, FORWARD)
  assert (case.tokens, case.entries) == (cases.SHARE, 2**18)
  least = bounds.least(case)
  assert least.flops == 4 * 128 * 512 * (1024 + 128) * case.tokens  # all see more than they pick
  assert bounds.visible(case)[-1] == 2**18 and least.bytes == least.row_bytes


# ---- the command line -------------------------------------------------------------------------------------------------
def test_cases_are_those_that_make_sense():
  found = cases.all_cases(("attention", "experts"), (4096, 65536), ("pro",))
  of = lambda op, direction: [(case.length, case.side) for case in found if (case.op, case.direction) == (op, direction)]
  assert of("attention", FORWARD) == [(4096, OURS), (4096, BLOCKWISE), (4096, SPLASH), (65536, OURS), (65536, BLOCKWISE),
                                      (DECODE, OURS), (DECODE, BLOCKWISE)]
  assert of("experts", GRADIENT) == [(4096, OURS), (4096, BLOCKWISE), (4096, "ragged_dot")]
  assert len({(case.name, case.side) for case in found}) == len(found)
  decode = Case("attention", "pro", DECODE, FORWARD)
  assert (decode.tokens, decode.entries, decode.name) == (32, 16384, "attention forward pro decode 32")
  assert (Case("experts", "pro", 4096, FORWARD).experts, Case("experts", "pro", 4096, FORWARD).rows) == (6, 4096 * PRO.picks)


@pytest.mark.parametrize("topology", ["", "v5p", "v5p:", "v9:2x2", "v5p:2xx1", "v5p:2x0x1"])
def test_unknown_topologies_are_refused(topology):
  with pytest.raises(ValueError, match=f"--topology = {topology!r}: expected a chip and the shape of a slice, such as v5p:"):
    chip_of(topology)


def test_known_topologies_are_found():
  assert [chip_of(name).name for name in ("v5p:4x4x4", "v6e:2x2", "TPU7x:2x2x1", "tpu7x:4x4x4")] == [
      "v5p", "v6e", "tpu7x", "tpu7x"]


@pytest.mark.parametrize("arguments, said", [
    (["kernels"], "error: --topology = '': expected a chip and the shape of a slice, such as v5p:2x2x1, v6e:2x2, TPU7x:2x"),
    (["kernels", "--topology", "v9:2x2"], "error: --topology = 'v9:2x2': expected a chip"),
    (["kernels", "--topology", "v5p:2x2x1", "--ops", "x"], "error: --ops = 'x': expected some of attention, "),
    (["kernels", "--topology", "v5p:2x2x1", "--models", "x"], "error: --models = 'x': expected some of flash"),
    (["kernels", "--topology", "v5p:2x2x1", "--lengths", "1000"], "error: --lengths = '1000': expected multiples of"),
    (["kernels", "--topology", "v5p:2x2x1", "--against", "transformers"], "error: --against = 'transformers': expected"),
])
def test_mistakes_are_told_without_a_traceback(arguments, said):
  done = subprocess.run([sys.executable, "-m", "launch.bench", *arguments], cwd=ROOT, env=os.environ, capture_output=True,
                        text=True, timeout=60)
  assert done.returncode != 0
  assert said in done.stdout + done.stderr and "Traceback" not in done.stderr


def test_matrix_rates_are_those_of_the_chips():
  assert [chip.clock * chip.flops_per_cycle * chip.devices_per_chip / 1e12 for chip in CHIPS] == pytest.approx(
      [459, 918, 2307], rel=0.01)
  assert np.isclose(V6E.bytes_per_cycle, 936) and TPU7X.devices_per_chip == 2
