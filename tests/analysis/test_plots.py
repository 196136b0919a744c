"""Pictures: what is drawn is what was given, every line and bar can be told apart without colours, and they make PNGs."""

import itertools

import numpy as np
import pytest

from deepseek_v4.analysis import plots, plots_attention, plots_costs, plots_layers, plots_optimizers
from deepseek_v4.analysis.gains import Gains
from deepseek_v4.analysis.selection_mass import selection_mass

S, WINDOW, RATE = 24, 5, 4


def traced():
  """By the names of a trace: layer 0 sliding, 1 CSA with entries of 4 and two picks, 2 HCA with entries of 8; one row."""
  rng = np.random.default_rng(0)
  place = np.arange(S)
  near = (place[:, None] >= place) & (place[:, None] - place < WINDOW)
  window = near[None, :, None] * np.full((1, S, 2, S), 0.1)
  found = {f"layers/{layer:02d}/attention/window_weight": window for layer in range(3)}
  found["layers/00/attention/entry_weight"] = np.zeros((1, S, 2, 0))
  for layer, rate in ((1, RATE), (2, 8)):
    first = np.arange(S // rate) * rate
    seen = place[:, None] >= first + rate - 1
    if layer == 1:
      scores = np.where(seen, rng.normal(size=seen.shape), -np.inf)
      found["layers/01/indexer/scores"] = scores[None]
      seen = seen & (np.argsort(np.argsort(-scores, 1), 1) < 2)
    found |= {f"layers/{layer:02d}/attention/entry_weight": seen[None, :, None] * np.full((1, S, 2, S // rate), 0.1),
              f"layers/{layer:02d}/attention/entry_segment": np.ones((1, S // rate), int),
              f"layers/{layer:02d}/attention/entry_position": first[None]}
  return found


RNG = np.random.default_rng(1)
DENSE = RNG.dirichlet(np.ones(9), (20, 3))
LINES = [{"split": split, "step": step, "next_token": 5.0 / step} for step in range(1, 9) for split in ("train", "held_out")]
COMBS = {f"layers/{sublayer}/comb": RNG.dirichlet(np.ones(4), (1, S, 4)) for sublayer in (
  "00/mhc_attn", "00/mhc_ffn", "01/mhc_attn", "01/mhc_ffn")}
WEIGHTS = RNG.dirichlet(np.ones(8), (5, 6)).swapaxes(1, 2)  # five entries, eight slots, six channels
LOADS = [RNG.poisson(30, (3, 8)) for _ in range(4)]
GAINS = [Gains(1.0, 1.0 + 0.1 * n, 1.0, 1.0) for n in range(4)]
PICTURES = {
  "side by side": lambda: plots.side_by_side({"a": LINES, "b": LINES, "c": LINES[1::2]}, smooth=3),
  "keys seen": lambda: plots_attention.keys_seen(traced(), {0: 0, 1: RATE, 2: 8}),
  "one layer's keys": lambda: plots_attention.keys_seen(traced(), {2: 8}),
  "attention": lambda: plots_attention.attention_maps(traced(), [0, 1]),
  "selection": lambda: plots_attention.selection(DENSE, DENSE.sum(1), 3, "layer 1"),
  "compressors": lambda: plots_attention.compressor_weights({"x": WEIGHTS}, {"x": 4}),
  "loads": lambda: plots_layers.expert_loads(LOADS, [0, 2, 4, 6]),
  "load": lambda: plots_layers.expert_loads(LOADS[:1], ["now"]),
  "mixing": lambda: plots_layers.stream_mixing(COMBS),
  "gains": lambda: plots_layers.gains_over_depth({"a": GAINS, "b": GAINS}),
  "costs": lambda: plots_costs.costs([1024, 4096], {"a": [1, 2], "b": [3, 4]}, {"a": [1, 2], "b": [3, 4]}),
  "parts": lambda: plots_costs.parts({"a": {"x": 1, "y": 2}, "b": {"y": 3, "none": 0}}, 1, "GiB", "title"),
  "singular values": lambda: plots_optimizers.singular_values({"a": [3, 1, 2], "b": [1, 1]},
                                                              {"a": [1, 1, 1], "b": [1, 0.4]}),
}


@pytest.mark.parametrize("name", PICTURES)
def test_print_tells_everything_apart(name):
  figure = PICTURES[name]()
  assert plots.png(figure).startswith(b"\x89PNG")
  for axes in figure.axes:
    looks = [(line.get_linestyle(), line.get_marker()) for line in axes.lines if not line.get_label().startswith("_")]
    assert len(set(looks)) == len(looks), looks
    bars = [box.patches[0] for box in axes.containers if hasattr(box, "patches")]
    fills = [(bar.get_hatch(), bar.get_facecolor()) for bar in bars]
    assert len(set(fills)) == len(fills)
    for picture in axes.images:
      assert picture.get_cmap().name == "Greys"
    assert axes.get_title() or axes.get_ylabel() or not axes.axison  # every part says what it is


def test_keys_that_are_seen_by_loops():
  found = traced()
  for layer, rate in ((0, 0), (1, RATE), (2, 8)):
    seen = plots_attention.seen_tokens(found, layer, rate)
    for query, token in itertools.product(range(S), range(S)):
      entry = token // rate if rate else 0
      if query - WINDOW < token <= query:
        expected = plots_attention.WINDOW
      elif rate == 0 or query < (entry + 1) * rate - 1:
        expected = plots_attention.NOTHING
      elif found[f"layers/{layer:02d}/attention/entry_weight"][0, query, 0, entry] > 0:
        expected = plots_attention.READ
      else:
        expected = plots_attention.VISIBLE if layer == 1 else plots_attention.NOTHING
      assert seen[query, token] == expected, (layer, query, token)


def test_selection_s_curves_are_the_masses():
  figure = PICTURES["selection"]()
  curves = {line.get_label(): line.get_xydata() for line in figure.axes[1].lines}
  for label, name in (("the best picks", "best"), ("the indexer's picks", "held"), ("picks at random", "even")):
    for k, share in curves[label]:
      expected = getattr(selection_mass(DENSE[None], DENSE.sum(1)[None], int(k)), name)
      assert share == expected or (np.isnan(share) and np.isnan(expected))


def test_loads_are_relative_to_the_mean():
  figure = PICTURES["loads"]()
  np.testing.assert_allclose(figure.axes[0].images[0].get_array(), LOADS[0] / LOADS[0].mean(1, keepdims=True))
  curve = figure.axes[3].lines[1].get_xydata()
  np.testing.assert_allclose(curve, [(2 * i, (x[1] / x[1].mean()).max()) for i, x in enumerate(LOADS)])


def test_loads_of_a_trace_count_tokens_only():
  found = {"layers/00/router/experts": np.array([[[0, 1], [1, 2], [3, 3]]]),
           "layers/01/router/experts": np.zeros((1, 3, 2), int)}
  np.testing.assert_array_equal(plots_layers.loads_of(found, 4), [[1, 2, 1, 2], [6, 0, 0, 0]])
  np.testing.assert_array_equal(plots_layers.loads_of(found, 4, [[1, 1, 0]]), [[1, 2, 1, 0], [4, 0, 0, 0]])


def test_curves_costs_and_singular_values_are_those_given():
  curve = PICTURES["side by side"]().axes[0].lines[0].get_xydata()
  np.testing.assert_allclose(curve, [(n, np.mean([5 / (n - 2), 5 / (n - 1), 5 / n])) for n in range(3, 9)])
  np.testing.assert_allclose(PICTURES["costs"]().axes[1].lines[1].get_ydata(), np.array([3, 4]) / 2**30)
  left, right = PICTURES["singular values"]().axes
  np.testing.assert_allclose(left.lines[0].get_ydata(), [1, 2 / 3, 1 / 3])
  np.testing.assert_allclose(right.lines[2 - 1].get_ydata(), [1, 0.4])
  bars = PICTURES["parts"]().axes[0].containers
  assert [bar.get_height() for bar in bars[1]] == [2, 3] and [bar.get_y() for bar in bars[1]] == [1, 0] and len(bars) == 2
