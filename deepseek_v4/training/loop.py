"""The training loop on one page: start, compile, then next batch, step, log, evaluate, save.

While the device computes step n, the host prepares batch n + 1; then it waits for step n's metrics and looks at them before
anything follows. So a step that is not finite ends the run with the very state and batch that it had.

A workdir holds
  config.json         the settings of the last start
  release/            tokenizer and encoder, if the run began with the weights of a release
  checkpoints/        see checkpoint/store.py
  metrics.jsonl, tensorboard/, summary.json, loss_curves.png      see training/metrics.py
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import time
from pathlib import Path
from typing import Any, Mapping

import jax
import numpy as np

from deepseek_v4.analysis import plots
from deepseek_v4.checkpoint.store import CheckpointStore
from deepseek_v4.config import RunConfig, to_dict
from deepseek_v4.sharding import batch_sharding
from deepseek_v4.training import baselines, metrics
from deepseek_v4.training.data import Batches, make_dataset
from deepseek_v4.training.start import check_source, copy_release, state_from
from deepseek_v4.training.state import abstract_state, init_state
from deepseek_v4.training.step import find_non_finite, make_eval_step, make_train_step

CONFIG, CHECKPOINTS = "config.json", "checkpoints"
BATCH_ARRAYS = ("tokens", "segment_ids", "positions", "loss_mask")


def train(run_config: RunConfig, workdir: str | Path, mesh: jax.sharding.Mesh | None = None) -> dict[str, Any]:
  """Trains to `training.steps`, going on from the newest sound checkpoint if `workdir` holds a run; returns the summary.

  Raises:
    ValueError, FileNotFoundError: `workdir` holds something that is not a run, one of another model or one that has more
      steps, none of its checkpoints is usable, `training.init_from` holds no checkpoint of this model, or the data cannot be
      used; before the step is compiled.
    NotImplementedError: `training.kernels` names an implementation that does not exist for these devices.
    RuntimeError: a checkpoint could not be written.
    FloatingPointError: a loss, gradient or update was not finite; the message names the first such tensor.
  """
  training, workdir, first_process = run_config.training, Path(workdir), jax.process_index() == 0
  say = print if first_process else lambda text: None
  changed = check_workdir(workdir, run_config)
  with contextlib.ExitStack() as stack:
    if mesh is not None:
      stack.enter_context(jax.set_mesh(mesh))
    store = stack.enter_context(CheckpointStore(workdir / CHECKPOINTS, keep=training.keep_checkpoints,
                                                config_dict=to_dict(run_config)))
    if training.init_from is not None and not store.steps():
      check_source(run_config, mesh)  # before text is tokenised
    held_out, train_data = dataset(run_config, "held_out"), dataset(run_config, "train")
    batches = stack.enter_context(contextlib.closing(iter(train_data)))

    # Start, in the order tried: 1. resume the newest sound checkpoint of this workdir, 2. the weights that
    # training.init_from names, 3. from scratch.
    restored = store.restore_latest(abstract_state(run_config, mesh))
    if restored is not None:
      start, state, extra = restored
      batches.set_state(extra["data"])
      say(f"resumed at step {start}")
      if start > training.steps:
        raise ValueError(f"training.steps = {training.steps}: expected at least {start}, the steps that the run in "
                         f"{workdir} has done")
    elif training.init_from is not None:
      start, state = 0, state_from(run_config, jax.random.key(training.seed), mesh, say)
    else:
      start, state = 0, init_state(run_config, jax.random.key(training.seed), mesh)
    for change in changed:
      say(f"changed since the last start: {change}")
    if first_process:
      workdir.mkdir(parents=True, exist_ok=True)
      metrics.write_json(workdir / CONFIG, to_dict(run_config))
      if restored is None and training.init_from is not None:
        copy_release(run_config, workdir)
    say(describe(state, mesh))
    for part in (train_data, held_out):
      say(part.describe())
    known = baselines.measure(run_config.data) if first_process and held_out.text_bytes is not None else {}
    writer = stack.enter_context(contextlib.closing(metrics.MetricsWriter(workdir, start, first_process)))

    # Compile for the shapes of a batch; no batch is taken yet.
    clock = time.perf_counter()
    step = make_train_step(run_config, mesh).lower(state, abstract_batch(run_config, mesh)).compile()
    compile_seconds = time.perf_counter() - clock
    say(f"compiled the step in {compile_seconds:.1f} s")
    score = functools.partial(evaluate, make_eval_step(run_config, mesh), held_out, mesh)
    progress = stack.enter_context(contextlib.closing(metrics.Progress(start, training.steps, first_process)))
    settle = functools.partial(check_and_log, run_config, mesh, writer, progress)
    upcoming, position = None, batches.get_state()
    for n in range(start + 1, training.steps + 1):
      store.check_errors()
      batch = to_device(next(batches), mesh) if upcoming is None else upcoming
      state, values = step(state, batch)
      position, last = batches.get_state(), n == training.steps
      upcoming = None if last else to_device(next(batches), mesh)  # while the device works
      settle(state, n, batch, values)
      if n % training.eval_every == 0 and not last:
        writer.write("held_out", n, found := score(state, training.eval_batches))
        progress.say(f"step {n}/{training.steps}  held-out loss {found['next_token']:.4f}")
        progress.restart_clock()
      if n % training.checkpoint_every == 0 or last:
        store.save(n, state, {"data": position})
        progress.restart_clock()

    progress.say("scoring all held-out text")
    writer.write("held_out", training.steps, found := score(state))
    summary = {"steps": training.steps, "compile_seconds": compile_seconds, "tokens_per_second": progress.tokens_per_second,
               "held_out": found, "baselines": known}
  if first_process:
    say(publish(summary, workdir))
  return summary


# ---- a workdir -----------------------------------------------------------------------------------------------------------
def check_workdir(workdir: Path, run_config: RunConfig) -> list[str]:
  """The settings that changed since the last start in `workdir`; none if it is new or empty.

  Raises:
    ValueError: the folder holds files, but no run.
  """
  if workdir.exists() and not workdir.is_dir():
    raise ValueError(f"workdir = {str(workdir)!r}: expected a folder")
  content = sorted(path.name for path in workdir.iterdir()) if workdir.is_dir() else []
  if content and not {CONFIG, CHECKPOINTS} & set(content):
    raise ValueError(f"workdir = {str(workdir)!r}: expected a new or an empty folder, or one that holds a run ({CONFIG}, "
                     f"{CHECKPOINTS}/); it holds {', '.join(content[:5])}{', ...' if content[5:] else ''}")
  if CONFIG not in content:
    return []
  return changes(json.loads((workdir / CONFIG).read_text(encoding="utf-8")), json.loads(json.dumps(to_dict(run_config))))


def changes(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
  """The settings that differ between two nested dictionaries, as 'name: old -> new'."""
  found = []
  for name in sorted({*before, *now}):
    old, new = before.get(name), now.get(name)
    if isinstance(old, Mapping) and isinstance(new, Mapping):
      found += changes(old, new, f"{prefix}{name}.")
    elif old != new:
      found.append(f"{prefix}{name}: {old} -> {new}")
  return found


# ---- batches -------------------------------------------------------------------------------------------------------------
def dataset(run_config: RunConfig, split: str) -> Batches:
  """This process's part of the batches of a split."""
  return make_dataset(run_config.data, run_config.model.vocab_size, split=split, process_index=jax.process_index(),
                      process_count=jax.process_count(), document_end=run_config.model.eos_token_id)


