"""The tree of a run as the leaves on disk, each one layer's, and back into the structure that is asked for."""

from __future__ import annotations

import functools
from typing import Any, Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from deepseek_v4.checkpoint.parts import read_leaves
from deepseek_v4.checkpoint.trees import disk_parts, groups_of, named_leaves


def _is_key(x: Any) -> bool:
  return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def to_disk(tree: Any) -> tuple[dict[str, Any], dict[str, str]]:
  """{name on disk: array of one layer} and {name: generator} of the typed PRNG keys among them."""
  named, _ = named_leaves(tree)
  named = [(name, x if isinstance(x, jax.Array) else np.asarray(x)) for name, x in named]
  groups = groups_of(named)
  leaves: dict[str, Any] = {}
  impls: dict[str, str] = {}
  for name, x in named:
    impl = str(jax.random.key_impl(x)) if _is_key(x) else None
    x = _on_host(x if impl is None else jax.random.key_data(x))
    for part, index in disk_parts(name, groups):
      leaves[part] = x if index is None else x[index]
      if impl is not None:
        impls[part] = impl
  return leaves, impls


def _on_host(x: Any) -> Any:
  """A host copy; arrays that other processes hold parts of stay where they are.

  Read shard by shard: an array that is read whole keeps its host copy until it dies.
  """
  if not isinstance(x, jax.Array) or not x.is_fully_addressable:
    return x
  copy = np.empty(x.shape, x.dtype)
  for shard in x.addressable_shards:
    if shard.replica_id == 0:
      copy[shard.index] = np.asarray(shard.data)
  return copy


def restore(path: epath.Path, manifest: dict[str, Any], abstract_tree: Any) -> Any:
  """The checkpoint at `path` in the structure of `abstract_tree`, one leaf after the other put together from its layers."""
  named, treedef = named_leaves(abstract_tree)
  groups = groups_of(named)
  targets = {name: _Target(leaf) for name, leaf in named}
  parts = {name: disk_parts(name, groups) for name in targets}
  _refuse_other_leaves({part: (targets[name], index is not None) for name in parts for part, index in parts[name]},
                       manifest["leaves"], path)
  shardings = {part: targets[name].part_sharding(index is not None) for name in parts for part, index in parts[name]}
  arrays = read_leaves(path, manifest, shardings)
  leaves = []
  for name, target in targets.items():
    first, index = parts[name][0]
    whole = target.assemble([arrays.pop(part) for part, _ in parts[name]], index is not None)
    impl = manifest["leaves"][first].get("key_impl")
    leaves.append(whole if impl is None else jax.random.wrap_key_data(whole, impl=impl))
  return jax.tree_util.tree_unflatten(treedef, leaves)


class _Target:
  """What one leaf of the wanted tree looks like, and how it is made of what is on disk."""

  def __init__(self, leaf: Any):
    self.key_dtype = leaf.dtype if _is_key(leaf) else None  # of a typed PRNG key, whose raw data are what is stored
    self.sharding = getattr(leaf, "sharding", None)
    stored = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    stored = stored if self.key_dtype is None else jax.eval_shape(jax.random.key_data, stored)
    self.shape, self.dtype = stored.shape, stored.dtype

  def part_sharding(self, scanned: bool) -> Any:
    """Of one layer's part: that of the whole without the axis of repeats."""
    if not scanned or not isinstance(self.sharding, jax.sharding.NamedSharding):
      return self.sharding
    return jax.sharding.NamedSharding(self.sharding.mesh, jax.sharding.PartitionSpec(*self.sharding.spec[1:]))

  def assemble(self, parts: list[Any], scanned: bool) -> jax.Array:
    """The leaf from the arrays of its layers."""
    if not scanned:
      return jnp.asarray(parts[0])
    return jnp.asarray(np.stack(parts)) if self.sharding is None else _stacker(self.sharding)(*parts)


@functools.lru_cache(maxsize=64)
def _stacker(sharding: Any) -> Callable[..., jax.Array]:
  return jax.jit(lambda *xs: jnp.stack(xs), out_shardings=sharding)


def _refuse_other_leaves(wanted: Mapping[str, tuple[_Target, bool]], stored: Mapping[str, Any], path: epath.Path) -> None:
  """Raises one ValueError that lists every leaf which the wanted tree and the checkpoint do not share."""
  lines = [f"{n} is wanted but not in the checkpoint" for n in wanted if n not in stored]
  lines += [f"{n} is in the checkpoint but not wanted" for n in stored if n not in wanted]
  for name, (target, scanned) in wanted.items():
    if name in stored:
      impl = stored[name].get("key_impl")
      key_dtype = None if impl is None else jax.eval_shape(lambda impl=impl: jax.random.key(0, impl=impl)).dtype
      there = tuple(stored[name]["shape"]), stored[name]["dtype"], key_dtype
      here = target.shape[scanned:], str(target.dtype), target.key_dtype
      if there != here:
        lines.append(f"{name} is {' '.join(map(str, there))} in the checkpoint, wanted {' '.join(map(str, here))}")
  if lines:
    raise ValueError("\n  ".join([f"the checkpoint {path} does not fit the state that is to be restored:", *lines]))
