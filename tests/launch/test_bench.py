"""The bench with fake workers: FLOPs by the formula, turns, rows, ratios, targets, the table, the file, mistakes."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deepseek_v4 as dsv4
from deepseek_v4.config import CSA, HCA, LEARNED, SLIDING, ModelConfig
from launch import bench
from launch.benchmarks import cases, flops, ours, report, run, worker
from launch.benchmarks.cases import DECODE, NEW_TOKENS, OURS, PREFILL, REMAT, TRANSFORMERS, Case
from pallas_kernels.grouped_matmul import padded_rows, row_tile

ROOT = Path(__file__).resolve().parents[2]
SMALL = ModelConfig(
    vocab_size=100, hidden_size=10, num_hidden_layers=3, layer_types=(SLIDING, CSA, HCA), mlp_layer_types=(LEARNED,) * 3,
    csa_compress_rate=2, hca_compress_rate=4, num_attention_heads=2, head_dim=6, qk_rope_head_dim=2, q_lora_rank=5,
    o_groups=2, o_lora_rank=3, sliding_window=2, index_n_heads=3, index_head_dim=2, index_topk=3, n_routed_experts=7,
    num_experts_per_tok=2, moe_intermediate_size=4, hc_mult=2, rope_scaling=None, num_nextn_predict_layers=0)


# ---- FLOPs ------------------------------------------------------------------------------------------------------------
def test_flops_equal_a_hand_count():
  # Multiply-adds of one layer's weights: q_a, q_b, kv, o_a, o_b; then router, 2 + 1 experts, 2 hyper-connections.
  attention = 10 * 5 + 5 * 12 + 10 * 6 + 12 * 3 + 6 * 10
  rest = 10 * 7 + 3 * (3 * 10 * 4) + 2 * (20 * 8)
  csa = 4 * 10 * 6 + (5 * 6 + 10 * 3 + 4 * 10 * 2)  # compressor; indexer: queries, head weights, its compressor
  hca = 2 * 10 * 6
  head = 20 * 2 + 10 * 100
  # Eight places see 1, 2, 2, ... window keys; 0, 1, 1, 2, 2, 3, 3, 4 entries of CSA (3 picked); 0, 0, 0, 1, ..., 2 of HCA.
  window, picked, visible, heavy = 15 / 8, 15 / 8, 16 / 8, 6 / 8
  pairs = 3 * window + picked + heavy
  expected = 2 * (3 * (attention + rest) + csa + hca + head) + 4 * 12 * pairs + 2 * 6 * visible
  assert flops.per_token(SMALL, 8, "forward") == pytest.approx(expected, rel=1e-12)
  assert flops.per_token(SMALL, 8, "train") == pytest.approx(3 * expected, rel=1e-12)
  # With six tokens there are three entries, as many as may be picked: nothing is scored.
  assert flops.per_token(SMALL, 6, "forward") == pytest.approx(
      2 * (3 * (attention + rest) + csa + hca + head) + 4 * 12 * (3 * 11 / 6 + 9 / 6 + 3 / 6), rel=1e-12)


def test_flops_of_prefill_and_of_one_more_token():
  head = 2 * 10 * 100
  forward = flops.per_token(SMALL, 8, "forward")
  assert flops.per_token(SMALL, 8, "prefill") == pytest.approx(forward - head * 7 / 8, rel=1e-12)
  # One token more is what the sums over nine places and over eight differ by.
  one = 9 * flops.per_token(SMALL, 9, "forward") - 8 * forward
  assert flops.per_token(SMALL, 8, "decode") == pytest.approx(one, rel=1e-12)


def test_entries_read_equal_a_hand_count():
  # The ninth token: 2 window keys in each of 3 layers; 4 index keys and 3 picks; 2 heavily compressed entries.
  assert flops.entries_per_token(SMALL, 8) == 6 + 4 + 3 + 2
  assert flops.entries_per_token(SMALL, 0) == 3  # itself
  assert [flops.entries_per_token(cases.model_config(), n) for n in cases.DECODE_LENGTHS] == [
      8 * 128 + 3 * (n // 4 + 64 + n // 128) for n in cases.DECODE_LENGTHS]


def test_flops_agree_with_xla():
  length = 64
  config = dataclasses.replace(
      SMALL, num_hidden_layers=2, layer_types=(SLIDING, HCA), mlp_layer_types=(LEARNED,) * 2, vocab_size=512,
      hidden_size=128, head_dim=32, q_lora_rank=64, o_lora_rank=32, moe_intermediate_size=128, sliding_window=length,
      scan_layers=False)
  model = dsv4.DeepseekV4(config, kernels="reference")
  tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
  variables = jax.eval_shape(model.init, jax.random.key(0), tokens)
  counted = jax.jit(lambda v, t: model.apply(v, t).logits).lower(variables, tokens).cost_analysis()["flops"] / length
  # The reference also multiplies the rows that fill the tiles, and pairs of tokens that do not see each other.
  picks, experts = length * config.num_experts_per_tok, config.n_routed_experts
  filling = padded_rows(picks, experts, row_tile(picks, experts)) - picks
  unseen = 2 * (length - (length + 1) / 2) + length / 4 - np.mean(np.arange(1, length + 1) // 4)
  expected = (flops.per_token(config, length, "forward") + 2 * filling / length * 3 * 2 * 128 * 128 + 4 * 64 * unseen)
  assert counted == pytest.approx(expected, rel=0.08)  # elementwise work comes on top
  assert counted > expected


def test_the_bench_model_needs_48_megaflops_a_token():
  config = cases.model_config()
  assert config.num_nextn_predict_layers == 0
  assert 47e6 < flops.per_token(config, 2048, "forward") < 50e6


# ---- cases ------------------------------------------------------------------------------------------------------------
def test_both_sides_take_turns_where_both_fit():
  forward = cases.cases_of("forward", (2048, 8192), TRANSFORMERS)
  assert [[case.label for case in group] for group in forward] == [["ours", "transformers"], ["ours"]]
  train = cases.cases_of("train", (512, 2048, 16384), TRANSFORMERS)
  assert [[case.label for case in group] for group in train] == [
      ["ours", "transformers", "transformers, checkpointing", "ours, full step with Muon"],
      ["ours", "ours, remat", "transformers", "transformers, checkpointing", "ours, full step with Muon"],
      ["ours, remat"]]
  assert all(case.side == OURS for group in cases.cases_of("train", cases.LENGTHS, None) for case in group)
  decode = cases.cases_of(DECODE, (512, 16384), TRANSFORMERS)
  assert [[case.label for case in group] for group in decode] == [
      ["ours", "transformers", "transformers, loop over experts"]] * 2
  assert [case.label for case in cases.cases_of(DECODE, (512,), None)[0]] == ["ours"]
  assert [case.label for case in cases.cases_of(REMAT, (2048,), None)[0]] == [
      "ours, none", "ours, mhc", "ours, block", "ours, offload", "ours, full"]
  assert cases.warms_up(forward[0]) and not cases.warms_up(forward[1])
  assert cases.warms_up(decode[0]) and not cases.warms_up(decode[1])
  assert [cases.turns_of(group, 3) for group in (forward[0], *decode)] == [3, 9, 3]


def test_tokens_are_the_same_on_both_sides():
  ours, theirs = (cases.tokens_of(Case("forward", side, 33)) for side in (OURS, TRANSFORMERS))
  np.testing.assert_array_equal(ours, theirs)
  assert ours.shape == (1, 33) and 0 <= ours.min() and ours.max() < cases.model_config().vocab_size


# ---- rows -------------------------------------------------------------------------------------------------------------
def row(case, *seconds, resident=1000, peak=1000 + 2048 * 2048, rate=1e11, compiled=0.0):
  samples = [{"seconds": s, "peak_bytes": peak, "matmul_flops_per_second": rate} for s in seconds]
  return report.make_row(case, {"compile_seconds": compiled, "resident_bytes": resident}, samples)


def test_a_row_holds_medians():
  found = row(Case("forward", OURS, 2048), 3.0, 2.0, 1.0, compiled=7.5)
  assert (found["seconds_median"], found["seconds_min"], found["repeats"], found["compile_seconds"]) == (2.0, 1.0, 3, 7.5)
  assert found["tokens_per_second"] == 1024 and found["seconds_per_token"] == 2 / 2048
  assert found["activation_bytes_per_token"] == 2048
  work = flops.per_token(cases.model_config(), 2048, "forward")
  assert found["matmul_share"] == pytest.approx(work * 1024 / 1e11)
  without_proc = row(Case("forward", OURS, 2048), 1.0, resident=None, peak=None)
  assert without_proc["activation_bytes_per_token"] is None


def decoded(side, length, prefill, decode, variant=""):
  samples = [{"seconds": prefill + decode, "peak_bytes": 2048, "matmul_flops_per_second": 1e11, "prefill_seconds": prefill,
              "decode_seconds": decode * times} for times in (1, 2, 3)]
  ready = {"compile_seconds": 0.0, "resident_bytes": 1024}
  return report.make_rows(Case(DECODE, side, length, variant), ready, samples)


def test_a_decode_case_has_a_row_of_each_part():
  prefill, decode = decoded(OURS, 512, 0.5, 0.08)
  assert (prefill["case"], decode["case"]) == ("prefill 512", "decode 512")
  assert prefill["tokens_per_second"] == 1024 and decode["tokens_per_second"] == NEW_TOKENS / 0.16
  entries = flops.entries_per_token(cases.model_config(), 512)
  assert decode["entries_per_token"] == entries and decode["seconds_per_entry"] == 0.16 / NEW_TOKENS / entries
  work = flops.per_token(cases.model_config(), 512, PREFILL)
  assert prefill["matmul_share"] == pytest.approx(work * 1024 / 1e11)
  assert report.speed(Case(DECODE, OURS, 512), {"prefill_seconds": 0.5, "decode_seconds": 0.16}) == (
      "1,024 tokens/s prefill, 200.0 decode")


def test_targets_of_decoding():
  """Each part against the other side's faster way; growth of the time against that of the entries."""
  rows = [*decoded(OURS, 512, 0.25, 0.08), *decoded(TRANSFORMERS, 512, 0.3, 0.5)]
  rows += decoded(TRANSFORMERS, 512, 0.26, 0.6, "loop")
  rows = report.with_ratios(rows + decoded(OURS, 4096, 2.0, 0.09) + decoded(OURS, 16384, 8.0, 0.9))
  found = {t["target"]: (t["value"], t["reached"]) for t in report.targets(DECODE, rows)}
  assert found["decode: decode, times the speed of transformers at 512, at least 5"] == (pytest.approx(6.25), True)
  assert found["decode: prefill, times the speed of transformers at 512, at least 1.1"] == (pytest.approx(1.04), False)
  assert found["decode: prefill, times the speed of transformers at 4096, at least 1.4"] == (None, None)
  share, enough = found["decode: share of the matmul rate in prefill at 512, at least 0.5"]
  assert share == pytest.approx(flops.per_token(cases.model_config(), 512, PREFILL) * 2048 / 1e11) and enough
  growth = "decode: seconds per token over entries read per token, {} over 512, at most 1"
  assert found[growth.format(4096)][1] and not found[growth.format(16384)][1]
  lines = report.table(rows).splitlines()
  assert "entries/token" in lines[0] and "KiB/token" in lines[0] and lines[1].startswith("prefill 512")
  assert "entries/token" not in report.table(report.with_ratios(TRAIN))


