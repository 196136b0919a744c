"""Pictures of a run, drawn without a screen and readable in black and white print."""

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


# ---- what a traced model does (names of `analysis.trace`) --------------------------------------------------------------
def png(figure: Figure) -> bytes:
  """A figure as the bytes of a PNG, for notebooks and files."""
  buffer = io.BytesIO()
  FigureCanvasAgg(figure).print_png(buffer)
  return buffer.getvalue()


def _image(axes: Axes, values: np.ndarray, title: str, xlabel: str, ylabel: str, **options: Any) -> None:
  picture = axes.imshow(values, aspect="auto", interpolation="nearest", **({"cmap": "Greys"} | options))
  axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
  axes.figure.colorbar(picture, ax=axes, fraction=0.046)


def attention_maps(found: Mapping[str, Any], layers: Sequence[int], row: int = 0) -> Figure:
  """Who looks at what: attention weights, mean over heads, of tokens in the window (left) and of compressed entries (right).

  Args:
    found: of `trace`.
    layers: one line of pictures each.
    row: of the batch.
  """
  figure = Figure(figsize=(9, 3.2 * len(layers)), dpi=110, layout="constrained")
  grid = figure.subplots(len(layers), 2, squeeze=False)
  for (window, entries), layer in zip(grid, layers):
    name = f"layers/{layer:02d}"
    weights = np.asarray(found[f"{name}/attention/window_weight"][row]).mean(1)
    _image(window, weights ** 0.5, f"layer {layer}: window", "key (token)", "query (token)")
    of_entries = np.asarray(found[f"{name}/attention/entry_weight"][row]).mean(1)
    if of_entries.shape[1]:
      _image(entries, of_entries ** 0.5, f"layer {layer}: compressed entries", "entry", "query (token)")
    else:
      entries.set_axis_off()
      entries.text(0.5, 0.5, "sliding layer: no entries", ha="center", va="center")
  return figure


def selection_map(found: Mapping[str, Any], layer: int, row: int = 0) -> Figure:
  """The indexer of a CSA layer: its choice (left) and the attention mass of each query on the chosen entries (right)."""
  name = f"layers/{layer:02d}"
  scores, picks = (np.asarray(found[f"{name}/indexer/{part}"][row]) for part in ("scores", "selected"))
  chosen = np.zeros(scores.shape)
  rows, places = np.nonzero(picks >= 0)
  chosen[rows, picks[rows, places]] = 1
  figure = Figure(figsize=(9, 3.4), dpi=110, layout="constrained")
  left, right = figure.subplots(1, 2)
  shades = chosen + 0.25 * (scores > -np.inf)
  _image(left, shades, f"layer {layer}: visible (grey), chosen (black)", "entry", "query (token)")
  mass = np.asarray(found[f"{name}/attention/entry_weight"][row]).mean(1).sum(-1)
  right.plot(mass, color="black", linewidth=0.8)
  right.set(title="attention on compressed entries", xlabel="query (token)", ylabel="share, mean over heads", ylim=(0, 1))
  return figure


def expert_loads(found: Mapping[str, Any], num_experts: int, segment_ids: Any = None) -> Figure:
  """Share of the tokens' picks that each expert gets, layer by layer; level = balanced.

  Args:
    found: of `trace`.
    segment_ids: [B, S], to leave out places that hold no token; None = all count.
  """
  names = sorted(name for name in found if name.startswith("layers/") and name.endswith("router/experts"))
  tokens = _tokens(segment_ids, found[names[0]])
  loads = np.stack([np.bincount(np.asarray(found[name])[tokens].reshape(-1), minlength=num_experts) for name in names])
  figure = Figure(figsize=(9, 0.5 * len(names) + 1.6), dpi=110, layout="constrained")
  relative = loads / loads.sum(1, keepdims=True) * num_experts
  _image(figure.subplots(), relative, "expert load (1 = balanced)", "expert", "layer", vmin=0, vmax=2)
  return figure


def _tokens(segment_ids: Any, of: Any) -> np.ndarray:
  """bool [B, S]: places that hold a token; `of` is any array [B, S, ...]."""
  return np.ones(np.shape(of)[:2], bool) if segment_ids is None else np.asarray(segment_ids) > 0


def stream_mixing(found: Mapping[str, Any], segment_ids: Any = None) -> Figure:
  """mHC over depth: the mean mixing matrix of every sublayer; rows = new streams, each summing to about 1.

  Args:
    found: of `trace`.
    segment_ids: [B, S], to leave out places that hold no token; None = all count.
  """
  names = sorted(n for n in found if n.startswith("layers/") and n.endswith("/comb"))
  # Within a layer attention comes before the experts, as the alphabet has it.
  figure = Figure(figsize=(1.5 * len(names) + 1, 2.1), dpi=110, layout="constrained")
  for axes, name in zip(np.atleast_1d(figure.subplots(1, len(names))), names):
    comb = np.asarray(found[name])[_tokens(segment_ids, found[name])]
    axes.imshow(comb.mean(0).T, cmap="Greys", vmin=0, vmax=1)
    axes.set(title=f"{name.split('/')[1]} {name.split('/')[2].removeprefix('mhc_')}", xticks=[], yticks=[])
  return figure
