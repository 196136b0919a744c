"""What crosses the borders of a sequence that is split over the mesh axis `context` (report 3.4.3).

Each device of the axis holds one contiguous part of every row, and documents are cut wherever a border falls. What a place
needs of its neighbours travels by one exchange with the part before or after it, compressed entries are gathered, and of a
whole document only sums. Without such an axis everything here is the one-device program: no wrapper, no collective.

Axis letters: B batch   S sequence, or what is split like it   L places of a part   N parts   C channels
Dtypes: what travels keeps its own, sums are floating and segment ids int32.
"""

from __future__ import annotations

import functools
from typing import Any, Callable

import jax
import jax.numpy as jnp

from deepseek_v4 import sharding

TOKENS = ("batch", "sequence")


def is_split() -> bool:
  """Whether the ambient mesh splits sequences."""
  return sharding.sequence_parts() > 1


def by_part(fn: Callable) -> Callable:
  """`fn` of arrays [B, S, ...] (or pytrees of them), on each part of a split sequence by itself; results are split alike."""
  if not is_split():
    return fn
  return lambda *args: sharding.per_shard(fn, (TOKENS,) * len(args), TOKENS)(*args)


def whole(x_BS: Any) -> Any:
  """A pytree of arrays [B, S, ...] with all parts on every device that has one of them."""
  return jax.tree.map(lambda x: sharding.constrain(x, ("batch", *(None,) * (x.ndim - 1))), x_BS) if is_split() else x_BS


# ---- neighbours, inside `by_part` -----------------------------------------------------------------------------------
def last_of_previous(x_BL: jax.Array, count: int) -> jax.Array:
  """[B, count, ...]: the last places of the part before; zeros in front of the row."""
  steps = [(i, i + 1) for i in range(sharding.sequence_parts() - 1)]
  return jax.lax.ppermute(x_BL[:, x_BL.shape[1] - count:], sharding.axis_name("sequence"), steps)


def _first_of_next(x_BL: jax.Array) -> jax.Array:
  """[B, 1, ...]: the first place of the part behind; zeros behind the row."""
  steps = [(i + 1, i) for i in range(sharding.sequence_parts() - 1)]
  return jax.lax.ppermute(x_BL[:, :1], sharding.axis_name("sequence"), steps)


# ---- documents over several parts, inside `by_part` -----------------------------------------------------------------
def any_earlier(documents_B: jax.Array, values_B: jax.Array, wanted_B: jax.Array) -> jax.Array:
  """bool [B]: `values_B` of any earlier part whose `documents_B` is this part's `wanted_B`."""
  axis = sharding.axis_name("sequence")
  documents_NB, values_NB = (jax.lax.all_gather(x, axis) for x in (documents_B, values_B))
  earlier_N = jnp.arange(sharding.sequence_parts()) < jax.lax.axis_index(axis)
  return (earlier_N[:, None] & values_NB & (documents_NB == wanted_B)).any(0)


def document_sums(sums_BLC: jax.Array, segment_ids_BL: jax.Array) -> jax.Array:
  """[B, L, C]: for each place the sum over its whole document, from the sums over what lies in its own part.

  Only a part's first and last document go on elsewhere.
  """
  axis = sharding.axis_name("sequence")
  first, last = segment_ids_BL[:, 0], segment_ids_BL[:, -1]
  ends = jnp.stack([first, jnp.where(last == first, 0, last)], 1), jnp.stack([sums_BLC[:, 0], sums_BLC[:, -1]], 1)
  documents_NB2, sums_NB2C = (jax.lax.all_gather(x, axis) for x in ends)
  elsewhere_N = jnp.arange(sharding.sequence_parts()) != jax.lax.axis_index(axis)

  def added(document_B):
    hit = elsewhere_N[:, None, None] & (documents_NB2 == document_B[:, None]) & (document_B > 0)[:, None]
    return jnp.where(hit[..., None], sums_NB2C, 0).sum((0, 2))
  of_first, of_last = (jnp.where((segment_ids_BL == d[:, None])[..., None], added(d)[:, None], 0) for d in ends[0].T)
  return sums_BLC + of_first + of_last


# ---- of the whole row -----------------------------------------------------------------------------------------------
def before_parts(x_BS: jax.Array, count: int) -> jax.Array:
  """[B, N count, ...], split like the sequence: the `count` places in front of each part; zeros in front of the row."""
  return by_part(functools.partial(last_of_previous, count=count))(x_BS)


def following(x_BS: jax.Array) -> jax.Array:
  """[B, S, ...]: what stands at the next place of the row; zero at its end."""
  def shifted(x):
    if is_split():
      return jnp.concatenate([x[:, 1:], _first_of_next(x)], 1)
    return jnp.pad(x[:, 1:], ((0, 0), (0, 1)) + ((0, 0),) * (x.ndim - 2))
  return by_part(shifted)(x_BS)
