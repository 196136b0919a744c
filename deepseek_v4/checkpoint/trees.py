"""Trees as flat names, and their layers as `layers/NN` whatever the grouping: what the files of this folder share.

In memory the layers of a tree are grouped (`model/groups.py`): scanned leaves carry a leading axis of repeats. On disk and
in messages every leaf is one layer's. Here one is turned into the other: as whole trees (`restack`), and name by name, for
any pytree that holds copies of the layers, such as an optimizer state (`disk_parts`).
"""

from __future__ import annotations

import re
from typing import Any, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_v4.config import ModelConfig
from deepseek_v4.model.groups import LayerGroups, group_specs, join_layers, split_layers

_LAYER_KEY = re.compile(r"(unit|layer)_(\d+)")
_LAYER_NAME = re.compile(r"(?P<before>(?:.*/)?layers)/(?P<key>(?:unit|layer)_\d+)(?P<after>/.*)?")


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
  """{"a/b/c": leaf} from nested mappings; anything else, None and empty tuples included, is a leaf."""
  if not isinstance(tree, Mapping):
    return {prefix: tree}
  flat = {}
  for key, value in tree.items():
    flat.update(flatten(value, f"{prefix}/{key}" if prefix else key))
  return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
  """Nested dictionaries from {"a/b/c": leaf}."""
  tree: dict[str, Any] = {}
  for path, value in flat.items():
    *parents, last = path.split("/")
    node = tree
    for key in parents:
      node = node.setdefault(key, {})
    node[last] = value
  return tree


def restack(tree: Any, config: ModelConfig, scan_layers: bool = True) -> Any:
  """A params or variables tree with its layers scanned (`unit_*`, leading axis of repeats) or not (`layer_NN`).

  Args:
    tree: nested mappings of arrays, in either layout (told from the keys).
    config: says which layers there are; its own `scan_layers` plays no part.
    scan_layers: the layout wanted.

  Raises:
    ValueError: the keys under `layers` are not those of this config's layers.
  """
  target = group_specs(config.layer_specs, scan_layers)

  def regroup(layers: Any) -> Any:
    source = group_specs(config.layer_specs, any(k.startswith("unit_") for k in layers))
    if set(layers) != set(source.keys):
      raise ValueError(f"layers = {sorted(layers)}: expected {sorted(source.keys)} for this config's layer_types")
    return join_layers(split_layers(layers, source), target, _stack)

  def visit(node: Any) -> Any:
    if not isinstance(node, Mapping):
      return node
    return {k: regroup(v) if k == "layers" and _is_layers(v) else visit(v) for k, v in node.items()}

  return visit(tree)


def _is_layers(node: Any) -> bool:
  return isinstance(node, Mapping) and bool(node) and all(_LAYER_KEY.fullmatch(k) for k in node)


def _stack(xs: list[Any]) -> Any:
  return np.stack(xs) if all(isinstance(x, np.ndarray) for x in xs) else jnp.stack(xs)


def named_leaves(tree: Any) -> tuple[list[tuple[str, Any]], Any]:
  """[("opt_state/0/mu/layers/unit_0/attention/q_a", leaf), ...] of any pytree, and its tree definition."""
  paths, treedef = jax.tree_util.tree_flatten_with_path(tree)
  return [("/".join(map(_key, path)), leaf) for path, leaf in paths], treedef


def _key(entry: Any) -> str:
  return str(next(getattr(entry, a) for a in ("key", "name", "idx") if hasattr(entry, a)))


def groups_of(named: Sequence[tuple[str, Any]]) -> LayerGroups:
  """The grouping of a tree's layers, from the names and shapes of its leaves.

  Raises:
    ValueError: scanned leaves without the common leading axis, or layers missing.
  """
  layers: set[int] = set()
  repeats: dict[int, int] = {}
  for name, leaf in named:
    match = _LAYER_NAME.fullmatch(name)
    if not match:
      continue
    kind, number = match["key"].split("_")
    if kind == "layer":
      layers.add(int(number))
    elif not leaf.shape or repeats.setdefault(int(number), leaf.shape[0]) != leaf.shape[0]:
      raise ValueError(f"{name} has shape {leaf.shape}: expected a leading axis of {repeats.get(int(number), 'repeats')}")
  prefix = next(i for i in range(len(layers) + 1) if i not in layers)
  num_layers = len(layers) + sum(repeats.values())
  groups = LayerGroups(num_layers, prefix, len(repeats), next(iter(repeats.values()), 0))
  expected = set(range(prefix)) | set(range(groups.suffix_start, num_layers))
  if layers != expected or set(repeats) != set(range(len(repeats))) or len(set(repeats.values())) > 1:
    raise ValueError(f"layers {sorted(layers)} beside {len(repeats)} scanned units of {sorted(repeats.values())} repeats: "
                     "expected every layer once")
  return groups


def disk_parts(name: str, groups: LayerGroups) -> list[tuple[str, int | None]]:
  """Where a leaf lies on disk: its name there with its index on the leading axis, one for each layer it holds."""
  match = _LAYER_NAME.fullmatch(name)
  if not match:
    return [(name, None)]
  scanned = groups.scanned(match["key"])
  return [(f"{match['before']}/{layer:02d}{match['after'] or ''}", index if scanned else None)
          for index, layer in enumerate(groups.layers_of(match["key"]))]


def unscanned_name(name: str) -> str:
  """`params/layers/03/...` on disk is `params/layers/layer_03/...` in an unscanned tree."""
  return re.sub(r"(^|/)layers/(\d+)(?=/|$)", r"\1layers/layer_\2", name)


def disk_name(name: str) -> str:
  """The inverse of `unscanned_name`."""
  return re.sub(r"(^|/)layers/layer_(\d+)(?=/|$)", r"\1layers/\2", name)
