"""Pictures of attention: which keys a query sees, what it reads, what the indexer chooses, how tokens become entries.

`found` is what `dsv4.trace` gives. All pictures are of one row of the batch that holds one document from its place 0 on.

Axis letters: S sequence   H heads   T entries   w slots of a compressor's window   d channels
"""

from __future__ import annotations

from typing import Any, Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from deepseek_v4.analysis.plots import finish, image, line_style, new_figure
from deepseek_v4.analysis.selection_mass import selection_mass

NOTHING, VISIBLE, READ, WINDOW = 0.0, 0.22, 0.55, 1.0  # shades of `keys_seen`


def keys_seen(found: Mapping[str, Any], rates: Mapping[int, int], row: int = 0) -> Figure:
  """Which tokens each query sees, a picture per layer: in the window one by one, before it as part of an entry.

  Args:
    found: of `trace`.
    rates: layer -> tokens of an entry; 0 for a sliding layer.
    row: of the batch.
  """
  figure = new_figure(3.4 * len(rates) + 0.6, 4.6 if len(rates) > 1 else 5.2)  # a line of legend for each shade
  for axes, (layer, rate) in zip(np.atleast_1d(figure.subplots(1, len(rates), sharey=True)), rates.items()):
    seen = seen_tokens(found, layer, rate, row)
    axes.imshow(seen, cmap="Greys", vmin=0, vmax=1, interpolation="nearest")
    kind = f"entries of {rate}" if rate else "window only"
    axes.set(title=f"layer {layer}: {kind}", xlabel="token that is seen")
  figure.axes[0].set_ylabel("query (token)")
  grey = matplotlib.colormaps["Greys"]
  labels = {"in the window": WINDOW, "in an entry that is read": READ, "in an entry that is not chosen": VISIBLE}
  figure.legend(handles=[Patch(facecolor=grey(shade), edgecolor="black", label=label) for label, shade in labels.items()],
                loc="outside lower center", ncols=3 if len(rates) > 1 else 1, fontsize=9)
  return figure


def seen_tokens(found: Mapping[str, Any], layer: int, rate: int, row: int = 0) -> np.ndarray:
  """float64 [S, S], shades of `keys_seen`: how each query (first axis) meets each token. Arguments as there."""
  name = f"layers/{layer:02d}"
  window_SS = np.asarray(found[f"{name}/attention/window_weight"][row]).max(1) > 0
  seen_SS = np.full(window_SS.shape, NOTHING)
  if rate:
    read_ST = np.asarray(found[f"{name}/attention/entry_weight"][row]).max(1) > 0
    scores = found.get(f"{name}/indexer/scores")
    visible_ST = read_ST if scores is None else np.asarray(scores[row]) > -np.inf
    shade_ST = np.where(read_ST, READ, np.where(visible_ST, VISIBLE, NOTHING))
    used = np.asarray(found[f"{name}/attention/entry_segment"][row]) > 0
    for entry in np.nonzero(used)[0]:
      first = int(found[f"{name}/attention/entry_position"][row, entry])
      seen_SS[:, first:first + rate] = shade_ST[:, entry, None]
  return np.where(window_SS, WINDOW, seen_SS)


def attention_maps(found: Mapping[str, Any], layers: Sequence[int], row: int = 0) -> Figure:
  """How much is looked at: attention weights, mean over heads, of tokens in the window (left) and of entries (right).

  Args:
    found: of `trace`.
    layers: numbers, one line of pictures each.
    row: of the batch.
  """
  figure = new_figure(9, 3.2 * len(layers))
  grid = figure.subplots(len(layers), 2, squeeze=False)
  for (window, entries), layer in zip(grid, layers):
    name = f"layers/{layer:02d}"
    weights = np.asarray(found[f"{name}/attention/window_weight"][row]).mean(1)
    image(window, weights ** 0.5, f"layer {layer}: window", "key (token)", "query (token)", "square root of the weight")
    of_entries = np.asarray(found[f"{name}/attention/entry_weight"][row]).mean(1)
    if of_entries.shape[1]:
      image(entries, of_entries ** 0.5, f"layer {layer}: compressed entries", "entry", "query (token)",
            "square root of the weight")
    else:
      entries.set_axis_off()
      entries.text(0.5, 0.5, "sliding layer: no entries", ha="center", va="center")
  return figure


