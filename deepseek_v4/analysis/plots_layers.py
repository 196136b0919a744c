"""Pictures over layers and time: where the experts' load goes, how residual streams mix and how far signals grow.

Axis letters: B batch   S sequence   L layers   E experts   N streams
"""

from __future__ import annotations

from typing import Any, Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from deepseek_v4.analysis.gains import Gains, places_of_tokens
from deepseek_v4.analysis.plots import finish, image, line_style, new_figure


def loads_of(found: Mapping[str, Any], num_experts: int, segment_ids: Any = None) -> np.ndarray:
  """int [L, E]: picks of each expert in the layers that a trace has.

  Args:
    found: of `trace`.
    num_experts: of a layer.
    segment_ids: int [B, S], to leave out places that hold no token; None = all count.

  Raises:
    ValueError: segment_ids that do not fit, or no token.
  """
  names = sorted(name for name in found if name.startswith("layers/") and name.endswith("router/experts"))
  tokens = places_of_tokens(segment_ids, np.shape(found[names[0]])[:2], names[0])
  return np.stack([np.bincount(np.asarray(found[name])[tokens].reshape(-1), minlength=num_experts) for name in names])


def expert_loads(loads: Sequence[Any], moments: Sequence[Any], title: str = "expert load (1 = balanced)") -> Figure:
  """Expert load over layers and time: each moment's picks of each expert, and over time the fullest expert of each layer.

  Args:
    loads: of each moment [L, E], picks or anything in proportion.
    moments: the steps, drawn to scale; what to call a single one, which has no picture over time.
    title: of the whole.
  """
  relative = [np.asarray(x, np.float64) for x in loads]
  relative = [x / np.maximum(x.mean(-1, keepdims=True), 1e-30) for x in relative]
  shown = sorted({0, len(relative) // 2, len(relative) - 1})
  columns = len(shown) + (len(relative) > 1)
  figure = new_figure(3.4 * columns + 0.6, 0.35 * len(relative[0]) + 2.1)
  figure.suptitle(title)
  every = np.atleast_1d(figure.subplots(1, columns))
  for axes, i in zip(every, shown):
    name = f"step {moments[i]}" if len(moments) > 1 else str(moments[i])
    image(axes, relative[i], name, "expert", "layer", "load over the mean", vmin=0, vmax=2)
    axes.set_yticks(range(len(relative[i])))
  if len(relative) > 1:
    for layer in range(len(relative[0])):
      every[-1].plot(moments, [x[layer].max() for x in relative], label=f"layer {layer}", **line_style(layer))
    finish(every[-1], "fullest expert", "step", "load over the mean", ylim=(0.9, None))
  return figure


def stream_mixing(found: Mapping[str, Any], segment_ids: Any = None) -> Figure:
  """mHC over depth: the mean mixing matrix of every sublayer; rows = new streams, each summing to about 1.

  Args:
    found: of `trace`.
    segment_ids: int [B, S], to leave out places that hold no token; None = all count.

  Raises:
    ValueError: segment_ids that do not fit, or no token.
  """
  names = sorted(n for n in found if n.startswith("layers/") and n.endswith("/comb"))
  # Within a layer attention comes before the experts, as the alphabet has it.
  figure = new_figure(1.5 * len(names) + 1, 2.1)
  for axes, name in zip(np.atleast_1d(figure.subplots(1, len(names))), names):
    tokens = places_of_tokens(segment_ids, np.shape(found[name])[:2], name)
    comb_NN = np.asarray(found[name])[tokens].mean(0).T
    axes.imshow(comb_NN, cmap="Greys", vmin=0, vmax=1)
    axes.set(title=f"{name.split('/')[1]} {name.split('/')[2].removeprefix('mhc_')}", xticks=[], yticks=[])
    if len(comb_NN) <= 4:
      for (i, j), value in np.ndenumerate(comb_NN):
        axes.text(j, i, f"{value:.2f}".lstrip("0"), ha="center", va="center", fontsize=7,
                  color="white" if value > 0.6 else "black")
  return figure


def gains_over_depth(found: Mapping[str, Sequence[Gains]]) -> Figure:
  """How far the first n sublayers' mixing lets a signal (forward) and a gradient (backward) grow.

  Args:
    found: label -> gains of the first 1, 2, ... sublayers together (`gains.composite_gains` of as many maps).
  """
  figure = new_figure(6.5, 3.8)
  axes = figure.subplots()
  for i, (label, gains) in enumerate(found.items()):
    depth = range(1, len(gains) + 1)
    for j, way in enumerate(("forward", "backward")):
      axes.plot(depth, [getattr(gain, way) for gain in gains], label=f"{label}, {way}", **line_style(2 * i + j))
  axes.axhline(1, color="0.5", linewidth=0.8)
  largest = max(max(gain.forward, gain.backward) for gains in found.values() for gain in gains)
  finish(axes, "gain of the first n sublayers together", "n", "gain", yscale="log" if largest > 10 else "linear")
  return figure
