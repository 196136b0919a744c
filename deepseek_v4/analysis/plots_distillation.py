"""The picture of a distillation: how far the student is from its teachers, and what it makes of their held-out text."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, Mapping, Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from deepseek_v4.analysis.plots import STYLES


def curves(lines: Sequence[Mapping[str, Any]], path: str | Path) -> None:
  """Draws KL, held-out scores, lengths of replies and the gradient norm over the steps into a PNG.

  Args:
    lines: what `metrics.read_lines` gives of the run's metrics.jsonl.
    path: the PNG to write.
  """
  of = lambda split: [line for line in lines if line["split"] == split]
  train, held_out, rollout = of("train"), of("held_out") + of("all_held_out"), of("rollout")
  figure = Figure(figsize=(9, 6.5), dpi=160, layout="constrained")
  ((kl, score), (length, gradient)) = figure.subplots(2, 2, sharex=True)
  _curves(kl, train, "kl/")
  kl.set(title="distance from the teachers, on the student's rows", ylabel="KL(student || teacher), nats per token",
         yscale="log")
  names = [name for line in held_out for name in line]
  kind = "bits_per_byte/" if any(name.startswith("bits_per_byte/") for name in names) else "bits_per_token/"
  _curves(score, held_out, kind, marker="o", markersize=3)
  score.set(title="teachers' held-out text", ylabel=kind.rstrip("/").replace("_", " "))
  length.plot([line["step"] for line in rollout], [line["reply_length"] for line in rollout], color="0.3")
  length.set(title="replies", ylabel="tokens, mean", xlabel="step")
  gradient.plot([line["step"] for line in train], [line["grad_norm"] for line in train], color="0.3", linewidth=1)
  gradient.set(title="gradient norm before clipping", xlabel="step", yscale="log")
  for axes in (kl, score, length, gradient):
    axes.grid(alpha=0.3)
  for axes in (kl, score):
    if axes.get_legend_handles_labels()[0]:
      axes.legend(fontsize=9)
  FigureCanvasAgg(figure).print_png(str(path))


def shares(lines: Sequence[Mapping[str, Any]], scores: Mapping[str, Mapping[str, float]], kinds: Sequence[str],
           methods: Mapping[str, str], path: str | Path) -> None:
  """Draws what a student and others reach of their specialists' gains into a PNG.

  Args:
    lines: of the student's metrics.jsonl.
    scores: {model: {kind: bits per byte of judged text}} of "start", of each kind's specialist, and of the methods.
    kinds: of text.
    methods: model -> what it is called.
    path: the PNG to write.
  """
  figure = Figure(figsize=(11, 4), dpi=160, layout="constrained")
  left, right = figure.subplots(1, 2)
  for i, (name, title) in enumerate(methods.items()):
    gains = [scores["start"][kind] - scores[kind][kind] for kind in kinds]
    height = [(scores["start"][kind] - scores[name][kind]) / gain if gain > 0 else 0 for kind, gain in zip(kinds, gains)]
    places = [k + 0.27 * (i - 1) for k in range(len(kinds))]
    bars = left.bar(places, height, 0.25, label=title, color=str(0.2 + 0.3 * i), edgecolor="black")
    left.bar_label(bars, [f"{100 * h:.0f}%" if gain > 0 else "no gain" for h, gain in zip(height, gains)], fontsize=8)
  left.axhline(0.8, color="tab:red", linestyle="--", linewidth=1, label="80%")
  left.axhline(1.0, color="black", linewidth=0.8)
  left.set(title="share of the specialist's gain over the start", xticks=range(len(kinds)), xticklabels=kinds,
           ylim=(0, 1.3 * max(1.0, left.dataLim.y1)))
  left.legend(fontsize=8, loc="upper right", ncols=2)
  held_out = [line for line in lines if line["split"] == "held_out"]
  for style, kind in zip(itertools.cycle(STYLES), kinds):
    points = [(line["step"], line[f"bits_per_byte/{kind}"]) for line in held_out]
    right.plot(*zip(*points), linestyle=style, marker="o", markersize=3, label=f"student on {kind}")
  right.set(title="other held-out text, while the student learns", xlabel="step", ylabel="bits per byte")
  right.grid(alpha=0.3)
  right.legend(fontsize=8)
  FigureCanvasAgg(figure).print_png(str(path))


def _curves(axes: Any, lines: Sequence[Mapping[str, Any]], prefix: str, **style: Any) -> None:
  """A curve for each number whose name begins so."""
  names = dict.fromkeys(name for line in lines for name in line if name.startswith(prefix))
  for line_style, name in zip(itertools.cycle(STYLES), names):
    points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    axes.plot(*zip(*points), linestyle=line_style, label=name.removeprefix(prefix), **style)
