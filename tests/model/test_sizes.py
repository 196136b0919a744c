"""The released models as shapes: the published numbers of parameters, their groups of layers, and nothing allocated."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deepseek_v4 as dsv4
from deepseek_v4.model.groups import LayerGroups, group_layers

RELEASED = json.loads((Path(__file__).parents[1] / "golden" / "released_configs.json").read_text(encoding="utf-8"))
# name -> (main with router bias and without hash tables, MTP block, layers, repeats of the unit of two)
PUBLISHED = {"DeepSeek-V4-Pro": (1_572_997_201_763, 25_840_145_979, 61, 29),
             "DeepSeek-V4-Flash": (284_332_240_471, 6_610_048_891, 43, 20)}


def size(tree):
  """Numbers in all leaves but hash tables."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return sum(int(np.prod(leaf.shape, dtype=np.int64)) for path, leaf in leaves if path[-1].key != "hash_table")


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_of_the_released_models(name):
  config = dsv4.ModelConfig.from_hf(RELEASED[name])
  main, mtp, layers, repeats = PUBLISHED[name]
  before = sum(x.nbytes for x in jax.live_arrays())
  shapes = jax.eval_shape(dsv4.DeepseekV4(config).init, jax.random.key(0), jax.ShapeDtypeStruct((1, 2), jnp.int32))
  assert sum(x.nbytes for x in jax.live_arrays()) - before < 10**6
  parts = {"params": dict(shapes["params"]), "router": dict(shapes["router"])}
  prediction = [collection.pop("mtp") for collection in parts.values()]
  assert (size(parts), size(prediction)) == (main, mtp)
  assert {leaf.dtype for leaf in jax.tree.leaves(shapes["params"])} == {jnp.dtype("float32")}
  tables = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(shapes["router"]) if path[-1].key == "hash_table"]
  assert [(t.shape, t.dtype) for t in tables] == [((129280, 6), jnp.int32)] * 3

  assert group_layers(config) == LayerGroups(layers, 3, 2, repeats)
  assert set(shapes["params"]["layers"]) == {"layer_00", "layer_01", "layer_02", "unit_0", "unit_1"}
  scanned = shapes["params"]["layers"]["unit_0"]["moe"]["experts"]["gate"].shape
  assert scanned == (repeats, config.n_routed_experts, config.hidden_size, config.moe_intermediate_size)

