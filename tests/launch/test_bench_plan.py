"""The step beside MaxText's: what is told to either side, and how their programs are read and set side by side."""

import json
import shutil
import subprocess
import sys

import pytest

from deepseek_v4 import config
from launch.benchmarks.maxtext import cases, read, run
from launch.benchmarks.maxtext.cases import ADAMW, CASES, DEFAULT_MUON, MUON, OURS, THEIRS, Case

CASE = Case(4, "v5p:2x2x1", 16, ADAMW)
MEMORY = {"arguments": 10 * 2**30, "outputs": 10 * 2**30, "aliased": 10 * 2**30, "temporaries": 5 * 2**30, "code": 2**20}

# A matmul [8, 4] x [4, 16]; an all-gather of 4 devices; a ragged exchange with room for 192 rows where 16 x 6 come, and rows
# that the compiler has cut in two.
TEXT = """HloModule step, is_scheduled=true

ENTRY %main (a: f32[8,4], b: f32[4,16], c: bf16[96,4096]) -> f32[8,16] {
  %a = f32[8,4]{1,0} parameter(0)
  %b = f32[4,16]{1,0} parameter(1)
  %c = bf16[96,4096]{1,0} parameter(2)
  %dot.1 = f32[8,16]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %all-gather.1 = f32[32,4]{1,0} all-gather(%a), replica_groups=[1,4]<=[4], dimensions={0}
  %room = bf16[192,2,2048]{2,1,0} broadcast()
  %ragged.1 = bf16[192,2,2048]{2,1,0} ragged-all-to-all(%c, %room, %s, %s, %s, %s), replica_groups={{0,1,2,3}}
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
    monkeypatch.setattr(run, "library_of", lambda python: (str(tmp_path / "libtpu.so"), "0.1", {}))
    monkeypatch.setattr(run, "command_of", lambda case, side, python, folder: [sys.executable, str(script), folder, side])
  return with_script


ASSIGNED = ("allocation 0: size 4096, parameter 0, shape |f32[8,4]| at ShapeIndex {}:\n"
            "allocation 1: size 512, preallocated-temp:\n")
SIDE = f"""
import json, os, pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
assert os.environ["TPU_LIBRARY_PATH"].endswith("libtpu.so")
assert os.environ["XLA_FLAGS"] == f"--xla_dump_to={{folder}}/dump --xla_dump_hlo_as_text=true"
(folder / "figures.json").write_text(json.dumps({{"versions": {{"jax": "1"}}}}))
(folder / "dump").mkdir()
write = lambda name, text: (folder / "dump" / f"module_1.{{name}}.txt").write_text(text)
write("jit_seed.after_optimizations_after_buffer_assignment", "")
write("jit_train_step.1.after_optimizations-memory-usage-report", "")
write("jit_train_step.1.after_optimizations", {TEXT!r})
write("jit_train_step.1.after_optimizations-buffer-assignment", {ASSIGNED!r})
write("jit_train_step.1.after_optimizations_after_buffer_assignment", "")
time.sleep(600)  # makes machine code
"""


def test_sides_are_compiled_in_processes_of_their_own_until_they_are_laid_out(fake):
  fake(SIDE)
  said = []
  rows = run.measure("python", CASES[1:3], said.append, 1)
  assert [(one["optimizer"], one["side"]) for one in rows] == [(MUON, OURS), (MUON, THEIRS), (DEFAULT_MUON, THEIRS)]
  assert all(one["matmuls"] == 1024 and one["arguments"] == 4096 and one["temporaries"] == 512 for one in rows), rows
  assert all(one["versions"] == {"jax": "1"} and one["libtpu"] == "0.1" for one in rows)
  assert all(0 < one["seconds"] < 30 and one["host_bytes"] > 2**20 for one in rows)
  assert said[0].startswith("1/3 ") and json.dumps(rows)


def test_a_step_that_the_compiler_refuses_and_one_that_takes_too_long_are_rows(fake):
  fake("import sys, pathlib\n(pathlib.Path(sys.argv[1]) / 'figures.json').write_text('{\"refused\": \"too large\"}')")
  assert run.measure(None, CASES[:1], lambda text: None, 1)[0]["refused"] == "too large"
  fake("import time\ntime.sleep(600)")
  assert run.measure(None, CASES[:1], lambda text: None, 0.01)[0]["failed"] == "more than 0.01 minutes"


def test_a_bench_goes_on_from_what_the_same_compiler_said(fake):
  """Rows of the same libtpu and the same code are not compiled again, unless they failed; those of other cases stay in the
  file."""
  fake("import sys\nsys.exit('compiled')")
  known = run.measure(None, CASES[:2], lambda text: None, 1)
  done = known[0] | {"refused": "too large"}
  del done["failed"]
  assert done["date"][:2] == "20" and done["digest"] == run.made_of(CASES[0], OURS, {})
  other = done | {"case": CASES[3].name, "digest": run.made_of(CASES[3], OURS, {})}
  older = known[1] | {"refused": "too large", "libtpu_sha256": "another"}
  del older["failed"]
  kept = []
  rows = run.measure(None, CASES[:2], lambda text: None, 1, [done, known[1], other, older], kept.append)
  known[1] |= {"date": rows[1]["date"]}
  assert rows == [done, known[1]]  # the second one was compiled again, and died again
  assert kept == [[done, other], [done, known[1], other]]
  foreign = [done | {"digest": "another"}, {name: value for name, value in done.items() if name != "digest"},
             done | {"case": "a case that is no more"}]
  for one in foreign:
    assert "failed" in run.measure(None, CASES[:1], lambda text: None, 1, [one], kept.append)[0] and len(kept[-1]) == 1


def test_a_row_is_of_its_code_its_settings_and_its_versions(tmp_path, monkeypatch):
  """A digest changes with each of what the figures follow from, and with nothing else."""
  ours, theirs = (lambda versions={}, case=CASES[0], side=side: run.made_of(case, side, versions) for side in (OURS, THEIRS))
  before = ours(), theirs({"maxtext": "1", "jax": "1"})
  assert before == (ours({"maxtext": "2"}), theirs({"maxtext": "1", "jax": "1", "libtpu": "3"}))
  assert len({*before, ours(case=CASES[1]), theirs({"maxtext": "2", "jax": "1"}), theirs({"maxtext": "1", "jax": "2"}),
              theirs({"maxtext": "1", "jax": "1"}, CASES[1])}) == 6
  for folder in (*run.LIBRARIES, "launch/benchmarks/maxtext", "configs"):
    shutil.copytree(run.ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
  monkeypatch.setattr(run, "ROOT", tmp_path)
  now = lambda: (ours() == before[0], theirs({"maxtext": "1", "jax": "1"}) == before[1])
  assert now() == (True, True)
  for name, same in (("deepseek_v4/model/two_levels.py", (False, True)), ("pallas_kernels/selection.py", (False, True)),
                     ("launch/benchmarks/maxtext/run.py", (True, True)),
                     ("launch/benchmarks/maxtext/read.py", (False, False))):
    text = (tmp_path / name).read_text()
    (tmp_path / name).write_text(text + "# changed\n")
    assert now() == same, name
    (tmp_path / name).write_text(text)


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