TRAIN = [
    row(Case("train", OURS, 2048), 2.0), row(Case("train", OURS, 2048, "remat"), 2.5),
    row(Case("train", TRANSFORMERS, 2048), 6.0), row(Case("train", TRANSFORMERS, 2048, "checkpointing"), 5.0),
    row(Case("train", OURS, 2048, "muon"), 3.0)]


def test_ratios_are_against_the_faster_of_their_ways():
  ratios = {r["side"]: r.get("ratio") for r in report.with_ratios(TRAIN)}
  assert ratios == {"ours": 2.5, "ours, remat": 2.0, "transformers": None, "transformers, checkpointing": None,
                    "ours, full step with Muon": None}
  stopped = report.failed_row(Case("train", TRANSFORMERS, 2048, "checkpointing"), "stopped")
  assert report.with_ratios([*TRAIN[:3], stopped])[0]["ratio"] == 3.0
  assert "ratio" not in report.with_ratios([TRAIN[0], stopped])[0]


def reached(kind, rows):
  return [(t["value"], t["reached"]) for t in report.targets(kind, rows)]


def test_targets_say_yes_no_or_not_measured():
  long = row(Case("train", OURS, 16384, "remat"), 2.5 * 8 * 1.2, peak=1000 + 2048 * 16384 * 2)
  rows = report.with_ratios(TRAIN)
  assert reached("train", rows) == [(2.5, True), (None, None), (None, None), (None, None)]
  # Growth is counted between the rows that recompute, not from the one that does not.
  (speed, fast), (memory, small) = reached("train", [*rows, long])[2:]
  assert (speed, fast, memory, small) == (pytest.approx(1.2), True, pytest.approx(2.0), False)
  slow = report.with_ratios([row(Case("forward", OURS, 4096), 1.0), row(Case("forward", TRANSFORMERS, 4096), 3.9)])
  assert reached("forward", slow)[1] == (pytest.approx(3.9), False)
  assert report.target_lines(report.targets("forward", slow)).splitlines()[:2] == [
      "not measured  forward: times the speed of transformers at 2048, at least 2",
      "NO   forward: times the speed of transformers at 4096, at least 4: 3.90"]


