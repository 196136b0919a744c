"""What has a limit: a part of `bench all`, a worker's answer, a fresh process, a compiler's program and its process."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from launch import bench
from launch.benchmarks import cases, everything, exchange, missing, report, run, start
from launch.benchmarks.cases import OURS, TRANSFORMERS, Case
from launch.benchmarks.kernels import cases as kernel_cases
from launch.benchmarks.kernels import compile, rows
from launch.benchmarks.kernels import report as kernel_report
from launch.benchmarks.kernels import run as kernel_run
from launch.benchmarks.kernels.chips import CHIPS
from launch.benchmarks.memory import run as memory_run
from tests.launch.in_process import program

V5P, _, TPU7X = CHIPS


# ---- a part of all ----------------------------------------------------------------------------------------------------
PART = everything.Part(("nothing",), 10)


def test_what_was_stopped_or_has_no_memory_is_left_out_and_no_failure(monkeypatch):
  def stopped(command, seconds):
    if "whole" in command:
      Path(command[command.index("--json") + 1]).write_text(json.dumps({"rows": [{}, {"left_out": "time"}]}))
    elif "broken" in command:
      Path(command[command.index("--json") + 1]).write_text('{"rows": [')  # stopped while it was written
    return None
  wanted = {name: everything.Part((name,), 30) for name in ("whole", "broken")}
  found = everything.measure(wanted, lambda text: None, stopped)
  assert found == {"whole": {"rows": [{}, {"left_out": "time"}], "left_out": "stopped after 30 minutes"},
                   "broken": {"left_out": "stopped after 30 minutes"}}
  monkeypatch.setattr(everything, "free_gigabytes", lambda: 11.6)
  said = []
  found |= everything.measure({"plan": everything.Part(("x",), 5, gigabytes=18)}, said.append, stopped)
  assert found["plan"] == {"left_out": "needs 18 GiB, 12 free"} and "left out: needs 18 GiB" in said[0]
  plan = {"fits": False, "memory": {"all": 3}, "hbm_bytes": 2}
  assert everything.summary(found | {"small": plan | {"fits": True}, "large": plan}).splitlines() == [
    "whole           2 rows, 1 of them left out, left out: stopped after 30 minutes",
    "broken          left out: stopped after 30 minutes", "plan            left out: needs 18 GiB, 12 free",
    "small           fits", "large           does not fit, 150%"]


def test_a_part_without_its_compiler_is_left_out(monkeypatch):
  monkeypatch.setattr(everything.importlib.util, "find_spec", lambda name: None)
  assert everything.obstacle(everything.Part(("x",), 5, compiler=True)) == "libtpu is not installed"
  assert everything.obstacle(PART) is None


def test_minutes_of_all_are_shared_and_bound_the_whole():
  """Each part gets its share of what is left, at least a minute while there is one, and never more than its own limit."""
  parts = [everything.Part(("x",), minutes) for minutes in (10, 30, 60)]
  assert everything.limit_of(parts, None) == 10 == everything.limit_of(parts, 1000)
  assert everything.limit_of(parts, 50) == 5 and everything.limit_of(parts[1:], 45) == 15
  assert [everything.limit_of(parts, minutes) for minutes in (2, 0.5, -1)] == [1, 0.5, 0]
  seconds = []
  wanted = {"first": everything.Part(("x",), 10, watches=True), "second": everything.Part(("x",), 10)}
  everything.measure(wanted, lambda text: None, lambda command, limit: seconds.append((limit, command)) or 0, minutes=8)
  (first, command), (second, plain) = seconds
  assert first == pytest.approx(240, abs=5) and second == pytest.approx(480, abs=5)  # the first one took no time
  assert float(command[command.index("--minutes") + 1]) == pytest.approx(3.75, abs=0.1) and "--minutes" not in plain
  found = everything.measure(wanted, lambda text: None, lambda command, limit: 0, minutes=0.3)
  late = {"left_out": "the 0.3 minutes of all are over"}  # too few to say --minutes
  assert found == {"first": late, "second": {"command": "x", "made_of": ""}}
  found = everything.measure(wanted, lambda text: None, lambda command, limit: 0, minutes=1e-9)
  assert found["second"] == {"left_out": "the 1e-09 minutes of all are over"}


def test_flags_of_all_go_to_the_parts_that_know_them():
  parts = everything.parts(TRANSFORMERS, 1, ["512", "1024"], others=False)
  words = {name: " ".join(part.arguments) for name, part in parts.items()}
  assert words["forward"] == "launch.bench forward --against transformers --repeats 1 --lengths 512,1024"
  assert words["remat"] == "launch.bench remat --repeats 1 --lengths 512,1024" and words["start"].endswith("--repeats 1")
  assert words["kernels_v5p"] == "launch.bench kernels --topology v5p:2x2x1 --lengths 512,1024 --noothers"
  assert words["exchange"].endswith("--lengths 512,1024") and "--lengths" not in words["plan"] + words["context"]
  assert list(parts)[-1] == "flash_plan" and parts["flash_plan"].gigabytes == 6 and parts["plan"].gigabytes == 12
  limits = {name: part.minutes for name, part in parts.items()}
  assert limits["train"] == 120 and limits["start"] == 15 and limits["kernels_tpu7x"] == 90


@pytest.mark.parametrize("minutes", [0.2, 0.35001, 150])
def test_every_part_is_understood_by_its_command(monkeypatch, minutes):
  """The flags that `all` adds included, --minutes from the fewest on; each says no word that its command does not know."""
  monkeypatch.setattr(everything, "obstacle", lambda part: None)
  parts, commands = everything.parts(None, 1, ["512"], others=False), []
  for name, part in parts.items():
    everything.measure({name: part}, lambda text: None, lambda command, _: commands.append(command) or 0, minutes=minutes)
  watching = [command for command in commands if "--minutes" in command]
  assert len(watching) == (0 if minutes == 0.2 else sum(part.watches for part in parts.values()))
  for module, *arguments in (command[2:] for command in commands):
    with program(module.removeprefix("launch.")) as main:
      rest = main.flags.FLAGS([module, *arguments])[1:]
      if module == "launch.bench":
        kind, _ = bench.check(rest, main.flags.FLAGS["lengths"].value, None, None)
        bench.refuse(kind, {name: None for name in bench.KNOWN_BY if main.flags.FLAGS[name].present})


@pytest.mark.parametrize("kind, name, others", [
    ("all", "topology", "kernels, memory, exchange"), ("all", "ops", "kernels"), ("all", "tokens", "context"),
    ("start", "lengths", "forward, train, decode, remat"), ("forward", "topology", "kernels"), ("tables", "json", "forward"),
])
def test_a_flag_that_would_do_nothing_is_refused(kind, name, others):
  with pytest.raises(ValueError, match=f"--{name} = 7: {kind} knows no such flag, expected it with {others}"):
    bench.refuse(kind, {name: 7})


def test_all_writes_machine_versions_and_date_and_ends_well_with_parts_left_out(monkeypatch, tmp_path, capsys):
  monkeypatch.setattr(everything, "run_for", None)
  monkeypatch.setattr(everything, "measure", lambda wanted, say, keep, **_: keep(
    {name: {"left_out": "time"} for name in wanted}) or {name: {"left_out": "time"} for name in wanted})
  with program("bench") as main:
    main.main(main.flags.FLAGS(["bench", "all", "--parts", "start,decode", "--json", str(tmp_path / "all.json")]))
    with pytest.raises(SystemExit, match="error: --lengths = '1000': expected multiples of 128"):
      main.main(main.flags.FLAGS(["bench", "all", "--parts", "memory", "--lengths", "1000"]))
  content = json.loads((tmp_path / "all.json").read_text())
  assert list(content) == ["machine", "versions", "date", "parts"]
  assert list(content["parts"]) == ["start", "decode"]
  first, *_, last = capsys.readouterr().out.split("error")[0].splitlines()[:4]
  assert content["versions"]["jax"] in first and content["date"][:10] in first and f"{os.cpu_count()} cores" in first
  assert last == "decode          left out: time"


def test_all_goes_on_from_its_file(monkeypatch, tmp_path, capsys):
  """What is whole there is not measured again; what failed, was left out, or had other flags or other code is."""
  file, ran, digest = tmp_path / "all.json", [], ["a"]

  def run(command, seconds):
    ran.append(command[3])
    rows = [{"left_out": "time"}] if command[3] == "train" else [{"failed": "no room", "ours": False}]
    Path(command[command.index("--json") + 1]).write_text(json.dumps({"rows": rows}))
    return int(command[3] == "decode")
  monkeypatch.setattr(everything.measure, "__defaults__", (run, *everything.measure.__defaults__[1:]))
  monkeypatch.setattr(everything, "made_of", lambda machine, versions: digest[0])
  with program("bench") as main:
    def measured(*arguments):
      ran.clear()
      with contextlib.suppress(SystemExit):  # a part failed
        main.main(main.flags.FLAGS(["bench", "all", "--noothers", "--json", str(file), *arguments]))
      return ran
    assert measured("--parts", "start,train,decode") == ["start", "train", "decode"]
    assert measured("--parts", "decode,context", "--resume") == ["decode", "context"]
    assert set(json.loads(file.read_text())["parts"]) == {"start", "train", "decode", "context"}
    assert "kept" not in capsys.readouterr().out
    assert measured("--parts", "start,train,decode,context", "--resume") == ["train", "decode"]
    assert "4/4 context: kept" in capsys.readouterr().out
    assert measured("--parts", "start,context", "--repeats", "2", "--resume") == ["start"]  # context knows no repeats
    digest[0] = "b"
    assert measured("--parts", "context", "--repeats", "2", "--resume") == ["context"]
  assert [path.name for path in tmp_path.iterdir()] == ["all.json"]


def test_figures_of_before_stay_until_there_are_new_ones(monkeypatch):
  """In the file too, after each part; also where a part comes to nothing this time, which is said beside them."""
  row = lambda word: {"rows": [{"case": word, "ours": True}], "command": "x", "made_of": "a"}
  known = {name: row(name) for name in ("kept", "cut", "other", "late", "unasked")}
  known["cut"]["rows"][0]["cut"] = "1 of 3 passes"
  known["other"]["made_of"] = "b"
  known["late"] |= {"left_out": "stopped"}
  so_far = []

  def run(command, seconds):
    if not so_far:  # the first one alone writes something
      Path(command[command.index("--json") + 1]).write_text(json.dumps({"rows": [{"case": "new"}]}))
    return 0 if not so_far else None
  wanted = {name: everything.Part(("x",), 5) for name in ("kept", "cut", "other", "late")}
  found = everything.measure(wanted, lambda text: None, run, so_far.append, known=known, made=lambda: "a")
  assert [set(content) for content in so_far] == [set(known)] * 3  # "kept" had no turn
  assert found["kept"] == known["kept"] and found["cut"]["rows"] == [{"case": "new"}]
  assert found["other"] == known["other"] | {"left_out": "stopped after 5 minutes"}
  assert found["late"] == known["late"] | {"left_out": "stopped after 5 minutes"}
  assert so_far[0]["other"] == known["other"] and so_far[-1]["unasked"] == known["unasked"]


def test_code_that_changes_meanwhile_is_nobodys(tmp_path):
  digests = iter("aab")
  found = everything.measure({"part": PART}, lambda text: None, lambda command, seconds: 0, made=lambda: next(digests))
  assert found == {"part": {"command": "nothing"}}


def test_what_figures_follow_from(monkeypatch, tmp_path):
  """A byte of any program or of the model that is measured, another machine, another version."""
  monkeypatch.setattr(everything, "ROOT", tmp_path)
  for name in ("launch/a.py", "launch/b/model.json", "configs/c.txt"):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("1")
  machine, versions = {"processor": "p", "cores": 2, "memory_bytes": 2**34}, {"jax": "1"}
  first = everything.made_of(machine, versions)
  (tmp_path / "configs/c.txt").write_text("2")
  assert everything.made_of(machine | {"memory_bytes": 2**34 + 2**20}, versions) == first
  others = [everything.made_of(machine | {"cores": 4}, versions), everything.made_of(machine, {"jax": "2"})]
  for name in ("launch/a.py", "launch/b/model.json"):
    (tmp_path / name).write_text("2")
    others.append(everything.made_of(machine, versions))
  assert len({first, *others}) == 5


def test_minutes_go_to_parts_that_can_run(monkeypatch):
  monkeypatch.setattr(everything, "obstacle", lambda part: "no compiler" if part.compiler else None)
  wanted = {"first": everything.Part(("x",), 10), "second": everything.Part(("x",), 90, compiler=True)}
  limits = []
  found = everything.measure(wanted, lambda text: None, lambda command, limit: limits.append(limit) or 0, minutes=5)
  assert limits == [pytest.approx(300, abs=1)] and found["second"] == {"left_out": "no compiler"}


def test_all_listens_to_a_signal_only_while_it_measures(monkeypatch):
  before, during = signal.getsignal(signal.SIGTERM), []
  monkeypatch.setattr(everything, "measure", lambda *_, **__: during.append(signal.getsignal(signal.SIGTERM)) or {})
  bench.bench_all([], None, 1, None, False, None, None, False)
  assert during != [before] and signal.getsignal(signal.SIGTERM) == before


# ---- workers and fresh processes --------------------------------------------------------------------------------------
SLEEPER = (sys.executable, "-c", "import time; time.sleep(60)")


def test_a_worker_that_does_not_answer_is_stopped(monkeypatch, tmp_path):
  monkeypatch.setattr(run, "PROGRAM", SLEEPER)
  monkeypatch.setattr(run, "longest_seconds", lambda case: 0.3)
  worker = run.Worker(Case("forward", OURS, 512), tmp_path)
  with pytest.raises(run.WorkerFailed, match="took more than 0 s"):
    worker.reply()
  worker.close()
  for kind in cases.KINDS:  # ten times the README's slowest passes: 42 s of training at 16,384 on 2 cores
    assert cases.longest_seconds(Case(kind, OURS, 16384)) > 420


FAKE = """
import json, sys, time
case = json.loads(sys.argv[1])
say = lambda **message: print(json.dumps(message), flush=True)
say(ready=True, compile_seconds=2.0, first_loss=5.0, resident_bytes=0)
for turn, _ in enumerate(sys.stdin):
  time.sleep(60 if turn or case["side"] != "ours" else 0)
  say(seconds=1.0, peak_bytes=512, matmul_flops_per_second=1e9)
