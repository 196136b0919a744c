"""The training loop on one page: start, compile, then next batch, step, look, log, evaluate, save.

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
import itertools
import json
import math
import time
from pathlib import Path
from typing import Any, Callable, Mapping

import jax
import numpy as np

from deepseek_v4.analysis import plots
from deepseek_v4.checkpoint.store import CheckpointStore
from deepseek_v4.config import RunConfig, to_dict
from deepseek_v4.training import anomalies, baselines, metrics
from deepseek_v4.training.ahead import Ahead
from deepseek_v4.training.anticipation import Anticipation
from deepseek_v4.training.data import Batches, BatchIterator
from deepseek_v4.training.feed import abstract_batch, check_same, check_shared, dataset, refuse_alone, to_device
from deepseek_v4.training.start import check_source, copy_release, state_from
from deepseek_v4.training.state import abstract_state, init_state
from deepseek_v4.training.step import find_non_finite, make_eval_step, make_train_step
from deepseek_v4.training.stopping import Stopped, Stopping
from deepseek_v4.training.workdir import CHECKPOINTS, CONFIG, changes, check_workdir, refuse_lost_checkpoints


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a run stands between two steps; what a checkpoint holds.

  Attributes:
    step: optimizer steps done.
    state: the TrainState after them.
    data: position in the data, from which the next batch comes.
    record: of losses and anomalies.
    unscored: whether held-out text was to be scored here and was not yet.
  """

  step: int
  state: Any
  data: Mapping[str, Any]
  record: anomalies.Record = anomalies.Record()
  unscored: bool = False


@dataclasses.dataclass(frozen=True)
class Tools:
  """What the loop works with."""

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
  routing: Anticipation


def train(run_config: RunConfig, workdir: str | Path, mesh: jax.sharding.Mesh | None = None,
          stop: Stopping | None = None) -> dict[str, Any]:
  """Trains to `training.steps`, going on from the newest sound checkpoint if `workdir` holds a run; returns the summary.

  Args:
    run_config, workdir, mesh: what is trained, where its files go, and the devices (None: the default one alone).
    stop: who may tell the run to stop; None = nobody.

  Raises:
    ValueError, FileNotFoundError: `workdir` holds something that is not a run, one of another model or one that has more
      steps, its checkpoints are gone or none is usable, `training.init_from` holds no checkpoint of this model, or the data
      cannot be used; before the step is compiled.
    NotImplementedError: `training.kernels` names an implementation that does not exist for these devices.
    RuntimeError: a checkpoint could not be written.
    FloatingPointError: a loss, gradient or update was not finite, or a loss spiked, and `anomalies.policy` or its limit says
      stop; the message names the step, its data and the first tensor that is not finite.
    Stopped: the run was told to stop, and what it had done is saved.
  """
  training, workdir, first_process = run_config.training, Path(workdir), jax.process_index() == 0
  say, stop = print if first_process else lambda text: None, stop or Stopping()
  refuse_alone(mesh)
  stored = check_workdir(workdir)
  changed = changes(stored, json.loads(json.dumps(to_dict(run_config)))) if stored else []
  with contextlib.ExitStack() as stack:
    if mesh is not None:
      stack.enter_context(jax.set_mesh(mesh))
    store = stack.enter_context(CheckpointStore(workdir / CHECKPOINTS, keep=training.keep_checkpoints,
                                                config_dict=to_dict(run_config)))
    if training.init_from is not None and not store.steps():
      check_source(run_config, mesh)  # before text is tokenised
    held_out, train_data = (dataset(run_config, split, mesh) for split in ("held_out", "train"))
    check_same(run_config, train_data, held_out)
    batches = stack.enter_context(contextlib.closing(iter(train_data)))
    beginning = batches.get_state()

    def go_back() -> Place:
      """Where to go on, in the order tried: 1. the newest sound checkpoint of this workdir, 2. the weights that
      training.init_from names, 3. from scratch."""
      restored = store.restore_latest(abstract_state(run_config, mesh))
      if restored is not None:
        step, state, extra = restored
        return Place(step, state, extra["data"], anomalies.Record.from_dict(extra.get("anomalies", {})),
                     extra.get("unscored", False))
      refuse_lost_checkpoints(workdir, stored)
      key = jax.random.key(training.seed)
      return Place(0, init_state(run_config, key, mesh) if training.init_from is None else
                   state_from(run_config, key, mesh, say), beginning)

    place = go_back()
    batches.set_state(place.data)
    if place.step:
      say(f"resumed at step {place.step}")
    if place.step > training.steps:
      raise ValueError(f"training.steps = {training.steps}: expected at least {place.step}, the steps that the run in "
                       f"{workdir} has done")
    for change in changed:
      say(f"changed since the last start: {change}")
    if first_process:
      workdir.mkdir(parents=True, exist_ok=True)
      metrics.write_json(workdir / CONFIG, to_dict(run_config))
      if not place.step and training.init_from is not None:
        copy_release(run_config, workdir)
    check_shared(workdir)
    say(describe(place.state, mesh))
    for part in (train_data, held_out):
      say(part.describe())
    known = baselines.measure(run_config.data) if first_process and held_out.text_bytes is not None else {}
    writer = stack.enter_context(contextlib.closing(metrics.MetricsWriter(workdir, place.step, first_process)))

    # Compile for the shapes of a batch; no batch is taken yet. Nothing is compiled while a step is unsaved.
    clock, shapes = time.perf_counter(), abstract_batch(run_config, mesh)
    step = make_train_step(run_config, mesh).lower(place.state, shapes).compile()
    compile_seconds = time.perf_counter() - clock
    say(f"compiled the step in {compile_seconds:.1f} s")
    clock = time.perf_counter()
    scorer = make_eval_step(run_config, mesh).lower(place.state, shapes).compile()
    say(f"compiled the evaluation in {time.perf_counter() - clock:.1f} s")
    spread = functools.partial(to_device, run_config, mesh)
    score = lambda state, count=None: evaluate(scorer, held_out, spread, stop, state, count)
    progress = stack.enter_context(contextlib.closing(metrics.Progress(place.step, training.steps, first_process)))
    routing = Anticipation(run_config, mesh, step, training.steps, progress.say)
    tools = Tools(run_config, mesh, step, score, go_back, batches, store, writer, progress, stop, routing)
    place = run_steps(tools, place)

    progress.say("scoring all held-out text")
    if (found := score(place.state)) is None:
      leave(tools, place)
    writer.write("held_out", training.steps, found)
    store.wait()
    stop.unsaved = False
    summary = {"steps": training.steps, "compile_seconds": compile_seconds, "tokens_per_second": progress.tokens_per_second,
               "held_out": found, "baselines": known}
  if first_process:
    say(publish(summary, workdir))
  return summary


