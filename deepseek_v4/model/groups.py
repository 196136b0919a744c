"""Layers as groups: a prefix, a repeated unit, a suffix, for any list of layer kinds; no layer is lost.

Repeated units are scanned: their leaves carry a leading axis of repeats under the keys `unit_0`, `unit_1`, ...; every other
layer stands alone under `layer_NN`. Flash becomes 3 + 20 x (HCA, CSA), Pro 3 + 29 x (HCA, CSA). In messages, traces and
checkpoints a layer is `layers/NN`, whatever the groups are. A program holds one body per lone layer and one per place of the
unit: 5 for either model, whatever its depth; two lone layers of one kind are two bodies with the same text.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Callable, Sequence

import jax
import jax.numpy as jnp

from deepseek_v4.config import LayerSpec, ModelConfig


@dataclasses.dataclass(frozen=True)
class LayerGroups:
  """`prefix` layers alone, then `repeats` times a unit of `unit` layers, then the rest alone."""

  num_layers: int
  prefix: int
  unit: int
  repeats: int

  @property
  def suffix_start(self) -> int:
    """Index of the first layer after the repeated units."""
    return self.prefix + self.unit * self.repeats

  def key_of(self, layer: int) -> tuple[str, int | None]:
    """Key of a layer's subtree and, for a scanned one, its index on the leading axis of the leaves.

    Raises:
      ValueError: there is no such layer.
    """
    if not 0 <= layer < self.num_layers:
      raise ValueError(f"layer = {layer}: expected 0 to {self.num_layers - 1}")
    if self.prefix <= layer < self.suffix_start:
      repeat, position = divmod(layer - self.prefix, self.unit)
      return f"unit_{position}", repeat
    return f"layer_{layer:02d}", None

  @property
  def keys(self) -> tuple[str, ...]:
    """Keys of all subtrees in the order of their first layers."""
    return tuple(dict.fromkeys(self.key_of(i)[0] for i in range(self.num_layers)))

  def scanned(self, key: str) -> bool:
    """Whether the leaves under this key carry the leading axis of repeats."""
    return key.startswith("unit_")

  def layers_of(self, key: str) -> tuple[int, ...]:
    """The layers whose leaves lie under this key, in order."""
    return tuple(i for i in range(self.num_layers) if self.key_of(i)[0] == key)


def group_layers(config: ModelConfig) -> LayerGroups:
  """The grouping of a model's layers: the one that compiles the fewest layer bodies; ties prefer the shorter unit."""
  return group_specs(config.layer_specs, config.scan_layers)


def group_specs(specs: Sequence[LayerSpec], scan_layers: bool = True) -> LayerGroups:
  """Finds prefix + repeats x unit + suffix with the fewest bodies (prefix + unit + suffix) for any list of layers."""
  n = len(specs)
  best = LayerGroups(n, n, 0, 0)
  if not scan_layers:
    return best
  fewest = n
  for unit in range(1, n // 2 + 1):
    for start in range(n - 2 * unit + 1):
      repeats = 1
      while specs[start + repeats * unit:start + (repeats + 1) * unit] == specs[start:start + unit]:
        repeats += 1
      bodies = n - (repeats - 1) * unit
      if repeats > 1 and bodies < fewest:
        best, fewest = LayerGroups(n, start, unit, repeats), bodies
  return best


def split_layers(layers: dict[str, Any], groups: LayerGroups,
                 take: Callable[[Any, int], Any] = lambda x, i: x[i]) -> list[Any]:
  """One subtree per layer, in order, from a `layers` subtree in grouped form."""
  trees = []
  for i in range(groups.num_layers):
    key, index = groups.key_of(i)
    tree = layers[key]
    trees.append(tree if index is None else jax.tree.map(lambda x, index=index: take(x, index), tree))
  return trees


def join_layers(trees: Sequence[Any], groups: LayerGroups, stack: Callable[[list[Any]], Any] = jnp.stack) -> dict[str, Any]:
  """The inverse of `split_layers`: one subtree per layer -> the grouped form.

  Raises:
    ValueError: more or fewer trees than layers.
  """
  if len(trees) != groups.num_layers:
    raise ValueError(f"{len(trees)} layers: expected num_hidden_layers = {groups.num_layers}")
  joined = {}
  for key in groups.keys:
    members = [trees[i] for i in groups.layers_of(key)]
    joined[key] = jax.tree.map(lambda *xs: stack(list(xs)), *members) if groups.scanned(key) else members[0]
  return joined
