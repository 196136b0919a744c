"""Picture of the miniature about stability: losses around a spike, gains over depth with and without a constraint."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from deepseek_v4.analysis.gains import Gains

Lines = Sequence[Mapping[str, Any]]
STYLES: tuple[dict[str, Any], ...] = (
  {"color": "black", "linewidth": 1.0, "linestyle": "-"}, {"color": "tab:red", "linewidth": 1.0, "linestyle": "--"})
BACKWARD: tuple[str, ...] = (":", "-.")  # of the same runs, told apart from the way forward without colours


def stability(spiking: Mapping[str, Lines], mixing: Mapping[str, tuple[Lines, Sequence[Gains]]], path: str | Path) -> None:
  """Draws a PNG of four parts.

  Args:
    spiking: policy -> what `metrics.read_lines` gives of a run that spikes; losses in nats.
    mixing: kind of mixing -> (lines of a run, gains of its first 1, 2, ... sublayers together).
    path: the PNG to write.
  """
  figure = Figure(figsize=(10, 7), dpi=160, layout="constrained")
  (spike, rate), (loss, gain) = figure.subplots(2, 2)
  for (policy, lines), style in zip(spiking.items(), STYLES):
    _losses(spike, lines, f"policy {policy}", style)
    points = [(line["step"], line["loss"]) for line in lines if line["split"] == "anomaly" and line["loss"] is not None]
    if points:
      spike.scatter(*zip(*points), color=style["color"], marker="x", s=30, zorder=3)
  spike.set(title="a learning rate that is too high (x: anomalies)", xlabel="step", ylabel="loss, nats")
  _around_the_spike(rate, spiking)
  for (kind, (lines, found)), style, back in zip(mixing.items(), STYLES, BACKWARD):
    _losses(loss, lines, kind, style)
    depth = range(1, len(found) + 1)
    gain.plot(depth, [one.forward for one in found], label=f"{kind}, forward", **style)
    gain.plot(depth, [one.backward for one in found], label=f"{kind}, backward", **{**style, "linestyle": back})
  loss.set(title="residual streams of 60 sublayers", xlabel="step", ylabel="loss, nats")
  gain.set(title="gain of the first n sublayers after training", xlabel="n", yscale="log")
  for axes in (spike, rate, loss, gain):
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
  FigureCanvasAgg(figure).print_png(str(path))


def _losses(axes: Axes, lines: Lines, label: str, style: Mapping[str, Any]) -> None:
  points = [(line["step"], line["next_token"]) for line in lines
            if line["split"] == "train" and line["next_token"] is not None]
  axes.plot(*zip(*points), label=label, **style)


def _around_the_spike(axes: Axes, spiking: Mapping[str, Lines]) -> None:
  """Learning rate, and by how many steps the parameters that choose experts are older."""
  lines = next(iter(spiking.values()))
  train = [line for line in lines if line["split"] == "train"]
  axes.plot([line["step"] for line in train], [line.get("routing_age", 0) for line in train],
            label="age of the routing, steps", **STYLES[0])
  axes.set(title="anticipatory routing", xlabel="step", ylabel="steps")
  other = axes.twinx()
  other.plot([line["step"] for line in train], [line["learning_rate"] for line in train], color="tab:blue", linestyle=":")
  other.set_ylabel("learning rate (dotted)")