def test_lost_rows_are_named():
  lost = report.with_ratios([row(Case("forward", OURS, 512), 2.0), row(Case("forward", TRANSFORMERS, 512), 1.0)])
  assert report.losses(lost) == "Slower than the other side: forward 512 ours (0.50)."
  assert report.losses(report.with_ratios(TRAIN)) == ""


def test_a_busy_machine_is_noticed():
  quiet = [row(Case("forward", OURS, 512), 1.0, rate=2e11), row(Case("forward", TRANSFORMERS, 512), 1.0, rate=1e11)]
  assert report.disturbances(quiet) == ""
  busy = report.disturbances([*quiet, row(Case("forward", OURS, 1024), 1.0, rate=1.4e11)])
  assert busy == "The machine was busy otherwise, measure again: forward 1024 ours."


def test_the_table_lines_up():
  stopped = report.failed_row(Case("train", TRANSFORMERS, 4096), "stopped: needs more than 16 GiB, or so it seemed")
  lines = report.table([*report.with_ratios(TRAIN), stopped]).splitlines()
  assert lines[0].split()[:3] == ["case", "side", "tokens/s"] and lines[0].endswith("ratio")
  assert lines[1].endswith("2.50") and len(lines[1]) == len(lines[0]) and lines[1].split()[3] == "1,024"
  assert lines[-1] == "train 4096  transformers                 stopped: needs more than 16 GiB, or so it seemed"


