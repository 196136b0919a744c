"""V4's stages on the standard library's sources: what the indexer's warm-up teaches, and what going sparse costs then.

The run of configs/tiny_stages.py: dense attention on rows that grow, the indexer alone, sparse attention. Its checkpoints at
the borders hold the same model with an untrained and with a trained indexer, since all else is frozen in between. On
held-out text in rows of the warm-up's length they say
  - which share of the dense attention's mass lies on the entries that the indexer picks (analysis/selection_mass.py),
  - how much the loss is with all entries and with the picks alone, weights being equal.

The number of picks is chosen on other documents than those that judge: the smallest of `PICKS` with which the trained
indexer reaches the goal there in every layer. Weights up to the switch do not depend on it, since attention is dense.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence

import jax
import numpy as np

from deepseek_v4.analysis import plots
from deepseek_v4.analysis.selection_mass import Mass, model_mass
from deepseek_v4.checkpoint.store import restore_variables
from deepseek_v4.config import RunConfig, load
from deepseek_v4.model.transformer import DeepseekV4
from deepseek_v4.training import feed, loop, metrics, stages
from deepseek_v4.training.state import TrainState
from deepseek_v4.training.step import make_eval_step
from launch.miniatures import Result, runs

DESCRIPTION = "dense attention, the indexer's warm-up, sparse attention: what the indexer keeps, what the switch costs"
CONFIG = Path(__file__).resolve().parents[2] / "configs" / "tiny_stages.py"
WARM_UP, SPARSE = "indexer_warm_up", "sparse"
PICTURE = "stages.png"
PICKS = (32, 48, 64, 80, 96)  # that are tried
CHOOSING_BATCHES, MASS_BATCHES, LOSS_BATCHES = 4, 8, 24  # at most, of each share of the held-out text
MASS_GOAL, COST_GOAL = 0.8, 0.02


@dataclasses.dataclass(frozen=True)
class Found:
  """What one run showed, in nats per token and shares of the attention's mass by CSA layer.

  Attributes:
    tried: picks -> the least mass that a layer's picks hold on the documents that choose, after the warm-up.
    picks: how many were chosen; all else is judged with them, on other documents.
    untrained, trained: mass on the indexer's picks before and after its warm-up.
    dense, sparse: held-out loss with the weights at the switch.
    sparse_untrained: the same, sparse, with the indexer as it was before.
  """

  tried: Mapping[int, float]
  picks: int
  untrained: Mapping[int, Mass]
  trained: Mapping[int, Mass]
  dense: float
  sparse: float
  sparse_untrained: float


def run(workdir: Path, seeds: int, say: Callable[[str], None]) -> Result:
  """Trains and measures `seeds` runs; see `launch.miniatures`."""
  found = []
  for seed in range(seeds):
    run_config, folder = settings(seed), workdir / f"seed{seed}"
    runs.trained(run_config, folder, loop.train, say)
    say(f"seed {seed}: measuring on held-out text")
    found.append(measure(run_config, folder, workdir / "text"))
    say(f"seed {seed}: least mass of a layer on the documents that choose: " + ", ".join(
      f"{picks} picks {held:.1%}" for picks, held in found[-1].tried.items()) + f"; judged with {found[-1].picks}")
  first = found[0]
  plots.stages_and_mass(metrics.read_lines(workdir / "seed0" / metrics.LINES), workdir / PICTURE, {
    f"layer {layer}": (first.untrained[layer].held, mass.held, mass.best) for layer, mass in first.trained.items()})
  rows = [row for seed, one in enumerate(found) for row in rows_of(seed, one)]
  return Result(rows, targets(found), PICTURE)


def settings(seed: int) -> RunConfig:
  """The run of a seed: every checkpoint stays."""
  run_config = load(CONFIG)
  return dataclasses.replace(run_config, data=dataclasses.replace(run_config.data, seed=seed),
                             training=dataclasses.replace(run_config.training, seed=seed, keep_checkpoints=1000))


def measure(run_config: RunConfig, folder: Path, text: Path) -> Found:
  """Looks at the checkpoints before and behind the warm-up of a finished run.

  Args:
    text: folder for the two shares of the held-out text.
  """
  border = next(phase for phase in stages.phases(run_config) if phase.stage == WARM_UP)
  before, after = (variables_of(folder, step) for step in (border.begin, border.begin + border.steps))
  shares = {name: batches_of(dataclasses.replace(run_config, data=data))
            for name, data in runs.shares(run_config.data, text).items()}
  dense = stages.of_stage(run_config, WARM_UP)
  choosing = shares[runs.CHOOSING][:CHOOSING_BATCHES]
  tried = {picks: min(mass.held for mass in mass_of(dense, after, choosing, picks).values()) for picks in PICKS}
  picks = chosen(tried)
  sparse = with_picks(dataclasses.replace(dense, training=stages.of_stage(run_config, SPARSE).training), picks)
  judging = shares[runs.JUDGING]
  untrained, trained = (mass_of(dense, variables, judging[:MASS_BATCHES], picks) for variables in (before, after))
  return Found(tried, picks, untrained, trained, loss_of(dense, after, judging), loss_of(sparse, after, judging),
               loss_of(sparse, before, judging))


def chosen(tried: Mapping[int, float]) -> int:
  """The fewest picks that hold as much as is asked for; the most where none do."""
  return next((picks for picks, held in sorted(tried.items()) if held >= MASS_GOAL), max(tried))


def with_picks(run_config: RunConfig, picks: int) -> RunConfig:
  """The same with another number of picks, which no weight depends on."""
  return dataclasses.replace(run_config, model=dataclasses.replace(run_config.model, index_topk=picks))


def batches_of(run_config: RunConfig) -> list[Mapping[str, np.ndarray]]:
  """Held-out batches in rows of the warm-up's length."""
  rows = feed.in_shape_of(feed.dataset(run_config, "held_out"), stages.of_stage(run_config, WARM_UP))
  with contextlib.closing(iter(rows)) as batches:
    return list(itertools.islice(batches, LOSS_BATCHES))


