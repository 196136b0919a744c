"""Host memory of a conversion, as the system counts it: the same for a model of four times the layers."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deepseek_v4.config import CSA, HASH, HCA, LEARNED, SLIDING
from tests.checkpoint.releases import CONFIG, make_release

ROOT = Path(__file__).resolve().parents[2]
BOUND = 16_000_000  # bytes of a part, of what is read together, and of a written file
# Anonymous pages only: files that are mapped are the system's to drop.
MEASURE = f"""
import gc, json, sys, threading, time
from pathlib import Path
from deepseek_v4.checkpoint import convert

convert.READ_BYTES = {BOUND}

def resident():
  (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
  return 1024 * int(line.split()[1])

def peak(work):
  gc.collect()
  before, seen, done = resident(), [], threading.Event()
  def look():
    while not done.wait(0.002):
      seen.append(resident())
  thread = threading.Thread(target=look)
  thread.start()
  work()
  done.set()
  thread.join()
  return max(seen) - before

def both_ways(release, folder):
  folder.mkdir()
  there = lambda: convert.to_checkpoint(release, folder / "ours", dtype="bfloat16", part_bytes={BOUND})
  back = lambda: convert.to_release(folder / "ours", folder / "back", max_file_bytes={BOUND})
  return [peak(there), peak(back)]

tiny, release, folder = map(Path, sys.argv[1:])
both_ways(tiny, folder / "tiny")
print(json.dumps(both_ways(release, folder / "model")))
"""


def model(repeats):
  """Layers of about 13 MB in FP8."""
  kinds = (SLIDING, CSA, HCA, CSA, HCA) * repeats
  return dataclasses.replace(CONFIG, hidden_size=512, n_routed_experts=32, moe_intermediate_size=256,
                             num_nextn_predict_layers=0, num_hidden_layers=len(kinds), layer_types=kinds,
                             mlp_layer_types=(HASH,) + (LEARNED,) * (len(kinds) - 1))


@pytest.mark.long
def test_memory_does_not_grow_with_the_model(tmp_path, capsys):
  """60 and 260 MB, both ways. Between the peaks a part or two are allowed: where parts are cut differs between the models. A
  converter that holds all of a model would differ by 400 MB."""
  make_release(tmp_path / "tiny")
  peaks = {}
  for repeats in (1, 4):
    release, folder = tmp_path / f"release_{repeats}", tmp_path / f"model_{repeats}"
    make_release(release, model(repeats), quantization="fp8", max_file_bytes=BOUND)
    folder.mkdir()
    found = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path / "tiny"), str(release), str(folder)], cwd=ROOT,
                           env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=600)
    assert found.returncode == 0, found.stderr
    size = sum(file.stat().st_size for file in release.iterdir() if file.is_file())
    peaks[size] = json.loads(found.stdout.splitlines()[-1])
  (small, of_small), (large, of_large) = sorted(peaks.items())
  with capsys.disabled():
    for size, (there, back) in peaks.items():
      print(f"\n{size / 1e6:.0f} MB: {there / 1e6:.0f} MB to a checkpoint, {back / 1e6:.0f} MB back", end="")
  assert large > 3.9 * small > 2e8
  for one, other in zip(of_small, of_large, strict=True):
    assert abs(other - one) < 2 * BOUND, peaks
