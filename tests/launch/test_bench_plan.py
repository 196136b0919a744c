"""The step beside MaxText's: what is told to either side, and how their programs are read and set side by side."""

import json
import subprocess
import sys

import pytest

from deepseek_v4 import config
from launch.benchmarks.maxtext import cases, read, run
from launch.benchmarks.maxtext.cases import ADAMW, CASES, DEFAULT_MUON, MUON, OURS, THEIRS, Case

CASE = Case(4, "v5p:2x2x1", 16, ADAMW)
MEMORY = {"arguments": 10 * 2**30, "outputs": 10 * 2**30, "aliased": 10 * 2**30, "temporaries": 5 * 2**30, "code": 2**20}

# A matmul [8, 4] x [4, 16]; an all-gather of 4 devices; a ragged exchange with room for 192 rows where 16 x 6 come.
TEXT = """HloModule step, is_scheduled=true

ENTRY %main (a: f32[8,4], b: f32[4,16], c: bf16[96,4096]) -> f32[8,16] {
  %a = f32[8,4]{1,0} parameter(0)
  %b = f32[4,16]{1,0} parameter(1)
  %c = bf16[96,4096]{1,0} parameter(2)
  %dot.1 = f32[8,16]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %all-gather.1 = f32[32,4]{1,0} all-gather(%a), replica_groups=[1,4]<=[4], dimensions={0}
  %room = bf16[192,4096]{1,0} broadcast()
  %ragged.1 = bf16[192,4096]{1,0} ragged-all-to-all(%c, %room, %s, %s, %s, %s), replica_groups={{0,1,2,3}}
  ROOT %out = f32[8,16]{1,0} copy(%dot.1)
}
"""


def test_both_texts_are_read_by_the_same_rules():
  found = read.of_program(CASE, TEXT, MEMORY, 16 * 2**30)
  assert found["matmuls"] == 2 * 8 * 4 * 16
  gathered, rows = 32 * 4 * 4 * 3 / 4, 16 * 6 * 4096 * 2 * 3 / 4  # of each three quarters come from others
  assert found["travels"] == gathered + rows
  assert found["all"] == 15 * 2**30 + 2**20 and not found["fits"]
  assert found["collectives"] == {"all-gather": 1, "ragged-all-to-all": 1}


def test_our_settings_are_settings():
  for case in CASES:
    run_config = config.load(run.ROOT / cases.CONFIG, case.ours)
    mesh = run_config.mesh
    assert mesh.data * mesh.fsdp * mesh.expert * mesh.context * mesh.tensor == case.chips
    assert run_config.data.batch_size * run_config.data.sequence_length == case.chips * case.tokens
    assert run_config.model.num_nextn_predict_layers == 0 and not run_config.stages


def test_their_arguments_name_the_slice_by_its_cores():
  assert {"compile_topology=v5p-256", "ici_fsdp_parallelism=16", "max_target_length=4096"} <= set(CASES[0].theirs)
  assert {"compile_topology=v5p-512", "ici_fsdp_parallelism=32", "max_target_length=16384"} <= set(CASES[3].theirs)
  assert "muon_use_all_to_all=True" in CASES[1].theirs and "muon_use_all_to_all=True" not in CASES[2].theirs


def row(case, side, **figures):
  return {"case": case.name, "side": side, "ours": side == OURS, "optimizer": case.optimizer, "tokens": case.tokens,
          "chips": case.chips, **figures}


def compiled(temporaries, matmuls, travels):
  return {**MEMORY, "temporaries": temporaries * 2**30, "all": (10 + temporaries) * 2**30, "matmuls": matmuls * 1e12,
          "travels": travels * 1e9, "seconds": 1.0}


