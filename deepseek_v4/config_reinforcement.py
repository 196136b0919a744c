"""The settings of reinforcement learning; `config.py` hands them on, and a run holds them as `RunConfig.reinforcement`."""

from __future__ import annotations

import dataclasses
from typing import Any

from deepseek_v4.config_checks import at_least, positive, refuse, typed


@dataclasses.dataclass(frozen=True)
class ReinforcementConfig:
  """Learning from rewards by GRPO (V3.2's report 3.1; V4's 5.1.1). Defaults are those of R1 where it names any.

  A round draws `replies` replies to each of `problems` problems with the weights at its beginning, rewards them, and takes
  `minibatches` optimizer steps, each on an equal part of them, once. `training.steps` counts optimizer steps; a round in
  which a multiple of `training.log_every` falls writes down what its steps were like, and so does the last. Of the run's
  data, source "chat", each line holds the messages of a problem, up to where the model replies, and whatever the rewards
  ask for; rows of `data.sequence_length` tokens are packed with whole samples, and data.batch_size / data.accumulation of
  them are one pass.
  """

  rewards: tuple[str, ...] = ("deepseek_v4.posttraining.rewards.exact_answer",)  # functions, module.name; they are added up
  reasoning_effort: str = "high"  # of every reply: a level of the template, or "none"
  problems: int = 32
  replies: int = 16
  minibatches: int = 16
  max_new_tokens: int = 32_768
  thinking_tokens: int | None = None  # most tokens of a thought; None = the effort's own budget
  temperature: float = 1.0
  top_p: float = 1.0
  top_k: int = 0
  decode_batch: int = 64  # replies that are drawn at a time
  clip: float = 10.0  # how far the ratio to the sampler's probability may be from 1
  kl_weight: float = 1e-3  # of the distance from the reference; 0 = no reference is kept
  reference_steps: int = 400  # after so many optimizer steps the reference becomes the present model
  mask_above: float | None = 0.1  # nats per token that a worse reply may have become less probable by; None = no limit
  keep_routing: bool = True  # experts of a token are those of the sampler
  keep_sampling_mask: bool = True  # so are the tokens that top-p and top-k left; others have no probability
  length_penalty: float = 0.0  # taken off the reward of a reply of max_new_tokens tokens, in proportion of shorter ones
  length_penalty_cap: float = 1.0  # but never more than this

  def __post_init__(self) -> None:
    typed(self)
    object.__setattr__(self, "rewards", tuple(self.rewards))
    if not self.rewards:
      refuse("rewards", self.rewards, "at least one function")
    at_least(self, 1, "problems", "minibatches", "max_new_tokens", "decode_batch", "reference_steps")
    at_least(self, 2, "replies")  # one alone is its group's mean, and has no advantage
    at_least(self, 0, "top_k", "kl_weight", "length_penalty", "length_penalty_cap")
    positive(self, "temperature", "clip")
    if self.mask_above is not None:
      at_least(self, 0, "mask_above")
    if self.thinking_tokens is not None:
      at_least(self, 0, "thinking_tokens")
    if not 0 < self.top_p <= 1:
      refuse("top_p", self.top_p, "a number above 0, at most 1")
    if self.problems * self.replies % self.minibatches:
      refuse("minibatches", self.minibatches, f"a divisor of problems x replies = {self.problems * self.replies}")


def check(run: Any) -> None:
  """Refuses a RunConfig with reinforcement that does not go with its other settings."""
  reinforcement, data = run.reinforcement, run.data
  if data.source != "chat":
    refuse("data.source", data.source, "'chat' with reinforcement: problems are conversations")
  if run.training.steps % reinforcement.minibatches:
    refuse("training.steps", run.training.steps, f"a multiple of reinforcement.minibatches = {reinforcement.minibatches}")
  if reinforcement.max_new_tokens >= data.sequence_length:
    refuse("reinforcement.max_new_tokens", reinforcement.max_new_tokens,
           f"less than data.sequence_length = {data.sequence_length}, which has to hold the problem too")
