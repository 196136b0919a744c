"""Rewards: plain Python functions of a problem and a reply, named in the run's settings; and what a long reply costs.

Report 5.1.1 has a penalty of length for each reasoning effort, but no formula; that of `length_penalty` has the form in
V4.1's report.

A reward is `reward(problem, message) -> float`, where `problem` is the object on a line of the data and `message` the
assistant's message, {"content", "reasoning_content", "tool_calls" if there are any}, with "finish": "stop" or "length". What
a model wrote without the form of a message comes as far as it could be read: a thought that was never closed has no content.
"""

from __future__ import annotations

import importlib
import inspect
import math
from typing import Any, Callable, Mapping, Sequence

from deepseek_v4.config_checks import refuse
from deepseek_v4.text import chat
from deepseek_v4.text.chat_template import NONE, THINK_END, ChatTemplate

Reward = Callable[[Mapping[str, Any], Mapping[str, Any]], float]


def exact_answer(problem: Mapping[str, Any], message: Mapping[str, Any]) -> float:
  """1 if the reply says what the problem's field `answer` says and nothing else, but for spaces around it; 0 if not."""
  return float(message["content"].strip() == str(problem["answer"]).strip())


def load(names: Sequence[str]) -> list[Reward]:
  """The functions of these names.

  Raises:
    ValueError: a name without a module, a module or function that is not there, or a function that does not take a problem
      and a message.
  """
  return [_load(f"reinforcement.rewards[{i}]", name) for i, name in enumerate(names)]


def _load(field: str, name: str) -> Reward:
  module, _, function = name.rpartition(".")
  if not module:
    refuse(field, name, "module.function, such as deepseek_v4.posttraining.rewards.exact_answer")
  try:
    found = getattr(importlib.import_module(module), function)
    inspect.signature(found).bind({}, {})
  except (ImportError, AttributeError, TypeError, ValueError) as error:
    refuse(field, name, f"a function (problem, message) -> number that can be imported; {error}")
  return found


def of_reply(rewards: Sequence[Reward], problem: Mapping[str, Any], message: Mapping[str, Any], place: str) -> float:
  """The sum of the rewards.

  Raises:
    ValueError: a reward that fails or gives no finite number; names it and the place of the problem.
  """
  total = 0.0
  for reward in rewards:
    name = f"{reward.__module__}.{getattr(reward, '__name__', reward)}"
    try:
      value = float(reward(problem, message))
    except Exception as error:  # whatever somebody else's function raises
      raise ValueError(f"reward {name} of {place}: {type(error).__name__}: {error}") from error
    if not math.isfinite(value):
      refuse(f"reward {name} of {place}", value, "a finite number")
    total += value
  return total


def length_penalty(length: int, longest: int, weight: float, cap: float) -> float:
  """What is taken off the reward of a reply of `length` tokens: in proportion to its share of the longest, up to a cap."""
  return min(cap, weight * length / longest)


def message_of(text: str, finish: str, effort: str, template: ChatTemplate) -> dict[str, Any]:
  """The assistant's message of a reply's text, as far as it can be read; see the top of this file."""
  try:
    message = chat.parse(text, reasoning_effort=effort, template=template)
  except ValueError:
    thought, closed, content = ("", True, text) if effort == NONE else text.partition(THINK_END)
    message = {"role": "assistant", "content": content if closed else "", "reasoning_content": thought}
  return message | {"finish": finish}