"""


def test_what_is_not_measured_in_time_is_left_out(monkeypatch, tmp_path):
  """Ours has a pass behind it and hangs in its second one, the other side in its first; the next length does not begin."""
  monkeypatch.setattr(run, "PROGRAM", (sys.executable, "-c", FAKE))
  group = cases.cases_of("forward", (512,), TRANSFORMERS)[0]
  found = run.measure_group(group, tmp_path, 3, run.Progress([group], 3, lambda text: None), time.monotonic() + 2)
  assert found[0]["repeats"] == 1 and found[0]["seconds_median"] == 1.0 and found[0]["cut"] == "1 of 3 passes"
  assert found[1]["left_out"] == missing.NO_TIME and "failed" not in found[1]
  rows = report.with_ratios(found)
  assert "ratio" not in rows[0] and report.table(rows).splitlines()[-1].endswith(f"left out: {missing.NO_TIME}")
  assert report.disturbances(rows) == "" and report.targets("forward", rows)[0]["value"] is None
  assert report.table(found[1:]).splitlines()[-1].endswith(f"left out: {missing.NO_TIME}")  # nothing at all was measured


def test_lengths_behind_the_time_are_left_out(monkeypatch):
  class Ready:
    def __init__(self, *_):
      pass

    def reply(self):
      return {}

    def close(self):
      pass
  monkeypatch.setattr(run, "Worker", Ready)
  found = run.measure("train", (512, 1024), None, 1, lambda text: None, minutes=-1)
  assert [row["case"] for row in found] == ["train 512"] * 2 + ["train 1024"] * 2
  assert all(row["left_out"] == missing.NO_TIME for row in found)


@pytest.mark.parametrize("against", [None, TRANSFORMERS])
def test_weights_and_logits_are_in_the_time_too(monkeypatch, against):
  """The first worker hangs, or the one that is asked for logits."""
  script = FAKE.replace("say(ready", "if case['kind'] == 'weights': sys.exit(say(ready=True))\ntime.sleep(60)\nsay(ready", 1)
  monkeypatch.setattr(run, "PROGRAM", SLEEPER if against is None else (sys.executable, "-c", script))
  begin = time.monotonic()
  found = run.measure("forward", (512, 1024), against, 1, lambda text: None, minutes=3 / 60)
  assert time.monotonic() - begin < 25
  groups = cases.cases_of("forward", (512, 1024), against)
  assert found == [report.left_out_row(case, missing.NO_TIME) for group in groups for case in group]


def test_a_worker_that_dies_is_no_matter_of_time(monkeypatch):
  monkeypatch.setattr(run, "PROGRAM", (sys.executable, "-c", "raise SystemExit('no room')"))
  with pytest.raises(run.WorkerFailed, match="no room"):
    run.measure("forward", (512,), None, 1, lambda text: None, minutes=1)


def test_a_fresh_process_that_hangs_is_stopped():
  begin = time.monotonic()
  with pytest.raises(ValueError, match="start import: the process took more than 0.05 s"):
    start.seconds_of("import", longest=0.05)
  assert time.monotonic() - begin < 10


# ---- the compiler -----------------------------------------------------------------------------------------------------
def sleeps(seconds=60):
  time.sleep(seconds)


def test_programs_have_limits_of_their_own_and_the_bench_has_one(monkeypatch):
  """A second for the first; the bench's time is over during the second; the third is not begun."""
  request = lambda name, **more: compile.Request(name, f"{__name__}:sleeps", **more)
  said = []
  with compile.Compiler("v5p:2x2x1", schedules=False) as compiler:
    assert compiler.compile(request("slow", seconds=1))["error"].startswith("took more than 1 s")
    found = compiler.compile_all([request("cut"), request("late")], said.append, minutes=2 / 60)
  assert found == [{"ok": False, "left_out": missing.NO_TIME}] * 2
  assert said == [f"cut: left out: {missing.NO_TIME}, and 1 more"]


