"""What `launch.plan` prints of a compiled step, and how it ranks; the compiler itself: tests/planning/test_aot.py."""

import dataclasses
import pickle
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import ANY

import jax
import pytest
from absl import flags

from deepseek_v4.config import MeshConfig
from deepseek_v4.planning import bound, estimate
from launch import plan
from launch.benchmarks.kernels import chips
from launch.plans import compiler, measure, report, search
from tests.launch.in_process import program
from tests.training.small import RUN

GIB = 2**30


def figures(**changes):
  memory = {"arguments": 3 * GIB, "outputs": 3 * GIB, "aliased": 3 * GIB, "temporaries": 2 * GIB, "all": 5 * GIB,
            "peak": 4 * GIB}
  return {"layout": False,
          "seconds": 61.2, "compile_seconds": 50.4, "host_bytes": 3 * GIB, "devices": 8, "hbm_bytes": 6 * GIB, "fits": True,
          "memory": memory, "state": {"parameters": GIB, "optimizer": 2 * GIB},
          "with_bundles": 0, "kernels": {"attend": {"calls": 12, "flops": 2e12, "bytes": 3e9, "seconds": 0.004}},
          "traffic": {
            "all-gather": {"count": 4, "started": 3, "bytes": 1.5e9, "hidden": 1e9, "more": 0},
            "ragged-all-to-all": {"count": 9, "started": 8, "bytes": 2e9, "hidden": 2e9, "more": 0.25e9}},
          "largest_gather": 33_554_432, "dense_layer": 153_400_000,
          "flops": {"model": 8e12, "hardware": 12e12, "matmuls": 10e12, "kernels": 2e12, "more": 1e12},
          "bounds": dict.fromkeys(("matmuls", "kernels", "compute", "hbm", "exposed", "hidden", "step"), 0.25),
          "utilization": 0.456} | changes


def test_everything_is_printed():
  lines = [line.split() for line in report.text(figures()).splitlines()]
  for wanted in (["temporaries", "2.00"], ["optimizer", "2.00"], ["attend", "12", "2.00", "3.00", "4.00"],
                 ["all-gather", "1.50", "4", "3"], ["ragged-all-to-all", "2.00", "9", "8", "+", "0.25"]):
    assert wanted in lines, wanted
  text = report.text(figures())
  assert "83.3% of the 6.00 that the compiler lets a program use: fits (held at one time: 66.7%)" in text
  assert text.endswith("this allows: 45.6%")
  assert "largest all-gather a device has 33.6 M numbers; of a layer all weights" in text and "most 153.4 M" in text
  assert "model 8.0, hardware 12.0, matmuls 10.0, kernels 2.0; + 1.0 for" in text
  assert "least ms by these, of 7 shapes also by the compiler's schedule" in report.text(figures(with_bundles=7))
  assert report.text(figures(layout=True)).startswith("laid out, without its machine code (a guess stands for it), in 50 s")
  small = report.text(figures(fits=False, kernels={}, traffic={}))
  assert "DOES NOT FIT, expected at most 90%" in small and small.splitlines().count("  none") == 2


def test_a_chips_rates_are_its_published_ones():
  """Cloud documentation: bfloat16 TFLOP/s, GB/s of HBM and of the bidirectional interconnect, per chip; TPU7x has two
  devices a chip. libtpu's own matrix rate of v6e is 920 against 918."""
  for name, published in (("v5p:2x2x1", (459e12, 2765e9, 1200e9)), ("v6e:2x2", (918e12, 1638e9, 800e9)),
                          ("TPU7x:2x2x1", (2307e12, 7380e9, 1200e9))):
    chip = chips.chip_of(name)
    rates = dataclasses.astuple(measure.rates_of(chip))
    assert [rate * chip.devices_per_chip for rate in rates] == pytest.approx(published, rel=3e-3)


# ---- search -----------------------------------------------------------------------------------------------------------
def test_every_mesh_is_a_way_to_write_the_number_of_devices():
  found = list(search.shapes_of(12, 3))
  assert len(found) == len(set(found)) == 18 and all(a * b * c == 12 for a, b, c in found)


def described(monkeypatch, devices):
  """Eight emulated devices in place of a slice's."""
  monkeypatch.setattr(search.lower, "devices_of", lambda topology: jax.devices()[:devices])