def selection(entry_weight: Any, scores: Any, top_k: int, name: str = "") -> Figure:
  """What the indexer chose against its teacher: the teacher's mass with the picks on it, and the mass that k picks hold.

  Args:
    entry_weight: [S, H, T], attention probabilities of a pass that attends to every visible entry
      (`trace(..., attention_mode="dense")`), 0 where invisible.
    scores: [S, T] of the indexer, -inf where invisible.
    top_k: picks of a query.
    name: of the whole picture.
  """
  weight_SHT, scores_ST = np.asarray(entry_weight, np.float64), np.asarray(scores, np.float64)
  mass_ST = weight_SHT.sum(1)
  share_ST = mass_ST / np.maximum(mass_ST.sum(-1, keepdims=True), 1e-30)
  figure = new_figure(10, 4.2)
  figure.suptitle(name)
  left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
  shown_ST = share_ST ** 0.5
  title = f"teacher's mass, and the {top_k} picks (marks)"
  image(left, shown_ST, title, "entry", "query (token)", "square root of the share", vmin=0,
        vmax=np.quantile(shown_ST[shown_ST > 0], 0.98))  # first queries have all their mass on few entries
  few = np.linspace(0, len(scores_ST) - 1, min(len(scores_ST), 16)).astype(int)  # more marks would hide the picture
  for query in few:
    order = np.argsort(-scores_ST[query], kind="stable")[:top_k]
    picks = order[scores_ST[query, order] > -np.inf]
    left.plot(picks, np.full(len(picks), query), linestyle="none", marker="o", markersize=3, markerfacecolor="white",
              markeredgecolor="black", markeredgewidth=0.6)
  tried = sorted({int(k) for k in np.geomspace(1, scores_ST.shape[1], 10)} | {top_k})
  masses = [selection_mass(weight_SHT[None], scores_ST[None], k) for k in tried]
  labels = {"best": "the best picks", "held": "the indexer's picks", "even": "picks at random"}
  for i, (name, label) in enumerate(labels.items()):
    right.plot(tried, [getattr(mass, name) for mass in masses], label=label, **line_style(i))
  right.axvline(top_k, color="0.3", linewidth=0.8, linestyle=":")
  right.annotate(f" {top_k} picks", (top_k, 0.02), fontsize=8)
  finish(right, "mass that k picks hold", "k", "share, mean over queries that see more", xscale="log", ylim=(0, 1.03))
  return figure


def compressor_weights(weights: Mapping[str, Any], rates: Mapping[str, int]) -> Figure:
  """What an entry is mixed of: the mean weight of each token of its window, and one entry channel by channel.

  Args:
    weights: label -> [T, w, d] of `trace` ("layers/NN/compressor/weight" of one row). The first entry, which has no window
      before its own, is left out of means where there are others.
    rates: label -> tokens of the own window (w or w / 2).
  """
  figure = new_figure(9, 2.7 * len(weights))
  for (left, right), (label, weight) in zip(figure.subplots(len(weights), 2, squeeze=False), weights.items()):
    weight_Twd = np.asarray(weight, np.float64)
    weight_Twd = weight_Twd[1:] if len(weight_Twd) > 1 else weight_Twd
    slots, rate = weight_Twd.shape[1], rates[label]
    places = np.arange(slots) - (slots - rate)  # 0 = the own window's first token
    low, middle, high = np.percentile(weight_Twd, (10, 50, 90), axis=(0, 2))
    left.errorbar(places, weight_Twd.mean((0, 2)), fmt="o", color="black", markersize=4, label="mean",
                  yerr=np.clip([weight_Twd.mean((0, 2)) - low, high - weight_Twd.mean((0, 2))], 0, None), elinewidth=0.7)
    left.axhline(1 / slots, color="0.4", linestyle="--", linewidth=1, label="plain average")
    if slots > rate:
      left.axvline(-0.5, color="0.4", linestyle=":", linewidth=1)
    finish(left, f"{label}: bars from 10% to 90%", "token, from the entry's first", "weight", ylim=(0, None))
    image(right, weight_Twd[len(weight_Twd) // 2], f"{label}: one entry", "channel", "token, from the first", "weight",
          vmin=0, extent=(-0.5, weight_Twd.shape[2] - 0.5, places[-1] + 0.5, places[0] - 0.5))
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.yaxis.set_major_locator(MaxNLocator(integer=True))
  return figure
