"""Both sides of the bench of decoding compute the same, chunks and single tokens, at a size at which that takes a second."""

import dataclasses

import numpy as np

from launch.benchmarks import cases, ours, run, theirs
from launch.benchmarks.cases import OURS, TRANSFORMERS, Case
from tests.launch.test_bench import SMALL


def test_cached_logits_agree(monkeypatch, tmp_path):
  length = 60
  config = dataclasses.replace(SMALL, hidden_size=12, vocab_size=50, index_topk=length)
  for module in (cases, ours, theirs):
    for name in ("model_config", "check_config"):
      monkeypatch.setattr(module, name, lambda **changes: dataclasses.replace(config, **changes))
    monkeypatch.setattr(module, "LOGITS_CHUNK", 16)
    monkeypatch.setattr(module, "LOGITS_SINGLE", 9)
  ours.prepare(Case("weights", OURS, 0), tmp_path)
  for module, side in ((ours, OURS), (theirs, TRANSFORMERS)):
    assert module.prepare(Case("cached_logits", side, length), tmp_path) is None
  found = [np.load(tmp_path / f"logits {side}.npy") for side in (OURS, TRANSFORMERS)]
  assert found[0].shape == (cases.LOGITS_ROWS, length, 50) and found[1].std() > 0.01
  assert "every place of 4 of 4 rows" in run.agreement(*found, TRANSFORMERS)
