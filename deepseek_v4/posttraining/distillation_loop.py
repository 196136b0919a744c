"""A distillation run, round by round: the student speaks, the teachers listen one after another, then steps of training
(report 5.1.2, 5.2.2).

    prompts -> replies (journal) -> rows of one teacher each -> teachers' hidden states (cached) -> optimizer steps

Samples lie in the order of their teachers, from the prompts to the passes of every step. What was sampled is in the journal
before anything follows from it, and a checkpoint says which weights its round was sampled with: a run that was killed
anywhere goes on by the same command, samples nothing twice and computes the same numbers, but for the rounding of replies
that were cut off and gone on with.

A workdir holds, beside what `training/loop.py` names,
  samples/            the journal: one file per round
  teachers/           hidden states of the round in work, and heads; both can be made again
  distillation.png    the curves, at the end
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import time
import zlib
from pathlib import Path
from typing import Any, Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_v4.analysis import plots_distillation
from deepseek_v4.checkpoint.store import CheckpointStore
from deepseek_v4.checkpoint.trees import restack
from deepseek_v4.config import STUDENT, RunConfig
from deepseek_v4.config_checks import refuse
from deepseek_v4.model.transformer import DeepseekV4
from deepseek_v4.posttraining import beginning
from deepseek_v4.posttraining import journal as journals
from deepseek_v4.posttraining.distillation_step import Pass, Steps
from deepseek_v4.posttraining.passes import not_finite
from deepseek_v4.posttraining.prompts import ChatPrompts, Prompts, Text, in_passes, rows_of
from deepseek_v4.posttraining.rollout import Request, check_mesh, sample_replies
from deepseek_v4.posttraining.teachers import Library, Resident, Teacher, open_teacher
from deepseek_v4.training import metrics
from deepseek_v4.training.data import Batches
from deepseek_v4.training.feed import dataset, to_device
from deepseek_v4.training.scoring import evaluate
from deepseek_v4.training.start import describe
from deepseek_v4.training.state import abstract_state
from deepseek_v4.training.step import make_eval_step
from deepseek_v4.training.stopping import Stopped, Stopping

SAMPLES, TEACHERS, CURVES = "samples", "teachers", "distillation.png"


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a run stands between two steps.

  Attributes:
    step: optimizer steps done.
    state: the TrainState after them.
    weights: fingerprint of the weights that the round in work was sampled with; None = they are those of `state`.
  """

  step: int
  state: Any
  weights: int | None = None


@dataclasses.dataclass(frozen=True)
class Tools:
  """What the run works with."""

  run_config: RunConfig
  mesh: jax.sharding.Mesh | None
  workdir: Path
  teachers: tuple[Teacher, ...]
  sources: tuple[Any, ...]  # Prompts or Text of each teacher
  library: Library
  resident: Resident
  steps: Steps
  score: Callable[..., dict[str, Any]]
  store: CheckpointStore
  writer: metrics.MetricsWriter
  progress: metrics.Progress
  stop: Stopping


