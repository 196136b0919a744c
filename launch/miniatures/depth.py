"""Reasoning depth: one model that answers at once, thinks or thinks longer, as each request asks.

Conversations of three efforts teach a start the forms; from it a specialist of each effort learns from rewards, with its own
price of length and its own limit of a thought; and a student is distilled from the three on its own replies. What counts is
how many sums of six digits that no run has seen the student gets right, and how long it takes, for each effort.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Callable, Sequence

import jax
import numpy as np

from deepseek_v4 import config as c
from deepseek_v4.analysis import plots_reinforcement
from deepseek_v4.checkpoint.store import restore_variables
from deepseek_v4.generation.requests import ThinkingBudget
from deepseek_v4.model.transformer import DeepseekV4
from deepseek_v4.posttraining import distillation_loop, reinforcement
from deepseek_v4.posttraining.rewards import exact_answer, message_of
from deepseek_v4.posttraining.rollout import Request, sample_replies
from deepseek_v4.text import chat, tokenize
from deepseek_v4.text.chat_template import DEFAULT, THINK_END
from deepseek_v4.training import loop, metrics
from launch.miniatures import Result, depth_task, runs
from launch.miniatures.depth_task import EFFORTS

DESCRIPTION = "sums of digits with no, some and long thought: conversations, rewards, and one student of all three"
PICTURE = "depth.png"
LENGTH = 128
THOUGHT = {"none": None, "high": 10, "max": 20}  # most tokens of a thought, which the decoder closes
REPLY = {"none": 4, "high": 14, "max": 26}
PRICE = {"none": 0.2, "high": 0.1, "max": 0.0}  # of a reply of that many tokens, taken off a reward of 1
MODELS = ("conversations", "rewards", "student")
MINUTES = 20  # at most, of a repetition's runs


@dataclasses.dataclass(frozen=True)
class Plan:
  """Sizes of the parts."""

  talks: int = 12_000  # conversations of each effort
  problems: int = 1500  # to learn from by rewards, and as many to be scored on
  start: int = 400  # optimizer steps
  specialist: int = 60
  student: int = 60


def model() -> c.ModelConfig:
  """Every kind of attention and router; the window holds a conversation."""
  return c.ModelConfig(
    vocab_size=264, hidden_size=64, num_hidden_layers=4, layer_types=(c.SLIDING, c.CSA, c.HCA, c.CSA),
    mlp_layer_types=(c.HASH, c.LEARNED, c.LEARNED, c.LEARNED), csa_compress_rate=4, hca_compress_rate=16,
    num_attention_heads=4, head_dim=64, qk_rope_head_dim=32, q_lora_rank=48, o_groups=2, o_lora_rank=48, sliding_window=48,
    index_n_heads=2, index_head_dim=32, index_topk=8, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=96,
    hc_mult=2, rope_theta=100.0, compress_rope_theta=100.0, rope_scaling=None,  # texts are short
    max_position_embeddings=256, num_nextn_predict_layers=0, init_std=0.02,
    bos_token_id=256, eos_token_id=257)  # of depth_task's tokenizer, behind the bytes


# ---- the runs -----------------------------------------------------------------------------------------------------------
def data_of(path: Path, tokenizer: Path, rows: int) -> c.DataConfig:
  return c.DataConfig(source="chat", path=str(path), tokenizer=str(tokenizer), sequence_length=LENGTH, batch_size=rows,
                      held_out_percent=4)


def start_run(folder: Path, steps: int, seed: int) -> c.RunConfig:
  """Conversations of all efforts."""
  return c.RunConfig(
    model=model(), data=data_of(folder / depth_task.TALKS, folder / depth_task.TOKENIZER, 32),
    optimizer=c.OptimizerConfig(learning_rate=6e-3, warmup_steps=min(20, steps // 4), decay_steps=steps // 3),
    training=c.TrainingConfig(steps=steps, seed=seed, log_every=20, eval_every=max(1, steps // 4), eval_batches=2,
                              checkpoint_every=max(1, steps // 4), keep_checkpoints=1))


def specialist_run(folder: Path, effort: str, steps: int, seed: int, start: Path) -> c.RunConfig:
  """Rewards for right answers of one effort."""
  return dataclasses.replace(
    start_run(folder, steps, seed), data=data_of(folder / depth_task.PROBLEMS, folder / depth_task.TOKENIZER, 32),
    optimizer=c.OptimizerConfig(learning_rate=1e-3, warmup_steps=2, weight_decay=0.0),
    training=c.TrainingConfig(steps=steps, seed=seed, log_every=1, eval_every=max(1, steps // 6), eval_batches=1,
                              checkpoint_every=max(1, steps // 3), keep_checkpoints=1, init_from=str(start)),
    reinforcement=c.ReinforcementConfig(
      reasoning_effort=effort, problems=32, replies=8, minibatches=2, max_new_tokens=REPLY[effort],
      thinking_tokens=THOUGHT[effort], decode_batch=256, clip=0.2, kl_weight=0.01, reference_steps=20,
      length_penalty=PRICE[effort]))


def student_run(folder: Path, specialists: dict[str, Path], steps: int, seed: int, start: Path) -> c.RunConfig:
  """One model from the three specialists."""
  tokenizer = folder / depth_task.TOKENIZER
  teachers = tuple(c.TeacherConfig(effort, str(path), data_of(folder / depth_task.TALKS / f"{effort}.jsonl", tokenizer, 32))
                   for effort, path in specialists.items())
  return dataclasses.replace(
    start_run(folder, steps, seed),
    data=dataclasses.replace(data_of(folder / depth_task.TALKS, tokenizer, 192), accumulation=12),
    optimizer=c.OptimizerConfig(learning_rate=2e-3, warmup_steps=2, decay_steps=steps // 2, weight_decay=0.0),
    training=c.TrainingConfig(steps=steps, seed=seed, log_every=4, eval_every=max(1, steps // 3), eval_batches=1,
                              checkpoint_every=max(1, steps // 3), keep_checkpoints=1, init_from=str(start)),
    distillation=c.DistillationConfig(teachers=teachers, prompt_length=16, shortest_prompt=16, reply_length=26,
                                      steps_per_round=4, decode_batch=192, hidden_dtype="float32"))


# ---- running --------------------------------------------------------------------------------------------------------------
def run(workdir: Path, seeds: int, say: Callable[[str], None], plan: Plan = Plan()) -> Result:
  """Trains, or goes on; see the top of the package."""
  runs.refuse_other_plan(workdir, {"plan": dataclasses.asdict(plan), "digits": depth_task.DIGITS, "slips": depth_task.SLIPS})
  jax.config.update("jax_compilation_cache_dir", str(workdir / "compiled"))  # the runs are much alike
  unseen = depth_task.write(workdir / "task", plan.talks, plan.problems)
  runs.refuse_other_runs({workdir / f"seed_{seed}" / name: config for seed in range(seeds)
                          for name, (config, _) in parts_of(workdir / f"seed_{seed}", workdir / "task", seed, plan).items()})
  made = [run_seed(workdir / f"seed_{seed}", workdir / "task", unseen, seed, say, plan) for seed in range(seeds)]
  found, seconds = [scores for scores, _ in made], [took for _, took in made]
  plots_reinforcement.depth(found, EFFORTS, MODELS, workdir / PICTURE)
  return Result([row_of(found, name) for name in MODELS], targets_of(found, seconds), PICTURE)


def parts_of(folder: Path, task: Path, seed: int, plan: Plan) -> dict[str, tuple[c.RunConfig, Callable[..., Any]]]:
  """{name: (settings, what trains)} of one repetition, in the order in which they need each other."""
  start, specialists = folder / "start", {effort: folder / f"rewards_{effort}" for effort in EFFORTS}
  parts: dict[str, tuple[c.RunConfig, Callable[..., Any]]] = {
    "start": (start_run(task, plan.start, seed), loop.train)}
  for effort, path in specialists.items():
    parts[path.name] = specialist_run(task, effort, plan.specialist, seed, start), reinforcement.reinforce
  parts["student"] = student_run(task, specialists, plan.student, seed, start), distillation_loop.distill
  return parts


def run_seed(folder: Path, task: Path, unseen: Sequence[Sequence[int]], seed: int, say: Callable[[str], None],
             plan: Plan) -> tuple[dict[str, Any], list[float | None]]:
  """({model: {effort: {"accuracy", "tokens"}}}, seconds of each run, None if it was interrupted) of one repetition; of the
  specialists each one's own effort."""
  scores, seconds = {}, []
  for name, (config, train) in parts_of(folder, task, seed, plan).items():
    seconds.append(runs.trained(config, folder / name, train, say))
    efforts = [name.removeprefix("rewards_")] if name.startswith("rewards_") else EFFORTS
    scores[name] = scored(folder / name, task, unseen, efforts)
    took = "" if seconds[-1] is None else f" ({seconds[-1]:.0f} s)"
    say(f"{folder.name}: {name}{took}: " + ", ".join(f"{effort} {x['accuracy']:.1%} in {x['tokens']:.1f} tokens"
                                                     for effort, x in scores[name].items()))
  specialists = {effort: scores[f"rewards_{effort}"][effort] for effort in EFFORTS}
  return {"conversations": scores["start"], "student": scores["student"], "rewards": specialists}, seconds