def test_the_file_holds_machine_versions_date_rows(tmp_path):
  rows = report.with_ratios(TRAIN)
  report.write_json(tmp_path / "bench.json", rows, report.targets("train", rows))
  content = json.loads((tmp_path / "bench.json").read_text())
  assert list(content) == ["machine", "versions", "date", "rows", "targets"]
  assert content["rows"] == rows and content["versions"]["jax"] == jax.__version__
  assert {"processor", "cores", "threads"} <= set(content["machine"])
  assert {"case", "side", "tokens_per_second", "ratio"} <= set(content["rows"][0])


# ---- the two sides compute the same -----------------------------------------------------------------------------------
def test_logits_agree_if_one_whole_row_does():
  theirs = np.random.default_rng(0).normal(size=(2, 8, 5))
  tie = theirs.copy()
  tie[0, 6:] += 0.1
  said = run.agreement(tie, theirs, TRANSFORMERS)
  assert "at every place of 1 of 2 rows of 8 tokens, in all at 87.5% of the places" in said
  for wrong in (theirs + 3e-4, theirs * np.nan):
    with pytest.raises(run.WorkerFailed, match="do not compute the same"):
      run.agreement(wrong, theirs, TRANSFORMERS)


def test_replies_may_part_after_the_first_token():
  of = lambda ours, theirs: {Case(DECODE, side, 8): {"tokens": reply} for side, reply in (
      (OURS, ours), (TRANSFORMERS, theirs))}
  assert run.compare_tokens(of([3, 4, 5], [3, 4, 5])) == ["decode 8: transformers replies the same 3 tokens as ours"]
  assert run.compare_tokens(of([3, 4, 5], [3, 4, 6])) == [
      "decode 8: transformers replies other tokens than ours from number 3 of 3 on"]
  assert run.compare_tokens({Case("forward", OURS, 8): {}, Case(DECODE, TRANSFORMERS, 8): {"tokens": [1]}}) == []
  assert run.compare_tokens(of([3, 4, 5], [4, 4, 5])) == [
      "decode 8: transformers replies other tokens than ours from number 1 of 3 on"]
  with pytest.raises(run.WorkerFailed, match="decode 8: transformers replied 0 tokens, expected 3 as ours"):
    run.compare_tokens(of([3, 4, 5], []))