def test_the_compilers_process_is_replaced_before_it_is_too_large(monkeypatch, tmp_path):
  """By one that answers each line with its number."""
  script = tmp_path / "compiler"
  script.write_text('#!/bin/sh\nwhile read line; do echo "{\\"ok\\": false, \\"error\\": \\"$$\\"}"; done\n')
  script.chmod(0o755)
  monkeypatch.setattr(compile.sys, "executable", str(script))
  monkeypatch.setattr(compile, "MOST_PROGRAMS", 2)
  request = compile.Request("a program", "")
  with compile.Compiler("v5p:2x2x1", schedules=False) as compiler:
    processes = [answer["error"] for answer in compiler.compile_all([request] * 3)]
    assert processes[0] == processes[1] != processes[2]
    monkeypatch.setattr(compile, "memory", lambda field, process: compile.MOST_MEMORY + 1)
    assert compiler.compile(request)["error"] == processes[2] != compiler.compile(request)["error"]


def test_ours_are_compiled_first_and_the_slowest_last():
  wanted = kernel_cases.all_cases(("attention", "attention_heavy", "experts"), (4096,), ("pro",))
  order = sorted(wanted, key=lambda case: kernel_run.place_of(case, TPU7X))
  ours = [case.side == OURS for case in order]
  assert ours == sorted(ours, reverse=True) and {case.op for case in order[:3]} == {"attention"}
  assert {(case.op, case.side) for case in order[-2:]} == {("attention_heavy", kernel_cases.BLOCKWISE)}
  limits = {case.side: kernel_run.request_of(case).seconds for case in wanted}
  assert limits.pop(OURS) is None and set(limits.values()) == {180}
  assert {kernel_run.place_of(case, V5P) for case in wanted} == {0, 1}


