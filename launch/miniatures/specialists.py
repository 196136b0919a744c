"""Three specialists and one student: on-policy distillation beside two other ways to get one model that knows it all.

A common start, trained on all three kinds of text for a while at a constant rate, becomes a specialist of each kind by more
training on it alone, in which the rate decays. From the same start one student is distilled from all specialists on its own
replies. For comparison, with as many updates of as many tokens: the same loss on the specialists' training text
(off-policy), and plain training on mixed text.

What counts is the share of a specialist's gain over the start that a model reaches on text of that kind:
(start - model) / (start - specialist) in bits per byte. The text is that of documents which no run reads, neither to train
nor to look at its held-out loss, so nothing about the runs was chosen by it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any, Callable, Mapping

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
from launch.miniatures import Result, specialists_text
from launch.miniatures.specialists_text import KINDS

DESCRIPTION = "three specialists on Python, C and English, and one student distilled from them on its own replies"
PICTURE = "specialists.png"
LENGTH = 256
ROWS = 48  # of a step of start and specialists
SAMPLES, SAMPLE_ROWS = 96, 36  # of a step of the student, and the rows that they fill with 88 tokens each
START_RATE, SPECIALIST_RATE, STUDENT_RATE = 6e-3, 4e-3, 5e-3
METHODS = {"student": "on-policy distillation", "off_policy": "off-policy distillation", "mixed": "plain, mixed text"}


@dataclasses.dataclass(frozen=True)
class Plan:
  """Optimizer steps of each part; those of the suite's short version are fewer."""

  start: int = 48
  specialist: int = 12
  student: int = 128


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
  # A start that had decayed already would have to warm up again before it can learn anything else.
  decay = {} if init_from is None else {"decay_steps": steps - warm_up, "final_fraction": 0.03}
  return c.RunConfig(
    model=model(), data=data_of(folder, kind),
    optimizer=c.OptimizerConfig(learning_rate=rate, warmup_steps=warm_up, **decay),
    training=c.TrainingConfig(steps=steps, seed=seed, log_every=10, eval_every=steps, eval_batches=1, checkpoint_every=steps,
                              keep_checkpoints=1, init_from=None if init_from is None else str(init_from)))


