"""What is asked of the decoder: settings of each request, checked before anything is compiled; and the rule of thoughts."""

from __future__ import annotations

import dataclasses
from typing import Any, Sequence

import jax
import numpy as np

from deepseek_v4.config import ModelConfig
from deepseek_v4.config_checks import at_least, refuse, typed
from deepseek_v4.generation import sample
from deepseek_v4.generation.sample import Rows, Sampling


# ---- thoughts ------------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class ThinkingBudget:
  """How long a reply that begins inside a thought may think.

  Attributes:
    tokens: of the thought; then it is closed. A stop token that comes before closes it as well.
    close: ids that close it: put into the reply one after another, as if they had been drawn, if the budget is spent before
      they have come by themselves.
  """

  tokens: int
  close: tuple[int, ...]

  def __post_init__(self) -> None:
    typed(self)
    at_least(self, 0, "tokens")
    if not self.close or min(self.close) < 0:
      refuse("close", self.close, "at least one token id")


class Thought:
  """Where the thought of one reply stands, as its tokens come; everything follows from the tokens alone.

  A stop token inside the thought does not end the reply: it stays in it, and the thought is closed behind it, so that an
  answer follows.

  Args:
    budget: None = no thought that anybody watches.
    stop_tokens: ids that end a reply.

  Attributes:
    is_open: whether the reply is still inside a thought with a budget.
    free: tokens that the thought may still grow by, at least 0.
  """

  def __init__(self, budget: ThinkingBudget | None, stop_tokens: Sequence[int] = ()) -> None:
    self.is_open = budget is not None
    self.free = 0 if budget is None else budget.tokens
    self._close = () if budget is None else tuple(budget.close)
    self._stop = frozenset(stop_tokens)
    self._tail: tuple[int, ...] = ()  # as many of the last tokens as the closing has

  @property
  def forced(self) -> int:
    """The token that has to come next, or -1; of a closing that has begun by itself only the rest."""
    if not self.is_open or self.free:
      return -1
    begun = (n for n in range(len(self._close) - 1, 0, -1) if self._tail[-n:] == self._close[:n])
    return self._close[next(begun, 0)]

  def add(self, token: int) -> bool:
    """Takes the next token of the reply; returns whether it ends it."""
    stops = token in self._stop
    if not self.is_open:
      return stops
    self._tail = (*self._tail, token)[-len(self._close):]
    self.is_open = self._tail != self._close
    self.free = 0 if stops else max(0, self.free - 1)
    return stops and not self.is_open


# ---- checks --------------------------------------------------------------------------------------------------------
def settings(count: int, *values: Any) -> Rows:
  """The rows of the four sampling settings, each one value or one per request.

  Raises:
    ValueError: another number of values, or one that is refused.
  """
  columns = []
  for name, value in zip(("temperature", "top_p", "top_k", "min_p"), values, strict=True):
    column = [value] * count if np.ndim(value) == 0 else np.asarray(value).tolist()
    if len(column) != count:
      refuse(name, value, f"one value, or one for each of the {count} requests")
    columns.append(column)
  return sample.rows([Sampling(*request) for request in zip(*columns)])


def budgets(value: ThinkingBudget | None | Sequence[ThinkingBudget | None], count: int) -> list[ThinkingBudget | None]:
  """The thinking budget of each request.

  Raises:
    ValueError: another number of budgets.
  """
  if value is None or isinstance(value, ThinkingBudget):
    return [value] * count
  found = list(value) if isinstance(value, Sequence) else []
  if len(found) != count or not all(budget is None or isinstance(budget, ThinkingBudget) for budget in found):
    refuse("thinking_budget", value, f"a ThinkingBudget or None, or one of them for each of the {count} requests")
  return found


def check(config: ModelConfig, prompts: Sequence[Sequence[int]], keys: jax.Array, max_new_tokens: int, chunk_size: int,
          stop_tokens: Sequence[int], thinking: Sequence[ThinkingBudget | None]) -> None:
  """Refuses what `decode.generate` cannot work with; arguments as there, dtypes too, the budget of each request among
  them."""
  if not len(prompts):
    refuse("prompts", prompts, "at least one")
  for name, value in (("max_new_tokens", max_new_tokens), ("chunk_size", chunk_size)):
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
      refuse(name, value, "a whole number, at least 1")
  if not jax.dtypes.issubdtype(keys.dtype, jax.dtypes.prng_key) or keys.shape != (len(prompts),):
    refuse("keys", f"{keys.dtype}{keys.shape}", f"typed keys of shape ({len(prompts)},), one per request")
  named = [(f"prompts[{i}]", prompt) for i, prompt in enumerate(prompts)]
  named += [("stop_tokens", stop_tokens)]
  named += [(f"thinking_budget[{i}].close", budget.close) for i, budget in enumerate(thinking) if budget is not None]
  for name, ids in named:
    if len(ids) and not 0 <= min(ids) <= max(ids) < config.vocab_size:
      refuse(name, f"ids from {min(ids)} to {max(ids)}", f"ids below vocab_size = {config.vocab_size}")
  for i, prompt in enumerate(prompts):
    if not 1 <= len(prompt) <= config.max_position_embeddings - max_new_tokens:
      refuse(f"prompts[{i}]", f"{len(prompt)} tokens", "1 to max_position_embeddings - max_new_tokens = "
             f"{config.max_position_embeddings - max_new_tokens}")


def begun(replies: Sequence[Sequence[int]] | None, thoughts: Sequence[Thought], max_new_tokens: int, vocab_size: int
          ) -> list[list[int]]:
  """The replies that have begun, checked; their tokens are added to the thoughts.

  Raises:
    ValueError: names the reply that cannot be gone on with.
  """
  if replies is None:
    return [[] for _ in thoughts]
  if len(replies) != len(thoughts):
    refuse("begun", f"{len(replies)} replies", f"one for each of the {len(thoughts)} requests")
  for i, (reply, thought) in enumerate(zip(replies, thoughts, strict=True)):
    if len(reply) >= max_new_tokens or any([thought.add(token) for token in reply]):
      refuse(f"begun[{i}]", f"{len(reply)} tokens", f"fewer than max_new_tokens = {max_new_tokens}, and no stop token")
    if len(reply) and not 0 <= min(reply) <= max(reply) < vocab_size:
      refuse(f"begun[{i}]", f"ids from {min(reply)} to {max(reply)}", f"ids below vocab_size = {vocab_size}")
  return [list(reply) for reply in replies]