def variables_of(folder: Path, step: int) -> dict[str, Any]:
  """The weights after a step of the run in `folder`."""
  return restore_variables(folder / loop.CHECKPOINTS, step=step)[0]


def mass_of(run_config: RunConfig, variables: Any, batches: Sequence[Mapping[str, np.ndarray]],
            picks: int) -> dict[int, Mass]:
  """Mass on so many picks of every CSA layer's indexer, over all batches together."""
  rows = [{name: x.reshape(-1, x.shape[-1]) for name, x in batch.items()} for batch in batches]
  model = DeepseekV4(run_config.model, run_config.training.kernels)
  parts = [model_mass(model, variables, row["tokens"], row["positions"], row["segment_ids"], picks)
           for row in rows]
  return {layer: joined([part[layer] for part in parts]) for layer in parts[0]}


def joined(parts: list[Mass]) -> Mass:
  """Several means as one over all their queries."""
  counts = [part.queries for part in parts]
  mean = lambda name: float(np.average([getattr(part, name) for part in parts], weights=counts))
  return Mass(mean("held"), mean("best"), mean("even"), sum(counts))


def loss_of(run_config: RunConfig, variables: Any, batches: Sequence[Mapping[str, np.ndarray]]) -> float:
  """Nats per token of the batches with a stage's way of attending."""
  score, state = make_eval_step(run_config), TrainState(0, variables["params"], variables["router"], (), jax.random.key(0))
  sums = [jax.device_get(score(state, batch)) for batch in batches]
  return float(sum(s["next_token_sum"] for s in sums) / sum(s["next_token_count"] for s in sums))


# ---- what is said ------------------------------------------------------------------------------------------------------
def rows_of(seed: int, found: Found) -> list[dict[str, Any]]:
  """A line of the table for every CSA layer, and one for the loss."""
  lines = [{"seed": seed, "what": f"layer {layer}: mass on {found.picks} picks",
            "untrained indexer": found.untrained[layer].held, "after its warm-up": mass.held,
            "all entries / best picks": mass.best, "picks at random": mass.even}
           for layer, mass in found.trained.items()]
  return lines + [{"seed": seed, "what": "held-out loss, nats", "untrained indexer": found.sparse_untrained,
                   "after its warm-up": found.sparse, "all entries / best picks": found.dense, "picks at random": None}]


def targets(found: list[Found]) -> list[dict[str, Any]]:
  """The two goals, each for the worst layer and seed, with what the untrained indexer shows there."""
  one, layer = min(((one, layer) for one in found for layer in one.trained), key=lambda at: at[0].trained[at[1]].held)
  mass, untrained = one.trained[layer].held, one.untrained[layer].held
  worst = max(found, key=lambda one: one.sparse - one.dense)
  cost = worst.sparse - worst.dense
  return [
    {"target": f"after the warm-up the indexer's picks hold {MASS_GOAL:.0%} of the attention's mass on held-out text "
               f"(untrained {untrained:.0%} in the same layer)",
     "bound": MASS_GOAL, "value": mass, "reached": mass >= MASS_GOAL},
    {"target": f"the switch to sparse attention costs under {COST_GOAL} nats per token (with the untrained indexer "
               f"{worst.sparse_untrained - worst.dense:.3f})",
     "bound": COST_GOAL, "value": cost, "reached": cost < COST_GOAL}]