def scored(folder: Path, task: Path, unseen: Sequence[Sequence[int]], efforts: Sequence[str]) -> dict[str, dict[str, float]]:
  """Accuracy and length of the replies to problems of no run, by effort; kept in the folder's scores.json."""
  file = folder / "scores.json"
  if file.is_file():
    return json.loads(file.read_text())
  variables, stored, _ = restore_variables(folder / loop.CHECKPOINTS, scan_layers=False)
  network = DeepseekV4(c.from_dict(c.ModelConfig, stored["model"]))
  tokenizer = tokenize.load_tokenizer(task / depth_task.TOKENIZER, network.config.vocab_size)
  found = {}
  for effort in efforts:
    budget = None if THOUGHT[effort] is None else ThinkingBudget(THOUGHT[effort], tuple(tokenizer.encode(THINK_END)))
    prompts = [chat.to_ids(chat.encode([depth_task.question(one)], reasoning_effort=effort), tokenizer) for one in unseen]
    samples = sample_replies(
      network, variables, [Request(tuple(prompt), (1, i), budget) for i, prompt in enumerate(prompts)],
      max_new_tokens=REPLY[effort], batch_size=256, stop_tokens=(tokenizer.document_end,))
    texts = [tokenizer.decode([t for t in sample.reply if t != tokenizer.document_end], keep_special=True)
             for sample in samples]
    right = [exact_answer({"answer": depth_task.answer(one)}, message_of(text, "stop", effort, DEFAULT))
             for one, text in zip(unseen, texts)]
    found[effort] = {"accuracy": float(np.mean(right)), "tokens": float(np.mean([len(s.reply) for s in samples]))}
  metrics.write_json(file, found)
  return found


