"""Routed and shared experts: dispatch, grouped matmuls, combine (report 2.1; the clamp: 4.2.3). No token is ever
dropped.

Expert weights lie on the mesh axis `expert`, where their number allows on `fsdp` and `context`, too
(`sharding.split_over`), and stay there, their width on `tensor`. Tokens come to them inside the shard_map wrapper, in one
of two ways:

    gather       all expert shards' tokens are gathered, every device works on the picks of its own experts, and the sums
                 return by reduce-scatter
    all_to_all   each pick's row travels to its expert's device and back (`exchange.py`)

Axis letters: B batch   S sequence   D hidden size   E experts   F expert width   k experts per token
              T tokens of a device   P picks (T k)   M rows of all tiles
"""

from __future__ import annotations

import functools
from typing import Any, Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

import pallas_kernels.grouped_matmul as grouped_matmul
from deepseek_v4 import sharding
from deepseek_v4.config import LEARNED, ModelConfig
from deepseek_v4.model import quantize, remat, weights
from deepseek_v4.model.context import Context
from deepseek_v4.model.dispatch import combine_rows, dispatch, gather_rows
from deepseek_v4.model.exchange import Axes, through_experts
from deepseek_v4.model.router import Router, balance_loss, expert_load
from pallas_kernels.names import EXPERTS

# Tokens of all shards that are gathered at a time: with 384 experts and 6 picks a token, an expert gets 256 rows, a full
# tile of the kernels.
GATHERED = 16384
# Tokens of one device whose rows travel at a time. With 6 picks of bfloat16 and 7,168 channels, room for 30,720 rows and the
# tiles' padding takes 0.5 GiB, and an expert of 384 gets 64 rows of each device.
SENT = 4096


def routed(x_BSD: jax.Array, experts_BSk: jax.Array, weights_BSk: jax.Array, gate_EDF: jax.Array, up_EDF: jax.Array,
           down_EFD: jax.Array, *, limit: float, kernels: str, expert_axis: Axes | None = None,
           width_axis: str | None = None, exchange: str = "auto", wave: int | None = None,
           rounded: Callable[[jax.Array], jax.Array] | None = None,
           prepared: Callable[[jax.Array], jax.Array] | None = None) -> jax.Array:
  """Sum over each token's experts of weight * expert(x), [B, S, D], on one device's part of the arrays: x and the experts'
  matrices floating, weights at least float32 like the sum, experts int32; in x's dtype.

  Nothing is dropped, so of tokens that are gathered a device must have room for all picks, although about one in
  `expert_axis` of them is its own; rows that travel find room for a quarter more than it sends, in more passes if need be.
  Beyond `wave` tokens either is done in waves, one after the other, and the backward pass repeats a wave instead of keeping
  its rows.

  Args:
    expert_axis: mesh axis, or several, over which experts and tokens are split: the experts of `experts_BSk` are numbered
      over all of its devices, and the weights are those of this device's.
    width_axis: mesh axis over which F is split: partial sums are added over it.
    exchange: "gather" or "all_to_all", see above; "auto" = `cheaper_exchange`. One shard exchanges nothing.
    wave: the most tokens of all shards of `expert_axis` together that are worked on at a time, if it has several; default:
      `GATHERED` tokens, or `SENT` of each shard that sends them.
    rounded: how the last matmul's input is rounded; a pick's weight then multiplies that input, as in DeepSeek's inference.
      Of a split F each device's part is rounded for itself. Only with tokens that are gathered, since rows travel without
      their weights.
    prepared: only where `few` holds: what to make of one expert's matrix before it is used.
  """
  shards = 1 if expert_axis is None else jax.lax.axis_size(expert_axis)
  tokens, top_k = x_BSD.shape[0] * x_BSD.shape[1], experts_BSk.shape[-1]
  if exchange == "auto" or shards == 1:
    exchange = cheaper_exchange(tokens, top_k, gate_EDF.shape[0], shards, x_BSD.dtype, rounded is not None)
  one_wave = {"gather": functools.partial(_gathered, rounded=rounded, prepared=prepared), "all_to_all": _sent}[exchange]
  run = functools.partial(one_wave, limit=limit, kernels=kernels, expert_axis=expert_axis, width_axis=width_axis)
  waves = num_waves(tokens, shards, wave or {"gather": GATHERED, "all_to_all": SENT * shards}[exchange])
  if waves == 1:
    return run(x_BSD, experts_BSk, weights_BSk, (gate_EDF, up_EDF, down_EFD))
  missing = -tokens % waves

  def cut(x, value):  # tokens that fill the last wave pick no expert
    return jnp.pad(x.reshape(tokens, -1), ((0, missing), (0, 0)), constant_values=value).reshape(waves, -1, x.shape[-1])
  one = jax.checkpoint(lambda *rows: run(*rows, (gate_EDF, up_EDF, down_EFD)))
  cuts = cut(x_BSD, 0), cut(experts_BSk, -1), cut(weights_BSk, 0)
  _, out = jax.lax.scan(lambda _, rows: (None, one(*rows)), None, cuts)
  return out.reshape(tokens + missing, -1)[:tokens].reshape(x_BSD.shape)


