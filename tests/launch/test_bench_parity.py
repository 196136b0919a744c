"""Both sides of the bench of decoding compute the same, chunks and single tokens, at a size at which that takes a second."""

import dataclasses

import numpy as np
import pytest

from deepseek_v4.config import CSA, HCA, LEARNED
from launch.benchmarks import cases, ours, run, theirs
from launch.benchmarks.cases import DECODE, OURS, TRANSFORMERS, Case
from pallas_kernels import grouped_matmul
from tests.launch.test_bench import SMALL

LENGTH = 60
SIDES = ((ours, OURS), (theirs, TRANSFORMERS))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
  """The folder with the weights of a small model, which both sides then take for theirs: one layer of each kind that keeps
  entries, and every entry is picked."""
  config = dataclasses.replace(SMALL, hidden_size=12, vocab_size=50, index_topk=LENGTH, num_hidden_layers=2,
                               layer_types=(CSA, HCA), mlp_layer_types=(LEARNED,) * 2)
  folder = tmp_path_factory.mktemp("weights")
  with pytest.MonkeyPatch.context() as patch:
    for module in (cases, ours, theirs):
      for name in ("model_config", "check_config"):
        patch.setattr(module, name, lambda **changes: dataclasses.replace(config, **changes))
      patch.setattr(module, "LOGITS_CHUNK", 17)
      patch.setattr(module, "LOGITS_SINGLE", 9)
    ours.prepare(Case("weights", OURS, 0), folder)
    yield folder


def test_cached_logits_agree(weights, monkeypatch):
  """The program that is checked is the one that is timed: a token alone does not come to all experts."""
  picks, few_picks = [], grouped_matmul.few_picks
  monkeypatch.setattr(grouped_matmul, "few_picks", lambda x, experts, *rest, **options: picks.append(experts.shape) or (
    few_picks(x, experts, *rest, **options)))
  for module, side in SIDES:
    assert module.prepare(Case("cached_logits", side, LENGTH), weights) is None
  found = [np.load(weights / f"logits {side}.npy") for side in (OURS, TRANSFORMERS)]
  assert found[0].shape == (cases.LOGITS_ROWS, LENGTH, 50) and found[1].std() > 0.01
  assert "every place of 4 of 4 rows" in run.agreement(*found, TRANSFORMERS)
  assert set(picks) == {(1, SMALL.num_experts_per_tok)}


def test_timed_replies_are_compared(weights, monkeypatch):
  passes = {}
  for module, side in SIDES:
    monkeypatch.setattr(module, "NEW_TOKENS", 4)
    case = Case(DECODE, side, LENGTH)
    passes[case] = module.prepare(case, weights)[0]()
  assert [len(parts["tokens"]) for parts in passes.values()] == [5, 5]
  (line,) = run.compare_tokens(passes)
  assert line == f"decode {LENGTH}: transformers replies the same 5 tokens as ours"