# ---- figures --------------------------------------------------------------------------------------------------------------
def row_of(found: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
  """A line of the table: means over the repetitions."""
  title = {"conversations": "after conversations", "rewards": "specialists, after rewards", "student": "one student"}[name]
  mean = lambda effort, what: float(np.mean([scores[name][effort][what] for scores in found]))
  return {"model": title, **{f"{effort}, {what}": mean(effort, what) for effort in EFFORTS
                             for what in ("accuracy", "tokens")}}


def targets_of(found: Sequence[dict[str, Any]], seconds: Sequence[Sequence[float | None]]) -> list[dict[str, Any]]:
  """accuracy(none) < accuracy(high) <= accuracy(max), and lengths that grow, each by the repetition in which least is left;
  and the time.

  Values are differences between the student's own efforts on problems of no run.
  """
  def least(what: str, more: str, less: str) -> float:
    return min(scores["student"][more][what] - scores["student"][less][what] for scores in found)
  wanted = (("accuracy(none) < accuracy(high)", "accuracy", "high", "none", True),
            ("accuracy(high) <= accuracy(max)", "accuracy", "max", "high", False),
            ("tokens of a reply: none < high", "tokens", "high", "none", True),
            ("tokens of a reply: high < max", "tokens", "max", "high", True))
  rows = []
  for text, what, more, less, strictly in wanted:
    value = least(what, more, less)
    rows.append({"target": f"{text}: {more} less {less} {'above' if strictly else 'at least'} 0", "bound": 0.0,
                 "value": value, "reached": value > 0 if strictly else value >= 0})
  return [*rows, runs.minutes_target("minutes of a repetition's runs", MINUTES, seconds)]