# ---- steps ---------------------------------------------------------------------------------------------------------------
def run_steps(tools: Tools, place: Place) -> Place:
  """Step after step from `place` to the last one, which is being saved when this returns."""
  training, stop = tools.run_config.training, tools.stop
  ahead = batches_from(tools, place)
  if place.unscored:
    place = score_some(tools, place)
  while place.step < training.steps:
    tools.store.check_errors()
    taken = tools.routing.take(ahead, place, lambda: stop.asked)
    if stop.agreed():
      leave(tools, place)
    stop.unsaved = True
    state, values = tools.routing.step(place, taken)
    n, last = place.step + 1, place.step + 1 == training.steps
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
      ahead = batches_from(tools, done)
      if done.step < n:
        place = done
        continue
    elif (first := anomalies.repeated_loss(place.record, taken.rows)) is not None:
      tools.progress.say(anomalies.told_again(tools.run_config.anomalies.policy, n, numbers["loss"], first[0]))
    place = dataclasses.replace(done, record=anomalies.accepted(done.record, tools.run_config.anomalies, n, numbers["loss"]))
    log(tools, n, numbers)
    if n % training.eval_every == 0 and not last:
      place = score_some(tools, place)
    if n % training.checkpoint_every == 0 or last:
      save(tools, place)
      tools.progress.restart_clock()
  return place


def log(tools: Tools, n: int, numbers: dict[str, float]) -> None:
  """Counts step n, and writes its numbers where they are due."""
  training = tools.run_config.training
  tools.progress.step(numbers["tokens"])
  if n % training.log_every == 0 or n == training.steps:
    numbers["tokens_per_second"] = tools.progress.report(n, numbers["loss"])
    tools.writer.write("train", n, numbers)


