"""Pictures of optimizers: compared ones (losses over steps and learning rates), and what Newton-Schulz does to a matrix."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Mapping, Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from deepseek_v4.analysis.plots import STYLES, finish, line_style, new_figure

COLOURS = ("black", "tab:red", "tab:blue", "tab:green")
MARKERS = ("o", "s", "^", "v")


def race(curves: Mapping[str, Sequence[Any]], sweeps: Mapping[str, Mapping[float, Sequence[float]]], loss: float,
         path: str | Path) -> None:
  """Draws a comparison of optimizers into a PNG.

  Args:
    curves: optimizer -> its runs at the best learning rate, one per seed, each with `steps` and `losses` (nats).
    sweeps: optimizer -> learning rate -> loss at the end of each run with it.
    loss: the level whose steps are compared.
    path: the PNG to write.
  """
  figure = Figure(figsize=(9, 3.8), dpi=160, layout="constrained")
  left, right = figure.subplots(1, 2)
  for name, colour, style, marker in zip(curves, COLOURS, STYLES, MARKERS):
    runs = [np.asarray(run.losses, float) for run in curves[name]]
    steps, middle = curves[name][0].steps, np.mean(runs, 0)
    left.plot(steps, middle, color=colour, linestyle=style, label=f"{name}, mean of {len(runs)}" if len(runs) > 1 else name)
    left.fill_between(steps, np.min(runs, 0), np.max(runs, 0), color=colour, alpha=0.2, linewidth=0)
    rates = sorted(sweeps[name])
    finite = {rate: [x for x in sweeps[name][rate] if np.isfinite(x)] for rate in rates}
    means = [np.mean(finite[rate]) if finite[rate] else np.nan for rate in rates]
    right.plot(rates, means, color=colour, linestyle=style, label=name)
    for rate in rates:
      right.plot([rate] * len(finite[rate]), finite[rate], color=colour, marker=marker, linestyle="none", markersize=4)
  left.axhline(loss, color="0.5", linewidth=0.8)
  left.annotate(f"the same loss: {loss:.2f}", (0.02, loss), xycoords=("axes fraction", "data"), va="top", fontsize=8)
  left.set(title="best learning rate of each", xlabel="step", ylabel="held-out loss, nats per token")
  right.set(title="learning rates tried", xlabel="learning rate", ylabel="loss at the end", xscale="log")
  tried = sorted({rate for by_rate in sweeps.values() for rate in by_rate})
  right.set_xticks(tried, [f"{rate:g}" for rate in tried])
  right.minorticks_off()
  for axes in (left, right):
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
  FigureCanvasAgg(figure).print_png(str(path))


def singular_values(before: Mapping[str, Any], after: Mapping[str, Any]) -> Figure:
  """Singular values of matrices before Newton-Schulz (left, each over its largest) and after it (right).

  Args:
    before, after: label -> singular values, in any order.
  """
  figure = new_figure(9, 3.6)
  left, right = figure.subplots(1, 2)
  for axes, found in ((left, before), (right, after)):
    for i, (label, values) in enumerate(found.items()):
      values = np.sort(np.asarray(values, np.float64))[::-1]
      values = values / values[0] if axes is left else values
      axes.plot(np.linspace(0, 1, len(values)), values, label=label, markevery=max(1, len(values) // 8), **line_style(i))
  finish(left, "before", "rank, as a share of all", "singular value / largest", yscale="log")
  right.axhline(1, color="0.5", linewidth=0.8)
  finish(right, "after", "rank, as a share of all", "singular value", ylim=(0, 1.3))
  return figure
