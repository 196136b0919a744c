"""The miniature of the stages: how its figures are put together; run short, and given again, as a long test."""

import dataclasses

import matplotlib.image
import pytest

from deepseek_v4.analysis import plots
from deepseek_v4.analysis.selection_mass import Mass
from deepseek_v4.config import override
from deepseek_v4.training import metrics, stages
from launch.miniatures import stages as miniature


def found(trained, sparse):
  mass = lambda held: Mass(held, 0.95, 0.3, 100)
  return miniature.Found({32: 0.7, 48: 0.81}, 48, {1: mass(0.4), 3: mass(0.5)}, {1: mass(trained), 3: mass(0.9)}, 1.5,
                         sparse, 1.9)


def test_goals_are_for_the_worst_layer_and_seed():
  mass, cost = miniature.targets([found(0.85, 1.51), found(0.81, 1.515)])
  assert mass["value"] == 0.81 and mass["reached"] and cost["value"] == pytest.approx(0.015) and cost["reached"]
  mass, cost = miniature.targets([found(0.85, 1.51), found(0.79, 1.52001)])
  assert not mass["reached"] and not cost["reached"]
  assert "untrained 40%" in mass["target"] and "with the untrained indexer 0.400" in cost["target"]  # 1.9 - 1.5


def test_the_fewest_picks_that_hold_enough_are_chosen():
  assert miniature.chosen({64: 0.85, 32: 0.79, 48: 0.8}) == 48
  assert miniature.chosen({32: 0.5, 64: 0.7}) == 64
  run = miniature.settings(0)
  assert set(miniature.PICKS) >= {run.model.index_topk}
  assert max(miniature.PICKS) < stages.of_stage(run, miniature.WARM_UP).data.sequence_length // run.model.csa_compress_rate


def test_the_table_has_the_untrained_indexer_beside_the_trained_one():
  rows = miniature.rows_of(2, found(0.85, 1.51))
  assert [row["what"] for row in rows] == ["layer 1: mass on 48 picks", "layer 3: mass on 48 picks", "held-out loss, nats"]
  assert list(rows[0].values()) == [2, "layer 1: mass on 48 picks", 0.4, 0.85, 0.95, 0.3]
  assert list(rows[2].values())[2:] == [1.9, 1.51, 1.5, None]
  assert len({tuple(row) for row in rows}) == 1


def test_means_are_over_all_queries():
  assert miniature.joined([Mass(0.5, 1.0, 0.25, 30), Mass(0.9, 1.0, 0.5, 10)]) == Mass(
    pytest.approx(0.6), 1.0, pytest.approx(0.3125), 40)


def test_the_run_goes_through_the_stages_of_v4():
  """Dense without the indexer, the indexer alone, sparse; rows grow."""
  run = miniature.settings(3)
  found = {phase.stage: phase.stage_config for phase in stages.phases(run)}
  assert [(x.training.attention_mode, x.training.trainable) for x in found.values()] == [
    ("dense", "all_but_indexer"), ("dense", "all_but_indexer"), ("dense", "indexer"), ("sparse", "all")]
  lengths = [x.data.sequence_length for x in found.values()]
  assert lengths == sorted(lengths) and lengths[0] < lengths[2] < lengths[3]
  entries = [length // run.model.csa_compress_rate for length in lengths]
  assert entries[2] >= 2 * run.model.index_topk and entries[3] >= 4 * run.model.index_topk  # much is not picked
  assert (run.data.seed, run.training.seed) == (3, 3)


def test_the_picture_is_drawn(tmp_path):
  lines = [{"split": split, "step": n, "stage": "dense" if n < 6 else "sparse", "next_token": 3 - 0.1 * n}
           | ({"indexer": 0.5} if n > 5 else {}) for n in range(1, 10) for split in ("train", "held_out")]
  plots.stages_and_mass(lines, tmp_path / "a.png", {"layer 1": (0.3, 0.8, 0.9), "layer 3": (0.2, 0.85, 0.9)})
  plots.stages_and_mass(lines, tmp_path / "b.png", {"layer 1": (0.3, 0.1, 0.9), "layer 3": (0.2, 0.85, 0.9)})
  a, b = (matplotlib.image.imread(tmp_path / name) for name in ("a.png", "b.png"))
  assert a.shape == b.shape and 0.001 < (a != b).any(-1).mean() < 0.2  # a bar is lower, and nothing else


@pytest.mark.long
def test_a_short_one_learns_and_goes_on(tmp_path, monkeypatch):
  settings = miniature.settings
  short = ["model.hidden_size=32", "model.index_topk=8", "stages.dense.steps=8", "stages.dense.ramp_steps=4",
           "stages.dense.sequence_length=64", "stages.dense_long.steps=4", "stages.dense_long.sequence_length=96",
           "stages.indexer_warm_up.steps=60", "stages.indexer_warm_up.sequence_length=128",
           "stages.indexer_warm_up.decay_steps=20", "stages.sparse.steps=3", "stages.sparse.sequence_length=128",
           "optimizer.decay_steps=2", "training.eval_every=1000"]
  monkeypatch.setattr(miniature, "settings", lambda seed: override(settings(seed), short))
  for name in ("CHOOSING_BATCHES", "MASS_BATCHES", "LOSS_BATCHES"):
    monkeypatch.setattr(miniature, name, 2)
  monkeypatch.setattr(miniature, "PICKS", (4, 8, 16))
  result = miniature.run(tmp_path, 1, print)
  lines = metrics.read_lines(tmp_path / "seed0" / metrics.LINES)
  kl = [line["indexer"] for line in lines if line.get("stage") == "indexer_warm_up" and line["split"] == "train"]
  assert kl[-1] < 0.7 * kl[0]
  frozen = {line["step"]: line["next_token"] for line in lines if line["split"] == "train"}
  assert all(value < 6 for value in frozen.values())
  for row in result.rows[:-1]:
    assert row["untrained indexer"] < row["after its warm-up"] <= row["all entries / best picks"]
  assert (tmp_path / result.picture).stat().st_size > 10_000
  again = miniature.run(tmp_path, 1, print)  # nothing is left to train
  assert again.rows == result.rows and dataclasses.asdict(again)["targets"] == result.targets