def test_candidates_divide_and_the_fastest_comes_first(monkeypatch):
  described(monkeypatch, 4)
  found = search.candidates(RUN, "v5p:2x2x1", ["none", "block"])
  meshes = {(one.mesh.data, one.mesh.fsdp, one.mesh.expert, one.mesh.context, one.mesh.tensor) for one in found}
  assert (1, 2, 2, 1, 1) in meshes and (1, 1, 1, 4, 1) in meshes and all(one.accumulation >= 1 for one in found)
  assert (1, 1, 1, 1, 4) not in meshes  # two groups of heads
  times = [one.estimate.seconds["step"] for one in found]
  assert times == sorted(times) and {one.remat for one in found} == {"none", "block"}
  # Eight rows: with four groups one or two rows each in a pass.
  assert {one.accumulation for one in found if one.mesh.fsdp == 4} == {2, 1}


def test_an_unknown_policy_is_named(monkeypatch):
  described(monkeypatch, 4)
  with pytest.raises(ValueError, match="--remat = 'all': expected some of none, mhc"):
    search.candidates(RUN, "v5p:2x2x1", ["all"])


def wanted(step="train"):
  return measure.Wanted(RUN, "v5p:2x2x1", step)


def candidate(number, size, seconds):
  work = bound.Work(0, 0, 0, 0, 0, 0)
  return search.Candidate(MeshConfig(data=number), 1, "block", estimate.Estimate(size, work, {"step": seconds}, 0.5))


def run_search(monkeypatch, sizes, real, compiles=3, jobs=1):
  """Searches among candidates 1, 2, ... of these estimated bytes; `real` says what each one's plan would say."""
  room, compiled, said = chips.chip_of("v5p:2x2x1").hbm_bytes, [], []
  monkeypatch.setattr(search, "candidates", lambda *_: [
    candidate(number, share * room, number) for number, share in enumerate(sizes, 1)])

  def compile_(one, command, accumulation, timeout, stop):
    compiled.append(one.mesh.data)
    share, seconds = real[one.mesh.data]
    if share is None:
      return {"failed": "error: no"}
    return {"memory": {"all": share * room}, "hbm_bytes": room, "fits": share <= 0.9, "bounds": {"step": seconds},
            "utilization": 0.4}
  monkeypatch.setattr(search, "_compile", compile_)
  rows = search.search(wanted(), [], "data.accumulation", ["block"], compiles, jobs, 60, said.append)
  return rows, compiled, said


def test_plans_that_fit_are_ranked_by_their_bound(monkeypatch):
  real = {1: (0.8, 9.0), 2: (None, 0), 3: (0.7, 5.0), 4: (0.6, 1.0)}
  rows, compiled, said = run_search(monkeypatch, [0.6, 0.6, 0.6, 0.6], real)
  assert compiled == [1, 2, 3] and [row["candidate"][:6] for row in rows] == ["data=3", "one de", "data=2"]
  assert said[0] == "4 candidates may fit; compiling at most 3, 1 at a time"
  assert said[1].startswith("[1/3] one device, accumulation 1, remat block: 80% of the memory, step at least 9.00 s")
  assert "a minute, about" in said[1] and "[2/3] data=2, accumulation 1, remat block: error: no" in said[2]
  assert search.table(rows).splitlines()[0].startswith("1. data=3, accumulation 1, remat block: 70% of the memory")


def test_what_a_plan_takes_beyond_its_estimate_is_expected_of_the_next(monkeypatch):
  """The first takes half as much again: the second and third would not fit then, the fourth would."""
  real = {1: (1.2, 9.0), 4: (0.6, 1.0)}
  rows, compiled, said = run_search(monkeypatch, [0.8, 0.8, 0.7, 0.5], real)
  assert compiled == [1, 4] and [row["fits"] for row in rows] == [True, False] and "DOES NOT FIT" in said[1]


def test_a_search_says_what_it_cannot_do(monkeypatch):
  monkeypatch.setattr(search, "candidates", lambda *_: [])
  with pytest.raises(ValueError, match="no mesh fits even by the estimate"):
    search.search(wanted(), [], "data.accumulation", ["block"], 1, 1, 60, print)
  with pytest.raises(ValueError, match="--step = 'decode': expected 'train' with --search"):
    search.search(wanted("decode"), [], "data.accumulation", ["block"], 1, 1, 60, print)


