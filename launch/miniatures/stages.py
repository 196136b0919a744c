"""V4's stages on the standard library's sources: what the indexer's warm-up teaches, and what going sparse costs then.

The run of configs/tiny_stages.py: dense attention on rows that grow, the indexer alone, sparse attention. Its checkpoints at
the borders hold the same model with an untrained and with a trained indexer, since all else is frozen in between. On
held-out text in rows of the warm-up's length they say
  - which share of the dense attention's mass lies on the entries that the indexer picks (analysis/selection_mass.py),
  - how much the loss is with all entries and with the picks alone, weights being equal.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any, Callable, Mapping

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
from launch.miniatures import Result

DESCRIPTION = "dense attention, the indexer's warm-up, sparse attention: what the indexer keeps, what the switch costs"
CONFIG = Path(__file__).resolve().parents[2] / "configs" / "tiny_stages.py"
WARM_UP, SPARSE = "indexer_warm_up", "sparse"
PICTURE = "stages.png"
MASS_BATCHES, LOSS_BATCHES = 8, 24  # of held-out text
MASS_GOAL, COST_GOAL = 0.8, 0.02


@dataclasses.dataclass(frozen=True)
class Found:
  """What one run showed, in nats per token and shares of the attention's mass by CSA layer.

  Attributes:
    untrained, trained: mass on the indexer's picks before and after its warm-up.
    dense, sparse: held-out loss with the weights at the switch.
    sparse_untrained: the same, sparse, with the indexer as it was before.
  """

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
    loop.train(run_config, folder)
    say(f"seed {seed}: measuring on held-out text")
    found.append(measure(run_config, folder))
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


def measure(run_config: RunConfig, folder: Path) -> Found:
  """Looks at the checkpoints before and behind the warm-up of a finished run."""
  border = next(phase for phase in stages.phases(run_config) if phase.stage == WARM_UP)
  dense = stages.of_stage(run_config, WARM_UP)
  sparse = dataclasses.replace(dense, training=stages.of_stage(run_config, SPARSE).training)
  batches = list(itertools.islice(feed.in_shape_of(feed.dataset(run_config, "held_out"), dense), LOSS_BATCHES))
  before, after = (variables_of(folder, step) for step in (border.begin, border.begin + border.steps))
  return Found(mass_of(sparse, before, batches[:MASS_BATCHES]), mass_of(sparse, after, batches[:MASS_BATCHES]),
               loss_of(dense, after, batches), loss_of(sparse, after, batches), loss_of(sparse, before, batches))


def variables_of(folder: Path, step: int) -> dict[str, Any]:
  """The weights after a step of the run in `folder`."""
  return restore_variables(folder / loop.CHECKPOINTS, step=step)[0]


def mass_of(run_config: RunConfig, variables: Any, batches: list[Mapping[str, np.ndarray]]) -> dict[int, Mass]:
  """Mass on the picks of every CSA layer's indexer, over all batches together."""
  rows = [{name: x.reshape(-1, x.shape[-1]) for name, x in batch.items()} for batch in batches]
  model = DeepseekV4(run_config.model, run_config.training.kernels)
  parts = [model_mass(model, variables, row["tokens"], row["positions"], row["segment_ids"]) for row in rows]
  return {layer: joined([part[layer] for part in parts]) for layer in parts[0]}


def joined(parts: list[Mass]) -> Mass:
  """Several means as one over all their queries."""
  counts = [part.queries for part in parts]
  mean = lambda name: float(np.average([getattr(part, name) for part in parts], weights=counts))
  return Mass(mean("held"), mean("best"), mean("even"), sum(counts))


def loss_of(run_config: RunConfig, variables: Any, batches: list[Mapping[str, np.ndarray]]) -> float:
  """Nats per token of the batches with a stage's way of attending."""
  score, state = make_eval_step(run_config), TrainState(0, variables["params"], variables["router"], (), jax.random.key(0))
  sums = [jax.device_get(score(state, batch)) for batch in batches]
  return float(sum(s["next_token_sum"] for s in sums) / sum(s["next_token_count"] for s in sums))


# ---- what is said ------------------------------------------------------------------------------------------------------
def rows_of(seed: int, found: Found) -> list[dict[str, Any]]:
  """A line of the table for every CSA layer, and one for the loss."""
  lines = [{"seed": seed, "what": f"layer {layer}: mass on the picks", "untrained indexer": found.untrained[layer].held,
            "after its warm-up": mass.held, "all entries / best picks": mass.best, "picks at random": mass.even}
           for layer, mass in found.trained.items()]
  return lines + [{"seed": seed, "what": "held-out loss, nats", "untrained indexer": found.sparse_untrained,
                   "after its warm-up": found.sparse, "all entries / best picks": found.dense, "picks at random": None}]


def targets(found: list[Found]) -> list[dict[str, Any]]:
  """The two goals, each for the worst layer and seed."""
  mass = min(mass.held for one in found for mass in one.trained.values())
  cost = max(one.sparse - one.dense for one in found)
  return [
    {"target": f"after the warm-up the indexer's picks hold {MASS_GOAL:.0%} of the attention's mass on held-out text",
     "bound": MASS_GOAL, "value": mass, "reached": mass >= MASS_GOAL},
    {"target": f"the switch to sparse attention costs under {COST_GOAL} nats per token", "bound": COST_GOAL, "value": cost,
     "reached": cost < COST_GOAL}]