def test_first_losses_must_be_equal():
  of = lambda ours, theirs: {case: {"first_loss": loss} for case, loss in (
      (Case("train", OURS, 8), ours), (Case("train", TRANSFORMERS, 8), theirs))}
  run.check_losses(of(5.0, 5.0005))
  run.check_losses(of(None, None))
  for wrong in (5.1, float("nan")):
    with pytest.raises(run.WorkerFailed, match="first losses differ: ours 5.00000, transformers"):
      run.check_losses(of(5.0, wrong))


# ---- workers -----------------------------------------------------------------------------------------------------------
FAKE = """
import json, sys
case = json.loads(sys.argv[1])
say = lambda **message: print(json.dumps(message), flush=True)
if case["variant"] == "checkpointing":
  sys.exit("no such thing")
say(ready=True, compile_seconds=2.0, first_loss=5.0, resident_bytes=0)
for turn, _ in enumerate(sys.stdin):
  say(seconds=turn + (1.0 if case["side"] == "ours" else 2.0), peak_bytes=512, matmul_flops_per_second=1e9)
"""


def test_sides_take_turns_and_a_dead_worker_says_why(monkeypatch, tmp_path):
  monkeypatch.setattr(run, "PROGRAM", (sys.executable, "-c", FAKE))
  group = cases.cases_of("train", (512,), TRANSFORMERS)[0]
  lines = []
  rows = run.measure_group(group, tmp_path, 3, run.Progress([group], 3, lines.append))
  assert [r["side"] for r in rows] == [case.label for case in group]
  assert [r.get("seconds_median") for r in rows] == [2.0, 3.0, None, 2.0]
  assert rows[2]["failed"] == "ended with code 1: no such thing" and rows[0]["activation_bytes_per_token"] == 1
  sides = [line.split(":")[0].split("512")[1].strip() for line in lines]
  ready, turns = [case.label for case in group], ["ours", "transformers", "ours, full step with Muon"]
  assert sides == ready + turns * 3 and lines[-1].startswith("[16/16]")


def test_passes_that_time_their_parts(monkeypatch, tmp_path):
  timed = "say(seconds=3.0, prefill_seconds=1.0, decode_seconds=2.0, tokens=[7, 8 + (case['variant'] == 'loop')], "
  monkeypatch.setattr(run, "PROGRAM", (sys.executable, "-c", FAKE.replace(
      'say(seconds=turn + (1.0 if case["side"] == "ours" else 2.0), ', timed)))
  group = cases.cases_of(DECODE, (512,), TRANSFORMERS)[0]
  lines = []
  rows = run.measure_group(group, tmp_path, 2, run.Progress([group], 2, lines.append))
  assert [(r["case"], r["side"], r["seconds_median"]) for r in rows] == [
      (name, case.label, seconds) for case in group for name, seconds in (("prefill 512", 1.0), ("decode 512", 2.0))]
  assert "512 tokens/s prefill, 16.0 decode" in lines[-1] and lines[-1].startswith("[21/21]")  # a short prompt: six turns
  assert [line for line in lines if "replies" in line] == [
      "decode 512: transformers replies the same 2 tokens as ours",
      "decode 512: transformers, loop over experts replies other tokens than ours from number 2 of 2 on"]


def test_a_pass_of_ours_decodes(monkeypatch, tmp_path):
  small = dataclasses.replace(SMALL, hidden_size=12, vocab_size=50, num_hidden_layers=1, layer_types=(HCA,),
                              mlp_layer_types=(LEARNED,))
  for module in (cases, ours):
    monkeypatch.setattr(module, "model_config", lambda **changes: dataclasses.replace(small, **changes))
  ours.prepare(Case("weights", OURS, 0), tmp_path)
  measure, _, compile_seconds = ours.prepare(Case(DECODE, OURS, 20), tmp_path)
  parts = measure()
  seconds = [parts.pop(name) for name in ("prefill_seconds", "decode_seconds")]
  assert set(parts) == {"tokens"} and len(parts["tokens"]) == cases.NEW_TOKENS + 1 and min(seconds) > 0
  assert compile_seconds > sum(seconds)


def test_a_worker_that_needs_too_much_memory_is_stopped(monkeypatch, tmp_path):
  monkeypatch.setattr(run, "PROGRAM", (sys.executable, "-c", "import time; time.sleep(60)"))
  monkeypatch.setattr(run, "MEMORY_LIMIT", 2**20)
  if worker.memory("VmRSS") is None:  # a system without /proc: what it would say
    monkeypatch.setattr(run, "memory", lambda field, process: 2**21)
  program = run.Worker(Case("train", TRANSFORMERS, 4096), tmp_path)
  with pytest.raises(run.WorkerFailed, match="stopped: needs more than 0 GiB"):
    program.reply()
  program.close()


