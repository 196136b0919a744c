"""Pictures: what is drawn is what was given, every line and bar can be told apart without colours, and they make PNGs."""

import itertools
import types
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from deepseek_v4.analysis import (
  plots,
  plots_attention,
  plots_costs,
  plots_distillation,
  plots_layers,
  plots_optimizers,
  plots_reinforcement,
  plots_stability,
)
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


# Of runs: what is written to a file at once.
NUMBERS = ("next_token", "mtp", "indexer", "balance", "grad_norm", "learning_rate", "max_load_violation", "loss", "reward",
           "reply_length", "kl", "policy_gap", "masked", "clipped", "finished", "kl/a", "kl/b", "bits_per_byte/a",
           "bits_per_byte/b", "bits_per_byte", "bits_per_token", "routing_age")
RUN = [{"split": split, "step": step, "stage": f"stage {step // 5}", **dict.fromkeys(NUMBERS, 1 / step)}
       for step in range(1, 9) for split in ("train", "held_out", "rollout")]
RUN.append({"split": "anomaly", "step": 4, "loss": 9.0})
REACHED = {name: {"a": 2.0 - 0.1 * i, "b": 2.2 - 0.1 * i} for i, name in enumerate(("start", "x", "y", "z", "a", "b"))}
DEPTH = {model: {effort: {"accuracy": 0.1 * i, "tokens": 5 * i} for i, effort in enumerate("nh", 1)} for model in "crs"}
RACE = {name: [types.SimpleNamespace(steps=[1, 2], losses=[3.0, 2.0 + seed]) for seed in (0, 1)] for name in "abc"}
WRITTEN = {
  "losses": (plots, lambda path: plots.loss_curves(RUN, path, {"bigram": 3.0, "zlib": 2.0})),
  "stages": (plots, lambda path: plots.stages_and_mass(RUN, path, {"1": (0.1, 0.5, 0.6), "3": (0.2, 0.4, 0.7)})),
  "race": (plots_optimizers, lambda path: plots_optimizers.race(
    RACE, {name: {0.1: [2.0, 2.1], 0.2: [3.0, np.inf]} for name in "abc"}, 2.0, path)),
  "distillation": (plots_distillation, lambda path: plots_distillation.curves(RUN, path)),
  "shares": (plots_distillation, lambda path: plots_distillation.shares(
    RUN, REACHED, ("a", "b"), {"x": "on-policy", "y": "off-policy", "z": "mixed"}, path)),
  "rewards": (plots_reinforcement, lambda path: plots_reinforcement.curves(RUN, path)),
  "depth": (plots_reinforcement, lambda path: plots_reinforcement.depth([DEPTH, DEPTH], "nh", "crs", path)),
  "stability": (plots_stability, lambda path: plots_stability.stability(
    {"anticipate": RUN, "log": RUN}, {"mHC": (RUN, GAINS), "free": (RUN, GAINS)}, path)),
}


def test_every_module_of_pictures_is_here():
  drawn = {module.__name__.split(".")[-1] for module, _ in WRITTEN.values()}
  drawn |= {"plots_attention", "plots_costs", "plots_layers"}
  assert {path.stem for path in Path(plots.__file__).parent.glob("plots*.py")} == drawn


@pytest.mark.parametrize("name", WRITTEN)
def test_print_tells_everything_apart_in_what_runs_write(name, tmp_path, monkeypatch):
  module, draw = WRITTEN[name]
  kept = []
  monkeypatch.setattr(module, "FigureCanvasAgg", lambda figure: kept.append(figure) or FigureCanvasAgg(figure))
  draw(tmp_path / "a.png")
  assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
  told_apart(*kept)


@pytest.mark.parametrize("name", PICTURES)
def test_print_tells_everything_apart(name):
  figure = PICTURES[name]()
  assert plots.png(figure).startswith(b"\x89PNG")
  told_apart(figure)


def told_apart(figure):
  """Lines by their strokes or markers, bars by their fills; and every part says what it is."""
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
