"""A run's numbers on held-out text, and what it publishes at its end."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from pathlib import Path
from typing import Any, Callable, Mapping

import numpy as np

from deepseek_v4.analysis import plots
from deepseek_v4.training import metrics
from deepseek_v4.training.ahead import Ahead
from deepseek_v4.training.data import Batches
from deepseek_v4.training.stopping import Stopping


def evaluate(eval_step: Any, held_out: Batches, spread: Callable[..., Any], stop: Stopping, state: Any,
             batches: int | None = None) -> dict[str, float] | None:
  """Scores the first `batches` held-out batches, or all of them.

  Returns:
    `next_token` (nats per predicted token), `tokens` (how many), `bits_per_token`, and of text also `bits_per_byte`; None if
    the run was told to stop meanwhile.
  """
  found: list[dict[str, float]] = []
  with contextlib.closing(iter(held_out)) as rows:
    ahead = Ahead(functools.partial(next, itertools.islice(rows, batches), {}))
    while True:
      batch = ahead.get(lambda: stop.asked)
      if stop.agreed():
        return None
      if not batch:
        break
      ahead.start()
      values = eval_step(state, spread(batch))
      found.append({name: np.asarray(value).item() for name, value in values.items()})
  total, count = (math.fsum(x[name] for x in found) for name in ("next_token_sum", "next_token_count"))
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
