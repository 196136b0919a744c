"""From a compiler's answer to the row of a case, what is said about rows, and the targets."""

import dataclasses
import json

import pytest

from launch.benchmarks.kernels import plans, program, report, rows
from launch.benchmarks.kernels.cases import BLOCKWISE, DECODE, FORWARD, GRADIENT, OURS, SPLASH, Case
from launch.benchmarks.kernels.chips import CHIPS
from tests.launch.bench_texts import TPU7X, V5P, V6E, answer, attention_call


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
  assert kernel["mean_step_bundles"] == bundles / plan.steps  # of both cores together
  assert row["time_cycles"] == max(bundles / 2, plan.flops / V5P.flops_per_cycle)
  assert row["ratio"] == row["time_cycles"] / row["matrix_cycles"] >= 1
  assert row["tokens_per_second_per_chip"] == pytest.approx(16384 / (row["time_cycles"] / 1.75e9))
  assert row["vmem_bytes"] == kernel["vmem_bytes"] == 12 * 2**20 and row["temp_bytes"] == 2**20
  assert report.guesses([row]) == ""


def test_what_a_kernel_reads_from_vmem_is_no_hbm_traffic():
  """However much of it the kernel visits, and how large the array is."""
  windows = program.Window(10**6, 10, False), program.Window(10**5, 3, False, 1), program.Window(10**4, 7, False, 3)
  call = dataclasses.replace(attention_call(V5P), windows=windows, numbers=2)
  case, content = Case("attention", "pro", 16384, FORWARD), answer(calls=[dataclasses.asdict(call)])
  size_of = lambda content: rows.row_of(case, json.loads(json.dumps(content)), V5P)["hbm_bytes"]
  assert size_of(content) == 10**7 + 3 * 10**5 + 7 * 10**4
  content["parts"][0]["near"] = [0, 2, -1]  # a prefetched number, the first block and the last one
  assert size_of(content) == 3 * 10**5


def test_kernels_in_a_loop_and_of_one_name_are_counted_each():
  """A kernel that runs 64 times on 1/64 of the tokens takes as many bundles a token as in one piece."""
  case, content = Case("attention", "pro", 16384, FORWARD), answer()
  content["parts"] += [content["parts"][0] | {"name": "masked_attention.2", "times": 64, "hbm_bytes": 10**9}]
  content["parts"] += [content["parts"][0] | {"name": "gather.3", "kernel": False, "times": 2, "hbm_bytes": 8_192_000,
                                              "sparse_core": True}]
  call = dataclasses.replace(attention_call(V5P), windows=(program.Window(10**6, 10, False),))
  found = rows.row_of(case, json.loads(json.dumps(content | {"calls": [dataclasses.asdict(call)]})), V5P)
  one, many = found["kernels"]["masked_attention"], found["kernels"]["masked_attention #2"]
  assert (one["times"], many["times"], many["bundles"]) == (1, 64, one["bundles"])
  title, first, second, gather = (line.split() for line in report.kernel_table([found]).splitlines())
  column = lambda line: dict(zip(("times", "MB", "HBM", "matrix", "slots", "bundles"), line[-6:]))
  assert title[-1] == "bundles" and second[4:6] == ["masked_attention", "#2"]
  assert column(first)["bundles"] == f"{one['bundles'] / 16384:,.0f}"
  assert column(second)["bundles"] == f"{64 * one['bundles'] / 16384:,.0f}"
  assert column(second)["matrix"] == f"{64 * one['matrix_cycles'] / 16384:,.0f}"
  assert (column(first)["MB"], column(second)["MB"]) == ("10.0", "640.0")
  assert gather[4:6] == ["gather.3", "(SparseCore)"] and column(gather)["MB"] == "16.4"
  assert column(gather)["HBM"] == f"{1000 / V5P.bytes_per_cycle:,.0f}" and column(gather)["bundles"] == "-"


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
  figures = {"time_cycles": time, "cycles_per_token": time / case.tokens, "kernels": {}, "sparse_core": [],
             "ours": case.side == OURS,
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
  assert take("expand_collapse", DECODE) == take("select", DECODE) == take("experts", DECODE) == ["kernel"] * 3
  assert take("kl_loss", 65536) == ["kernel"] * 3 and take("kl_loss", 2**20) == ["blockwise"] * 3
  assert take("kl_loss", 4 * 110_720) == ["blockwise", "kernel", "blockwise"]  # one tile more than v5p and TPU7x hold


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
      (7600, False), (None, None), (1.05, True), (None, None), (1.8, False), (None, None), (1.5, True), (1.25, True),
      (3.0, False)]


def test_a_guess_reaches_no_target():
  guessed = {"masked_attention": {"unit_bundles": 1.0, "fixed_ratio": 0.5, "guessed": True}}
  found = report.targets([row(Case("attention", "pro", 4096, FORWARD), 2.0, kernels=guessed)], V5P)
  assert all((target["value"], target["reached"]) == (None, None) for target in found)


@pytest.mark.parametrize("op, keys", [("attention_heavy", 512 + 256), ("attention_window", 256)])
def test_the_start_of_a_block_that_meets_all_its_keys_at_once_has_a_target(op, keys):
  """The fourth one: its bundles over the cycles of the matmuls with these keys."""
  case, content = Case(op, "pro", 4096, FORWARD), answer(calls=[dataclasses.asdict(attention_call(V5P, 4096))])
  regions = content["schedules"][0]["root"]["inner"][0]["inner"]
  regions[0], regions[1] = regions[1], regions[0]  # the start is the part with the matmuls
  if op == "attention_heavy":
    regions.pop(1)  # there is no part for a tile
  found = rows.row_of(case, json.loads(json.dumps(content)), V5P)
  kernel = found["kernels"]["masked_attention"]
  bound = 4 * 1024 * 512 * keys / (V5P.flops_per_cycle / V5P.cores)
  assert not kernel["guessed"] and kernel["fixed_bundles"] == 7 and kernel["fixed_ratio"] == 7 / bound
  target = report.targets([found], V5P)[3]
  assert target["value"] == kernel["fixed_ratio"] and target["reached"] and "HCA" in target["target"]


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