def test_rows_that_are_left_out_are_told_and_count_for_nothing(monkeypatch):
  """Rows come in the order of the cases, whatever was compiled first."""
  late = {"ok": False, "left_out": missing.NO_TIME}
  monkeypatch.setattr(compile.Compiler, "compile", lambda self, request, left: late)
  wanted = kernel_cases.all_cases(("attention_window", "collapse"), (4096,), ("pro",))
  found = kernel_run.measure("v5p:2x2x1", wanted, lambda text: None, minutes=1)
  assert [(row["case"], row["side"]) for row in found] == [(case.name, case.side) for case in wanted]
  assert all(row["left_out"] == missing.NO_TIME and "failed" not in row for row in found)
  assert all(target["value"] is None for target in kernel_report.targets(found, V5P))
  assert kernel_report.table(found).splitlines()[1].endswith(f"left out: {missing.NO_TIME}")
  memory = memory_run.measure("v5p:2x2x2", (4096,), ("ours", "blockwise"), lambda text: None, minutes=1)
  assert [row["side"] for row in memory] == ["ours", "blockwise"] * 3 and missing.NO_TIME in memory_run.table(memory)
  assert memory_run.targets(memory)[0]["reached"] is None
  spread = exchange.measure("v5p:2x2x2", (4096,), ("flash",), lambda text: None, minutes=1)
  assert [row["case"] for row in spread] == ["flash 4,096, gather", "flash 4,096, all_to_all"]
  assert missing.NO_TIME in exchange.table(spread)
  assert rows.row_of(wanted[0], {"ok": False, "error": "no room"}, V5P)["failed"] == "no room"
