"""Pictures of runs, drawn without a screen and readable in black and white print; and what all pictures are made with.

What a model does inside is in `plots_attention.py` and `plots_layers.py`, what it costs in `plots_costs.py`.
"""

from __future__ import annotations

import io
import itertools
import math
from pathlib import Path
from typing import Any, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

AUXILIARY = ("mtp", "indexer", "balance")
STYLES = ("-", "--", ":", "-.")  # told apart without colours
MARKERS = ("o", "s", "^", "D", "v", "x")
SHADES = ("black", "0.35", "0.55", "0.2", "0.65", "0.45")


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
  _stage_borders(next_token, train)
  for axes in (next_token, auxiliary, gradient, load):
    axes.grid(alpha=0.3)
    names = axes.get_legend_handles_labels()
    if axes is gradient:
      names = tuple(map(list.__add__, names, rate.get_legend_handles_labels()))
    if names[0]:
      axes.legend(*names, fontsize=9)
  FigureCanvasAgg(figure).print_png(str(path))


def stages_and_mass(lines: Sequence[Mapping[str, Any]], path: str | Path,
                    mass: Mapping[str, tuple[float, float, float]]) -> None:
  """Draws the loss of a run over its stages, and what the indexer keeps before and after its warm-up, into a PNG.

  Args:
    lines: what `metrics.read_lines` gives of a run with stages.
    path: the PNG to write.
    mass: label -> shares of the attention's mass on the picks of the untrained indexer, of the trained one, of the best.
  """
  figure = Figure(figsize=(10, 4), dpi=160, layout="constrained")
  loss, bars = figure.subplots(1, 2, width_ratios=(2, 1))
  train, held_out = ([line for line in lines if line["split"] == split] for split in ("train", "held_out"))
  _curve(loss, train, "next_token", "training", color="0.55", linewidth=1.0)
  _curve(loss, held_out, "next_token", "held out", color="black", marker="o", markersize=4)
  _curve(loss, train, "indexer", "indexer's KL loss", color="tab:blue", linestyle="--", linewidth=1.2)
  _stage_borders(loss, train)
  loss.set(title="loss over the stages", xlabel="step", ylabel="nats", yscale="log")
  loss.legend(fontsize=9)
  shades = (("untrained", "0.85", None), ("after its warm-up", "0.45", None), ("best possible", "white", "///"))
  for i, (label, color, hatch) in enumerate(shades):
    places = np.arange(len(mass)) + 0.27 * (i - 1)
    bars.bar(places, [values[i] for values in mass.values()], 0.25, label=label, color=color, edgecolor="black", hatch=hatch)
  bars.set(title="attention mass on the picks", ylabel="share", ylim=(0, 1), xticks=np.arange(len(mass)),
           xticklabels=list(mass))
  bars.legend(fontsize=9, loc="lower right")
  for axes in (loss, bars):
    axes.grid(alpha=0.3)
  FigureCanvasAgg(figure).print_png(str(path))


def _stage_borders(axes: Axes, lines: Sequence[Mapping[str, Any]]) -> None:
  """An upright line and a name where each stage begins; nothing for a run without stages."""
  for stage, group in itertools.groupby((line for line in lines if "stage" in line), lambda line: line["stage"]):
    first = next(group)["step"]
    axes.axvline(first, color="0.3", linestyle=":", linewidth=1.0)
    axes.annotate(f" {stage}", (first, 1.0), xycoords=("data", "axes fraction"), va="top", rotation=90, fontsize=8)


def _curve(axes: Axes, lines: Sequence[Mapping[str, Any]], name: str, label: str, scale: float = 1.0, **style: Any) -> None:
  """One number over the steps; lines without it (or where it was not finite) are left out."""
  points = [(line["step"], line[name] * scale) for line in lines if line.get(name) is not None]
  if points:
    axes.plot(*zip(*points), label=label, **style)


def side_by_side(runs: Mapping[str, Sequence[Mapping[str, Any]]], name: str = "next_token", ylabel: str = "nats per token",
                 *, smooth: int = 1) -> Figure:
  """Loss curves of runs: training on the left, held out on the right, where a run has such lines.

  Args:
    runs: label -> what `metrics.read_lines` gives of the run; lines without the number are left out.
    name: of the number.
    ylabel: its unit.
    smooth: steps whose mean is drawn, on the left only.
  """
  figure = new_figure(9, 3.6)
  axes = figure.subplots(1, 2, sharex=True, sharey=True)
  for i, (label, lines) in enumerate(runs.items()):
    for part, split in zip(axes, ("train", "held_out")):
      points = [(line["step"], line[name]) for line in lines if line["split"] == split and line.get(name) is not None]
      if not points:
        continue
      steps, values = np.asarray(points, float).T
      if split == "train" and smooth > 1 and len(values) >= smooth:
        values = np.convolve(values, np.full(smooth, 1 / smooth), "valid")
        steps = steps[smooth - 1:]
      part.plot(steps, values, label=label, markevery=max(1, len(steps) // 8), **line_style(i))
  for part, title in zip(axes, ("training" + (f", mean of {smooth} steps" if smooth > 1 else ""), "held out")):
    finish(part, title, "step", ylabel)
  return figure


# ---- what all pictures are made with ---------------------------------------------------------------------------------
def new_figure(width: float, height: float) -> Figure:
  """An empty figure of so many inches, without a screen."""
  return Figure(figsize=(width, height), dpi=110, layout="constrained")


def line_style(i: int) -> dict[str, Any]:
  """The look of the i-th line: another dash and another marker each, so that print tells them apart."""
  return {"linestyle": STYLES[i % len(STYLES)], "marker": MARKERS[i % len(MARKERS)], "color": SHADES[i % len(SHADES)],
          "markersize": 4, "linewidth": 1.2, "markerfacecolor": "white"}


def finish(axes: Axes, title: str, xlabel: str, ylabel: str, **settings: Any) -> None:
  """Titles, a light grid, and a legend where there is something to tell apart."""
  axes.set(title=title, xlabel=xlabel, ylabel=ylabel, **settings)
  axes.grid(alpha=0.3)
  if axes.get_legend_handles_labels()[0]:
    axes.legend(fontsize=9)


def image(axes: Axes, values: np.ndarray, title: str, xlabel: str, ylabel: str, bar: str = "", **options: Any) -> None:
  """A matrix [rows, columns] of numbers of any dtype in shades of grey, dark = much, with its scale beside it
  (named `bar`)."""
  picture = axes.imshow(values, aspect="auto", interpolation="nearest", **({"cmap": "Greys"} | options))
  axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
  axes.figure.colorbar(picture, ax=axes, fraction=0.046, label=bar)


def png(figure: Figure) -> bytes:
  """A figure as the bytes of a PNG, for notebooks and files."""
  buffer = io.BytesIO()
  FigureCanvasAgg(figure).print_png(buffer)
  return buffer.getvalue()
