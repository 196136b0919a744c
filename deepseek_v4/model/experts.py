"""Routed and shared experts: dispatch, grouped matmuls, combine (report 2.1). No token is ever dropped.

Expert weights lie on the mesh axis `expert`, their width on `tensor`. Inside the shard_map wrapper the tokens of all
expert shards are gathered, every device works on the picks of its own experts, and the sums return by reduce-scatter.
A pick is one (token, expert) pair; picks are sorted by expert into tiles of rows, so the work is proportional to them.
Picks are numbered and stored with the token last (pick j T + t is token t's j-th): libtpu cannot compile the sums over a
token's picks from columns of a [T, k] array beyond 1,024 tokens on chips with two cores (0.0.42.1 and 0.0.50.1).

Axis letters: B batch   S sequence   D hidden size   E experts   F expert width   k experts per token
              T tokens of a device   P picks (T k)   M rows of all tiles
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

import pallas_kernels.grouped_matmul as grouped_matmul
from deepseek_v4 import sharding
from deepseek_v4.config import LEARNED, ModelConfig
from deepseek_v4.model import quantize, weights
from deepseek_v4.model.context import Context
from deepseek_v4.model.router import Router, balance_loss, expert_load

# With 384 experts and 6 picks a token, an expert gets 256 rows of a wave, a full tile of the kernels.
WAVE = 16384


@functools.partial(jax.tree_util.register_dataclass, meta_fields=["tile"],
                   data_fields=["slot", "local", "pick", "token", "group_sizes"])
@dataclasses.dataclass(frozen=True)
class Dispatch:
  """Where each pick's row lies.

  Attributes:
    slot: int32 [k, T], row of each pick; some row for a pick that is not local.
    local: bool [k, T], the pick's expert lives on this device.
    pick: int32 [M], pick of each row; P = the row is empty.
    token: int32 [M], token of each row; some token for an empty row.
    group_sizes: int32 [E], rows of each of this device's experts.
    tile: rows per tile.
  """

  slot: jax.Array
  local: jax.Array
  pick: jax.Array
  token: jax.Array
  group_sizes: jax.Array
  tile: int


def dispatch(experts_kT: jax.Array, num_experts: int, shards: int = 1, kernels: str = "blockwise") -> Dispatch:
  """Sorts picks by expert, each expert's rows from a tile's start on; experts outside [0, num_experts) get no row.

  Args:
    shards: devices that share the picks; about picks / shards of them are local.
    kernels: implementation that will read the rows.
  """
  picks = experts_kT.size
  tile = grouped_matmul.row_tile(picks // shards, num_experts, kernels)
  rows = grouped_matmul.padded_rows(picks, num_experts, tile)
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
  """Rows [M, D] of the picks; empty rows hold some token. The gradient gathers too: no scatter in either direction."""
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


def routed(x_BSD, experts_BSk, weights_BSk, gate_EDF, up_EDF, down_EFD, *, limit: float, kernels: str,
           expert_axis: str | None = None, width_axis: str | None = None, wave: int = WAVE,
           rounded: Callable[[jax.Array], jax.Array] | None = None) -> jax.Array:
  """Sum over each token's experts of weight * expert(x), [B, S, D], on one device's part of the arrays.

  Nothing is dropped, so a device must have room for all picks of the tokens that it is shown, although about one in
  `expert_axis` of them is its own. Beyond `wave` tokens they are therefore shown in waves, one after the other, and the
  backward pass repeats a wave instead of keeping its rows.

  Args:
    expert_axis: mesh axis over which experts and the batch are split: tokens are gathered over it and sums scattered back.
    width_axis: mesh axis over which F is split: partial sums are added over it.
    wave: the most tokens of all shards of `expert_axis` together that are worked on at a time, if it has several.
    rounded: how the last matmul's input is rounded; a pick's weight then multiplies that input, as in DeepSeek's inference.
      Of a split F each device's part is rounded for itself.
  """
  run = functools.partial(_one_wave, limit=limit, kernels=kernels, expert_axis=expert_axis, width_axis=width_axis,
                          rounded=rounded)
  shards = 1 if expert_axis is None else jax.lax.axis_size(expert_axis)
  tokens = x_BSD.shape[0] * x_BSD.shape[1]
  waves = num_waves(tokens, shards, wave)
  if waves == 1:
    return run(x_BSD, experts_BSk, weights_BSk, gate_EDF, up_EDF, down_EFD)
  missing = -tokens % waves

  def cut(x, value):  # tokens that fill the last wave pick no expert
    return jnp.pad(x.reshape(tokens, -1), ((0, missing), (0, 0)), constant_values=value).reshape(waves, -1, x.shape[-1])
  one = jax.checkpoint(lambda *rows: run(*rows, gate_EDF, up_EDF, down_EFD))
  cuts = cut(x_BSD, 0), cut(experts_BSk, -1), cut(weights_BSk, 0)
  _, out = jax.lax.scan(lambda _, rows: (None, one(*rows)), None, cuts)
  return out.reshape(tokens + missing, -1)[:tokens].reshape(x_BSD.shape)


def num_waves(tokens: int, shards: int, wave: int) -> int:
  """The least number of waves of a device's tokens with at most `wave` tokens of all shards together, but at least one of
  each; 1 if there is one shard."""
  return 1 if shards == 1 else -(-tokens // max(wave // shards, 1))


def _one_wave(x_TD, experts_Tk, weights_Tk, gate_EDF, up_EDF, down_EFD, *, limit, kernels, expert_axis, width_axis, rounded):
  """`routed` for tokens that fit in memory; the token axes may be one or several."""
  if expert_axis is not None:
    gather = functools.partial(jax.lax.all_gather, axis_name=expert_axis, tiled=True)
    x_TD, experts_Tk, weights_Tk = map(gather, (x_TD, experts_Tk, weights_Tk))
    experts_Tk = experts_Tk - jax.lax.axis_index(expert_axis) * gate_EDF.shape[0]
  top_k = experts_Tk.shape[-1]
  shards = 1 if expert_axis is None else jax.lax.axis_size(expert_axis)
  if kernels == "blockwise" and experts_Tk.size < gate_EDF.shape[0]:
    rows = (x.reshape(-1, x.shape[-1]) for x in (x_TD, experts_Tk, weights_Tk))
    out_TD = grouped_matmul.few_picks(*rows, gate_EDF, up_EDF, down_EFD, limit=limit, rounded=rounded).reshape(x_TD.shape)
    return _over_axes(out_TD, expert_axis, width_axis).astype(x_TD.dtype)
  plan = dispatch(experts_Tk.reshape(-1, top_k).T, gate_EDF.shape[0], shards, kernels)
  rows_MD = gather_rows(x_TD.reshape(-1, x_TD.shape[-1]), plan)
  weights_kT, rounding = weights_Tk.reshape(-1, top_k).T, None
  if rounded is not None:
    rounding = rounded, jnp.append(weights_kT.reshape(-1), 0)[plan.pick]
    weights_kT = jnp.ones_like(weights_kT)
  y_MD = grouped_matmul.expert_mlp(rows_MD, gate_EDF, up_EDF, down_EFD, plan.group_sizes, tile=plan.tile, limit=limit,
                                   rounding=rounding, implementation=kernels)
  out_TD = combine_rows(y_MD, weights_kT, plan).reshape(x_TD.shape)
  return _over_axes(out_TD, expert_axis, width_axis).astype(x_TD.dtype)


def _over_axes(out_TD: jax.Array, expert_axis: str | None, width_axis: str | None) -> jax.Array:
  """The parts of all devices summed, each device's own tokens left."""
  out_TD = out_TD if width_axis is None else jax.lax.psum(out_TD, width_axis)
  return out_TD if expert_axis is None else jax.lax.psum_scatter(out_TD, expert_axis, tiled=True)


