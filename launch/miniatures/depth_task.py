"""Sums of digits modulo ten, as conversations of three reasoning efforts: what is learnt in the miniature of depth.

    effort   thought on "385927"                                                              answer
    none     -                                                                                4
    high     316574            the sum after every digit                                      4
    max      316574?316574     the same, and once more                                        4

The conversations are those of somebody careless: where sums are written down the first time, one in ten is wrong (and those
after it go on from there); looked at once more they are right. So a model that learnt them well makes mistakes with effort
high, which rewards may cure, and hardly any with effort max.

The layout is that of the chat format (`text/chat.py`); a vocabulary of single bytes and the format's own tokens makes a
conversation about twenty tokens long.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Sequence

import numpy as np
import tokenizers

from deepseek_v4.text import chat
from deepseek_v4.text.chat_template import DEFAULT, THINK, THINK_END

EFFORTS = ("none", "high", "max")
DIGITS = 6
SLIPS = 0.1  # share of sums that are wrong when they are written down the first time
TALKS, PROBLEMS, TOKENIZER = "talks", "problems.jsonl", "tokenizer.json"


def sums(digits: Sequence[int], slips: Sequence[int]) -> str:
  """The sum after every digit, modulo ten; each is off by its slip."""
  return "".join(str(x % 10) for x in np.cumsum(np.add(digits, slips)))


def reply(digits: Sequence[int], effort: str, rng: np.random.Generator) -> dict[str, str]:
  """The assistant's message: what somebody careless thinks with this effort, and the answer that follows from it."""
  slips = np.where(rng.random(len(digits)) < SLIPS, rng.integers(1, 10, len(digits)), 0)
  quick, right = sums(digits, slips), sums(digits, np.zeros_like(slips))
  thought = {"none": "", "high": quick, "max": f"{quick}?{right}"}[effort]
  return {"role": "assistant", "content": thought[-1:] or answer(digits), "reasoning_content": thought}


def question(digits: Sequence[int]) -> dict[str, Any]:
  """The user's message."""
  return {"role": "user", "content": "".join(map(str, digits))}


def answer(digits: Sequence[int]) -> str:
  return str(int(sum(digits)) % 10)


def write(folder: Path, talks: int, problems: int, seed: int = 0) -> list[list[int]]:
  """Writes conversations of each effort, problems and the tokenizer; returns as many other problems as there are there.

  Args:
    folder: made if it is not there.
    talks: conversations of each effort.
    problems: without a reply.
  """
  rng = np.random.default_rng(seed)
  numbers = rng.choice(10 ** DIGITS, 3 * talks + 2 * problems, replace=False)  # no sum comes twice
  digits = [[int(x) for x in f"{number:0{DIGITS}d}"] for number in numbers]
  (folder / TALKS).mkdir(parents=True, exist_ok=True)
  for i, effort in enumerate(EFFORTS):
    lines = [json.dumps({"messages": [question(one), reply(one, effort, rng)], "reasoning_effort": effort})
             for one in digits[i * talks:(i + 1) * talks]]
    (folder / TALKS / f"{effort}.jsonl").write_text("\n".join(lines) + "\n")
  asked = digits[3 * talks:]
  lines = [json.dumps({"messages": [question(one)], "answer": answer(one)}) for one in asked[:problems]]
  (folder / PROBLEMS).write_text("\n".join(lines) + "\n")
  write_tokenizer(folder / TOKENIZER)
  return asked[problems:]


def write_tokenizer(file: Path) -> None:
  """A vocabulary of bytes and of the chat format's tokens, the wording of the highest effort being one of them."""
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  tokenizer.add_special_tokens([chat.BOS, chat.EOS, chat.USER, chat.ASSISTANT, THINK, THINK_END,
                                DEFAULT.effort_prefix["max"]])
  tokenizer.save(str(file))