def abstract_batch(run_config: RunConfig, mesh: jax.sharding.Mesh | None) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes [A,B,S] of a batch over all processes, with its sharding."""
  data = run_config.data
  shape = (data.accumulation, data.batch_size // data.accumulation, data.sequence_length)
  sharding = None if mesh is None else batch_sharding(mesh)
  return {name: jax.ShapeDtypeStruct(shape, np.int32, sharding=sharding) for name in BATCH_ARRAYS}


def to_device(batch: Mapping[str, np.ndarray], mesh: jax.sharding.Mesh | None) -> dict[str, jax.Array]:
  """A process's rows -> arrays of the whole batch, spread over the mesh."""
  if mesh is None:
    return jax.device_put(dict(batch))
  return {name: jax.make_array_from_process_local_data(batch_sharding(mesh), x) for name, x in batch.items()}


# ---- numbers -------------------------------------------------------------------------------------------------------------
def describe(state: Any, mesh: jax.sharding.Mesh | None) -> str:
  """Number of parameters and of devices, in a line."""
  parameters = sum(math.prod(x.shape) for x in jax.tree.leaves(state.params))
  axes = {} if mesh is None else {name: size for name, size in mesh.shape.items() if size > 1}
  count, kind = (1 if mesh is None else mesh.size), jax.devices()[0].device_kind
  layout = f" ({' x '.join(f'{name} {size}' for name, size in axes.items())})" if axes else ""
  return f"{parameters:,} parameters on {count} {kind} device{'s' if count > 1 else ''}{layout}"


def check_and_log(run_config: RunConfig, mesh: jax.sharding.Mesh | None, writer: metrics.MetricsWriter,
                  progress: metrics.Progress, state: Any, n: int, batch: Mapping[str, jax.Array],
                  values: Mapping[str, jax.Array]) -> None:
  """Waits for step n and logs it; if something was not finite, `state` is the one that step n was given."""
  numbers = {name: np.asarray(value).item() for name, value in jax.device_get(values).items()}
  if not numbers.pop("finite"):
    name = find_non_finite(run_config, mesh)(state, batch) or "no tensor when the step is repeated"
    raise FloatingPointError(f"step {n}: not finite: {name}. Nothing of this step was kept or saved; the next start goes on "
                             f"from the newest checkpoint")
  progress.step(numbers["tokens"])
  if n % run_config.training.log_every == 0 or n == run_config.training.steps:
    numbers["tokens_per_second"] = progress.report(n, numbers["loss"])
    writer.write("train", n, numbers)


def evaluate(eval_step: Any, held_out: Batches, mesh: jax.sharding.Mesh | None, state: Any,
             batches: int | None = None) -> dict[str, float]:
  """Scores the first `batches` held-out batches, or all of them.

  Returns:
    `next_token` (nats per predicted token), `tokens` (how many), `bits_per_token`, and of text also `bits_per_byte`.
  """
  with contextlib.closing(iter(held_out)) as rows:
    found = [eval_step(state, to_device(batch, mesh)) for batch in itertools.islice(rows, batches)]
  total, count = (math.fsum(np.asarray(x[name]).item() for x in found) for name in ("next_token_sum", "next_token_count"))
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
