"""Pictures of a run, drawn without a screen and readable in black and white print."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

AUXILIARY = ("mtp", "indexer", "balance")
STYLES = ("-", "--", ":", "-.")  # told apart without colours


def loss_curves(lines: Sequence[Mapping[str, Any]], path: str | Path, baselines: Mapping[str, float] | None = None) -> None:
  """Draws the losses, gradient norm, learning rate and expert load of a run over its steps into a PNG.

  Args:
    lines: what `metrics.read_lines` gives: `split`, `step` and numbers; losses in nats.
    path: the PNG to write.
    baselines: name -> bits per byte, drawn as level lines where the held-out lines have bits per byte too.
  """
  train = [line for line in lines if line["split"] == "train"]
  held_out = [line for line in lines if line["split"] == "held_out"]
  figure = Figure(figsize=(9, 6.5), dpi=160, layout="constrained")
  ((next_token, auxiliary), (gradient, load)) = figure.subplots(2, 2, sharex=True)
  # Bits per byte of the training text are not known batch by batch; the held-out ratio of tokens to bytes serves.
  ratios = [line["bits_per_byte"] / line["bits_per_token"] for line in held_out if line.get("bits_per_byte") is not None]
  scale = (ratios[-1] if ratios else 1.0) / math.log(2)
  _curve(next_token, train, "next_token", "training", scale=scale, color="0.55", linewidth=1.0)
  _curve(next_token, held_out, "next_token", "held out", scale=scale, color="black", marker="o", markersize=4)
  for style, (name, value) in zip(itertools.cycle(STYLES[1:]), (baselines or {}).items() if ratios else ()):
    next_token.axhline(value, color="tab:red", linestyle=style, linewidth=1.2, label=f"{name.replace('_', ' ')} {value:.2f}")
  next_token.set(title="next token", ylabel="bits per byte" if ratios else "bits per token")
  for style, name in zip(STYLES, AUXILIARY):
    _curve(auxiliary, train, name, name, linestyle=style, linewidth=1.2)
  auxiliary.set(title="other losses", ylabel="loss", yscale="log")
  _curve(gradient, train, "grad_norm", "gradient norm", color="0.3", linewidth=1.0)
  gradient.set(title="gradient norm and learning rate", ylabel="norm", xlabel="step", yscale="log")
  rate = gradient.twinx()
  _curve(rate, train, "learning_rate", "learning rate", color="tab:blue", linestyle="--")
  rate.set_ylabel("learning rate")
  _curve(load, train, "max_load_violation", "fullest expert", color="0.3", linewidth=1.0)
  load.set(title="expert load above the mean", ylabel="(max - mean) / mean", xlabel="step")
  for axes in (next_token, auxiliary, gradient, load):
    axes.grid(alpha=0.3)
    names = axes.get_legend_handles_labels()
    if axes is gradient:
      names = tuple(map(list.__add__, names, rate.get_legend_handles_labels()))
    if names[0]:
      axes.legend(*names, fontsize=9)
  FigureCanvasAgg(figure).print_png(str(path))


def _curve(axes: Axes, lines: Sequence[Mapping[str, Any]], name: str, label: str, scale: float = 1.0, **style: Any) -> None:
  """One number over the steps; lines without it (or where it was not finite) are left out."""
  points = [(line["step"], line[name] * scale) for line in lines if line.get(name) is not None]
  if points:
    axes.plot(*zip(*points), label=label, **style)