# ---- progress and memory ----------------------------------------------------------------------------------------------
def test_progress_counts_to_the_end():
  lines = []
  groups = cases.cases_of("forward", (512, 1024), TRANSFORMERS)
  progress = run.Progress(groups, 2, lines.append)
  for group in groups:
    for case in group:
      progress.done(case, "", sum(cases.expected_seconds(case)) + 2 * cases.turn_seconds(case, group), 3)
  assert [line.split("]")[0] for line in lines] == ["[ 3/12", "[ 6/12", "[ 9/12", "[12/12"]
  assert lines[-1].endswith("about 0 s left")


def test_the_peak_starts_again():
  before = worker.settle()
  if not Path("/proc/self/clear_refs").exists():  # no peak can be restarted there, and nothing fails
    assert (before is None) == (worker.memory("VmRSS") is None)
    return
  size = 64 * 2**20
  block = np.ones(size, np.uint8)
  assert worker.memory("VmHWM") - before > 0.9 * size
  del block
  after = worker.settle()
  assert worker.memory("VmHWM") - after < 0.2 * size
  assert worker.memory("VmRSS", 2**30) is None


# ---- the command line -------------------------------------------------------------------------------------------------
MISTAKES = [
    ([], "error: measurement = '': expected one of forward, train"),
    (["sampling"], "error: measurement = 'sampling': expected one of forward, train, decode"),
    (["decode", "--lengths", "1048544"], "error: --lengths = '1048544': expected whole numbers from 1 to 1048543"),
    (["forward", "--lengths", "512,x"], "error: --lengths = 'x': expected whole numbers from 1 to 1048576"),
    (["forward", "--json", "no/such/folder.json"], "error: --json = 'no/such/folder.json': expected a file in a"),
    (["forward", "--against", "torchtitan"], "value should be one of <transformers|maxtext>"),
    (["forward", "--against", "maxtext"], "error: --against = 'maxtext': expected transformers for forward"),
    (["plan", "--against", "transformers"], "error: --against = 'transformers': expected maxtext for plan"),
    (["plan", "--against", "maxtext"], "error: --maxtext_python = None: expected a Python with --against maxtext"),
    (["plan", "--against", "maxtext", "--maxtext_python", "no/python"], "error: --maxtext_python = 'no/python': No such"),
    (["plan", "--optimizers", "sgd"], "error: --optimizers = 'sgd': expected some of ('adamw', 'muon', "),
]
# The command with one list of arguments after another: to start it takes seconds. What is not told as a mistake ends it.
COMMANDS = """
import contextlib, io, json, sys
from absl import app, flags
from launch import bench

bench.define_flags()
told = []
for arguments in json.loads(sys.argv[1]):
  flags.FLAGS.unparse_flags()
  said = io.StringIO()
  try:
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
      app.run(bench.main, ["launch.bench", *arguments])
  except SystemExit as end:
    words = end.code if isinstance(end.code, str) else ""  # which Python prints, and ends with 1
    told.append((1 if words else end.code, said.getvalue() + words))
print(json.dumps(told))
"""


def ended(*command):
  return subprocess.run([sys.executable, *command], cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def told():
  """The exit code and the words of each of these commands."""
  done = ended("-c", COMMANDS, json.dumps([arguments for arguments, _ in MISTAKES]))
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("number", range(len(MISTAKES)), ids=[" ".join(arguments) for arguments, _ in MISTAKES])
def test_mistakes_are_told_without_a_traceback(number, told):
  code, words = told[number]
  assert code and MISTAKES[number][1] in words and "Traceback" not in words


def test_a_mistake_ends_the_program():
  """One of them as a user makes it."""
  arguments, said = MISTAKES[1]
  done = ended("-m", "launch.bench", *arguments)
  assert done.returncode != 0
  assert said in done.stdout + done.stderr and "Traceback" not in done.stderr


def test_what_to_install_is_said(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  assert bench.check(["forward"], ["512", "64"], None, None) == ("forward", (64, 512))
  with pytest.raises(ValueError, match=r"torch and transformers not installed, expected what pip install -e '\.\[test\]'"):
    bench.check(["forward"], ["512"], TRANSFORMERS, None)
