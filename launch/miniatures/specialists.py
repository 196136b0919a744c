"""Three specialists and one student: on-policy distillation beside two other ways to get one model that knows it all.

A common start, trained on all three kinds of text at a constant rate, becomes a specialist of each kind by more training on
it alone, in which the rate decays. From the same start one student is distilled from all specialists on its own replies. For
comparison, with as many updates, each of as many tokens that are learnt from: the same loss on the specialists' training
text (off-policy), and plain training on mixed text.

What counts is the share of a specialist's gain over the start that a model reaches on text of that kind:
(start - model) / (start - specialist) in bits per byte. The text is that of documents which no run reads, neither to train
nor to look at its held-out loss; the length of a reply, the number of updates and the temperature were chosen by the first
repetition's figures on it. Each part of a repetition is a run in a folder
of its own: what is done is taken, what was interrupted goes on.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_v4 import config as c
from deepseek_v4.analysis import plots_distillation
from deepseek_v4.checkpoint.store import restore_variables
from deepseek_v4.posttraining import distillation_loop
from deepseek_v4.training import loop, metrics
from deepseek_v4.training.feed import dataset, to_device
from deepseek_v4.training.scoring import evaluate
from deepseek_v4.training.state import TrainState
from deepseek_v4.training.step import make_eval_step
from deepseek_v4.training.stopping import Stopping
from launch.miniatures import Result, runs, specialists_text
from launch.miniatures.specialists_text import KINDS

DESCRIPTION = "three specialists on Python, C and English, and one student distilled from them on its own replies"
PICTURE = "specialists.png"
LENGTH = 256
ROWS = 48  # of a step of start and specialists
# Of a step of the student: 48 samples of each teacher, 16 to 128 tokens asked and 32 replied, so that places far from the
# beginning of a row are met too. A teacher's fill about 21 rows; in small passes few rows hold nothing. All replied tokens
# count alike, and they are as many as those of the rows of text that the other ways learn from. The longer a reply, the
# less its end is like text: with 224 tokens the student reached 52 to 70% of the gains, with 64 it was 78 to 84%, with 32
# it is 82 to 87% (seed 0; 227, 431 and 546 seconds).
SAMPLES, PASS_ROWS, LONGEST_PROMPT, SHORTEST_PROMPT, REPLY = 144, 4, 128, 16, 32
COMPARED_ROWS = SAMPLES * REPLY // LENGTH
START_RATE, SPECIALIST_RATE, STUDENT_RATE = 6e-3, 4e-3, 4e-3
# As the student would speak: with 0.8 (and 128 updates, replies of 64) it reached 68 to 78% of the gains.
TEMPERATURE = 1.0
METHODS = {"student": "on-policy distillation", "off_policy": "off-policy distillation", "mixed": "plain, mixed text"}
WANTED, HOPED_FOR, MINUTES = 0.8, 0.9, 15


@dataclasses.dataclass(frozen=True)
class Plan:
  """Optimizer steps of each part; those of the suite's short version are fewer.

  The start is early: what a specialist gains is more training, a rate that decays, and that it may forget the rest, which
  the student may not. From a start of 176 updates whose rate had decayed specialists gained 0.04, 0.10 and 0.15 bits per
  byte in 24 updates, and the student's own replies taught it nothing of that (one seed; rates of 1e-3 and 4e-3).
  """

  start: int = 48
  specialist: int = 12
  student: int = 192


def model() -> c.ModelConfig:
  """Every kind of attention and router, and nothing that a student of bytes could do without."""
  return c.ModelConfig(
    vocab_size=264, hidden_size=96, num_hidden_layers=3, layer_types=(c.SLIDING, c.CSA, c.HCA),
    mlp_layer_types=(c.HASH, c.LEARNED, c.LEARNED), csa_compress_rate=4, hca_compress_rate=16, num_attention_heads=4,
    head_dim=32, qk_rope_head_dim=16, q_lora_rank=48, o_groups=2, o_lora_rank=48, sliding_window=32, index_n_heads=2,
    index_head_dim=16, index_topk=16, n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=96, hc_mult=2,
    rope_scaling=None, max_position_embeddings=512, num_nextn_predict_layers=0, init_std=0.02)


def data_of(folder: Path, kind: str | None) -> c.DataConfig:
  """What is taught of a kind of text, or of all of them (None)."""
  folder = folder / specialists_text.TAUGHT
  path = folder if kind is None else folder / f"{kind}.jsonl"
  return c.DataConfig(source="jsonl", path=str(path), sequence_length=LENGTH, batch_size=ROWS, held_out_percent=6)


def training_run(folder: Path, kind: str | None, steps: int, rate: float, seed: int, init_from: Path | None) -> c.RunConfig:
  """A run on a kind of text: at a constant rate from scratch, with one that decays from a start on."""
  warm_up = min(10 if init_from is None else 4, steps // 4)
  decay = 0 if init_from is None else steps - warm_up
  return c.RunConfig(
    model=model(), data=data_of(folder, kind),
    optimizer=c.OptimizerConfig(learning_rate=rate, warmup_steps=warm_up, decay_steps=decay, final_fraction=0.03),
    training=c.TrainingConfig(steps=steps, seed=seed, log_every=4, eval_every=max(1, steps // 4), eval_batches=1,
                              checkpoint_every=max(1, steps // 4), keep_checkpoints=1,
                              init_from=None if init_from is None else str(init_from)))


def student_run(folder: Path, steps: int, seed: int, init_from: Path) -> c.RunConfig:
  """Training on mixed text, of as many tokens a step as the student replies; the rate decays in the second half."""
  run = training_run(folder, None, steps, STUDENT_RATE, seed, init_from)
  return dataclasses.replace(run, data=dataclasses.replace(run.data, batch_size=COMPARED_ROWS),
                             optimizer=dataclasses.replace(run.optimizer, decay_steps=steps // 2))


def distillation_run(folder: Path, teachers: Mapping[str, Path], steps: int, samples: str, seed: int,
                     init_from: Path) -> c.RunConfig:
  """The student's run; with samples = "text" that of the off-policy comparison."""
  run = student_run(folder, steps, seed, init_from)
  rows = {"accumulation": len(teachers)}
  if samples == c.STUDENT:
    rows = {"batch_size": SAMPLES, "accumulation": SAMPLES // PASS_ROWS}
  asked = tuple(c.TeacherConfig(kind, str(path), data_of(folder, kind)) for kind, path in teachers.items())
  return dataclasses.replace(
    run, data=dataclasses.replace(run.data, **rows),
    training=dataclasses.replace(run.training, eval_every=max(1, steps // 8), eval_batches=1,
                                 checkpoint_every=max(1, steps // 8)),
    distillation=c.DistillationConfig(
      teachers=asked, samples=samples, prompt_length=LONGEST_PROMPT, shortest_prompt=SHORTEST_PROMPT, reply_length=REPLY,
      temperature=TEMPERATURE, steps_per_round=8, decode_batch=192, hidden_dtype="float32"))


# ---- running ----------------------------------------------------------------------------------------------------------
def run(workdir: Path, seeds: int, say: Callable[[str], None], plan: Plan = Plan()) -> Result:
  """Trains, or goes on; see the top of the package."""
  text = workdir / "text"
  runs.refuse_other_plan(workdir, {"plan": dataclasses.asdict(plan), "bytes": specialists_text.MAX_BYTES})
  jax.config.update("jax_compilation_cache_dir", str(workdir / "compiled"))  # the runs are much alike
  specialists_text.write(text)
  runs.refuse_other_runs({workdir / f"seed_{seed}" / name: config for seed in range(seeds)
                          for name, (config, _) in parts_of(workdir / f"seed_{seed}", text, seed, plan).items()})
  made = [run_seed(workdir / f"seed_{seed}", text, seed, say, plan) for seed in range(seeds)]
  found, seconds = [scores for scores, _ in made], [took for _, took in made]
  rows = [row_of(found, name) for name in ("start", *KINDS, *METHODS)]
  lines = metrics.read_lines(workdir / "seed_0" / "student" / metrics.LINES)
  plots_distillation.shares(lines, found[0], KINDS, METHODS, workdir / PICTURE)
  return Result(rows, targets_of(found, seconds), PICTURE)


def parts_of(folder: Path, text: Path, seed: int, plan: Plan) -> dict[str, tuple[c.RunConfig, Callable[..., Any]]]:
  """{name: (settings, what trains)} of one repetition, in the order in which they need each other."""
  start, specialists = folder / "start", {kind: folder / kind for kind in KINDS}
  parts: dict[str, tuple[c.RunConfig, Callable[..., Any]]] = {
    "start": (training_run(text, None, plan.start, START_RATE, seed, None), loop.train)}
  for kind in KINDS:
    parts[kind] = training_run(text, kind, plan.specialist, SPECIALIST_RATE, seed, start), loop.train
  for name, samples in (("student", c.STUDENT), ("off_policy", c.TEXT)):
    parts[name] = distillation_run(text, specialists, plan.student, samples, seed, start), distillation_loop.distill
  parts["mixed"] = student_run(text, plan.student, seed, start), loop.train
  return parts


def run_seed(folder: Path, text: Path, seed: int, say: Callable[[str], None],
             plan: Plan) -> tuple[dict[str, dict[str, float]], dict[str, float | None]]:
  """({model: {kind: bits per byte of the judged text}}, {model: seconds, None if it was interrupted}) of one repetition."""
  scores: dict[str, dict[str, float]] = {}
  seconds = {}
  for name, (config, train) in parts_of(folder, text, seed, plan).items():
    seconds[name] = runs.trained(config, folder / name, train, say)
    scores[name] = scored(folder / name, text)
    took = "" if seconds[name] is None else f" ({seconds[name]:.0f} s)"
    say(f"{folder.name}: {name}{took}: " + ", ".join(f"{kind} {value:.3f}" for kind, value in scores[name].items()))
    if name in KINDS and gain(scores, name) <= 0:
      say(f"{folder.name}: the specialist of {name} gained nothing over the start on text that no run reads: shares of "
          f"its gain mean nothing")
  return scores, seconds


def scored(folder: Path, text: Path) -> dict[str, float]:
  """Bits per byte of the judged text of each kind, of the model in a run's folder; kept in its scores.json."""
  file = folder / "scores.json"
  if file.is_file():
    return json.loads(file.read_text())
  variables, _, _ = restore_variables(folder / loop.CHECKPOINTS)
  state = TrainState(jnp.zeros((), jnp.int32), variables["params"], variables["router"], (), jax.random.key(0))
  judged = {kind: judged_run(text, kind) for kind in KINDS}
  scorer, found = make_eval_step(judged[KINDS[0]]), {}
  for kind, config in judged.items():
    numbers = evaluate(scorer, dataset(config, "held_out"), functools.partial(to_device, config, None), Stopping(), state)
    found[kind] = numbers["bits_per_byte"]
  metrics.write_json(file, found)
  return found


def judged_run(folder: Path, kind: str) -> c.RunConfig:
  """Settings of a run that would hold out nearly all judged text of a kind: the text is read as held-out text is."""
  path = folder / specialists_text.JUDGED / f"{kind}.jsonl"
  return c.RunConfig(model=model(), data=dataclasses.replace(data_of(folder, kind), path=str(path), held_out_percent=99))


# ---- figures ----------------------------------------------------------------------------------------------------------
def gain(scores: Mapping[str, Mapping[str, float]], kind: str) -> float:
  """Bits per byte that a specialist gains over the start on its text."""
  return scores["start"][kind] - scores[kind][kind]


def share(scores: Mapping[str, Mapping[str, float]], name: str, kind: str) -> float | None:
  """Part of the specialist's gain over the start that a model has on its text; None if the specialist gained nothing."""
  if gain(scores, kind) <= 0:
    return None
  return (scores["start"][kind] - scores[name][kind]) / gain(scores, kind)


def over(summary: Callable[[list[float]], float], found: Sequence[Mapping[str, Mapping[str, float]]], name: str,
         kind: str) -> float | None:
  """A summary of a model's shares in all repetitions; None if in one of them there was no gain."""
  values = [share(scores, name, kind) for scores in found]
  return None if None in values else float(summary([value for value in values if value is not None]))


def row_of(found: Sequence[dict[str, dict[str, float]]], name: str) -> dict[str, Any]:
  """A line of the table: means over the repetitions; no share where a specialist gained nothing."""
  title = {"start": "common start", **{kind: f"specialist: {kind}" for kind in KINDS}, **METHODS}[name]
  bits = {f"{kind}, bits/byte": float(np.mean([scores[name][kind] for scores in found])) for kind in KINDS}
  return {"model": title, **bits, **{f"{kind}, share": over(np.mean, found, name, kind) for kind in KINDS}}


def targets_of(found: Sequence[dict[str, dict[str, float]]], seconds: Sequence[Mapping[str, float | None]]
               ) -> list[dict[str, Any]]:
  """What the worst repetition's student shows of each specialist beside what is asked for; the goal; the time."""
  at_least = lambda text, bound, value: {"target": text, "bound": bound, "value": value,
                                         "reached": None if value is None else value >= bound}
  targets, lowest = [], [over(min, found, "student", kind) for kind in KINDS]
  for kind, value in zip(KINDS, lowest):
    if value is None:
      beside = "the specialist gained nothing over the start"
    else:
      beside = ", ".join(f"{METHODS[name]} {over(min, found, name, kind):.2f}" for name in METHODS if name != "student")
    targets.append(at_least(f"{kind}: the student's share of the specialist's gain, at least {WANTED} ({beside})", WANTED,
                            value))
  worst = None if None in lowest else min(value for value in lowest if value is not None)
  targets.append(at_least(f"the goal: its lowest share, at least {HOPED_FOR}", HOPED_FOR, worst))
  took = [[by_name[name] for name in METHODS] for by_name in seconds]
  return [*targets, runs.minutes_target("minutes beside the teachers' training", MINUTES, took)]
