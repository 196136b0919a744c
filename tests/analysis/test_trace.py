"""Traces: which names there are and their shapes, that they fit together, that nothing changes, from whatever variables."""

import dataclasses
import functools
import re

import jax
import ml_dtypes
import numpy as np
import pytest

import deepseek_v4 as dsv4
from deepseek_v4 import config as c
from deepseek_v4 import sharding
from tests.model.small import ROW, T0, pack, random_tokens, variables

TOKENS, SEGMENTS = pack(random_tokens(37, seed=1), random_tokens(20, seed=2))
ROWS = random_tokens(1, ROW, seed=3)
# One document, packed ones, one behind padding, packed ones: what all traces here are of, so that one program makes them.
FOUR = (np.concatenate([ROWS, TOKENS, TOKENS[:, ::-1], TOKENS]),
        np.concatenate([np.ones_like(SEGMENTS), SEGMENTS, np.where(SEGMENTS[:, ::-1] > 0, 1, 0), SEGMENTS]))
MODEL = dsv4.DeepseekV4(T0, "blockwise")
N, D, H, d, K, E, k, h, i, A = 4, 32, 4, 16, 2, 4, 2, 8, 8, 16  # sizes of T0; A: entries of rate 4
B, S = 1, ROW
SHAPES = {
  "streams": (B, S, N, D), "mhc_attn/comb": (B, S, N, N), "mhc_ffn/comb": (B, S, N, N), "mhc_attn/post": (B, S, N),
  "mhc_ffn/post": (B, S, N), "attention/input": (B, S, D), "attention/output": (B, S, D), "ffn/input": (B, S, D),
  "ffn/output": (B, S, D), "attention/queries": (B, S, H, d), "attention/keys": (B, S, d),
  "attention/window_weight": (B, S, H, S), "attention/sink_weight": (B, S, H), "router/scores": (B, S, E),
  "router/experts": (B, S, k), "router/weights": (B, S, k)}
of_entries = lambda count, slots: {
  "attention/entry_weight": (B, S, H, count), "attention/entries": (B, count, d), "attention/entry_segment": (B, count),
  "attention/entry_position": (B, count), "compressor/weight": (B, count, slots, d)}
