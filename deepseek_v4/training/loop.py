"""The training loop: start, compile, then next batch, step, look, log, evaluate, save; phase after phase (`stages.py`).

While the device computes step n, a thread prepares batch n + 1; then the loop waits for step n's metrics and looks at them
before anything follows. So a step that went wrong is met with the very state and batch that it had (`anomalies.py`), and a
run that is told to stop saves the step in hand (`stopping.py`).

A workdir holds
  config.json         the settings of the last start
  release/            tokenizer and encoder, if the run began with the weights of a release
  checkpoints/        see checkpoint/store.py
  metrics.jsonl, tensorboard/, summary.json, loss_curves.png      see training/metrics.py
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from pathlib import Path
from typing import Any, Callable, Mapping, NoReturn

import jax
import numpy as np

from deepseek_v4.checkpoint.store import CheckpointStore
from deepseek_v4.config import RunConfig, to_dict
from deepseek_v4.training import anomalies, baselines, metrics, stages, trainable
from deepseek_v4.training.ahead import Ahead
from deepseek_v4.training.anticipation import Anticipation
from deepseek_v4.training.data import Batches, BatchIterator
from deepseek_v4.training.feed import abstract_batch, beginning, in_shape_of, refuse_alone, to_device
from deepseek_v4.training.row_order import moved
from deepseek_v4.training.scoring import evaluate, publish
from deepseek_v4.training.start import Place, Texts, announce, check_source, newest_place, read_texts
from deepseek_v4.training.step import find_non_finite, make_eval_step, make_train_step
from deepseek_v4.training.stopping import Stopped, Stopping
from deepseek_v4.training.workdir import CHECKPOINTS, check_workdir


@dataclasses.dataclass(frozen=True)
class Tools:
  """What the loop works with in one phase of a run: its settings, its programs and batches, and what all phases share."""

  run_config: RunConfig
  mesh: jax.sharding.Mesh | None
  step: Callable[..., Any]
  score: Callable[..., dict[str, float] | None]
  go_back: Callable[[], Place]
  batches: BatchIterator
  store: CheckpointStore
  writer: metrics.MetricsWriter
  progress: metrics.Progress
  stop: Stopping
  phase: stages.Phase
  watch: trainable.Watch
  routing: Anticipation
  compile_seconds: float


def train(run_config: RunConfig, workdir: str | Path, mesh: jax.sharding.Mesh | None = None,
          stop: Stopping | None = None) -> dict[str, Any]:
  """Trains to `training.steps`, going on from the newest sound checkpoint if `workdir` holds a run; returns the summary.

  Args:
    run_config, workdir, mesh: what is trained, where its files go, and the devices (None: the default one alone).
    stop: who may tell the run to stop; None = nobody.

  Raises:
    ValueError, FileNotFoundError: `workdir` holds something that is not a run, one of another kind or model, or one that has
      more steps, its checkpoints are gone or none is usable, `training.init_from` holds no checkpoint of this model, or the
      data cannot be used; before the step is compiled.
    NotImplementedError: `training.kernels` names an implementation that does not exist for these devices.
    RuntimeError: a checkpoint could not be written.
    FloatingPointError: a loss, gradient or update was not finite, or a loss spiked, and `anomalies.policy` or its limit says
      stop; the message names the step, its data and the first tensor that is not finite. In a stage, or with
      `training.watch_gradients`: the gradient of a group of parameters was exactly 0 for `log_every` steps; it is named.
    Stopped: the run was told to stop, and what it had done is saved.
  """
  workdir, stop = Path(workdir), stop or Stopping()
  say = print if jax.process_index() == 0 else lambda text: None
  refuse_alone(mesh)
  stored = check_workdir(workdir, to_dict(run_config))
  with contextlib.ExitStack() as stack:
    if mesh is not None:
      stack.enter_context(jax.set_mesh(mesh))
    store = stack.enter_context(CheckpointStore(workdir / CHECKPOINTS, keep=run_config.training.keep_checkpoints,
                                                config_dict=to_dict(run_config)))
    if run_config.training.init_from is not None and not store.steps():
      check_source(run_config, mesh)  # before text is tokenised
    texts = read_texts(run_config, mesh)
    go_back = functools.partial(newest_place, run_config, workdir, mesh, store, stored, beginning(texts.train), say)
    place = go_back()
    announce(run_config, workdir, mesh, place, stored, texts, say)
    known = baselines.measure(run_config.data) if jax.process_index() == 0 and texts.held_out.text_bytes is not None else {}
    open_until_the_end = lambda x: stack.enter_context(contextlib.closing(x))
    writer = open_until_the_end(metrics.MetricsWriter(workdir, place.step, jax.process_index() == 0))
    progress = open_until_the_end(metrics.Progress(place.step, run_config.training.steps, jax.process_index() == 0))
    shared = {"mesh": mesh, "go_back": go_back, "store": store, "writer": writer, "progress": progress, "stop": stop}
    tools, place = run_phases(run_config, texts, shared, place)
    summary = summarised(tools, place, known)
  if jax.process_index() == 0:
    say(publish(summary, workdir))
  return summary


# ---- phases ------------------------------------------------------------------------------------------------------------
def run_phases(run_config: RunConfig, texts: Texts, shared: Mapping[str, Any], place: Place) -> tuple[Tools, Place]:
  """Phase after phase from `place` to the end of the run, which is being saved then; also the last phase's tools.

  Args:
    shared: the fields of `Tools` that all phases have in common.
  """
  tools = None
  with contextlib.ExitStack() as stack:
    while tools is None or place.step < tools.phase.total:
      if tools is not None:
        stack.close()
        tools.store.wait()  # nothing is compiled while a step is unsaved
        tools.stop.unsaved = False
      phase = stages.at(run_config, place.step)
      place = entered(place, phase)
      tools = prepared(phase, texts, shared, place, tools)
      stack.enter_context(contextlib.closing(tools.batches))
      place = run_steps(tools, place)
  return tools, place


def entered(place: Place, phase: stages.Phase) -> Place:
  """The place as a phase goes on from it: in rows of the stage's length, and at a stage's first step without the losses of
  the stage before, which would make spikes of its own."""
  if not phase.stage:
    return place
  record = dataclasses.replace(place.record, losses=()) if place.step == phase.begin else place.record
  return dataclasses.replace(place, data=moved(place.data, phase.run_config.data.sequence_length), record=record)


def prepared(phase: stages.Phase, texts: Texts, shared: Mapping[str, Any], place: Place, before: Tools | None) -> Tools:
  """The tools of a phase, compiled for the shapes of a batch; no batch is taken yet.

  Args:
    place: where the phase is entered.
    before: tools of the phase before; what the two have in common is kept.
  """
  run_config, mesh, progress = phase.run_config, shared["mesh"], shared["progress"]
  rows = in_shape_of(texts.train, run_config, mesh) if phase.stage else texts.train  # refuses before anything is compiled
  same_stage = before is not None and before.phase.stage == phase.stage
  if phase.stage and not same_stage:
    progress.say(f"stage {phase.stage} from step {place.step + 1} on {trainable.describe(run_config, place.state.params)}")
  clock, shapes = time.perf_counter(), abstract_batch(run_config, mesh)
  step = make_train_step(run_config, mesh).lower(place.state, shapes).compile()
  seconds = time.perf_counter() - clock
  progress.say(f"compiled the step in {seconds:.1f} s")
  score = before.score if before and same_stage else scorer_of(
    phase, texts.held_out, place, mesh, shared["stop"], progress.say)
  patience = min(run_config.training.log_every, phase.steps)
  watch = before.watch if before and same_stage else trainable.Watch(
    patience, f"stage {phase.stage}, " if phase.stage else "")
  batches = iter(rows)
  progress.restart_clock()
  routing = Anticipation(run_config, mesh, step, phase.end, progress.say)
  return Tools(run_config=run_config, step=step, score=score, batches=batches, phase=phase, watch=watch, routing=routing,
               compile_seconds=seconds + (before.compile_seconds if before else 0), **shared)


def scorer_of(phase: stages.Phase, held_out: Batches, place: Place, mesh: jax.sharding.Mesh | None, stop: Stopping,
              say: Callable[[str], None]) -> Callable[..., dict[str, float] | None]:
  """(state, number of batches or None = all) -> `evaluate` of held-out text in rows of the stage's length."""
  run_config, clock = phase.stage_config, time.perf_counter()
  scorer = make_eval_step(run_config, mesh).lower(place.state, abstract_batch(run_config, mesh)).compile()
  say(f"compiled the evaluation in {time.perf_counter() - clock:.1f} s")
  spread = functools.partial(to_device, run_config, mesh)
  rows = in_shape_of(held_out, run_config, mesh) if phase.stage else held_out
  return lambda state, count=None: evaluate(scorer, rows, spread, stop, state, count)


