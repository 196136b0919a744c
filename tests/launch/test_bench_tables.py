"""README's tables out of benches' files, and all benches behind one another."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from launch.benchmarks import everything, tables

HEAD = {"machine": {"processor": "a processor", "cores": 2}, "versions": {"jax": "1.2", "libtpu": "0.1", "torch": "3"},
        "date": "2026-01-02T03:04:05+00:00", "targets": []}


def kernel_row(chip, side, cycles, op="attention", length=4096, direction="forward", model="pro"):
  return {"case": f"{op} {direction} {model} {length}", "chip": chip, "side": side, "op": op, "model": model,
          "length": length, "direction": direction, "time_cycles": cycles, "tokens_per_second_per_chip": 1e9 / cycles}


def file_of(path: Path, rows, **head) -> str:
  path.write_text(json.dumps(HEAD | head | {"rows": rows}))
  return str(path)


def test_a_kernels_table_joins_chips_and_shows_who_wins(tmp_path):
  v5p = file_of(tmp_path / "a.json", [
    kernel_row("v5p", "ours", 100), kernel_row("v5p", "blockwise", 250), kernel_row("v5p", "ours", 10, length=0),
    kernel_row("v5p", "blockwise", 5, length=0), kernel_row("v5p", "ours", 7, op="experts", model="flash")])
  failed = kernel_row("v6e", "blockwise", 1) | {"failed": "no room"}
  v6e = file_of(tmp_path / "b.json", [kernel_row("v6e", "ours", 200), failed], date="2026-01-04T00:00:00+00:00")
  again = file_of(tmp_path / "c.json", [kernel_row("v5p", "blockwise", 1500)])
  assert tables.markdown(tables.read([v5p, v6e, again])).splitlines() == [
    "V4-Pro and V4-Flash, jax 1.2, libtpu 0.1, 2026-01-02 to 2026-01-04", "",
    "| V4-Pro: v5p / v6e | plain XLA | ours, tokens/s/chip |", "| --- | --- | --- |",
    "| CSA attention, 4,096, forward | 15 / - | 10,000,000 / 5,000,000 |",
    "| CSA attention, decoding | **0.50** / - | 100,000,000 / - |", "",
    "| V4-Flash: v5p | ours, tokens/s/chip |", "| --- | --- |", "| experts, 4,096, forward | 142,857,143 |"]


def test_a_models_table_has_a_column_for_each_side(tmp_path):
  row = {"case": "forward 512", "kind": "forward", "side": "ours", "ours": True, "tokens_per_second": 1000.4, "ratio": 2.5,
         "matmul_share": 0.456}
  other = {"case": "forward 512", "kind": "forward", "side": "transformers", "ours": False, "tokens_per_second": 400.0}
  text = tables.markdown(tables.read([file_of(tmp_path / "a.json", [row, other])]))
  assert text.splitlines()[0] == "a processor, 2 cores, jax 1.2, torch 3, 2026-01-02"
  assert text.splitlines()[-1] == "| forward 512 | 1,000 | 400 | 2.50 | 46% |"


@pytest.mark.parametrize("content", ["", "[]", '{"rows": []}', '{"rows": [{"case": "x"}]}'])
def test_other_files_are_refused(tmp_path, content):
  (tmp_path / "x.json").write_text(content)
  with pytest.raises(ValueError, match="x.json: expected a file that a bench wrote with --json"):
    tables.read([str(tmp_path / "x.json")])
  with pytest.raises(ValueError, match="other bench than kernels"):
    tables.markdown([HEAD | {"rows": [{"case": "x", "kind": "overlap"}]}])


def test_a_part_that_fails_does_not_stop_the_others():
  def run(command):
    if "decode" in command:
      return subprocess.CompletedProcess(command, 3)
    rows = {"rows": [{}, {}], "targets": [{"reached": True}, {"reached": False}, {"reached": None}]}
    Path(command[command.index("--json") + 1]).write_text(json.dumps(rows))
    return subprocess.CompletedProcess(command, 0)
  said, kept = [], []
  found = everything.measure(everything.chosen(["forward", "decode", "plan"], "transformers"), said.append, run,
                             lambda so_far: kept.append(list(so_far)))
  assert kept == [["forward"], ["forward", "decode"], ["forward", "decode", "plan"]]
  assert list(found) == ["forward", "decode", "plan"] and found["decode"] == {"failed": "exit code 3"}
  assert everything.summary(found).splitlines() == [
    "forward         2 rows, 1 of 2 targets reached", "decode          exit code 3",
    "plan            2 rows, 1 of 2 targets reached"]
  assert "launch.bench forward --against transformers" in said[0]


def test_every_part_is_a_command_that_exists():
  assert {"forward", "train", "decode", "kernels_v5p", "kernels_v6e", "kernels_tpu7x", "plan"} <= set(everything.parts(None))
  assert not any("--against" in arguments for arguments in everything.parts(None).values())
  with pytest.raises(ValueError, match="--parts = 'fast': expected some of start, forward"):
    everything.chosen(["fast"], None)
