"""The order of rows by expert: where each pick's row lies, rows out of tokens, sums over a token's rows (report 2.1).

A pick is one (token, expert) pair; picks are sorted by expert into tiles of rows, so the work is proportional to them.
Picks are numbered and stored with the token last (pick j T + t is token t's j-th): libtpu cannot compile the sums over a
token's picks from columns of a [T, k] array beyond 1,024 tokens on chips with two cores (0.0.42.1 and 0.0.50.1).

Axis letters: D hidden size   E experts   k experts per token   T tokens   P picks (T k)   M rows of all tiles
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

import pallas_kernels.grouped_matmul as grouped_matmul


@functools.partial(jax.tree_util.register_dataclass, meta_fields=["tile"],
                   data_fields=["slot", "local", "pick", "token", "group_sizes"])
@dataclasses.dataclass(frozen=True)
class Dispatch:
  """Where each pick's row lies.

  Attributes:
    slot: int32 [k, T], row of each pick; some row for a pick that is not local.
    local: bool [k, T], the pick has a row.
    pick: int32 [M], pick of each row; P = the row is empty.
    token: int32 [M], token of each row; some token for an empty row.
    group_sizes: int32 [E], rows of each expert.
    tile: rows per tile.
  """

  slot: jax.Array
  local: jax.Array
  pick: jax.Array
  token: jax.Array
  group_sizes: jax.Array
  tile: int


def dispatch(experts_kT: jax.Array, num_experts: int, tile: int) -> Dispatch:
  """Sorts picks by expert, each expert's rows from a tile's start on; experts outside [0, num_experts) get no row.

  Args:
    experts_kT: int32 [k, T].
    tile: rows per tile; 1 = every pick in its place, M = P.
  """
  picks = experts_kT.size
  rows = picks if tile == 1 else grouped_matmul.padded_rows(picks, num_experts, tile)
  expert_P = experts_kT.reshape(-1)
  local_P = (expert_P >= 0) & (expert_P < num_experts)
  expert_P = jnp.where(local_P, expert_P, num_experts)
  order_P = jnp.argsort(expert_P, stable=True)
  sorted_P = expert_P[order_P]
  sizes_E = (expert_P[:, None] == jnp.arange(num_experts)).sum(0, dtype=jnp.int32)
  tiles_E = -(-sizes_E // tile)
  start_E = (jnp.cumsum(tiles_E) - tiles_E) * tile - (jnp.cumsum(sizes_E) - sizes_E)
  row_P = jnp.arange(picks) + jnp.append(start_E, 0)[sorted_P]
  row_P = jnp.where(sorted_P < num_experts, row_P, rows).astype(jnp.int32)
  slot_P = jnp.zeros(picks, jnp.int32).at[order_P].set(jnp.minimum(row_P, rows - 1), unique_indices=True)
  pick_M = jnp.full(rows, picks, jnp.int32).at[row_P].set(order_P.astype(jnp.int32), mode="drop")
  # Stored and not derived from pick_M: fused into a gather of rows, the remainder would be taken for every channel.
  token_M = jnp.zeros(rows, jnp.int32).at[row_P].set((order_P % experts_kT.shape[1]).astype(jnp.int32), mode="drop")
  shape = experts_kT.shape
  return Dispatch(slot_P.reshape(shape), local_P.reshape(shape), pick_M, token_M, sizes_E, tile)


def _rows_at(x: jax.Array, index: jax.Array) -> jax.Array:
  return x.at[index].get(mode="promise_in_bounds")


def _sum_of_rows(rows_MD: jax.Array, weights_kT: jax.Array, plan: Dispatch) -> jax.Array:
  """[T, D] = sum over a token's local picks of weight * row."""
  weights_kT = jnp.where(plan.local, weights_kT, 0)
  return sum(weights_T[:, None] * _rows_at(rows_MD, slot_T) for weights_T, slot_T in zip(weights_kT, plan.slot))


@jax.custom_vjp
def gather_rows(x_TD: jax.Array, plan: Dispatch) -> jax.Array:
  """Rows [M, D] of the picks, in x's dtype; empty rows hold some token. The gradient gathers too: no scatter in either
  direction."""
  return _rows_at(x_TD, plan.token)


def _gather_rows_backward(plan, d_MD):
  return _sum_of_rows(d_MD, jnp.ones(plan.slot.shape, d_MD.dtype), plan), None


gather_rows.defvjp(lambda x, plan: (gather_rows(x, plan), plan), _gather_rows_backward)


@jax.custom_vjp
def combine_rows(y_MD: jax.Array, weights_kT: jax.Array, plan: Dispatch) -> jax.Array:
  """[T, D] = sum over a token's picks of weight * row, summed at least in float32; empty rows get a zero gradient."""
  return _sum_of_rows(y_MD, weights_kT, plan)


def _combine_rows_backward(saved, d_TD):
  y_MD, weights_kT, plan = saved
  weight_M = jnp.append(weights_kT.reshape(-1), 0)[plan.pick]  # pick P, an empty row, has weight 0
  d_rows = _rows_at(d_TD, plan.token) * weight_M[:, None]
  d_weights_kT = jnp.stack([(_rows_at(y_MD, slot_T) * d_TD).sum(-1) for slot_T in plan.slot])
  return d_rows.astype(y_MD.dtype), jnp.where(plan.local, d_weights_kT, 0).astype(weights_kT.dtype), None


combine_rows.defvjp(lambda *args: (combine_rows(*args), args), _combine_rows_backward)