def score_some(tools: Tools, place: Place) -> Place:
  """Scores `eval_batches` of held-out text; leaves if told to stop meanwhile."""
  training = tools.run_config.training
  if (found := tools.score(place.state, training.eval_batches)) is None:
    leave(tools, dataclasses.replace(place, unscored=True))
  tools.writer.write("held_out", place.step, found)
  tools.progress.say(f"step {place.step}/{training.steps}  held-out loss {found['next_token']:.4f}")
  tools.progress.restart_clock()
  return dataclasses.replace(place, unscored=False)


def save(tools: Tools, place: Place) -> None:
  """Starts writing a checkpoint; nothing happens if there is a whole one of this step."""
  extra = {"data": place.data, "anomalies": place.record.to_dict()}
  tools.store.save(place.step, place.state, extra | ({"unscored": True} if place.unscored else {}))


def leave(tools: Tools, place: Place) -> None:
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
  tools.writer.add("anomaly", anomaly.step, {
    "kind": anomaly.kind, "loss": anomaly.loss, "limit": anomaly.limit, "first_row": anomaly.rows[0],
    "end_row": anomaly.rows[1], "action": "log" if goes_on else config.policy})
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
  """Ends a run at an anomaly, with the name of the first tensor that is not finite."""
  name = ""
  if anomaly.kind == anomalies.NOT_FINITE:
    found = find_non_finite(tools.run_config, tools.mesh)(state, taken.batch)
    name = f": {found or 'no tensor when the step is repeated'}"
  raise FloatingPointError(f"{anomaly}{name}. The run ends: {why}. Nothing of this step was saved; the next start goes on "
                           f"from the newest checkpoint")


# ---- batches -------------------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Taken:
  """A batch on the devices, the rows of the data that it is made of, and the positions before and after it."""

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


# ---- numbers -------------------------------------------------------------------------------------------------------------
def describe(state: Any, mesh: jax.sharding.Mesh | None) -> str:
  """Number of parameters and of devices, in a line."""
  parameters = sum(math.prod(x.shape) for x in jax.tree.leaves(state.params))
  axes = {} if mesh is None else {name: size for name, size in mesh.shape.items() if size > 1}
  count, kind = (1 if mesh is None else mesh.size), jax.devices()[0].device_kind
  layout = f" ({' x '.join(f'{name} {size}' for name, size in axes.items())})" if axes else ""
  return f"{parameters:,} parameters on {count} {kind} device{'s' if count > 1 else ''}{layout}"


def evaluate(eval_step: Any, held_out: Batches, spread: Callable[..., Any], stop: Stopping, state: Any,
             batches: int | None = None) -> dict[str, float] | None:
  """Scores the first `batches` held-out batches, or all of them.

  Returns:
    `next_token` (nats per predicted token), `tokens` (how many), `bits_per_token`, and of text also `bits_per_byte`; None if
    the run was told to stop meanwhile.
  """
  found: list[dict[str, float]] = []
  with contextlib.closing(iter(held_out)) as rows:
    ahead = Ahead(functools.partial(next, itertools.islice(rows, batches), {}))
    while True:
      batch = ahead.get(lambda: stop.asked)
      if stop.agreed():
        return None
      if not batch:
        break
      ahead.start()
      values = eval_step(state, spread(batch))
      found.append({name: np.asarray(value).item() for name, value in values.items()})
  total, count = (math.fsum(x[name] for x in found) for name in ("next_token_sum", "next_token_count"))
  numbers = {"next_token": total / count, "tokens": int(count), "bits_per_token": total / count / math.log(2)}
  if held_out.tokens_per_byte is not None:
    # Document ends are predicted too and cost bits; they stand for no byte of text. The first token of each piece of a
    # document, one in sequence_length or more, is not predicted and counts as an average one.
    numbers["bits_per_byte"] = numbers["bits_per_token"] * held_out.tokens_per_byte
  return numbers


def publish(summary: Mapping[str, Any], workdir: Path) -> str:
  """Writes the summary and the picture of a run; returns the closing table."""
  unit = "bits_per_byte" if "bits_per_byte" in summary["held_out"] else "bits_per_token"
  metrics.write_json(workdir / metrics.SUMMARY, summary)
  plots.loss_curves(metrics.read_lines(workdir / metrics.LINES), workdir / metrics.CURVES, summary["baselines"])
  return metrics.held_out_table(summary["held_out"][unit], summary["baselines"], unit.replace("_", " "))
