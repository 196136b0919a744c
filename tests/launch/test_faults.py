"""The fault runs: their plan, what they expect of a start, and in the long tier a short one with every kind of damage."""

import collections
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.fault_runs import damage, run

ROOT = Path(__file__).resolve().parents[2]


def test_the_plan_holds_all_that_is_asked_for():
  faults = run.plan(50, 8, 3, random.Random(0))
  kinds = collections.Counter(fault.kind for fault in faults)
  assert kinds == {"SIGKILL": 50, "SIGTERM": 4, "SIGINT": 4, "full disk": 3}
  damaged = collections.Counter(fault.damage for fault in faults if fault.kind == "SIGKILL")
  assert set(damaged) == {None, *damage.KINDS} and min(damaged.values()) >= 2
  assert run.plan(50, 8, 3, random.Random(0)) == faults != run.plan(50, 8, 3, random.Random(1))
  few = run.plan(2, 0, 0, random.Random(0))
  assert {fault.damage for fault in few} == {None, *damage.KINDS}  # every kind, however few kills are asked for
  assert {fault.kind for fault in run.plan(0, 2, 1, random.Random(0))} == {"SIGTERM", "SIGINT", "full disk"}


@pytest.fixture
def disk(tmp_path):
  disk = run.Disk(tmp_path)
  for step in (4, 8, 12):
    for name in ("state/d/data", "state/_METADATA", "state/manifest.ocdbt", "manifest/manifest.json"):
      file = disk.checkpoints / str(step) / name
      file.parent.mkdir(parents=True, exist_ok=True)
      file.write_bytes(bytes(100))
  return disk


def test_what_a_start_must_do_follows_from_the_disk(disk):
  assert (disk.expected().step, disk.expected().others) == (12, {})
  rng = random.Random(0)
  assert disk.damage("manifest missing", rng) and disk.damage("empty step folder", rng)
  (disk.checkpoints / "16.orbax-checkpoint-tmp").mkdir()
  expected, root = disk.expected(), disk.checkpoints
  assert (expected.step, expected.others) == (8, {12: root / "12", 13: root / "13", 16: root / "16.orbax-checkpoint-tmp"})
  warnings = "".join(f"checkpoint passed over: {path}: why; using step 8\n" for path in expected.others.values())
  assert expected.problem(warnings + "resumed at step 8\n1 parameters on 1 cpu device") == ""
  assert expected.problem("") == ""  # killed before it said anything
  assert "it went on from 4" in expected.problem(warnings + "resumed at step 4\n")
  assert "it started over" in expected.problem(warnings + "1 parameters on 1 cpu device\n")
  assert f"expected it to name what it passed over, and why: {root / '13'}" == expected.problem(
    warnings.replace(f"{root / '13'}:", "nothing") + "resumed at step 8\n")
  assert disk.damage("array file empty", rng) and not disk.damage("array file empty", rng)  # never the last sound one
  (root / "12" / "state" / "_METADATA").unlink()
  assert disk.expected().step == 4  # half deleted, by a save that was killed
  time.sleep(0.02)  # more than a clock of a file system is coarse
  (root / "12" / "manifest" / "manifest.json").write_bytes(b"{}")
  assert disk.expected().step == 12  # written again


def test_a_bit_that_nobody_reads_may_be_harmless(disk):
  disk.damage("bit of an array file flipped", random.Random(0))
  expected = disk.expected()
  assert (expected.step, expected.harmless) == (8, (12,)) and expected.problem("resumed at step 12\n") == ""


@pytest.mark.long
def test_a_few_faults_leave_no_trace(tmp_path):
  environment = os.environ | {"PYTHONPATH": str(ROOT)}
  done = subprocess.run([sys.executable, "-m", "launch.faults", "--kills", "1", "--stops", "2", "--full_disks", "1",
                         "--seed", "3", "--json", str(tmp_path / "faults.json"), "--set", "training.steps=30"],
                        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500)
  assert done.returncode == 0, done.stdout + done.stderr
  rows = json.loads((tmp_path / "faults.json").read_text())["rows"]
  assert [row for row in rows if row["problem"]] == []
  cases = {row["case"] for row in rows}
  assert {"SIGKILL", "SIGTERM", "SIGINT", "full disk", "end of a disturbed run", "no usable checkpoint"} <= cases
  assert {f"SIGKILL, {kind}" for kind in damage.KINDS} <= cases