def distill(run_config: RunConfig, workdir: str | Path, mesh: jax.sharding.Mesh | None = None,
            stop: Stopping | None = None) -> dict[str, Any]:
  """Distils to `training.steps`, going on where the run in `workdir` was; returns the summary.

  Args:
    run_config, workdir, mesh, stop: as of `training.loop.train`; `run_config.distillation` names the teachers.

  Raises:
    ValueError, FileNotFoundError: settings, teachers, data or a workdir that cannot be used, before anything is compiled.
    RuntimeError: a checkpoint could not be written.
    FloatingPointError: a loss, gradient or update was not finite.
    Stopped: the run was told to stop, and what it had done is saved.
  """
  workdir, stop = Path(workdir), stop or Stopping()
  check(run_config, mesh)
  with contextlib.ExitStack() as stack:
    store, stored = beginning.open_store(stack, run_config, workdir, mesh)
    teachers = tuple(open_teacher(run_config, teacher, mesh) for teacher in run_config.distillation.teachers)
    beginning.check_beginning(run_config, mesh, store)
    sources, held_out = read_data(run_config, mesh)
    place = go_back(run_config, workdir, mesh, store, stored)
    beginning.write_settings(run_config, workdir, stored, place.step)
    print(describe(place.state, mesh))
    scorer, spread = make_eval_step(run_config, mesh), functools.partial(to_device, run_config, mesh)
    score = lambda state, count=None: {
      name: evaluate(scorer, data, spread, stop, state, count) for name, data in held_out.items()}
    library, steps = Library(run_config, workdir / TEACHERS, mesh), Steps(run_config, mesh)
    writer, progress = beginning.meters(stack, run_config, workdir, place.step)
    tools = Tools(run_config, mesh, workdir, teachers, sources, library, Resident(library, steps.put_head), steps, score,
                  store, writer, progress, stop)
    started = time.perf_counter()
    place = run_rounds(tools, place)
    return finish(tools, place, time.perf_counter() - started)


# ---- before the first step --------------------------------------------------------------------------------------------
def check(run_config: RunConfig, mesh: jax.sharding.Mesh | None) -> None:
  """Refuses what cannot be distilled.

  Raises:
    ValueError: names the setting.
  """
  distillation = run_config.distillation
  if distillation is None:
    refuse("distillation", None, "a DistillationConfig with the teachers")
  if run_config.training.steps % distillation.steps_per_round:
    refuse("training.steps", run_config.training.steps,
           f"a multiple of distillation.steps_per_round = {distillation.steps_per_round}")
  if jax.process_count() > 1:
    refuse("processes", jax.process_count(), "one: a distillation runs on the devices of one process")
  if mesh is not None and distillation.samples == STUDENT:
    check_mesh(mesh, distillation.decode_batch, "distillation.decode_batch")


def read_data(run_config: RunConfig, mesh: jax.sharding.Mesh | None) -> tuple[tuple[Any, ...], dict[str, Batches]]:
  """(what each teacher is asked, {teacher: held-out text})."""
  sources, held_out = [], {}
  for teacher in run_config.distillation.teachers:
    data = dataclasses.replace(teacher.data, **{name: getattr(run_config.data, name) for name in (
      "sequence_length", "batch_size", "accumulation")})
    asked = ChatPrompts if teacher.data.source == "chat" else Prompts
    sources.append(asked(run_config, teacher) if run_config.distillation.samples == STUDENT else
                   Text(run_config, teacher.data, run_config.data.sequence_length))
    held_out[teacher.name] = dataset(dataclasses.replace(run_config, data=data), "held_out", mesh)
    print(f"{teacher.name}: {sources[-1].describe()}; {held_out[teacher.name].describe()}")
  return tuple(sources), held_out


def go_back(run_config: RunConfig, workdir: Path, mesh: jax.sharding.Mesh | None, store: CheckpointStore,
            stored: Mapping[str, Any]) -> Place:
  """Where to go on: the newest sound checkpoint of the workdir, the weights of training.init_from, or from scratch.

  Raises:
    ValueError: another run is in the workdir, or one that has done more steps or had other rounds.
  """
  found = beginning.newest(run_config, workdir, store, stored, abstract_state(run_config, mesh))
  if found is None:
    return Place(0, beginning.first_state(run_config, mesh))
  step, state, extra = found
  before = extra.get("round", {})  # checkpoints of older versions do not say
  for name, now in round_of(run_config).items():
    if before.get(name, now) != now:
      refuse(name, now, f"{before[name]}, with which the run in {workdir} has done {step} steps: its prompts would "
             f"come again or be left out")
  return Place(step, state, extra["sampled_with"])


def round_of(run_config: RunConfig) -> dict[str, int]:
  """The settings from which, with the number of steps, the place in the teachers' prompts follows."""
  distillation = run_config.distillation
  return {"distillation.steps_per_round": distillation.steps_per_round, "data.batch_size": run_config.data.batch_size,
          "number of distillation.teachers": len(distillation.teachers)}