def test_a_search_that_is_ended_ends_its_compilers(monkeypatch):
  """A signal comes while the second is compiled."""
  class Signal(Exception):
    pass

  def say(line):
    if line.startswith("[1/"):
      raise Signal
  ended = []

  def compile_(one, command, accumulation, timeout, stop):
    while one.mesh.data == 2 and not stop():
      time.sleep(0.01)
    ended.append(one.mesh.data)
    return {"failed": "error: no"}
  monkeypatch.setattr(search, "candidates", lambda *_: [candidate(number, 1.0, number) for number in (1, 2)])
  monkeypatch.setattr(search, "_compile", compile_)
  with pytest.raises(Signal):
    search.search(wanted(), [], "data.accumulation", ["block"], 2, 2, 60, say)
  assert ended == [1, 2]


def test_a_search_tells_its_compilers_what_it_was_told(monkeypatch):
  """The run, the slice and how; each candidate's own settings come behind."""
  told = []
  monkeypatch.setattr(search, "search", lambda wanted, command, *more: told.append((command, *more)) or [])
  line = "--config configs/debug.py --topology v5p:2x2x1 --set data.batch_size=4 --search --layout --jobs 2 --remat full"
  with program("plan") as module:
    flags.FLAGS(["plan", *line.split()])
    assert module.searched(RUN, wanted(), print) == {"rows": []}
  command, accumulation, remats, compiles, jobs, seconds, _ = told[0]
  assert command == [*"--config configs/debug.py --topology v5p:2x2x1 --stage".split(), "", "--set", "data.batch_size=4",
                     "--layout"]
  assert (accumulation, remats, compiles, jobs, seconds) == ("data.accumulation", ("full",), 4, 2, 1800)


# ---- the compiler's process -------------------------------------------------------------------------------------------
WRITES = """
import pathlib, sys, time
pathlib.Path(sys.argv[1]).write_text("a program")
time.sleep(float(sys.argv[2]))
"""


def test_a_compiler_is_ended_when_its_program_is_there(tmp_path):
  path = tmp_path / "program"
  found = lambda: ({"all": 64}, path.read_text()) if path.is_file() and path.read_text() else None
  run = lambda text, *arguments, **options: compiler.until([sys.executable, "-c", text, *arguments], found, **options)
  assert run("raise SystemExit(3)") == compiler.Outcome(None, ANY, ANY, 3)
  assert run("import time; time.sleep(60)", seconds=0.1) == compiler.Outcome(None, ANY, ANY, None)
  assert run("import time; time.sleep(60)", stop=lambda: True) == compiler.Outcome(None, 0, ANY, None)
  begin = time.monotonic()
  outcome = run(WRITES, str(path), "60")
  assert outcome.seconds <= time.monotonic() - begin < 30 and outcome.code is None and outcome.host_bytes > 2**20
  assert outcome.program == ({"all": 64}, "a program")
  path.unlink()
  assert run(WRITES, str(path), "0").program == outcome.program  # written, and ended before anybody looked


@pytest.mark.parametrize("by_layout", [False, True])
def test_how_a_compiler_ends(by_layout, monkeypatch):
  """With a program; or it refuses it, perhaps after it was laid out, which is said in its words; or it dies."""
  asked = SimpleNamespace(layout=by_layout)
  program, refused, code = ({"all": 64}, "HloModule step"), False, 0

  def ends(command, found, stdin, stdout, **options):
    folder = Path(command[-1])
    assert pickle.load(stdin) == asked and found() is None
    stdout.write(b"first\nInvalid flag\n")
    if refused:
      (folder / compiler.REFUSED).write_text("RESOURCE_EXHAUSTED: too large")
    return compiler.Outcome(program, 0, 1.0, code)
  monkeypatch.setattr(compiler, "until", ends)
  assert compiler.of_plan(asked).program == program
  refused = True
  with pytest.raises(jax.errors.JaxRuntimeError, match="^RESOURCE_EXHAUSTED: too large$"):
    compiler.of_plan(asked)
  program, refused = None, False
  with pytest.raises(compiler.NoProgram, match="code 0 and left no program: expected a libtpu .* 0.0.42 .*words: first Inv"):
    compiler.of_plan(asked)
  code = -9
  with pytest.raises(compiler.NoProgram, match="code -9 and left no program; its last words: first Invalid flag"):
    compiler.of_plan(asked)


def test_passes_are_set_where_the_run_reads_them():
  stages = SimpleNamespace(stages=(SimpleNamespace(name="dense"), SimpleNamespace(name="long")))
  of = lambda stage: plan.accumulation_of(stages, stage)
  assert plan.accumulation_of(RUN, "") == "data.accumulation"
  assert (of(""), of("1"), of("long")) == ("stages.dense.accumulation", *["stages.long.accumulation"] * 2)
