"""The experts' MLP (report 2.1; the clamp: 4.2.3) as TPU kernels: the clamped SwiGLU and its gradient are epilogues of the
matmuls.

    forward    h = swiglu(x gate, x up)        y = h down
    backward   dh = dy down^T -> dg, du, h     dx = dg gate^T + du up^T
               d gate, d up = x^T dg, x^T du   d down = h^T dy

g and u are kept for the gradient in the rows' dtype, so the backward pass does the work of six matmuls and no more.

Their schedules, and what `ragged_dot` and megablox multiply and move instead: pallas_kernels/README.md, Experts.

Axis letters: M rows   D hidden size   F expert width   E experts
"""

from __future__ import annotations

import functools
from typing import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import tpu
from pallas_kernels.grouped_matmul import kernel_calls as calls
from pallas_kernels.names import EXPERTS, named


def expert_mlp(x_MD: jax.Array, gate_EDF: jax.Array, up_EDF: jax.Array, down_EFD: jax.Array, group_sizes_E: jax.Array,
               *, tile: int, limit: float, interpret: bool,
               rounding: tuple[Callable[[jax.Array], jax.Array], jax.Array] | None = None) -> jax.Array:
  """See `pallas_kernels.grouped_matmul.expert_mlp`; the weights are cast to x's dtype, products are float32."""
  d, f = (tpu.round_up(size, tpu.LANES) for size in gate_EDF.shape[1:])
  pad = lambda w, rows, columns: tpu.pad_axis(tpu.pad_axis(w.astype(x_MD.dtype), 1, rows), 2, columns)
  weights = pad(gate_EDF, d, f), pad(up_EDF, d, f), pad(down_EFD, f, d)
  arrays, static = (tpu.pad_axis(x_MD, 1, d), *weights, group_sizes_E), (tile, limit, interpret)
  y_MD = _mlp(*arrays, static) if rounding is None else _forward(*arrays, static, False, rounding)[0]
  return y_MD[:, :x_MD.shape[1]]


# ---- bodies -----------------------------------------------------------------------------------------------------------
def _swiglu(g, u, limit):
  """-> silu(min(g, limit)) * clip(u, -limit, limit) and what its gradient needs."""
  g_low, u_in = jnp.minimum(g, limit), jnp.clip(u, -limit, limit)
  sigmoid = jax.nn.sigmoid(g_low)
  return g_low * sigmoid * u_in, g_low, u_in, sigmoid


def _hidden(x, gate, up, *outputs, limit):
  def step(columns):
    g, u = tpu.matmul(x[...], gate[:, columns]), tpu.matmul(x[...], up[:, columns])
    values = (_swiglu(g, u, limit)[0], g, u)
    for output, value in zip(outputs, values):
      output[:, columns] = value.astype(output.dtype)
  calls.each_inner(gate.shape[1], step)


def _down(h, down, y):
  def step(columns):
    y[:, columns] = tpu.matmul(h[...], down[:, columns]).astype(y.dtype)
  calls.each_inner(down.shape[1], step)


def _d_hidden(dy, down, g, u, dg, du, h, *, limit):
  def step(columns):
    dh = tpu.matmul_t(dy[...], down[columns])
    gate, up = g[:, columns].astype(jnp.float32), u[:, columns].astype(jnp.float32)
    hidden, g_low, u_in, sigmoid = _swiglu(gate, up, limit)
    # Outside the bounds the clamp stops the gradient.
    dg[:, columns] = jnp.where(gate < limit, dh * u_in * sigmoid * (1 + g_low * (1 - sigmoid)), 0.0).astype(dg.dtype)
    du[:, columns] = jnp.where(jnp.abs(up) < limit, dh * g_low * sigmoid, 0.0).astype(du.dtype)
    h[:, columns] = hidden.astype(h.dtype)
  calls.each_inner(down.shape[0], step)


def _d_rows(dg, du, gate, up, dx):
  def step(columns):
    dx[:, columns] = (tpu.matmul_t(dg[...], gate[columns]) + tpu.matmul_t(du[...], up[columns])).astype(dx.dtype)
  calls.each_inner(gate.shape[0], step)


# ---- the op -----------------------------------------------------------------------------------------------------------
def _forward(x, gate, up, down, sizes, static, keep, rounding=None):
  """-> y, and (g, u) if they are to be kept."""
  tile, limit, interpret = static
  plan = calls.row_map(sizes, x.shape[0], tile)
  h, *kept = calls.rows_call(functools.partial(_hidden, limit=limit), "experts_hidden", interpret, plan, tile, gate.shape[2],
                             (("rows", x), ("columns", gate), ("columns", up)), 3 if keep else 1)
  if rounding is not None:
    function, weights_M = rounding
    h = function((h * weights_M[:, None]).astype(h.dtype))
  y = calls.rows_call(_down, "experts_down", interpret, plan, tile, down.shape[2], (("rows", h), ("columns", down)), 1, True)
  return y[0], tuple(kept)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _mlp(x, gate, up, down, sizes, static):
  return _forward(x, gate, up, down, sizes, static, False)[0]


def _mlp_forward(x, gate, up, down, sizes, static):
  y, kept = _forward(x, gate, up, down, sizes, static, True)
  return y, (x, gate, up, down, sizes, *named(EXPERTS, *kept))


def _mlp_backward(static, saved, dy):
  x, gate, up, down, sizes, g, u = saved
  tile, limit, interpret = static
  plan = calls.row_map(sizes, x.shape[0], tile)
  dg, du, h = calls.rows_call(
      functools.partial(_d_hidden, limit=limit), "experts_d_hidden", interpret, plan, tile, g.shape[1],
      (("rows", dy), ("rows_of", down), ("cut", g), ("cut", u)), 3)
  (dx,) = calls.rows_call(_d_rows, "experts_d_rows", interpret, plan, tile, x.shape[1],
                          (("rows", dg), ("rows", du), ("rows_of", gate), ("rows_of", up)), 1, True)
  of_weights, experts = calls.weight_map(sizes, x.shape[0], tile), gate.shape[0]
  d_gate, d_up = calls.weights_call("experts_d_gate_up", interpret, of_weights, tile, x, (dg, du), experts)
  (d_down,) = calls.weights_call("experts_d_down", interpret, of_weights, tile, h, (dy,), experts)
  return dx, d_gate, d_up, d_down, None


_mlp.defvjp(_mlp_forward, _mlp_backward)
