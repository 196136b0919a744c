"""Learning from rewards, round by round: replies, rewards, then optimizer steps on them, once (report 5.1.1).

    problems -> replies (our own decoder, same mesh) -> rewards -> advantages -> packed rows -> minibatches

Everything a round draws follows from the settings, its number and the weights at its beginning, which is where checkpoints
lie: a run that was stopped or killed anywhere goes on by the same command with the same numbers.

A workdir holds what `training/loop.py` names; its picture is reinforcement.png.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence

import jax
import numpy as np

from deepseek_v4.analysis import plots_reinforcement
from deepseek_v4.checkpoint.store import CheckpointStore
from deepseek_v4.checkpoint.trees import restack
from deepseek_v4.config import ReinforcementConfig, RunConfig
from deepseek_v4.config_checks import refuse
from deepseek_v4.generation.requests import ThinkingBudget
from deepseek_v4.model.transformer import DeepseekV4
from deepseek_v4.posttraining import beginning, grpo, rewards
from deepseek_v4.posttraining.passes import not_finite
from deepseek_v4.posttraining.policy_step import PolicyState, Programs, abstract_policy, as_policy
from deepseek_v4.posttraining.problems import Problem, Problems, in_passes, rows_of
from deepseek_v4.posttraining.rollout import Request, Sample, check_mesh, sample_replies
from deepseek_v4.text import tokenize
from deepseek_v4.text.chat_template import THINK_END, ChatTemplate
from deepseek_v4.training import conversations, metrics
from deepseek_v4.training.stopping import Stopped, Stopping

CURVES = "reinforcement.png"
_HELD_OUT = 1 << 30  # problem numbers of held-out replies, in their random keys, begin here


@dataclasses.dataclass(frozen=True)
class Asking:
  """What is asked and how replies are judged.

  Attributes:
    train, held_out: the problems.
    tokenizer, template: of the texts.
    rewards: the functions.
    budget: of a thought.
  """

  train: Problems
  held_out: Problems
  tokenizer: Any
  template: ChatTemplate
  rewards: Sequence[rewards.Reward]
  budget: ThinkingBudget | None


@dataclasses.dataclass(frozen=True)
class Tools:
  """What the run works with."""

  run_config: RunConfig
  mesh: jax.sharding.Mesh | None
  asking: Asking
  programs: Programs
  store: CheckpointStore
  writer: metrics.MetricsWriter
  progress: metrics.Progress
  stop: Stopping
  scored: frozenset[int]  # steps after which held-out problems were asked before this start


@dataclasses.dataclass(frozen=True)
class Judged:
  """Replies with what they are worth.

  Attributes:
    samples: [problems x replies], a problem's replies one after another.
    rewards: float64 [problems, replies], without the penalty.
    penalties: what their lengths cost.
  """

  samples: list[Sample]
  rewards: np.ndarray
  penalties: np.ndarray

  def numbers(self) -> dict[str, float]:
    """Means over all replies."""
    lengths = np.array([len(sample.reply) for sample in self.samples])
    return {"reward": float(self.rewards.mean()), "length_penalty": float(self.penalties.mean()),
            "reply_length": float(lengths.mean()),
            "finished": float(np.mean([sample.finish == "stop" for sample in self.samples]))}


def reinforce(run_config: RunConfig, workdir: str | Path, mesh: jax.sharding.Mesh | None = None,
              stop: Stopping | None = None) -> dict[str, Any]:
  """Learns to `training.steps`, going on where the run in `workdir` was; returns the summary.

  Args:
    run_config, workdir, mesh, stop: as of `training.loop.train`; `run_config.reinforcement` says how.

  Raises:
    ValueError, FileNotFoundError: settings, rewards, problems or a workdir that cannot be used, before anything is compiled;
      a reward that fails.
    RuntimeError: a checkpoint could not be written.
    FloatingPointError: a loss, gradient or update was not finite.
    Stopped: the run was told to stop, and the rounds that it had done are saved.
  """
  workdir, stop = Path(workdir), stop or Stopping()
  check(run_config, mesh)
  with contextlib.ExitStack() as stack:
    store, stored = beginning.open_store(stack, run_config, workdir, mesh)
    beginning.check_beginning(run_config, mesh, store)
    asking = prepare(run_config)
    step, state = go_back(run_config, workdir, mesh, store, stored)
    beginning.write_settings(run_config, workdir, stored, step)
    print(f"{len(asking.train.all):,} problems, {len(asking.held_out.all):,} held out; effort "
          f"{run_config.reinforcement.reasoning_effort}; rewards {', '.join(run_config.reinforcement.rewards)}")
    writer, progress = beginning.meters(stack, run_config, workdir, step)
    scored = frozenset(line["step"] for line in metrics.read_lines(workdir / metrics.LINES) if line["split"] == "held_out")
    tools = Tools(run_config, mesh, asking, Programs(run_config, mesh), store, writer, progress, stop, scored)
    started = time.perf_counter()
    step, state = run_rounds(tools, step, state)
    return finish(tools, workdir, step, state, time.perf_counter() - started)


# ---- before the first round ---------------------------------------------------------------------------------------------
def check(run_config: RunConfig, mesh: jax.sharding.Mesh | None) -> None:
  """Refuses what cannot be learnt from rewards.

  Raises:
    ValueError: names the setting.
  """
  config = run_config.reinforcement
  if config is None:
    refuse("reinforcement", None, "a ReinforcementConfig")
  if jax.process_count() > 1:
    refuse("processes", jax.process_count(), "one: replies are drawn on the devices of one process")
  if mesh is not None:
    check_mesh(mesh, config.decode_batch, "reinforcement.decode_batch")
    parts = 8 * mesh.shape["tensor"]  # a byte holds eight ids of a kept set
    if config.keep_sampling_mask and (config.top_p < 1 or config.top_k > 0) and run_config.model.vocab_size % parts:
      refuse("model.vocab_size", run_config.model.vocab_size, f"a multiple of 8 x mesh.tensor = {parts}, or "
             "reinforcement.keep_sampling_mask = False")


def prepare(run_config: RunConfig) -> Asking:
  """Reads problems and finds rewards; each reward is tried on an empty reply.

  Raises:
    ValueError, FileNotFoundError: names what cannot be used.
  """
  config, data = run_config.reinforcement, run_config.data
  functions = rewards.load(config.rewards)
  template = conversations.template_of(data)
  effort = template.check_effort(config.reasoning_effort)
  tokenizer = tokenize.load_tokenizer(data.tokenizer, run_config.model.vocab_size)
  longest = data.sequence_length - config.max_new_tokens
  train, held_out = (Problems(data, split, effort, template, tokenizer, longest) for split in ("train", "held_out"))
  for problem in (train.all[0], held_out.all[0]):
    rewards.of_reply(functions, problem.fields, rewards.message_of("", "length", effort, template), problem.place)
  return Asking(train, held_out, tokenizer, template, functions, _budget(config, effort, template, tokenizer))


def _budget(config: Any, effort: str, template: ChatTemplate, tokenizer: Any) -> ThinkingBudget | None:
  tokens = template.budget(effort) if config.thinking_tokens is None else config.thinking_tokens
  if effort == "none" or tokens is None:
    return None
  return ThinkingBudget(tokens, tuple(tokenizer.encode(THINK_END)))


def go_back(run_config: RunConfig, workdir: Path, mesh: jax.sharding.Mesh | None, store: CheckpointStore,
            stored: Mapping[str, Any]) -> tuple[int, PolicyState]:
  """(optimizer steps done, state) to go on from: the newest sound checkpoint, the weights of training.init_from, or none.

  Raises:
    ValueError: another run is in the workdir, or one that has done more steps or had other rounds.
  """
  found = beginning.newest(run_config, workdir, store, stored, abstract_policy(run_config, mesh))
  if found is None:
    return 0, as_policy(run_config, beginning.first_state(run_config, mesh))
  step, state, extra = found
  minibatches = run_config.reinforcement.minibatches
  if step % minibatches or extra["problems"] * minibatches != step * run_config.reinforcement.problems:
    raise ValueError(f"reinforcement.problems, reinforcement.minibatches: expected those with which the run in {workdir} "
                     f"saw {extra['problems']} problems in {step} steps")
  return step, state


# ---- rounds -------------------------------------------------------------------------------------------------------------
def run_rounds(tools: Tools, step: int, state: PolicyState) -> tuple[int, PolicyState]:
  """Round after round to the last step; what is returned is being saved."""
  training, config = tools.run_config.training, tools.run_config.reinforcement
  due = lambda every: step // every > (step - config.minibatches) // every
  if (not step or due(training.eval_every)) and step < training.steps and step not in tools.scored:
    evaluate(tools, step, state)
  while step < training.steps:
    tools.store.check_errors()
    leave_if_asked(tools, step, state)
    judged = draw(tools, step, state)
    tools.stop.unsaved = True
    if config.kl_weight and step and due(config.reference_steps):
      state = as_policy(tools.run_config, state)
    state = learn(tools, step, state, judged)
    step += config.minibatches
    last = step == training.steps
    if due(training.eval_every) and not last:
      evaluate(tools, step, state)
    if due(training.checkpoint_every) or last:
      save(tools, step, state)
    tools.progress.restart_clock()
  return step, state


def draw(tools: Tools, step: int, state: PolicyState) -> Judged:
  """Replies of the round that begins after `step` steps, with their rewards."""
  config = tools.run_config.reinforcement
  first = step // config.minibatches * config.problems
  started = time.perf_counter()
  judged = ask(tools, step, state, tools.asking.train.take(first, config.problems), first, config.replies, kept_of(config))
  seconds = time.perf_counter() - started
  tokens = sum(len(sample.reply) for sample in judged.samples)
  tools.writer.write("rollout", step, judged.numbers() | {"seconds": seconds, "tokens_per_second": tokens / seconds})
  return judged


def kept_of(config: ReinforcementConfig) -> list[str]:
  """What the sampler writes down for the trainer; without a filter every token could be drawn, so there are no sets."""
  filtered = config.top_p < 1 or config.top_k > 0
  wanted = {"experts": config.keep_routing, "kept": config.keep_sampling_mask and filtered}
  return [name for name, on in wanted.items() if on]


def ask(tools: Tools, step: int, state: PolicyState, problems: Sequence[Problem], first: int, replies: int,
        record: Sequence[str] = ()) -> Judged:
  """Replies to problems, of which the first has the number `first`, and their rewards."""
  run_config, asking = tools.run_config, tools.asking
  config = run_config.reinforcement
  model_config = dataclasses.replace(run_config.model, scan_layers=False)  # decodes faster
  variables = restack({"params": state.params, "router": state.router}, model_config, False)
  requests = [Request(problem.prompt, (run_config.training.seed, first + i, j), asking.budget)
              for i, problem in enumerate(problems) for j in range(replies)]
  samples = sample_replies(
    DeepseekV4(model_config, run_config.training.kernels), variables, requests, max_new_tokens=config.max_new_tokens,
    batch_size=config.decode_batch, stop_tokens=(asking.tokenizer.document_end,), temperature=config.temperature,
    top_p=config.top_p, top_k=config.top_k, record=record, mesh=tools.mesh,
    on_batch=lambda _: leave_if_asked(tools, step, state), on_drawn=lambda _: leave_if_asked(tools, step, state))
  effort, end = asking.template.check_effort(config.reasoning_effort), asking.tokenizer.document_end

  def worth(sample: Sample, problem: Problem) -> float:
    text = asking.tokenizer.decode([token for token in sample.reply if token != end], keep_special=True)
    message = rewards.message_of(text, sample.finish, effort, asking.template)
    return rewards.of_reply(asking.rewards, problem.fields, message, problem.place)

  found = np.array([worth(sample, problems[i // replies]) for i, sample in enumerate(samples)])
  penalty = [rewards.length_penalty(len(sample.reply), config.max_new_tokens, config.length_penalty,
                                    config.length_penalty_cap) for sample in samples]
  return Judged(samples, found.reshape(-1, replies), np.array(penalty).reshape(-1, replies))


def learn(tools: Tools, step: int, state: PolicyState, judged: Judged) -> PolicyState:
  """The optimizer steps of a round. Its rows stay on the host; those of a step are on the devices while it is made."""
  run_config, config = tools.run_config, tools.run_config.reinforcement
  data, size = run_config.data, len(judged.samples) // config.minibatches
  advantages = grpo.advantages(judged.rewards - judged.penalties).reshape(-1)
  order = np.random.default_rng([run_config.training.seed, step]).permutation(len(judged.samples))
  found = []
  for chosen in order.reshape(-1, size):
    rows = rows_of([judged.samples[i] for i in chosen], advantages[chosen], data.sequence_length)
    state, numbers = one_step(tools, state, in_passes(rows, data.batch_size // data.accumulation))
    found.append(numbers)
  done = step + config.minibatches
  every = run_config.training.log_every
  if done // every > step // every or done == run_config.training.steps:
    report(tools, done, judged, found)
  return state


def report(tools: Tools, step: int, judged: Judged, found: Sequence[Mapping[str, float]]) -> None:
  """Says and writes what the round that ends with this step was like.

  Args:
    step: optimizer steps done.
    judged: the round's replies.
    found: metrics of each of its steps.
  """
  of: dict[str, Callable[..., Any]] = {"tokens": sum, "policy_gap_max": max}
  mean = {name: float(of.get(name, np.mean)([numbers[name] for numbers in found])) for name in found[0]}
  # The first step's distances are those of two programs with one set of weights: of sampler and trainer.
  mean |= judged.numbers() | {"sampler_gap": found[0]["policy_gap"], "sampler_gap_max": found[0]["policy_gap_max"]}
  mean["tokens_per_second"] = tools.progress.report(step, mean["loss"])
  tools.progress.say(f"  reward {mean['reward']:.3f}, {mean['reply_length']:.1f} tokens a reply, KL {mean['kl']:.4f} nats, "
                     f"{mean['acceptance']:.1%} accepted, {mean['masked']:.1%} masked")
  tools.writer.write("train", step, mean)


def one_step(tools: Tools, state: PolicyState,
             passes: Sequence[Mapping[str, np.ndarray]]) -> tuple[PolicyState, dict[str, float]]:
  """One optimizer step on a minibatch, whose rows, arrays [B, S] by name in the dtypes of `problems.rows_of`, come from the
  host.

  Raises:
    FloatingPointError: loss or gradients are not finite.
  """
  programs = tools.programs
  passes = [programs.put_rows(rows) for rows in passes]
  if tools.run_config.reinforcement.kl_weight:  # the reference is the same for all steps of a round
    passes = [rows | {"reference": programs.reference(state.reference, rows)} for rows in passes]
  counted = jax.device_get([programs.count(rows) for rows in passes])
  counts = {name: np.float32(sum(one[name] for one in counted)) for name in counted[0]}
  sums = programs.start()
  for rows in passes:
    sums = programs.add(state, sums, rows, counts)
  state, values = programs.update(state, sums)
  numbers = {name: np.asarray(value).item() for name, value in jax.device_get(values).items()}
  if not numbers.pop("finite"):
    raise FloatingPointError(not_finite("round", numbers))
  tools.progress.step(numbers["tokens"])
  return state, numbers


# ---- scores, checkpoints, the end ---------------------------------------------------------------------------------------
def evaluate(tools: Tools, step: int, state: PolicyState, batches: int | None = -1) -> dict[str, float]:
  """Asks held-out problems once each (`eval_batches` x decode_batch of them; None = all), and writes the scores down."""
  config, everything = tools.run_config.reinforcement, tools.asking.held_out.all
  batches = tools.run_config.training.eval_batches if batches == -1 else batches
  problems = everything if batches is None else everything[:batches * config.decode_batch]
  found = ask(tools, step, state, problems, _HELD_OUT, 1).numbers() | {"problems": len(problems)}
  tools.writer.write("held_out", step, found)
  tools.progress.say(f"step {step}/{tools.run_config.training.steps}  held-out reward {found['reward']:.3f}, "
                     f"{found['reply_length']:.1f} tokens a reply")
  tools.progress.restart_clock()
  return found


def save(tools: Tools, step: int, state: PolicyState) -> None:
  """Starts writing a checkpoint."""
  config = tools.run_config.reinforcement
  tools.store.save(step, state, {"problems": step // config.minibatches * config.problems})


def leave_if_asked(tools: Tools, step: int, state: PolicyState) -> None:
  """Saves the round's beginning and raises Stopped if the run was told to stop."""
  if not tools.stop.asked:
    return
  if step:
    save(tools, step, state)
  tools.store.wait()
  tools.stop.unsaved = False
  saved = ", which is saved; the same command goes on from there" if step else "; nothing was there to save"
  raise Stopped(f"stopped after step {step}{saved}")


def finish(tools: Tools, workdir: Path, step: int, state: PolicyState, seconds: float) -> dict[str, Any]:
  """Asks all held-out problems, writes summary and picture, and returns the summary."""
  tools.store.wait()
  tools.stop.unsaved = False
  found = evaluate(tools, step, state, None)
  summary = {"steps": step, "held_out": found, "seconds": seconds, "tokens_per_second": tools.progress.tokens_per_second}
  metrics.write_json(workdir / metrics.SUMMARY, summary)
  plots_reinforcement.curves(metrics.read_lines(workdir / metrics.LINES), workdir / CURVES)
  return summary
