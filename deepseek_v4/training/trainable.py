"""Which parameters a run trains, in groups that its log can name: what is left out, counts, norms, and who gets nothing.

Frozen leaves are not differentiated at all: a tree of trained leaves has None in their places. The optimizer sees that tree
and its own state for it, so that of a frozen leaf neither value nor moments change by one bit, and it does not decay.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Mapping, Sequence

import jax
import jax.numpy as jnp

from deepseek_v4 import sharding
from deepseek_v4.config import RunConfig

# The first prefix that a leaf's name begins with says its group; names as in `sharding.PARAMETER_AXES`, below `mtp/` whole.
GROUPS = (("mtp/", "mtp"), ("embed/", "embedding"), ("lm_head/", "head"), ("attention/indexer/", "indexer"),
          ("attention/compressor/", "compressors"), ("attention/", "attention"), ("moe/router/", "routers"),
          ("moe/experts/", "experts"), ("moe/shared/", "shared experts"), ("attn_hc/", "hyper-connections"),
          ("ffn_hc/", "hyper-connections"), ("hc_head/", "hyper-connections"), ("attn_norm/", "norms"),
          ("ffn_norm/", "norms"), ("final_norm/", "norms"))
INDEXER = "indexer"


def group_of(path: Sequence[str]) -> str:
  """The group of the leaf at this path of `params`.

  Raises:
    ValueError: a leaf that no prefix fits.
  """
  name = "mtp/" if path[0] == "mtp" else sharding.leaf_name(path)
  found = next((group for prefix, group in GROUPS if name.startswith(prefix)), None)
  if found is None:
    raise ValueError(f"parameter {'/'.join(path)}: in no group of deepseek_v4/training/trainable.py")
  return found


def trains(trainable: str, path: Sequence[str]) -> bool:
  """Whether `training.trainable` lets the leaf at this path train."""
  return trainable == "all" or (group_of(path) == INDEXER) == (trainable == "indexer")


# ---- trees with and without the frozen leaves ---------------------------------------------------------------------------
def trained_part(trainable: str, tree: Any) -> Any:
  """A tree like params with None for every frozen leaf; the tree itself where all train."""
  if trainable == "all":
    return tree
  keep = lambda path, x: x if trains(trainable, sharding.path_names(path)) else None
  return jax.tree_util.tree_map_with_path(keep, tree)


def with_frozen(trained: Any, params: Any) -> Any:
  """The inverse of `trained_part`: params, with the trained leaves in the place of their own."""
  return jax.tree.map(lambda new, old: old if new is None else new, trained, params, is_leaf=lambda x: x is None)


# ---- groups -------------------------------------------------------------------------------------------------------------
def members(trained: Any) -> dict[str, list[Any]]:
  """The leaves of each group, in the order in which the tree has them."""
  found: dict[str, list[Any]] = {}
  for path, x in jax.tree_util.tree_leaves_with_path(trained):
    found.setdefault(group_of(sharding.path_names(path)), []).append(x)
  return found


def norms(grads: Any) -> dict[str, jax.Array]:
  """Norm of each group's gradients, float32 scalars; 0 only where every element is 0."""
  return {f"grad_norm/{group}": _norm(leaves) for group, leaves in members(grads).items()}


def _norm(leaves: Sequence[jax.Array]) -> jax.Array:
  # Scaled, since squares of small gradients would underflow to a norm of 0.
  largest = jnp.stack([jnp.abs(x).max() for x in leaves]).max().astype(jnp.float32)
  scale = jnp.where(largest > 0, largest, 1)
  return scale * jnp.sqrt(sum(jnp.square(x.astype(jnp.float32) / scale).sum() for x in leaves))


def describe(run_config: RunConfig, params: Any) -> str:
  """What trains, in a line: parameters by group, and how many are frozen. `params`: arrays or shapes."""
  sizes = {group: sum(math.prod(x.shape) for x in leaves)
           for group, leaves in members(trained_part(run_config.training.trainable, params)).items()}
  frozen = sum(math.prod(x.shape) for x in jax.tree.leaves(params)) - sum(sizes.values())
  listed = ", ".join(f"{group} {size:,}" for group, size in sizes.items())
  return f"trains {sum(sizes.values()):,} parameters ({listed}); {frozen:,} are frozen"


@dataclasses.dataclass
class Watch:
  """Looks whether each group gets a gradient.

  Attributes:
    patience: steps in a row with a gradient of exactly 0 that end the run.
    where: the stage, for the message.
  """

  patience: int
  where: str
  _zero: dict[str, int] = dataclasses.field(default_factory=dict)

  def look(self, step: int, numbers: Mapping[str, float]) -> None:
    """Counts one step's norms of `norms`; other numbers and an empty mapping mean nothing.

    Raises:
      FloatingPointError: names the groups that had none for `patience` steps.
    """
    for name, value in numbers.items():
      if name.startswith("grad_norm/"):
        self._zero[name] = self._zero.get(name, 0) + 1 if value == 0 else 0
    without = [name.removeprefix("grad_norm/") for name, count in self._zero.items() if count >= self.patience]
    if without:
      raise FloatingPointError(
          f"{self.where}steps {step - self.patience + 1} to {step}: the gradient of {', '.join(without)} was exactly 0 in "
          f"every one: expected a loss that reaches what trains (training.trainable, weights of the losses)")
