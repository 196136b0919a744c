"""Anticipatory routing: for a while after a spike older parameters choose the experts (report 4.2.3).

At step t everything is computed with the parameters of step t, but for the experts' numbers: these the parameters of step
t - delay have chosen, whose forward-only pass over the batch of step t was made then. So a step's update cannot feed back
into its own choice of experts at once. Gate weights are current scores; balance loss and bias follow the experts that were
used. The report gives neither the delay nor the length of the period; both are settings.

Where parameters of t - delay do not exist or are not on disk, the oldest that are serve: those of the last checkpoint or of
the period's beginning, if that is nearer. There all batches up to t + delay are passed through at once. So nothing of the
period but where it ends (`Record.anticipate_until`) has to be saved: a run that goes on from any of the checkpoints of its
rhythm computes what an undisturbed one does, bit for bit. One that was told to stop between two of them goes on with choices
of the parameters it stopped at, and is as well determined, but not the undisturbed run.

Axis letters: A accumulation   B rows   S sequence   L layers   k experts per token
"""

from __future__ import annotations

import collections
import dataclasses
import time
from typing import Any, Callable, Mapping

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from deepseek_v4 import sharding
from deepseek_v4.config import RunConfig
from deepseek_v4.model.transformer import DeepseekV4
from deepseek_v4.training import stages
from deepseek_v4.training.ahead import Ahead
from deepseek_v4.training.anomalies import Record
from deepseek_v4.training.feed import abstract_batch
from deepseek_v4.training.state import TrainState, abstract_state
from deepseek_v4.training.step import compiler_options, make_train_step, runs_mtp


def make_routing_pass(run_config: RunConfig, mesh: Mesh | None = None) -> sharding.OnMesh:
  """The jitted forward-only pass (state, batch) -> the experts that the state's parameters choose for the batch.

  A batch with what it returns added is one of which `make_train_step` takes the experts as given: "experts" int32
  [A, B, S, L, k] of the layers, and "mtp_experts" int32 [A, B, S, k] of the prediction block, if the model has one.

  Args:
    run_config: the run.
    mesh: devices; None = the default device alone.

  Returns:
    A callable, also with `.lower(state, batch)`; the state is not consumed.

  Raises:
    ValueError: sizes that the mesh does not divide.
  """
  run_config = stages.of_stage(run_config)
  model = DeepseekV4(run_config.model, run_config.training.kernels)

  def choose(state: TrainState, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    def one(rows: Any) -> Any:
      out = model.apply({"params": state.params, "router": state.router}, rows["tokens"], rows["positions"],
                        rows["segment_ids"], logits="none", mtp=runs_mtp(run_config),
                        attention_mode=run_config.training.attention_mode)
      found = {"experts": jnp.moveaxis(out.routing["experts"], 0, 2)}
      return found | ({"mtp_experts": out.routing["mtp_experts"]} if "mtp_experts" in out.routing else {})
    return jax.lax.map(one, dict(batch))

  options: dict[str, Any] = {"compiler_options": compiler_options(mesh)}
  if mesh is not None:
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(run_config, mesh))
    rows = sharding.batch_sharding(mesh)
    options |= {"in_shardings": (places, rows), "out_shardings": rows}
  return sharding.OnMesh(jax.jit(choose, **options), mesh)