def of_stage(tools: Tools, numbers: Mapping[str, Any]) -> dict[str, Any]:
  """The numbers of a line of metrics.jsonl, with the name of the stage if there are any."""
  return {**({"stage": tools.phase.stage} if tools.phase.stage else {}), **numbers}


def summarised(tools: Tools, place: Place, known: Mapping[str, float]) -> dict[str, Any]:
  """Scores all held-out text at the end of a run, waits for its last checkpoint, and puts the run's figures together."""
  tools.progress.say("scoring all held-out text")
  if (found := tools.score(place.state)) is None:
    leave(tools, place)
  tools.writer.write("held_out", tools.phase.total, of_stage(tools, found))
  tools.store.wait()
  tools.stop.unsaved = False
  return {"steps": tools.phase.total, "compile_seconds": tools.compile_seconds,
          "tokens_per_second": tools.progress.tokens_per_second, "held_out": found, "baselines": known}


# ---- steps ---------------------------------------------------------------------------------------------------------------
def run_steps(tools: Tools, place: Place) -> Place:
  """Step after step from `place` to the last of the phase, which is being saved when this returns; or to a place in an
  earlier phase, to which the run went back."""
  training, stop, phase = tools.run_config.training, tools.stop, tools.phase
  ahead = batches_from(tools, place)
  if place.unscored:
    place = score_some(tools, place)
  while place.step < phase.end:
    tools.store.check_errors()
    taken = tools.routing.take(ahead, place, lambda: stop.asked)
    if stop.agreed():
      leave(tools, place)
    stop.unsaved = True
    state, values = tools.routing.step(place, taken)
    n = place.step + 1
    last, whole = n == phase.end, n == phase.total
    if not last:
      ahead.start()  # while the device works
    numbers = {name: np.asarray(value).item() for name, value in jax.device_get(values).items()}
    finite = numbers.pop("finite")
    anomaly = anomalies.judge(place.record, tools.run_config.anomalies, n, taken.rows, numbers["loss"], finite)
    done = Place(n, state, taken.after, place.record)
    if anomaly is not None:
      ahead.forget()
      tools.routing.forget()
      done = recover(tools, dataclasses.replace(place, state=None), done, taken, anomaly)
      if done.step < phase.first:
        return done
      done = entered(done, phase)
      ahead = batches_from(tools, done)
      if done.step < n:
        place = done
        continue
    elif (first := anomalies.repeated_loss(place.record, taken.rows)) is not None:
      tools.progress.say(anomalies.told_again(tools.run_config.anomalies.policy, n, numbers["loss"], first[0]))
    place = dataclasses.replace(done, record=anomalies.accepted(done.record, tools.run_config.anomalies, n, numbers["loss"]))
    log(tools, n, numbers)
    if n % training.eval_every == 0 and not whole:
      place = score_some(tools, place)
    if n % training.checkpoint_every == 0 or last:
      save(tools, place)
      tools.progress.restart_clock()
  return place