def student_run(folder: Path, steps: int, seed: int, init_from: Path) -> c.RunConfig:
  """Training on mixed text, with as many tokens a step as the student reads; the rate decays in the last third."""
  run = training_run(folder, None, steps, STUDENT_RATE, seed, init_from)
  return dataclasses.replace(run, data=dataclasses.replace(run.data, batch_size=SAMPLE_ROWS),
                             optimizer=dataclasses.replace(run.optimizer, decay_steps=steps // 3))


def distillation_run(folder: Path, teachers: Mapping[str, Path], steps: int, samples: str, seed: int,
                     init_from: Path) -> c.RunConfig:
  """The student's run; with samples = "text" that of the off-policy comparison."""
  run = student_run(folder, steps, seed, init_from)
  rows = {"accumulation": len(teachers)} | ({"batch_size": SAMPLES, "accumulation": 8} if samples == c.STUDENT else {})
  asked = tuple(c.TeacherConfig(kind, str(path), data_of(folder, kind)) for kind, path in teachers.items())
  return dataclasses.replace(
    run, data=dataclasses.replace(run.data, **rows),
    training=dataclasses.replace(run.training, eval_every=max(1, steps // 8), eval_batches=2, checkpoint_every=steps // 4),
    distillation=c.DistillationConfig(
      # Short replies: what a model of this size says turns to noise, and it is to learn what follows real text.
      teachers=asked, samples=samples, prompt_length=96, shortest_prompt=16, reply_length=32, steps_per_round=8,
      decode_batch=192, hidden_dtype="float32"))


# ---- running ----------------------------------------------------------------------------------------------------------
def run(workdir: Path, seeds: int, say: Callable[[str], None], plan: Plan = Plan()) -> Result:
  """Trains, or goes on; see the top of the package."""
  text = workdir / "text"
  jax.config.update("jax_compilation_cache_dir", str(workdir / "compiled"))  # the runs are much alike
  specialists_text.write(text)
  found = [run_seed(workdir / f"seed_{seed}", text, seed, say, plan) for seed in range(seeds)]
  rows = [row_of(found, name) for name in ("start", *KINDS, *METHODS)]
  lowest = min(share(scores, "student", kind) for scores in found for kind in KINDS)
  targets = [{"target": f"share of every specialist's gain that the student reaches, at least ({why})", "bound": bound,
              "value": lowest, "reached": lowest >= bound} for bound, why in ((0.8, "asked for"), (0.9, "hoped for"))]
  lines = metrics.read_lines(workdir / "seed_0" / "student" / metrics.LINES)
  plots_distillation.shares(lines, found[0], KINDS, METHODS, workdir / PICTURE)
  return Result(rows, targets, PICTURE)


def run_seed(folder: Path, text: Path, seed: int, say: Callable[[str], None], plan: Plan) -> dict[str, dict[str, float]]:
  """{model: {kind: held-out bits per byte}} of one repetition."""
  start, specialists = folder / "start", {kind: folder / kind for kind in KINDS}
  parts: dict[str, tuple[c.RunConfig, Callable[..., Any]]] = {
    "start": (training_run(text, None, plan.start, START_RATE, seed, None), loop.train)}
  for kind in KINDS:
    parts[kind] = training_run(text, kind, plan.specialist, SPECIALIST_RATE, seed, start), loop.train
  for name, samples in (("student", c.STUDENT), ("off_policy", c.TEXT)):
    parts[name] = distillation_run(text, specialists, plan.student, samples, seed, start), distillation_loop.distill
  parts["mixed"] = student_run(text, plan.student, seed, start), loop.train
  scores = {}
  for name, (config, train) in parts.items():
    if not (folder / name / metrics.SUMMARY).is_file():
      say(f"\n==== {folder.name}: {name}")
      train(config, folder / name)
    scores[name] = scored(folder / name, text)
    say(f"{folder.name}: {name}: " + ", ".join(f"{kind} {value:.3f}" for kind, value in scores[name].items()))
  return scores


def scored(folder: Path, text: Path) -> dict[str, float]:
  """Bits per byte of the judged text of each kind, of the model in a run's folder; kept in its scores.json."""
  file = folder / "scores.json"
  if file.is_file():
    return json.loads(file.read_text())
  variables, _, _ = restore_variables(folder / loop.CHECKPOINTS)
  state = TrainState(jnp.zeros((), jnp.int32), variables["params"], variables["router"], (), jax.random.key(0))
  runs = {kind: judged_run(text, kind) for kind in KINDS}
  scorer, found = make_eval_step(runs[KINDS[0]]), {}
  for kind, config in runs.items():
    numbers = evaluate(scorer, dataset(config, "held_out"), functools.partial(to_device, config, None), Stopping(), state)
    found[kind] = numbers["bits_per_byte"]
  metrics.write_json(file, found)
  return found


def judged_run(folder: Path, kind: str) -> c.RunConfig:
  """Settings of a run that would hold out nearly all judged text of a kind: the text is read as held-out text is."""
  path = folder / specialists_text.JUDGED / f"{kind}.jsonl"
  return c.RunConfig(model=model(), data=dataclasses.replace(data_of(folder, kind), path=str(path), held_out_percent=99))


# ---- figures ----------------------------------------------------------------------------------------------------------
def share(scores: Mapping[str, Mapping[str, float]], name: str, kind: str) -> float:
  """Part of the specialist's gain over the start that a model has on its text."""
  start, best = scores["start"][kind], scores[kind][kind]
  return (start - scores[name][kind]) / (start - best) if start > best else math.nan


def row_of(found: list[dict[str, dict[str, float]]], name: str) -> dict[str, Any]:
  """A line of the table: means over the repetitions."""
  title = {"start": "common start", **{kind: f"specialist: {kind}" for kind in KINDS}, **METHODS}[name]
  bits = {f"{kind}, bits/byte": float(np.mean([scores[name][kind] for scores in found])) for kind in KINDS}
  gains = {f"{kind}, share": float(np.mean([share(scores, name, kind) for scores in found])) for kind in KINDS}
  return {"model": title, **bits, **gains}
