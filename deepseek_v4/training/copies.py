"""How copies of the weights add up their gradients over the mesh axes dcn_data and data: once a step where a slow network,
rounding or several passes make it worth it (`once_a_step`), else in every pass, as the partitioner does.

    float32    one sum
    bfloat16   two exchanges of half the bytes (report 3.4.1): each copy rounds its gradients and sends every other one its
               piece of them, the pieces are added in float32, and the rounded sums go to all. Rounding is stochastic, so
               that on average nothing is lost.

Over fsdp, expert and context gradients are summed within each pass, in the precision of the weights in use.
"""

from __future__ import annotations

from typing import Any, Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from deepseek_v4 import sharding
from deepseek_v4.config_training import can_run_alone


def round_stochastically(x: jax.Array, key: jax.Array) -> jax.Array:
  """bfloat16 of float32, any shape: one of the two neighbours, the nearer one more often, so that its mean over keys is x.

  What is not finite stays so; a number that bfloat16 has stays what it is.
  """
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
  # Of the sum the upper half: a carry out of the lower one steps away from zero.
  upper = jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
  return jnp.where(jnp.isfinite(x), upper, x.astype(jnp.bfloat16))


def _exchanged(x: jax.Array, axes: tuple[str, ...], key: jax.Array) -> jax.Array:
  """Sum of a device's float32 `x` over `axes`, rounded to bfloat16, the same on all of them."""
  copies = jax.lax.axis_size(axes)
  flat = jnp.pad(x.reshape(-1), (0, -x.size % copies)).reshape(copies, -1)
  sent, answered = jax.random.split(jax.random.fold_in(key, jax.lax.axis_index(axes)))
  pieces = _read(jax.lax.all_to_all(_written(flat, sent), axes, 0, 0, tiled=True))
  total = _read(jax.lax.all_gather(_written(pieces.sum(0), answered), axes, tiled=True))
  return total[:x.size].reshape(x.shape)


def _written(x: jax.Array, key: jax.Array) -> jax.Array:
  """As it travels: the bits, since some compilers make float32 of bfloat16 that is exchanged."""
  return jax.lax.bitcast_convert_type(round_stochastically(x, key), jnp.uint16)


def _read(bits: jax.Array) -> jax.Array:
  return jax.lax.bitcast_convert_type(bits, jnp.bfloat16).astype(jnp.float32)


def sum_gradients(grads: Any, places: Any, how: str, key: jax.Array) -> Any:
  """Gradients of all copies, added up.

  Args:
    grads: pytree of float32 [copies, ...], as of `sharding.per_copy`.
    places: their PartitionSpecs without the first axis.
    how: "float32" or "bfloat16".
    key: of the step; "float32" does not use it.
  """
  axes = sharding.copies()
  leaves, treedef = jax.tree.flatten(grads)
  tree: Any = treedef  # whose type has no methods
  specs = tree.flatten_up_to(places)
  if how == "float32":
    return tree.unflatten([jax.lax.with_sharding_constraint(x.sum(0), spec) for x, spec in zip(leaves, specs)])

  def exchange(leaves: Any, key: jax.Array) -> list[jax.Array]:
    found = []
    for number, (x, spec) in enumerate(zip(leaves, specs)):
      own = jax.random.fold_in(key, number)
      split = tuple(name for names in spec for name in ((names,) if isinstance(names, str) else names or ()))
      own = jax.random.fold_in(own, jax.lax.axis_index(split)) if split else own  # other parts, other noise
      found.append(_exchanged(x[0], axes, own))
    return found
  stacked = [PartitionSpec(axes, *spec) for spec in specs]
  return tree.unflatten(jax.shard_map(exchange, in_specs=(stacked, PartitionSpec()), out_specs=specs,
                                         check_vma=False)(leaves, key))


def once_a_step(how: str, passes: int) -> bool:
  """Whether each copy runs its passes alone, on the ambient mesh.

  Copies within a slice gain nothing by it in a single pass; some meshes do not allow it (`config_training.can_run_alone`).
  """
  split = {axis: sharding.mesh_axis_size(axis) for axis in sharding.MESH_AXES}
  return bool(sharding.copies()) and can_run_alone(split) and (split["dcn_data"] > 1 or passes > 1 or how != "float32")


def over_copies(fn: Callable, whole: Any, rows: Any, places: Any, how: str, key: jax.Array) -> tuple[Any, Any]:
  """fn(whole, rows) -> (gradients, other sums) of all rows: one call, or one of each copy of the weights, whose results are
  added up.

  Args:
    fn: of a pytree that all copies have and of arrays [A, B, ...] or a part of their rows; its gradients are float32, its
      other sums of any dtype.
    places: PartitionSpecs of the gradients; None without a mesh.
    how, key: as for `sum_gradients`.
  """
  if not once_a_step(how, jax.tree.leaves(rows)[0].shape[0]):
    return fn(whole, rows)
  grads, others = sharding.per_copy(fn)(whole, rows)
  return sum_gradients(grads, places, how, key), jax.tree.map(lambda x: x.sum(0), others)