def log(tools: Tools, n: int, numbers: dict[str, float]) -> None:
  """Counts step n, looks whether all that trains had a gradient, and writes its numbers where they are due."""
  tools.progress.step(numbers["tokens"])
  tools.watch.look(n, numbers)
  if n % tools.run_config.training.log_every == 0 or n == tools.phase.total:
    numbers["tokens_per_second"] = tools.progress.report(n, numbers["loss"], tools.phase.stage)
    tools.writer.write("train", n, of_stage(tools, numbers))


def score_some(tools: Tools, place: Place) -> Place:
  """Scores `eval_batches` of held-out text; leaves if told to stop meanwhile."""
  if (found := tools.score(place.state, tools.run_config.training.eval_batches)) is None:
    leave(tools, dataclasses.replace(place, unscored=True))
  tools.writer.write("held_out", place.step, of_stage(tools, found))
  tools.progress.say(f"step {place.step}/{tools.phase.total}  held-out loss {found['next_token']:.4f}")
  tools.progress.restart_clock()
  return dataclasses.replace(place, unscored=False)


def save(tools: Tools, place: Place) -> None:
  """Starts writing a checkpoint; nothing happens if there is a whole one of this step."""
  extra = {"data": place.data, "anomalies": place.record.to_dict()}
  tools.store.save(place.step, place.state, extra | ({"unscored": True} if place.unscored else {}))


