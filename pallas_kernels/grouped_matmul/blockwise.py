"""Experts one after another, each over its own tiles: work proportional to the routed rows, a written gradient
(formulas: report 2.1; the clamp: 4.2.3).

A loop over experts loads that expert's weights once; inside it a loop over its tiles has a length known only at run time.
(`jax.lax.ragged_dot` on a CPU multiplies every row by every expert.)

Axis letters: X tiles   C rows of a tile   D hidden size   F expert width   E experts
"""

from __future__ import annotations

import functools
from typing import Callable

import jax
import jax.numpy as jnp


def expert_mlp(x_MD: jax.Array, gate_EDF: jax.Array, up_EDF: jax.Array, down_EFD: jax.Array, group_sizes_E: jax.Array,
               *, tile: int, limit: float, rounding: tuple[Callable[[jax.Array], jax.Array], jax.Array] | None = None
               ) -> jax.Array:
  """See `pallas_kernels.grouped_matmul.expert_mlp`; dtypes as there, products at least in float32."""
  last_E = jnp.cumsum(-(-group_sizes_E // tile))
  first_E = last_E - -(-group_sizes_E // tile)
  tiles = x_MD.reshape(-1, tile, x_MD.shape[1])
  arrays = tiles, gate_EDF, up_EDF, down_EFD, first_E, last_E
  return (_tiles(*arrays, limit) if rounding is None else _every_tile(*arrays, limit, rounding)).reshape(x_MD.shape)


def few_picks(x_TD: jax.Array, experts_Tk: jax.Array, weights_Tk: jax.Array, gate_EDF: jax.Array, up_EDF: jax.Array,
              down_EFD: jax.Array, *, limit: float, rounded: Callable[[jax.Array], jax.Array] | None = None,
              prepared: Callable[[jax.Array], jax.Array] | None = None) -> jax.Array:
  """See `pallas_kernels.grouped_matmul.few_picks`; dtypes as there, products at least in float32."""
  num_experts, top_k = gate_EDF.shape[0], experts_Tk.shape[1]
  experts_Tk, weights_Tk = jnp.asarray(experts_Tk), jnp.asarray(weights_Tk)  # a traced number is no index of NumPy's

  def pick(i, out_TD):
    token, rank = i // top_k, i % top_k
    expert, weight = experts_Tk[token, rank], weights_Tk[token, rank]
    gate, up, down = (jax.lax.dynamic_index_in_dim(w, expert, keepdims=False) for w in (gate_EDF, up_EDF, down_EFD))
    gate, up, down = (gate, up, down) if prepared is None else map(prepared, (gate, up, down))
    x_1D = jax.lax.dynamic_slice_in_dim(x_TD, token, 1)
    h_1F = jax.nn.silu(jnp.minimum(_dot(x_1D, gate), limit)) * jnp.clip(_dot(x_1D, up), -limit, limit)
    h_1F = h_1F.astype(x_TD.dtype) if rounded is None else rounded((h_1F * weight).astype(x_TD.dtype))
    weight = jnp.where((expert >= 0) & (expert < num_experts), weight if rounded is None else jnp.ones_like(weight), 0)
    y_1D = weight * _dot(h_1F, down).astype(x_TD.dtype)
    return jax.lax.dynamic_update_slice_in_dim(out_TD, jax.lax.dynamic_slice_in_dim(out_TD, token, 1) + y_1D, token, 0)

  return jax.lax.fori_loop(0, experts_Tk.size, pick, jnp.zeros(x_TD.shape, jnp.promote_types(x_TD.dtype, weights_Tk.dtype)))


def _dot(a, b):
  return jnp.matmul(a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _tiles(x_XCD, gate_EDF, up_EDF, down_EFD, first_E, last_E, limit):
  return _every_tile(x_XCD, gate_EDF, up_EDF, down_EFD, first_E, last_E, limit, None)


def _every_tile(x_XCD, gate_EDF, up_EDF, down_EFD, first_E, last_E, limit, rounding):
  dtype, num_experts = x_XCD.dtype, gate_EDF.shape[0]

  def tile(i, out, gate, up, down):
    g, u = _dot(x_XCD[i], gate), _dot(x_XCD[i], up)
    h = jax.nn.silu(jnp.minimum(g, limit)) * jnp.clip(u, -limit, limit)
    if rounding is None:
      h = h.astype(dtype)
    else:
      function, weights_M = rounding
      h = function((h * weights_M.reshape(x_XCD.shape[:2])[i][:, None]).astype(dtype))
    return out.at[i].set(_dot(h, down).astype(dtype))

  if x_XCD.shape[0] < 2 * num_experts:
    # Few rows, as in decoding of some sequences: many experts have none, and only those that do are read.
    def chosen(i, out):
      e = (last_E <= i).sum()
      return tile(i, out, gate_EDF[e], up_EDF[e], down_EFD[e])

    return jax.lax.fori_loop(0, last_E[-1], chosen, jnp.zeros_like(x_XCD))

  def expert(out, item):
    gate, up, down, first, last = item
    return jax.lax.fori_loop(first, last, lambda i, out: tile(i, out, gate, up, down), out), None

  return jax.lax.scan(expert, jnp.zeros_like(x_XCD), (gate_EDF, up_EDF, down_EFD, first_E, last_E))[0]


def _forward(x, gate, up, down, first, last, limit):
  return _tiles(x, gate, up, down, first, last, limit), (x, gate, up, down, first, last)


def _backward(limit, saved, dy_XCD):
  x_XCD, gate_EDF, up_EDF, down_EFD, first_E, last_E = saved
  dtype = x_XCD.dtype
  exact = jnp.promote_types(dtype, jnp.float32)

  def expert(dx, item):
    gate, up, down, first, last = item

    def tile(i, carry):
      dx, d_gate, d_up, d_down = carry
      x, dy = x_XCD[i], dy_XCD[i]
      g, u = _dot(x, gate), _dot(x, up)
      dh = _dot(dy, down.T)
      g_low, u_in = jnp.minimum(g, limit), jnp.clip(u, -limit, limit)
      sigmoid = jax.nn.sigmoid(g_low)
      h = g_low * sigmoid * u_in
      # Outside the bounds the clamp stops the gradient.
      dg = jnp.where(g < limit, dh * u_in * sigmoid * (1 + g_low * (1 - sigmoid)), 0).astype(dtype)
      du = jnp.where(jnp.abs(u) < limit, dh * g_low * sigmoid, 0).astype(dtype)
      dx = dx.at[i].set((_dot(dg, gate.T) + _dot(du, up.T)).astype(dtype))
      return dx, d_gate + _dot(x.T, dg), d_up + _dot(x.T, du), d_down + _dot(h.astype(dtype).T, dy)

    zeros = tuple(jnp.zeros(w.shape, exact) for w in (gate, up, down))
    dx, *d_weights = jax.lax.fori_loop(first, last, tile, (dx, *zeros))
    return dx, tuple(d.astype(w.dtype) for d, w in zip(d_weights, (gate, up, down)))

  dx, d_weights = jax.lax.scan(expert, jnp.zeros_like(x_XCD), (gate_EDF, up_EDF, down_EFD, first_E, last_E))
  return dx, *d_weights, None, None


_tiles.defvjp(_forward, _backward)
