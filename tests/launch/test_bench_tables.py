"""README's tables out of benches' files, and all benches behind one another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.benchmarks import everything, tables

README = Path(__file__).resolve().parents[2] / "README.md"
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


def model_row(kind, length, variant="", ours=True, **figures):
  side = ("ours" if ours else "transformers") + (f", {variant}" if variant else "")
  head = {"case": f"{kind} {length}", "kind": kind, "side": side, "ours": ours, "length": length, "variant": variant}
  return head | figures


def speed(tokens, kib, **more):
  return {"tokens_per_second": tokens, "activation_bytes_per_token": kib * 1024} | more


def heads(text):
  """The first line of each Markdown table, its cells."""
  lines = text.splitlines()
  return [[cell.strip() for cell in line.split("|")[1:-1]] for line, after in zip(lines, lines[1:])
          if line.startswith("|") and "---" in after and set(after) <= set("|- ")]


def test_the_models_tables_are_those_of_the_readme(tmp_path):
  """Columns of README.md, its words for policies, and its way to write figures."""
  forward = [model_row("forward", 512, **speed(1790.4, 205, ratio=1.2184, matmul_share=0.431)),
             model_row("forward", 512, ours=False, **speed(1470, 197)), model_row("forward", 8192, left_out="no time")]
  train = [model_row("train", 512, **speed(410, 1230, ratio=0.928)), model_row("train", 512, "muon", **speed(68, 1)),
           model_row("train", 512, ours=False, **speed(442, 1615)),
           model_row("train", 512, "checkpointing", False, **speed(332, 1103)),
           model_row("train", 8192, "remat", **speed(402, 319)), model_row("train", 16384, "remat", failed="no room")]
  remat = [model_row("remat", 2048, policy, seconds_min=seconds, **speed(1, kib)) for policy, seconds, kib in (
    ("none", 2.0, 795), ("mhc", 2.1, 576), ("full", 2.54, 424))]
  plan = {"config": "configs/pod_flash_4k.py", "topology": "v5p:4x4x8", "devices": 128, "sequence_length": 4096,
          "step": "train", "fits": True, "memory": {"all": 85.5 * 2**30, "peak": 59.6 * 2**30},
          "hbm_bytes": int(95.74 * 2**30), "bounds": {"step": 211.4}, "utilization": 0.52, **HEAD}
  files = [file_of(tmp_path / f"{name}.json", rows) for name, rows in (("f", forward), ("t", train), ("r", remat))]
  (tmp_path / "p.json").write_text(json.dumps(plan))
  text = tables.markdown(tables.read([*files, str(tmp_path / "p.json")]))
  readme = README.read_text(encoding="utf-8")
  assert len(heads(text)) == 4 and all(head in heads(readme) for head in heads(text))
  assert all(f"| {kept} |" in readme for kept in tables.KEPT.values())
  lines = text.splitlines()
  for line in ("| 512 | 1,790 | 1,470 | 1.2 | 205 | 197 | 43% |", "| 8,192 |  |  |  |  |  |  |",
               "| 512 | 410 |  | 442 | 332 | **0.93** | 1,230 | 1,615, 1,103 | 68 |",
               "| 8,192 |  | 402 |  |  |  | 319 |  |  |", "| 16,384 |  |  |  |  |  |  |  |  |",
               "| `none` | everything | 1.00 | 795 |", "| `full` | streams in front of groups of layers | 1.27 | 424 |",
               "| `block` | streams in front of each layer |  |  |",
               "| `pod_flash_4k`, 4,096, v5p:4x4x8 | 128 | 59.6 | 85.5 of 95.7, fits | 211 s | 52% |"):
    assert line in lines, line
  assert lines[0] == "a processor, 2 cores, jax 1.2, torch 3, 2026-01-02"
  assert "jax 1.2, libtpu 0.1, 2026-01-02" in lines
  large = plan | {"fits": False, "topology": "TPU7x:2x2x1", "devices": 8, "hbm_bytes": 50 * 2**30,
                  "memory": {"all": 60 * 2**30, "peak": 40 * 2**30}}  # a chip is two devices
  row = "| `pod_flash_4k`, 4,096, TPU7x:2x2x1 | 4 | 80.0 | **120.0 of 100.0, does not fit** | 211 s | 52% |"
  assert row in tables.markdown([large])
  two = plan | {"mesh": {"dcn_data": 2}, "devices": 256, "step": "decode"}
  assert "| `pod_flash_4k`, 4,096, 2 slices of v5p:4x4x8, decode | 256 |" in tables.markdown([two])


def test_a_decode_table_has_a_column_for_each_side(tmp_path):
  rows = [model_row("prefill", 512, **speed(1000.4, 1, ratio=2.5, matmul_share=0.456)),
          model_row("prefill", 512, ours=False, **speed(400.0, 1))]
  text = tables.markdown(tables.read([file_of(tmp_path / "a.json", rows)]))
  assert text.splitlines()[-1] == "| prefill 512 | 1,000 | 400 | 2.50 | 46% |"


def test_tables_of_a_file_of_all_benches(tmp_path):
  """Of the parts that README has tables for; the others, and those that wrote nothing, are passed over."""
  parts = {"start": HEAD | {"rows": [{"case": "import"}]}, "train": {"left_out": "stopped"},
           "forward": HEAD | {"rows": [model_row("forward", 512, **speed(5, 1))]},
           "kernels_v6e": HEAD | {"rows": [kernel_row("v6e", "ours", 100) | {"left_out": "time"}]}}
  (tmp_path / "all.json").write_text(json.dumps(HEAD | {"parts": parts}))
  text = tables.markdown(tables.read([str(tmp_path / "all.json")]))
  assert "| 512 | 5 |" in text and "| CSA attention, 4,096, forward | - |" in text and len(heads(text)) == 2


@pytest.mark.parametrize("content", ["", "[]", '{"rows": []}', '{"rows": [{"case": "x"}]}'])
def test_other_files_are_refused(tmp_path, content):
  (tmp_path / "x.json").write_text(content)
  with pytest.raises(ValueError, match="x.json: expected a file that a bench wrote with --json"):
    tables.read([str(tmp_path / "x.json")])
  with pytest.raises(ValueError, match="other bench than kernels"):
    tables.markdown([HEAD | {"rows": [{"case": "x", "kind": "overlap"}]}])


def test_a_part_that_fails_does_not_stop_the_others():
  def run(command, seconds):
    if "decode" in command:
      return 3
    rows = {"rows": [{}, {}], "targets": [{"reached": True}, {"reached": False}, {"reached": None}]}
    Path(command[command.index("--json") + 1]).write_text(json.dumps(rows))
    return 0
  said, kept, known = [], [], everything.parts("transformers")
  found = everything.measure(everything.chosen(["forward", "decode", "context"], known), said.append, run,
                             lambda so_far: kept.append(list(so_far)))
  assert kept == [["forward"], ["forward", "decode"], ["forward", "decode", "context"]]
  assert list(found) == ["forward", "decode", "context"] and found["decode"] == {"failed": "exit code 3"}
  assert everything.summary(found).splitlines() == [
    "forward         2 rows, 1 of 2 targets reached", "decode          exit code 3",
    "context         2 rows, 1 of 2 targets reached"]
  assert "launch.bench forward --against transformers" in said[0]


def test_every_part_is_a_command_that_exists():
  assert {"forward", "train", "decode", "kernels_v5p", "kernels_v6e", "kernels_tpu7x", "plan"} <= set(everything.parts(None))
  assert not any("--against" in part.arguments for part in everything.parts(None).values())
  with pytest.raises(ValueError, match="--parts = 'fast': expected some of start, forward"):
    everything.chosen(["fast"], everything.parts(None))
