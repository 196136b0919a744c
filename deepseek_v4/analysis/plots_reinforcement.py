"""The picture of learning from rewards: what replies are worth, how long they are, how far the model went."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Lines = Sequence[Mapping[str, Any]]


def curves(lines: Lines, path: str | Path) -> None:
  """Draws rewards, lengths, KL and masked samples over the optimizer steps into a PNG.

  Args:
    lines: what `metrics.read_lines` gives of the run's metrics.jsonl.
    path: the PNG to write.
  """
  train, held_out = ([line for line in lines if line["split"] == split] for split in ("train", "held_out"))
  figure = Figure(figsize=(9, 6.5), dpi=160, layout="constrained")
  ((reward, length), (distance, share)) = figure.subplots(2, 2, sharex=True)
  for axes, name in ((reward, "reward"), (length, "reply_length")):
    _curve(axes, train, name, "training", color="0.55")
    _curve(axes, held_out, name, "held out", color="black", marker="o", markersize=4)
  _curve(distance, train, "kl", "KL to the reference", color="black")
  _curve(distance, train, "policy_gap", "|old - new| per token", color="0.55", linestyle="--")
  _curve(share, train, "masked", "samples masked", color="black")
  _curve(share, train, "clipped", "tokens clipped", color="0.55", linestyle="--")
  _curve(share, train, "finished", "replies finished", color="0.3", linestyle=":")
  reward.set(title="reward, without the length's price", ylabel="mean of replies")
  length.set(title="replies", ylabel="tokens, mean")
  distance.set(title="how far a round goes", ylabel="nats per token", xlabel="step")
  share.set(title="shares", xlabel="step", ylim=(-0.02, 1.02))
  for axes in (reward, length, distance, share):
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
      axes.legend(fontsize=9)
  FigureCanvasAgg(figure).print_png(str(path))


def _curve(axes: Axes, lines: Lines, name: str, label: str, **style: Any) -> None:
  points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
  if points:
    axes.plot(*zip(*points), label=label, **style)


def depth(found: Sequence[Mapping[str, Any]], efforts: Sequence[str], models: Sequence[str], path: str | Path) -> None:
  """Draws accuracy over the length of replies, a line from effort to effort for each model, into a PNG.

  Args:
    found: {model: {effort: {"accuracy", "tokens"}}} of each repetition.
    efforts: in the order of the lines.
    models: what is drawn.
    path: the PNG to write.
  """
  figure = Figure(figsize=(7, 4.2), dpi=160, layout="constrained")
  axes = figure.subplots()
  styles = zip(models, ("0.6", "tab:blue", "black"), ("s", "^", "o"))
  for model, color, marker in styles:
    for i, scores in enumerate(found):
      points = [(scores[model][effort]["tokens"], scores[model][effort]["accuracy"]) for effort in efforts]
      axes.plot(*zip(*points), color=color, marker=marker, linewidth=1, label=model if i == 0 else None)
      if model == models[-1] and i == 0:
        for effort, point in zip(efforts, points):
          axes.annotate(effort, point, xytext=(6, -12), textcoords="offset points")
  axes.set(xlabel="tokens of a reply, mean", ylabel="right answers on unseen problems", ylim=(0, 1.03))
  axes.grid(alpha=0.3)
  axes.legend(fontsize=9, loc="lower right")
  FigureCanvasAgg(figure).print_png(str(path))