class Experts(nn.Module):
  """The routed experts' weights, stacked over E."""

  config: ModelConfig
  kernels: str

  @nn.compact
  def __call__(self, x_BSD: jax.Array, experts_BSk: jax.Array, weights_BSk: jax.Array) -> jax.Array:
    config = self.config
    count, d, f = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
    matrices = [weights.matrix(self, config, name, shape) for name, shape in (
        ("gate", (count, d, f)), ("up", (count, d, f)), ("down", (count, f, d)))]
    run = functools.partial(routed, limit=config.swiglu_limit, kernels=self.kernels,
                            expert_axis=sharding.axis_name("expert"), width_axis=sharding.axis_name("mlp"),
                            rounded=functools.partial(quantize.linear_input, config) if config.inference_rounding else None)
    tokens = ("batch", "sequence")
    in_axes = (tokens, tokens, tokens, ("expert", None, "mlp"), ("expert", None, "mlp"), ("expert", "mlp", None))
    return sharding.per_shard(run, in_axes, tokens)(x_BSD, experts_BSk, weights_BSk, *matrices)


class SharedExpert(nn.Module):
  """The expert that every token passes, with the same clamp."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x_BSD: jax.Array) -> jax.Array:
    config, limit = self.config, self.config.swiglu_limit
    d, f = config.hidden_size, config.moe_intermediate_size
    gate, up = x_BSD @ weights.matrix(self, config, "gate", (d, f)), x_BSD @ weights.matrix(self, config, "up", (d, f))
    hidden = jax.nn.silu(jnp.minimum(gate, limit)) * jnp.clip(up, -limit, limit)
    return quantize.linear_input(config, hidden) @ weights.matrix(self, config, "down", (f, d))


class MoE(nn.Module):
  """Router, routed experts and shared expert of one layer."""

  config: ModelConfig
  kind: str
  kernels: str

  @nn.compact
  def __call__(self, x_BSD: jax.Array, context: Context, layer: jax.Array | int, given: jax.Array | None = None):
    """Returns (output [B, S, D], experts int32 [B, S, k], load int32 [E], balance loss (sum, count) or None).

    `given` experts are taken instead of the router's own, see `Router`; load and balance loss are then of these.
    """
    config = self.config
    experts_BSk, weights_BSk, scores_BSE = Router(config, self.kind, name="router")(x_BSD, context, layer, given)
    in_BSD = quantize.linear_input(config, x_BSD)
    out_BSD = Experts(config, self.kernels, name="experts")(in_BSD, experts_BSk, weights_BSk)
    out_BSD += SharedExpert(config, name="shared")(in_BSD)
    loss = None
    if context.with_losses and self.kind == LEARNED:
      loss = balance_loss(scores_BSE, experts_BSk, context)
    return out_BSD, experts_BSk, expert_load(experts_BSk, config.n_routed_experts, context.segment_ids), loss
