"""Pictures of costs: operations and cache against the context, for models side by side."""

from __future__ import annotations

from typing import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from deepseek_v4.analysis.plots import finish, line_style, new_figure

HATCHES = ("", "///", "...", "xx", "\\\\\\", "--", "oo", "++")


def costs(contexts: Sequence[int], flops: Mapping[str, Sequence[float]], cache: Mapping[str, Sequence[float]]) -> Figure:
  """A decoded token's operations (left) and a sequence's cache (right) against the context.

  Args:
    contexts: tokens seen.
    flops: model -> operations of one token at each context.
    cache: model -> bytes of one sequence at each context.
  """
  figure = new_figure(10, 4)
  left, right = figure.subplots(1, 2)
  for axes, values, unit in ((left, flops, 1e12), (right, cache, 2**30)):
    for i, (name, found) in enumerate(values.items()):
      axes.plot(contexts, np.asarray(found, float) / unit, label=name, markevery=max(1, len(contexts) // 6), **line_style(i))
    axes.set_xscale("log", base=2)
    ticks = [n for n in (2**10, 2**12, 2**14, 2**16, 2**18, 2**20) if contexts[0] <= n <= contexts[-1]]
    axes.set_xticks(ticks, [f"{n >> 10}K" if n < 2**20 else "1M" for n in ticks])
  finish(left, "one decoded token", "context, tokens", "operations, 10^12 (FP8 equivalents)", yscale="log")
  finish(right, "cache of one sequence", "context, tokens", "GiB", yscale="log")
  return figure


def parts(costs: Mapping[str, Mapping[str, float]], unit: float, ylabel: str, title: str) -> Figure:
  """What a cost is made of, a stacked bar each; the parts are told apart by hatches.

  Args:
    costs: bar -> part -> cost.
    unit: what costs are divided by.
    ylabel, title: of the picture.
  """
  figure = new_figure(1.5 * len(costs) + 4, 4)
  axes = figure.subplots()
  names = [name for name in dict.fromkeys(name for bar in costs.values() for name in bar)
           if any(bar.get(name) for bar in costs.values())]
  below = np.zeros(len(costs))
  for i, name in enumerate(names):
    height = np.array([bar.get(name, 0) for bar in costs.values()]) / unit
    axes.bar(range(len(costs)), height, 0.6, below, label=name.replace("_", " "), edgecolor="black", linewidth=0.6,
             color=str(0.95 - 0.12 * (i % 4)), hatch=HATCHES[i % len(HATCHES)])
    below += height
  axes.set(title=title, ylabel=ylabel, xticks=range(len(costs)), xticklabels=list(costs), ylim=(0, 1.05 * below.max()))
  handles, labels = axes.get_legend_handles_labels()
  figure.legend(handles[::-1], labels[::-1], loc="outside right center", fontsize=9)
  axes.grid(alpha=0.3, axis="y")
  return figure