def test_table_and_targets():
  rows = [row(CASES[0], OURS, **compiled(20, 250, 310)), row(CASES[0], THEIRS, **compiled(52, 254, 338)),
          row(CASES[1], OURS, **compiled(22, 480, 380)), row(CASES[1], THEIRS, **compiled(63, 713, 433)),
          row(CASES[2], THEIRS, **compiled(63, 1210, 1715)),
          row(CASES[3], OURS, **compiled(40, 900, 900)), row(CASES[3], THEIRS, refused="out of memory")]
  text = run.table(rows)
  assert "refused by the compiler: out of memory" in text
  muon = text.split(CASES[1].name)[1].splitlines()
  assert muon[1].split() == [OURS, "10.0", "22.0", "32.0", "480.0", "230.0", "380.0"]
  assert muon[2].split() == [THEIRS, "10.0", "63.0", "73.0", "713.0", "459.0", "433.0"]
  assert muon[3].split()[3:] == ["1.00", "0.35", "0.44", "0.67", "0.50", "0.88"]
  assert [target["reached"] for target in run.targets(rows)] == [True, False, True, True, True, True]


@pytest.fixture
def fake(tmp_path, monkeypatch):
  """Compilers that are none: the process writes what a step might say."""
  def with_script(text):
    script = tmp_path / "side.py"
    script.write_text(text)
    (tmp_path / "libtpu.so").write_bytes(b"library")
    monkeypatch.setattr(run, "library_of", lambda python: str(tmp_path / "libtpu.so"))
    monkeypatch.setattr(run, "command_of", lambda case, side, python, folder: [sys.executable, str(script), folder, side])
  return with_script


def test_sides_are_compiled_in_processes_of_their_own(fake):
  figures = {"memory": MEMORY, "seconds": 2.0, "versions": {"jax": "1"}}
  fake(f"import sys, json, os, pathlib\nfolder = pathlib.Path(sys.argv[1])\n"
       f"(folder / 'program.txt').write_text({TEXT!r})\nassert os.environ['TPU_LIBRARY_PATH'].endswith('libtpu.so')\n"
       f"(folder / 'figures.json').write_text(json.dumps({figures!r}))")
  said = []
  rows = run.measure("python", CASES[1:3], said.append, 1)
  assert [(one["optimizer"], one["side"]) for one in rows] == [(MUON, OURS), (MUON, THEIRS), (DEFAULT_MUON, THEIRS)]
  assert all(one["matmuls"] == 1024 for one in rows) and said[0].startswith("1/3 ") and json.dumps(rows)


def test_a_bench_goes_on_from_what_the_same_compiler_said(fake):
  """Rows of the same libtpu are not compiled again, unless they failed; those of other cases stay in the file."""
  fake("import sys\nsys.exit('compiled')")
  known = run.measure(None, CASES[:2], lambda text: None, 1)
  done = known[0] | {"refused": "too large"}
  del done["failed"]
  other, older = done | {"case": CASES[3].name}, done | {"case": CASES[1].name, "libtpu_sha256": "another"}
  kept = []
  rows = run.measure(None, CASES[:2], lambda text: None, 1, [done, known[1], other, older], kept.append)
  assert rows == [done, known[1]]  # the second one was compiled again, and died again
  assert kept == [[done, other], [done, known[1], other]]


def test_a_side_that_dies_is_a_row(fake):
  fake("import sys\nprint('first', file=sys.stderr)\nsys.exit('there is no MaxText')")
  rows = run.measure(None, CASES[:1], lambda text: None, 1)
  assert [one["side"] for one in rows] == [OURS] and rows[0]["failed"] == "exit code 1: first there is no MaxText"
  assert run.table(rows) and not any(target["reached"] for target in run.targets(rows))


def test_an_environment_without_maxtext_is_refused():
  with pytest.raises(ValueError, match=r"(?s)--maxtext_python = '.*': .*maxtext.*, expected the Python of .*pip install"):
    run.library_of(sys.executable)


def test_theirs_needs_nothing_of_ours(tmp_path):
  """It runs where this project is not installed: it compiles by itself, and dies over MaxText alone."""
  script = run.ROOT / "launch/benchmarks/maxtext/theirs.py"
  done = subprocess.run([sys.executable, "-I", str(script), str(tmp_path)], capture_output=True, text=True, timeout=120)
  assert "No module named 'maxtext'" in done.stderr