def num_waves(tokens: int, shards: int, wave: int) -> int:
  """The least number of waves of a device's tokens with at most `wave` tokens of all shards together, but at least one of
  each; 1 if there is one shard."""
  return 1 if shards == 1 else -(-tokens // max(wave // shards, 1))


def few(picks: int, num_experts: int, kernels: str) -> bool:
  """Whether so few picks, as when one sequence is decoded, are worked on one by one without sorting."""
  return kernels == "blockwise" and picks < num_experts


def cheaper_exchange(tokens: int, top_k: int, experts: int, shards: int, dtype: Any, rounding: bool) -> str:
  """The way that moves fewer bytes: of a token all other devices' copies and float32 sums, or its picks' rows, both ways.

  Few picks, less than one for each expert of all devices, are gathered, and so are those whose weights must travel.

  Args:
    tokens: of a device. experts: of a device.
  """
  size, exact = jnp.dtype(dtype).itemsize, jnp.promote_types(dtype, jnp.float32).itemsize
  lone = shards == 1 or tokens * top_k < experts * shards
  return "gather" if lone or rounding or shards * (size + exact) <= 2 * top_k * size else "all_to_all"


def _gathered(x_TD, experts_Tk, weights_Tk, matrices, *, limit, kernels, expert_axis, width_axis, rounded, prepared):
  """`routed` for tokens that fit in memory; the token axes may be one or several."""
  if expert_axis is not None:
    gather = functools.partial(jax.lax.all_gather, axis_name=expert_axis, tiled=True)
    x_TD, experts_Tk, weights_Tk = map(gather, (x_TD, experts_Tk, weights_Tk))
    experts_Tk = experts_Tk - jax.lax.axis_index(expert_axis) * matrices[0].shape[0]
  top_k, experts = experts_Tk.shape[-1], matrices[0].shape[0]
  shards = 1 if expert_axis is None else jax.lax.axis_size(expert_axis)
  if few(experts_Tk.size, experts, kernels):
    rows = (x.reshape(-1, x.shape[-1]) for x in (x_TD, experts_Tk, weights_Tk))
    out_TD = grouped_matmul.few_picks(*rows, *matrices, limit=limit, rounded=rounded,
                                      prepared=prepared).reshape(x_TD.shape)
    return _over_axes(out_TD, expert_axis, width_axis).astype(x_TD.dtype)
  tile = grouped_matmul.row_tile(experts_Tk.size // shards, experts, kernels)
  plan = remat.keep(dispatch(experts_Tk.reshape(-1, top_k).T, experts, tile), EXPERTS)
  rows_MD = gather_rows(x_TD.reshape(-1, x_TD.shape[-1]), plan)
  weights_kT, rounding = weights_Tk.reshape(-1, top_k).T, None
  if rounded is not None:
    rounding = rounded, jnp.append(weights_kT.reshape(-1), 0)[plan.pick]
    weights_kT = jnp.ones_like(weights_kT)
  y_MD = grouped_matmul.expert_mlp(rows_MD, *matrices, plan.group_sizes, tile=tile, limit=limit, rounding=rounding,
                                   implementation=kernels)
  out_TD = combine_rows(remat.keep(y_MD, EXPERTS), weights_kT, plan).reshape(x_TD.shape)
  return _over_axes(out_TD, expert_axis, width_axis).astype(x_TD.dtype)


def _sent(x_TD, experts_Tk, weights_Tk, matrices, *, limit, kernels, expert_axis, width_axis):
  """`routed` for tokens that fit in memory, whose rows travel; the token axes may be one or several."""
  top_k, experts = experts_Tk.shape[-1], matrices[0].shape[0]
  plan = dispatch(experts_Tk.reshape(-1, top_k).T, experts * jax.lax.axis_size(expert_axis), tile=1)
  rows_PD = gather_rows(x_TD.reshape(-1, x_TD.shape[-1]), plan)
  tile = grouped_matmul.row_tile(rows_PD.shape[0], experts, kernels)

  def mlp(rows_CD, matrices, sizes_E):
    return grouped_matmul.expert_mlp(rows_CD, *matrices, sizes_E, tile=tile, limit=limit, implementation=kernels)
  y_PD = through_experts(mlp, rows_PD, plan.group_sizes, matrices, axis=expert_axis, tile=tile, implementation=kernels)
  out_TD = combine_rows(y_PD, weights_Tk.reshape(-1, top_k).T, plan).reshape(x_TD.shape)
  return _over_axes(out_TD, None, width_axis).astype(x_TD.dtype)


def _over_axes(out_TD: jax.Array, expert_axis: Axes | None, width_axis: str | None) -> jax.Array:
  """The parts of all devices summed, each device's own tokens left."""
  out_TD = out_TD if width_axis is None else jax.lax.psum(out_TD, width_axis)
  return out_TD if expert_axis is None else jax.lax.psum_scatter(out_TD, expert_axis, tiled=True)


class Experts(nn.Module):
  """The routed experts' weights, stacked over E."""

  config: ModelConfig
  kernels: str

  @nn.compact
  def __call__(self, x_BSD: jax.Array, experts_BSk: jax.Array, weights_BSk: jax.Array) -> jax.Array:
    """x [B, S, D], experts int32 [B, S, k], weights [B, S, k] -> the weighted sum [B, S, D], in x's dtype, over the chosen
    experts."""
    config = self.config
    count, d, f = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
    own, width_axis = sharding.weight_axes("expert", count), sharding.axis_name("mlp")
    as_used = functools.partial(quantize.expert_weights, config)
    # To decode a token it would be a waste to round the experts that it does not go to.
    late = config.qat is not None and not (own or width_axis) and few(experts_BSk.size, count, self.kernels)
    matrices = [weights.matrix(self, config, name, shape, (lambda master: master) if late else as_used) for name, shape in (
        ("gate", (count, d, f)), ("up", (count, d, f)), ("down", (count, f, d)))]
    run = functools.partial(routed, limit=config.swiglu_limit, kernels=self.kernels, expert_axis=own or None,
                            width_axis=width_axis, exchange=config.expert_exchange, prepared=as_used if late else None,
                            rounded=functools.partial(quantize.linear_input, config) if config.inference_rounding else None)
    tokens = ("batch", "sequence")
    in_axes = (tokens, tokens, tokens, (own, None, "mlp"), (own, None, "mlp"), (own, "mlp", None))
    return sharding.per_shard(run, in_axes, tokens)(x_BSD, experts_BSk, weights_BSk, *matrices)


class SharedExpert(nn.Module):
  """The expert that every token passes, with the same clamp."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x_BSD: jax.Array) -> jax.Array:
    """x [B, S, D], floating -> [B, S, D] of its dtype, what every token's own expert adds."""
    config, limit = self.config, self.config.swiglu_limit
    d, f = config.hidden_size, config.moe_intermediate_size
    gate, up = remat.keep([x_BSD @ weights.matrix(self, config, name, (d, f)) for name in ("gate", "up")])
    hidden = jax.nn.silu(jnp.minimum(gate, limit)) * jnp.clip(up, -limit, limit)
    return quantize.linear_input(config, hidden) @ weights.matrix(self, config, "down", (f, d))


class MoE(nn.Module):
  """Router, routed experts and shared expert of one layer."""

  config: ModelConfig
  kind: str
  kernels: str

  @nn.compact
  def __call__(self, x_BSD: jax.Array, context: Context, layer: jax.Array | int, given: jax.Array | None = None
               ) -> tuple[jax.Array, jax.Array, jax.Array, tuple[jax.Array, jax.Array] | None]:
    """Returns (output [B, S, D] in x's dtype, experts int32 [B, S, k], load int32 [E], balance loss (sum, count) at least in
    float32 or None).

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
