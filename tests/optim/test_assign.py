"""The table: every leaf of a model has its owner, its matrix axes and its decay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_v4.config import OptimizerConfig
from deepseek_v4.optim import MatrixAxes, assign, build_optimizer, decay_mask, matrix_axes
from deepseek_v4.optim.assign import LAYER_TABLE, TOP_TABLE, path_of

N, D, HEAD, HEADS, QL, G, R, E, F, V, M = 4, 32, 16, 4, 12, 2, 8, 6, 24, 97, 4
HI, DI = 3, 8


def nest(flat):
  tree = {}
  for name, shape in flat.items():
    *folders, leaf = name.split("/")
    node = tree
    for folder in folders:
      node = node.setdefault(folder, {})
    node[leaf] = shape
  return tree


def under(prefix, flat):
  return {f"{prefix}/{name}": shape for name, shape in flat.items()}


def compressor(co, d):
  return {"kv": (co, D, d), "gate": (co, D, d), "position_bias": (co, M, d), "norm/scale": (d,)}


def layer(attention):
  hyper = {"fn_pre": (N * D, N), "fn_post": (N * D, N), "fn_res": (N * D, N * N), "base": ((2 + N) * N,), "scale": (3,)}
  flat = {
      **under("attn_hc", hyper), **under("ffn_hc", hyper), "attn_norm/scale": (D,), "ffn_norm/scale": (D,),
      "attention/q_a": (D, QL), "attention/q_a_norm/scale": (QL,), "attention/q_b": (QL, HEADS, HEAD),
      "attention/kv": (D, HEAD), "attention/kv_norm/scale": (HEAD,), "attention/sink": (HEADS,),
      "attention/o_a": (G, HEADS * HEAD // G, R), "attention/o_b": (G * R, D),
      "moe/router/gate": (D, E), "moe/experts/gate": (E, D, F), "moe/experts/up": (E, D, F), "moe/experts/down": (E, F, D),
      "moe/shared/gate": (D, F), "moe/shared/up": (D, F), "moe/shared/down": (F, D),
  }
  if attention != "sliding":
    flat |= under("attention/compressor", compressor(2 if attention == "csa" else 1, HEAD))
  if attention == "csa":
    flat |= {"attention/indexer/q_b": (QL, HI, DI), "attention/indexer/head_weights": (D, HI)}
    flat |= under("attention/indexer/compressor", compressor(2, DI))
  return flat


def stacked(flat, repeats):
  return {name: (repeats, *shape) for name, shape in flat.items()}


def model_shapes():
  """Every leaf of a model with a hash prefix, scanned units, a lone layer and an MTP block, as name -> shape."""
  head = {"fn": (N * D, N), "base": (N,), "scale": (1,)}
  params = {
      "embed/embedding": (V, D), "lm_head/kernel": (D, V), "final_norm/scale": (D,), **under("hc_head", head),
      **under("layers/layer_00", layer("sliding")), **under("layers/unit_0", stacked(layer("hca"), 3)),
      **under("layers/unit_1", stacked(layer("csa"), 3)), **under("layers/layer_07", layer("csa")),
      "mtp/embed_norm/scale": (D,), "mtp/hidden_norm/scale": (D,), "mtp/embed_proj": (D, D), "mtp/hidden_proj": (D, D),
      "mtp/final_norm/scale": (D,), **under("mtp/hc_head", head), **under("mtp/block", layer("sliding")),
  }
  router = {"layers/layer_00/moe/router/hash_table": (V, 2), "layers/unit_0/moe/router/bias": (3, E),
            "layers/unit_1/moe/router/bias": (3, E), "layers/layer_07/moe/router/bias": (E,),
            "mtp/block/moe/router/bias": (E,)}
  return {"params": params, "router": router}


def abstract(flat):
  return nest({name: jax.ShapeDtypeStruct(shape, jnp.int32 if name.endswith("hash_table") else jnp.float32)
               for name, shape in flat.items()})


@pytest.fixture(scope="module")
def params():
  return abstract(model_shapes()["params"])


def flat_of(tree, is_leaf=None):
  return {path_of(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf)[0]}


def short_name(name):
  """The name that the table uses, written independently of it."""
  parts = name.split("/")
  return "/".join(parts[2:] if parts[0] == "layers" or name.startswith("mtp/block/") else parts)


# What a reader of the report expects, by the last parts of a name.
ADAMW_DECAYED = ("embedding", "kernel", "norm/scale")
ADAMW_PLAIN = ("sink", "position_bias", "base", "hc/scale", "hc_head/scale")


def test_owner_and_decay_of_every_leaf(params):
  owners, decays = flat_of(assign(params)), flat_of(decay_mask(params))
  assert owners.keys() == decays.keys() == model_shapes()["params"].keys()
  for name, owner in owners.items():
    if name.endswith(ADAMW_DECAYED):
      expected = ("adamw", True)
    elif name.endswith(ADAMW_PLAIN):
      expected = ("adamw", False)
    else:
      expected = ("muon", True)
    assert (owner, decays[name]) == expected, name


def test_the_table_names_nothing_else(params):
  variables = {name: shape for part in model_shapes().values() for name, shape in part.items()}
  assert {short_name(name) for name in variables} == LAYER_TABLE.keys() | TOP_TABLE.keys()


def test_router_collection_is_frozen():
  variables = {collection: abstract(flat) for collection, flat in model_shapes().items()}
  owners, decays = assign(variables), decay_mask(variables)
  assert owners["router"]["layers"]["layer_00"]["moe"]["router"] == {"hash_table": "frozen"}
  assert set(jax.tree.leaves(owners["router"])) == {"frozen"}
  assert not any(jax.tree.leaves(decays["router"]))
  assert owners["params"] == assign(variables["params"])


@pytest.mark.parametrize("name, rows, columns", [
    ("layers/layer_00/attention/q_b", (0,), (1, 2)),
    ("layers/unit_1/attention/q_b", (1,), (2, 3)),
    ("layers/unit_1/attention/indexer/q_b", (1,), (2, 3)),
    ("layers/unit_1/attention/compressor/kv", (2,), (3,)),
    ("layers/unit_0/attention/o_a", (2,), (3,)),
    ("layers/layer_07/moe/experts/down", (1,), (2,)),
    ("layers/unit_0/moe/experts/gate", (2,), (3,)),
    ("layers/unit_0/attn_hc/fn_res", (1,), (2,)),
    ("layers/unit_0/moe/router/gate", (1,), (2,)),
    ("mtp/block/moe/shared/up", (0,), (1,)),
    ("mtp/embed_proj", (0,), (1,)),
    ("hc_head/fn", (0,), (1,)),
])
def test_matrix_axes(params, name, rows, columns):
  axes = flat_of(matrix_axes(params), lambda x: isinstance(x, MatrixAxes))
  assert axes[name] == (rows, columns)


def test_matrix_axes_exist_for_muon_leaves_only(params):
  owners = assign(params)
  # Against params, every leaf has an entry; None where there is no matrix.
  has_axes = jax.tree.map(lambda leaf, axes: axes is not None, params, matrix_axes(params))
  assert has_axes == jax.tree.map(lambda owner: owner == "muon", owners)


def test_choices(params):
  split = flat_of(matrix_axes(params, muon_split="head"), lambda x: isinstance(x, MatrixAxes))
  assert split["layers/unit_1/attention/q_b"] == ((1,), (3,))
  assert split["layers/unit_1/attention/indexer/q_b"] == ((1,), (3,))
  assert split["layers/unit_1/attention/kv"] == ((1,), (2,))
  owners = flat_of(assign(params, position_bias_owner="muon"))
  assert owners["layers/unit_1/attention/indexer/compressor/position_bias"] == "muon"
  decays = flat_of(decay_mask(params, position_bias_owner="muon"))
  assert not decays["layers/unit_0/attention/compressor/position_bias"]  # a bias, whoever owns it
  owners = flat_of(assign(params, matrix_owner="adamw"))
  assert set(owners.values()) == {"adamw"} and not jax.tree.leaves(matrix_axes(params, matrix_owner="adamw"))
  assert flat_of(decay_mask(params, matrix_owner="adamw")) == flat_of(decay_mask(params))
  with pytest.raises(ValueError, match="matrix_owner = 'sgd'"):
    assign(params, matrix_owner="sgd")
  with pytest.raises(ValueError, match="muon_split = 'heads'"):
    assign(params, muon_split="heads")
  with pytest.raises(ValueError, match="position_bias_owner = 'frozen'"):
    assign(params, position_bias_owner="frozen")


@pytest.mark.parametrize("name, shape, message", [
    ("layers/unit_0/attention/q_c", (3, D, D), "layers/unit_0/attention/q_c: no such leaf"),
    ("layers/layer_00", (D,), "layers/layer_00: no such leaf"),
    ("embed/kernel", (V, D), "embed/kernel: no such leaf"),
    ("attention/q_a", (D, QL), "attention/q_a: no such leaf"),
    ("layers/unit_0/attention/q_a", (D, QL), "layers/unit_0/attention/q_a has 2 axes: expected 3"),
    ("layers/layer_03/attention/q_b", (QL, HEADS * HEAD), "layers/layer_03/attention/q_b has 2 axes: expected 3"),
])
def test_a_leaf_outside_the_table_is_named(name, shape, message):
  tree = abstract({name: shape})
  for function in (assign, matrix_axes, decay_mask, lambda tree: build_optimizer(OptimizerConfig(), tree)):
    with pytest.raises(ValueError, match=message):
      function(tree)


def test_state_of_a_whole_model_has_moments_where_they_are_needed(params):
  """Built from shapes only; every moment lies at its parameter's path, momentum for Muon, two moments for AdamW."""
  optimizer = build_optimizer(OptimizerConfig(), params)
  state = flat_of(jax.eval_shape(optimizer.init, params))
  shapes = model_shapes()["params"]
  owners = flat_of(assign(params))
  expected = {}
  for name, owner in owners.items():
    for moment in ("trace",) if owner == "muon" else ("mu", "nu"):
      expected[f"{moment}/{name}"] = shapes[name]
  found, counters = {}, []
  for path, leaf in state.items():
    for moment in ("trace", "mu", "nu"):
      if f"/{moment}/" in path:
        assert leaf.dtype == jnp.float32
        found[f"{moment}/{path.split(f'/{moment}/', 1)[1]}"] = leaf.shape
        break
    else:
      counters.append((path, leaf))
  assert found == expected
  assert [(leaf.shape, leaf.dtype) for _, leaf in counters] == [((), np.int32)] * 2