def last_of_cut(step: int, record: Record, run_config: RunConfig, end: int) -> int:
  """The last step whose experts may be chosen ahead after `step` steps: that of the period, of the run (or of its stage,
  which ends with step `end`), and before the next checkpoint, where the choices are made anew."""
  every = run_config.training.checkpoint_every
  return min(record.anticipate_until, end, (step // every + 1) * every)


@dataclasses.dataclass
class _Waiting:
  """A batch taken for a step to come, and the experts chosen for it, at which step."""

  taken: Any
  experts: dict[str, jax.Array] | None = None
  chosen_at: int = 0


class Anticipation:
  """The steps of a run: plain ones, and in a period of anticipatory routing those with older choices.

  Args:
    run_config, mesh: of the run.
    plain_step: its compiled step (state, batch) -> (state, metrics).
    end: the last step that has batches of this shape.
    say: prints a line.
  """

  def __init__(self, run_config: RunConfig, mesh: Mesh | None, plain_step: Callable[..., Any], end: int,
               say: Callable[[str], None]) -> None:
    self._run_config, self._mesh, self._plain, self._end, self._say = run_config, mesh, plain_step, end, say
    self._waiting: collections.deque[_Waiting] = collections.deque()
    self._choose: Any = None  # both are compiled when the first period begins
    self._replayed: Any = None
    self._passes, self._seconds = 0, 0.0

  def active(self, step: int, record: Record) -> bool:
    """Whether the step after `step` steps takes older choices."""
    return step < record.anticipate_until and self._run_config.anomalies.anticipation_delay > 0

  def take(self, ahead: Ahead, place: Any, give_up: Callable[[], bool]) -> Any:
    """The next step's batch, as `ahead.get` returns it; in a period those of `delay` further steps are then waiting.

    Nothing runs on the devices here: processes that wait for data in vain and those that got theirs can still agree to stop.

    Args:
      ahead: brings the batches.
      place: where the run stands: `step`, `state` (for which the first period's programs are compiled) and `record`.
      give_up: whether to stop waiting; then the result is None.
    """
    if not self.active(place.step, place.record):
      return ahead.get(give_up)
    if self._choose is None:
      self._compile(place.state)
    last = last_of_cut(place.step, place.record, self._run_config, self._end)
    wanted = 1 + min(self._run_config.anomalies.anticipation_delay, last - place.step - 1)
    while len(self._waiting) < wanted:
      taken = ahead.get(give_up)
      if taken is None:
        return None
      self._waiting.append(_Waiting(taken))
    return self._waiting[0].taken

  def step(self, place: Any, taken: Any) -> tuple[Any, dict[str, Any]]:
    """The step on the batch that `take` returned: (state, metrics). In a period the metrics have also "routing_age", by how
    many steps the parameters that chose the experts are older, and "routing_seconds", what choosing ahead took.
    """
    if not self.active(place.step, place.record):
      return self._plain(place.state, taken.batch)
    clock, passes = time.perf_counter(), 0
    for item in self._waiting:
      if item.experts is None:
        item.experts, item.chosen_at = self._choose(place.state, item.taken.batch), place.step
        passes += 1
    jax.block_until_ready(self._waiting[-1].experts)
    seconds = time.perf_counter() - clock
    item = self._waiting.popleft()
    state, values = self._replayed(place.state, {**taken.batch, **(item.experts or {})})
    self._passes, self._seconds = self._passes + passes, self._seconds + seconds
    if place.step + 1 == min(place.record.anticipate_until, self._end):
      self._say(f"anticipatory routing ends with step {place.step + 1}: {self._passes} forward-only passes of "
                f"{self._seconds / max(1, self._passes):.3g} s each")
      self._passes, self._seconds = 0, 0.0
    return state, {**values, "routing_age": place.step - item.chosen_at, "routing_seconds": seconds}

  def forget(self) -> None:
    """Drops what waits: the run goes on from another place than the one behind the last step."""
    self._waiting.clear()

  def _compile(self, state: Any) -> None:
    config, mesh, clock = self._run_config, self._mesh, time.perf_counter()
    batch = abstract_batch(config, mesh)
    choose = make_routing_pass(config, mesh).lower(state, batch)
    place = None if mesh is None else sharding.batch_sharding(mesh)
    experts = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for name, x in choose.out_info.items()}
    self._choose = choose.compile()
    self._replayed = make_train_step(config, mesh).lower(state, {**batch, **experts}).compile()
    self._say(f"compiled the step with older routing in {time.perf_counter() - clock:.1f} s")