def leave(tools: Tools, place: Place) -> NoReturn:
  """Saves the place and raises Stopped."""
  if place.step:
    save(tools, place)
  tools.store.wait()
  tools.stop.unsaved = False
  saved = ", which is saved; the same command goes on from there" if place.step else "; nothing was there to save"
  raise Stopped(f"stopped after step {place.step}{saved}")


# ---- steps that went wrong -----------------------------------------------------------------------------------------------
def recover(tools: Tools, before: Place, after: Place, taken: Taken, anomaly: anomalies.Anomaly) -> Place:
  """Where a run goes on when a step went wrong: after it, or before it, from a sound state.

  Args:
    before, after: the places around the step; the first has no state any more. If the step was not finite, the second has
      the state of the first.
    taken: its batch.
    anomaly: what is wrong with it.

  Raises:
    FloatingPointError: the run ends here.
  """
  config = tools.run_config.anomalies
  again = anomalies.repeated_loss(before.record, taken.rows)
  record = anomalies.noted(before.record, anomaly)
  finite = anomaly.kind == anomalies.SPIKE
  broken_again = again is not None and not finite and config.policy != "anticipate"
  if config.policy == "stop" or anomalies.too_many(record, config) or broken_again:
    reasons = {"stop": "anomalies.policy = 'stop'", "repeat": "it came again"}
    why = (f"more than anomalies.limit = {config.limit} anomalies within {config.window} steps"
           if anomalies.too_many(record, config) else reasons[config.policy])
    end(tools, after.state, taken, anomaly, why)
  goes_on = config.policy == "log" or again is not None
  tools.writer.add("anomaly", anomaly.step, of_stage(tools, {
    "kind": anomaly.kind, "loss": anomaly.loss, "limit": anomaly.limit, "first_row": anomaly.rows[0],
    "end_row": anomaly.rows[1], "action": "log" if goes_on else config.policy}))
  tools.progress.say(f"warning: {anomaly}; {'it counts' if goes_on and finite else config.policy}")
  if goes_on and finite:
    return dataclasses.replace(after, record=record)
  if goes_on:  # as if there had been no such batch
    return Place(before.step, after.state, after.data, record)
  if finite or config.policy == "anticipate":
    for x in jax.tree.leaves(after.state):  # make room for the older ones
      if isinstance(x, jax.Array):
        x.delete()
    earlier = tools.go_back()
    tools.stop.unsaved = False
  else:
    earlier = Place(before.step, after.state, taken.before, before.record)
  tools.progress.back_to(earlier.step)
  tools.writer.back_to(earlier.step)
  record = anomalies.rolled_back(record, earlier.record, anomaly, config.policy, config.anticipation_steps)
  return dataclasses.replace(earlier, record=record)


def end(tools: Tools, state: Any, taken: Taken, anomaly: anomalies.Anomaly, why: str) -> None:
  """Ends a run at an anomaly, with the name of the first tensor that is not finite.

  Raises:
    FloatingPointError: always, with what went wrong and why that ends the run.
  """
  name = ""
  if anomaly.kind == anomalies.NOT_FINITE:
    found = find_non_finite(tools.run_config, tools.mesh)(state, taken.batch)
    name = f": {found or 'no tensor when the step is repeated'}"
  raise FloatingPointError(f"{anomaly}{name}. The run ends: {why}. Nothing of this step was saved; the next start goes on "
                           f"from the newest checkpoint")


# ---- batches -------------------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Taken:
  """A batch on the devices, int32 [A, B, S] by name, the rows of the data that it is made of, and the positions before
  and after it."""

  batch: Mapping[str, jax.Array]
  rows: anomalies.Rows
  before: Mapping[str, Any]
  after: Mapping[str, Any]


def batches_from(tools: Tools, place: Place) -> Ahead:
  """The batches from a place on, without those that are left out."""
  tools.batches.set_state(place.data)

  def take() -> Taken:
    while True:
      before = tools.batches.get_state()
      batch = next(tools.batches)
      after = tools.batches.get_state()
      rows = (before["row"], after["row"])
      if not anomalies.is_left_out(place.record, rows):
        return Taken(to_device(tools.run_config, tools.mesh, batch), rows, before, after)

  return Ahead(take)