# ---- rounds -----------------------------------------------------------------------------------------------------------
def run_rounds(tools: Tools, place: Place) -> Place:
  """Round after round from `place` to the last step, which is being saved when this returns."""
  training, length = tools.run_config.training, tools.run_config.distillation.steps_per_round
  if not place.step:
    score(tools, place)
  while place.step < training.steps:
    number = place.step // length
    if place.step % length == 0 or place.weights is None:
      place = dataclasses.replace(place, weights=fingerprint(place.state))
    parts = passes_of(tools, number, place)  # [teacher][step of the round] -> passes
    heard = listen(tools, number, parts, place)
    while place.step // length == number and place.step < training.steps:
      place = one_step(tools, place, parts, heard, place.step % length)
    # Rounds from which the oldest checkpoint goes on may be asked for again.
    journals.forget(tools.workdir / SAMPLES, min(tools.store.steps(), default=0) // length)
    tools.library.forget(number + 1)
  return place


def passes_of(tools: Tools, number: int, place: Place) -> list[list[list[dict[str, np.ndarray]]]]:
  """Rows of a round: of each teacher, of each step, its passes of rows, int32 [B, S] by name."""
  run_config = tools.run_config
  data, length = run_config.data, run_config.distillation.steps_per_round
  each, rows = data.batch_size // len(tools.teachers), data.batch_size // data.accumulation
  first, count = number * length * each, length * each
  of_step = lambda x, s: x[s * each:(s + 1) * each]
  if run_config.distillation.samples == STUDENT:
    prompts = [source.take(first, count) for source in tools.sources]
    replies = sampled(tools, number, [prompt for of_teacher in prompts for prompt in of_teacher], place)
    made = [[rows_of(list(zip(of_step(asked, s), of_step(replies[t * count:], s))), data.sequence_length)
             for s in range(length)] for t, asked in enumerate(prompts)]
  else:
    texts = [source.take(first, count) for source in tools.sources]
    made = [[{name: of_step(x, s) for name, x in text.items()} for s in range(length)] for text in texts]
  return [[in_passes(of_one, rows) for of_one in of_teacher] for of_teacher in made]


def sampled(tools: Tools, number: int, prompts: list[tuple[int, ...]], place: Place) -> list[list[int]]:
  """Replies of a round, in the order of the prompts: from the journal, and by the student where they are missing there."""
  run_config, started = tools.run_config, time.perf_counter()
  distillation, seed, stop_token = run_config.distillation, run_config.training.seed, tools.sources[0].document_end
  asked = {"prompts": zlib.crc32(json.dumps(prompts).encode()), "weights": place.weights, "seed": seed,
           "reply_length": distillation.reply_length, "temperature": distillation.temperature}
  config = dataclasses.replace(run_config.model, scan_layers=False)  # decodes faster
  variables = restack({"params": place.state.params, "router": place.state.router}, config, False)
  draw = functools.partial(sample_replies, DeepseekV4(config, run_config.training.kernels), variables, mesh=tools.mesh,
                           batch_size=distillation.decode_batch, temperature=distillation.temperature)
  first = number * distillation.steps_per_round
  draw = draw if place.step == first else functools.partial(_refuse_to_draw, tools.workdir, number, place.step)
  with journals.Journal(tools.workdir / SAMPLES, number, asked, len(prompts), whole=place.step != first) as journal:
    before = journal.count
    requests = [Request(prompt, (seed, number, i)) for i, prompt in enumerate(prompts)]
    replies = journals.draw_missing(journal, requests, draw, max_new_tokens=distillation.reply_length,
                                    stop_tokens=(stop_token,), on_saved=functools.partial(leave_if_asked, tools, place))
    seconds = time.perf_counter() - started
    new = journal.count - before
    tools.writer.write("rollout", first, {
      "sampled_tokens": new, "seconds": seconds, "tokens_per_second": new / seconds,
      "reply_length": journal.count / len(replies), "ended": np.mean([reply[-1] == stop_token for reply in replies])})
    tools.progress.say(f"round {number}: {len(replies)} replies of {journal.count / len(replies):.1f} tokens; {new:,} "
                       f"sampled now, {before:,} before, {new / seconds:,.0f} tokens/s")
  return replies


def _refuse_to_draw(workdir: Path, number: int, step: int, *_: Any, **__: Any) -> None:
  """The end of a run that is in the middle of a round and has lost what that was to learn from."""
  raise FileNotFoundError(f"{journals.file_of(workdir / SAMPLES, number)}: replies of round {number} are missing, and the "
                          f"weights that drew them are gone after step {step}: expected the file as the run left it")


def listen(tools: Tools, number: int, parts: list[list[list[dict[str, np.ndarray]]]], place: Place) -> list[np.ndarray]:
  """Hidden states of a round: of each teacher [passes of all steps, B, S, E], in the dtype `distillation.hidden_dtype`. One
  teacher's weights at a time.

  Args:
    parts: of `passes_of`.
  """
  started, heard = time.perf_counter(), []
  for teacher, of_steps in zip(tools.teachers, parts):
    heard.append(tools.library.hidden(teacher, number, [part for step in of_steps for part in step], tools.steps.put_rows,
                                      functools.partial(leave_if_asked, tools, place)))
  first = number * tools.run_config.distillation.steps_per_round
  tools.writer.write("teachers", first, {"seconds": time.perf_counter() - started})
  tools.progress.restart_clock()
  return heard


def one_step(tools: Tools, place: Place, parts: list[list[list[dict[str, np.ndarray]]]], heard: list[np.ndarray],
             step: int) -> Place:
  """The step number `step` of a round, and what is due after it.

  Args:
    parts: of each teacher and step, the passes' rows, int32 [B, S] by name; see `passes_of`.
    heard: of each teacher, hidden states [passes, B, S, E], dtype `distillation.hidden_dtype`; see `listen`.

  Raises:
    FloatingPointError: loss or gradients are not finite.
  """
  training, steps = tools.run_config.training, tools.steps
  tools.store.check_errors()
  leave_if_asked(tools, place)
  tools.stop.unsaved = True
  passes = [(t, sum(map(len, of_teacher[:step])) + i, rows) for t, of_teacher in enumerate(parts)
            for i, rows in enumerate(of_teacher[step])]
  rows = [steps.put_rows(rows) for *_, rows in passes]
  counted = jax.device_get([steps.count(one) for one in rows])
  counts = {name: sum(one[name] for one in counted) for name in counted[0]}
  sums, found = steps.start(), []
  for (t, at, _), one in zip(passes, rows):
    teacher = tools.teachers[t]
    part = Pass(one, steps.put_hidden(heard[t][at]), tools.resident.head(teacher), np.float32(teacher.config.weight),
                min(teacher.model.vocab_size, tools.run_config.model.vocab_size))
    sums, kl = steps.add(place.state, sums, part, counts)
    found.append(kl)
  state, values = steps.update(place.state, sums)
  numbers = {name: np.asarray(value).item() for name, value in jax.device_get(values).items()}
  n = place.step + 1
  if not numbers.pop("finite"):
    raise FloatingPointError(f"step {n}: {not_finite('step', numbers)}")
  place = Place(n, state, place.weights)
  kl = kl_by_teacher(tools.teachers, [t for t, *_ in passes], jax.device_get(found), counted)
  tools.progress.step(numbers["tokens"])
  if n % training.log_every == 0 or n == training.steps:
    numbers["tokens_per_second"] = tools.progress.report(n, kl["kl"], name="KL")
    tools.writer.write("train", n, numbers | kl)
  if n % training.eval_every == 0 and n != training.steps:
    score(tools, place)
  if n % training.checkpoint_every == 0 or n == training.steps:
    save(tools, place)
    tools.progress.restart_clock()
  return place


def kl_by_teacher(teachers: tuple[Teacher, ...], of_pass: list[int], sums: list[Any],
                  counted: list[Any]) -> dict[str, float]:
  """Mean KL in nats over all tokens that count, "kl", and over those of each teacher, "kl/NAME"."""
  kl, count = np.zeros(len(teachers)), np.zeros(len(teachers))
  for t, total, counts in zip(of_pass, sums, counted):
    kl[t] += total
    count[t] += counts["distillation"]
  each = {f"kl/{teacher.name}": float(kl[t] / max(count[t], 1)) for t, teacher in enumerate(teachers)}
  return {"kl": float(kl.sum() / max(count.sum(), 1)), **each}


@jax.jit
def _fingerprint(tree: Any) -> jax.Array:
  bits = lambda x: jax.lax.bitcast_convert_type(x, jnp.uint32).sum(dtype=jnp.uint32)
  return sum(jnp.uint32(2 * i + 1) * bits(x) for i, x in enumerate(jax.tree.leaves(tree)))


def fingerprint(state: Any) -> int:
  """A number that changes with any bit of the weights."""
  return int(_fingerprint({"params": state.params, "router": state.router}))


# ---- scores, checkpoints, the end -------------------------------------------------------------------------------------
def score(tools: Tools, place: Place, batches: int | None = -1) -> dict[str, dict[str, float]]:
  """Scores the teachers' held-out text (`eval_batches` of it; None = all), and writes it down; leaves if told to stop."""
  found = tools.score(place.state, tools.run_config.training.eval_batches if batches == -1 else batches)
  if None in found.values():
    leave(tools, place)
  unit = {name: numbers.get("bits_per_byte", numbers["bits_per_token"]) for name, numbers in found.items()}
  tools.writer.write("held_out" if batches == -1 else "all_held_out", place.step, {
    f"{kind}/{name}": value for name, numbers in found.items() for kind, value in numbers.items()})
  tools.progress.say(f"step {place.step}/{tools.run_config.training.steps}  held-out bits  " + "  ".join(
    f"{name} {value:.3f}" for name, value in unit.items()))
  tools.progress.restart_clock()
  return found


def save(tools: Tools, place: Place) -> None:
  """Starts writing a checkpoint."""
  tools.store.save(place.step, place.state, {"sampled_with": place.weights, "round": round_of(tools.run_config)})


def leave_if_asked(tools: Tools, place: Place) -> None:
  """Leaves if the run was told to stop."""
  if tools.stop.asked:
    leave(tools, place)


def leave(tools: Tools, place: Place) -> None:
  """Saves the place and raises Stopped."""
  if place.step:
    save(tools, place)
  tools.store.wait()
  tools.stop.unsaved = False
  saved = "which is saved, and so is every token sampled after it; the same command goes on from there"
  raise Stopped(f"stopped after step {place.step}, {saved if place.step else 'and every token sampled is saved'}")


def finish(tools: Tools, place: Place, seconds: float) -> dict[str, Any]:
  """Scores all held-out text, writes summary and picture, and returns the summary."""
  found = score(tools, place, None)
  tools.store.wait()
  tools.stop.unsaved = False
  lines = metrics.read_lines(tools.workdir / metrics.LINES)
  total = lambda split, name: sum(line[name] for line in lines if line["split"] == split)
  took = {split: total(split, "seconds") for split in ("rollout", "teachers")}
  summary = {"steps": place.step, "held_out": found, "sampled_tokens": total("rollout", "sampled_tokens"),
             "seconds": took | {"last_start": seconds}, "tokens_per_second": tools.progress.tokens_per_second}
  metrics.write_json(tools.workdir / metrics.SUMMARY, summary)
  plots_distillation.curves(lines, tools.workdir / CURVES)
  return summary
