"""Grouping of layers: for any list of kinds no layer is lost, order is kept, and no grouping has fewer bodies."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_v4.config import CSA, HASH, HCA, LEARNED, SLIDING, LayerSpec
from deepseek_v4.model.groups import group_layers, group_specs, join_layers, split_layers
from tests.model.small import T0

KINDS = st.builds(LayerSpec, st.sampled_from((SLIDING, CSA, HCA)), st.sampled_from((HASH, LEARNED)))
# random lists rarely repeat, so half of the examples are built around a repeated unit
REPEATED = st.tuples(st.lists(KINDS, max_size=3), st.lists(KINDS, min_size=1, max_size=3), st.integers(2, 5),
                     st.lists(KINDS, max_size=3)).map(lambda x: x[0] + x[1] * x[2] + x[3])
LISTS = st.one_of(st.lists(KINDS, min_size=1, max_size=10), REPEATED)


def fewest_bodies(specs):
  """Bodies of the best grouping, by trying every prefix, unit and number of repeats."""
  n = len(specs)
  tried = ((start, unit, repeats) for start in range(n) for unit in range(1, n) for repeats in range(2, n + 1))
  return min([n] + [n - (repeats - 1) * unit for start, unit, repeats in tried if start + unit * repeats <= n and
                    specs[start:start + unit * repeats] == specs[start:start + unit] * repeats])


@given(LISTS, st.booleans())
@settings(max_examples=150, deadline=None)
def test_any_list_of_layers(specs, scan_layers):
  groups = group_specs(tuple(specs), scan_layers)
  n = len(specs)
  assert groups.num_layers == n
  keyed = [groups.key_of(i) for i in range(n)]
  assert len(set(keyed)) == n
  # every layer under one key has the same kind, and the slices of a scanned key are consecutive
  for key in groups.keys:
    members = groups.layers_of(key)
    assert len({specs[i] for i in members}) == 1
    if groups.scanned(key):
      assert [groups.key_of(i)[1] for i in members] == list(range(groups.repeats)) and groups.repeats > 1
    else:
      assert members == (int(key.removeprefix("layer_")),) and groups.key_of(members[0])[1] is None
  assert sorted(i for key in groups.keys for i in groups.layers_of(key)) == list(range(n))
  assert len(groups.keys) == (fewest_bodies(specs) if scan_layers else n)
  # a tree per layer survives stacking and slicing
  trees = [{"a": np.array([i, 10 * i]), "b": {"c": np.array(i)}} for i in range(n)]
  joined = join_layers(trees, groups, stack=np.stack)
  assert tuple(joined) == groups.keys
  for i, tree in enumerate(split_layers(joined, groups)):
    np.testing.assert_array_equal(tree["a"], trees[i]["a"])
    np.testing.assert_array_equal(tree["b"]["c"], i)


def test_wrong_layers_are_refused():
  groups = group_layers(T0)
  for layer in (-1, 3):
    with pytest.raises(ValueError, match=f"layer = {layer}: expected 0 to 2"):
      groups.key_of(layer)
  with pytest.raises(ValueError, match="2 layers: expected num_hidden_layers = 3"):
    join_layers([{}, {}], groups)


def test_unscanned_models_keep_layers_apart():
  specs = dict(num_hidden_layers=4, layer_types=(HCA, CSA) * 2, mlp_layer_types=(LEARNED,) * 4)
  assert group_layers(dataclasses.replace(T0, **specs)).keys == ("unit_0", "unit_1")
  flat = group_layers(dataclasses.replace(T0, **specs, scan_layers=False))
  assert flat.keys == ("layer_00", "layer_01", "layer_02", "layer_03")