EXPECTED = (
  SHAPES | {"attention/entry_weight": (B, S, H, 0)},
  SHAPES | of_entries(A, 8) | {
    "indexer/queries": (B, S, h, i), "indexer/weights": (B, S, h), "indexer/keys": (B, A, i), "indexer/scores": (B, S, A),
    "indexer/selected": (B, S, K), "indexer/compressor/weight": (B, A, 8, i)},
  SHAPES | of_entries(A // 2, 8))


@functools.cache
def traced():
  """(variables, tokens, segment_ids) -> trace, jitted."""
  return jax.jit(lambda *arguments: dsv4.trace(MODEL, arguments[0], arguments[1], None, arguments[2]))


@pytest.fixture(scope="module")
def plain():
  """The trace of four rows on one device."""
  return jax.device_get(traced()(variables(), *FOUR))


@pytest.fixture(scope="module")
def found(plain):
  """The trace of the row that is one document."""
  return {name: x[:1] for name, x in plain.items()}


def test_every_name_is_there_with_its_shape_and_in_the_docstring(found):
  expected = {f"layers/{layer:02d}/{name}": shape for layer, names in enumerate(EXPECTED) for name, shape in names.items()}
  expected |= {"embedding": (B, S, D), "final_norm": (B, S, D), "logits": (B, S, T0.vocab_size)}
  assert {name: x.shape for name, x in found.items()} == expected
  text = re.sub(r"\s+", "", dsv4.trace.__doc__)  # a name may be broken over two lines
  for name in expected:
    words = name.removeprefix(name[:10]) if name.startswith("layers/") else name
    assert words in text or words in ("mhc_attn/post", "mhc_ffn/post"), f"{name} is not in the docstring"


def test_no_number_changes(plain):
  """The same compiled operations but for what XLA fuses otherwise: float32 roundings of a model of three layers."""
  run = jax.jit(lambda variables, tokens, segment_ids: MODEL.apply(variables, tokens, None, segment_ids))
  out = jax.device_get(run(variables(), *FOUR))
  tokens = FOUR[1] > 0
  np.testing.assert_allclose(plain["final_norm"][tokens], out.hidden[tokens], atol=2e-5, rtol=2e-5)
  for layer, experts in enumerate(out.routing["experts"]):
    np.testing.assert_array_equal(plain[f"layers/{layer:02d}/router/experts"][tokens], experts[tokens])


def test_layers_of_op_by_op_passes_are_the_same_bits():
  """Without jit nothing is fused, so that tracing has to leave every bit."""
  short = ROWS[:, :9]
  config = dataclasses.replace(T0, num_nextn_predict_layers=0).cut_layers(1)
  of = {"params": {name: x for name, x in variables()["params"].items() if name != "mtp"}, "router": variables()["router"]}
  of = {kind: tree | {"layers": {"layer_00": tree["layers"]["layer_00"]}} for kind, tree in of.items()}
  model = dsv4.DeepseekV4(config, "reference")
  np.testing.assert_array_equal(dsv4.trace(model, of, short)["logits"], model.apply(of, short).logits)


def test_parts_fit_together(found):
  """Streams, routers' and attention's weights follow from the other names by their formulas in float64."""
  x = {name: np.asarray(value, np.float64) for name, value in found.items()}
  streams = np.repeat(x["embedding"][:, :, None], N, 2)
  for layer in range(3):
    at = lambda name, layer=layer: x[f"layers/{layer:02d}/{name}"]
    for part, sublayer in (("attn", "attention"), ("ffn", "ffn")):
      mixed = np.einsum("BSjk,BSjD->BSkD", at(f"mhc_{part}/comb"), streams)
      streams = mixed + at(f"mhc_{part}/post")[..., None] * at(f"{sublayer}/output")[:, :, None]
    # one layer in float32, its inputs being those that were traced
    np.testing.assert_allclose(streams, at("streams"), atol=1e-4, rtol=1e-4)
    streams = at("streams")
    total = at("attention/window_weight").sum(-1) + at("attention/entry_weight").sum(-1) + at("attention/sink_weight")
    np.testing.assert_allclose(total, 1, atol=1e-5)
    chosen = np.take_along_axis(at("router/scores"), found[f"layers/{layer:02d}/router/experts"], -1)
    expected = T0.routed_scaling_factor * chosen / chosen.sum(-1, keepdims=True)
    np.testing.assert_allclose(at("router/weights"), expected, rtol=1e-5)


@pytest.mark.parametrize("layer, name, rate", [(1, "compressor", 4), (1, "indexer/compressor", 4), (2, "compressor", 8)])
def test_compressor_weights_by_loops(found, layer, name, rate):
  """softmax over slots of x @ gate + position bias; the first entry of a document has no window before its own."""
  weight = found[f"layers/{layer:02d}/{name}/weight"]
  tree = variables()["params"]["layers"][f"layer_{layer:02d}"]["attention"]
  for part in name.split("/"):
    tree = tree[part]
  x = np.asarray(found[f"layers/{layer:02d}/attention/input"][0], np.float64)
  gates = [x @ np.float64(gate) for gate in tree["gate"]]
  for entry in range(S // rate):
    logits = []
    for series, gate in enumerate(gates):
      start = (entry - (len(gates) - 1 - series)) * rate  # of two series the first is the window before
      for slot in range(rate):
        bias = np.float64(tree["position_bias"][series][slot])
        logits.append(gate[start + slot] + bias if start >= 0 else np.full_like(bias, -np.inf))
    powers = np.exp(np.array(logits))
    np.testing.assert_allclose(weight[0, entry], powers / powers.sum(0), atol=1e-5, rtol=1e-4)


def in_order(found, tokens):
  """Of every name what tokens and used entries have, entries in their order; a split row has unused ones between them."""
  out = {}
  for name, x in found.items():
    layer = name.rsplit("/", 1)[0].split("/")[:2]
    used = found.get("/".join((*layer, "attention/entry_segment"))) if layer[0] == "layers" else None
    used = None if used is None else used > 0
    if name.endswith(("/entry_weight", "/scores")) and used is not None and x.shape[-1] == used.shape[1]:
      out[name] = np.concatenate([x[b][tokens[b]][..., used[b]].ravel() for b in range(len(x))])
    elif name.endswith("/selected"):
      place = np.cumsum(used, 1) - 1
      out[name] = np.concatenate([np.where(x[b] < 0, -1, place[b][x[b]])[tokens[b]] for b in range(len(x))])
    else:
      out[name] = x[tokens] if x.shape[:2] == tokens.shape else x[used]
  return out


@pytest.mark.parametrize("sizes", [{"data": 2, "context": 2, "tensor": 2},
                                   pytest.param({"fsdp": 2, "expert": 2}, marks=pytest.mark.long)], ids=str)
def test_a_mesh_traces_the_same(plain, sizes):
  """Float32 sums in another order, and the same choices."""
  count = int(np.prod(list(sizes.values())))
  with jax.set_mesh(sharding.make_mesh(c.MeshConfig(**{"data": 1} | sizes), jax.devices()[:count])):
    split = jax.device_get(traced()(variables(), *FOUR))
  assert plain.keys() == split.keys()
  got = in_order(split, FOUR[1] > 0)
  for name, expected in in_order(plain, FOUR[1] > 0).items():
    np.testing.assert_allclose(got[name], expected, atol=2e-4, rtol=2e-4, err_msg=name)


def test_of_a_release_folder_it_is_that_of_its_weights(tmp_path):
  """A folder holds bfloat16, so bit for bit the trace of weights that are rounded here; exact ones are float32 there too."""
  dsv4.save_hf(variables(), T0, tmp_path / "release")
  loaded = dsv4.load_hf(tmp_path / "release", dsv4.ModelConfig.from_hf(tmp_path / "release"), dtype="float32")
  rounded = jax.tree.map(lambda x, y: x if np.array_equal(x, y) else x.astype(ml_dtypes.bfloat16).astype(x.dtype),
                         variables(), loaded)
  expected, found = (jax.device_get(traced()(tree, *FOUR)) for tree in (rounded, loaded))
  assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_slices_of_layers_and_what_is_refused():
  def run(layers, **arguments):
    return jax.eval_shape(lambda v: dsv4.trace(MODEL, v, ROWS, layers=layers, **arguments), variables())
  layers_of = lambda found: sorted({name.split("/")[1] for name in found if name.startswith("layers/")})
  assert layers_of(run(slice(1, None))) == ["01", "02"] and layers_of(run((2,))) == ["02"]
  assert layers_of(run(range(0, 3, 2))) == ["00", "02"] and layers_of(run(slice(0, 0))) == []
  with pytest.raises(ValueError, match="layer = 3: expected 0 to 2"):
    run((3,))
  with pytest.raises(ValueError, match="cache: expected none, as a trace is of whole rows"):
    run(None, cache=dsv4.init_cache(T0, 1, ROW))


def test_the_prediction_block_has_the_same_names_where_it_runs():
  found = jax.eval_shape(lambda v: dsv4.trace(MODEL, v, ROWS, mtp=True), variables())
  assert {name.removeprefix("mtp/") for name in found if name.startswith("mtp/")} == set(EXPECTED[0])
