"""The bench of the kernels without a compiler: the process around it, cases, mistakes on the command line."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from launch.benchmarks.kernels import cases, compile, run
from launch.benchmarks.kernels.cases import BLOCKWISE, DECODE, FORWARD, GRADIENT, OURS, SPLASH, Case
from launch.benchmarks.kernels.chips import CHIPS, chip_of
from pallas_kernels.shapes import PRO
from tests.launch.in_process import program

ROOT = Path(__file__).resolve().parents[2]
V6E, TPU7X = CHIPS[1:]


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
  monkeypatch.setattr(compile.Compiler, "compile", lambda self, request, left: {"ok": False, "error": "fake"})
  found = run.measure("v6e:2x2", wanted, lines.append)
  assert [row["case"] for row in found] == ["expand forward pro 4,096"]
  assert lines[0] == "left out, more than the HBM of one v6e device: attention gradient pro 65,536"
  assert lines[1] == "[1/1] expand forward pro 4,096, ours: fake, about 0 s left"
  assert len(run.measure("v5p:2x2x1", wanted, lines.append)) == 2


# ---- cases and the command line ----------------------------------------------------------------------------------------
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
  """What a program leaves by: Python prints the text of a SystemExit, and no traceback."""
  with program("bench") as main, pytest.raises(SystemExit) as left:
    main.main(main.flags.FLAGS(["bench", *arguments]))
  assert said in left.value.code


def test_a_process_tells_mistakes_without_a_traceback():
  done = subprocess.run([sys.executable, "-m", "launch.bench", "kernels", "--topology", "v9:2x2"], cwd=ROOT,
                        env=os.environ, capture_output=True, text=True, timeout=60)
  assert done.returncode != 0
  assert "error: --topology = 'v9:2x2': expected a chip" in done.stderr and "Traceback" not in done.stderr


def test_matrix_rates_are_those_of_the_chips():
  assert [chip.clock * chip.flops_per_cycle * chip.devices_per_chip / 1e12 for chip in CHIPS] == pytest.approx(
      [459, 918, 2307], rel=0.01)
  assert np.isclose(V6E.bytes_per_cycle, 936) and TPU7X.devices_per_chip == 2
