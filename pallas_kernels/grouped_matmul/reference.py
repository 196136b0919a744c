"""Experts as the formula stands (report 2.1; the clamp: 4.2.3): every row looks its expert's weights up. Memory grows with
rows x weights.

Axis letters: M rows   D hidden size   F expert width   E experts
"""

from __future__ import annotations

from typing import Callable

import jax
import jax.numpy as jnp


def hidden(x: jax.Array, gate: jax.Array, up: jax.Array, limit: float) -> jax.Array:
  """The clamped SwiGLU between the matmuls, [M, D] and twice [D, F], floating -> [M, F], dtype as of the products:
  silu(min(g, limit)) * clip(u, -limit, limit)."""
  return jax.nn.silu(jnp.minimum(x @ gate, limit)) * jnp.clip(x @ up, -limit, limit)


def expert_mlp(x_MD: jax.Array, gate_EDF: jax.Array, up_EDF: jax.Array, down_EFD: jax.Array, group_sizes_E: jax.Array,
               *, tile: int, limit: float, rounding: tuple[Callable[[jax.Array], jax.Array], jax.Array] | None = None
               ) -> jax.Array:
  """See `pallas_kernels.grouped_matmul.expert_mlp`; dtypes as there, products in the operands' own."""
  last_tile_E = jnp.cumsum(-(-group_sizes_E // tile))
  expert_M = jnp.searchsorted(last_tile_E, jnp.arange(x_MD.shape[0]) // tile, side="right")
  expert_M = jnp.minimum(expert_M, gate_EDF.shape[0] - 1)  # nobody reads the rows behind the last group

  hidden_MF = jax.vmap(lambda x_D, e: hidden(x_D, gate_EDF[e], up_EDF[e], limit))(x_MD, expert_M)
  if rounding is not None:
    function, weights_M = rounding
    hidden_MF = function((hidden_MF * weights_M[:, None]).astype(x_MD.dtype))
  return jax.vmap(lambda h_F, e: h_F @ down_EFD[e])(hidden_MF, expert_M).astype(x_MD.dtype)
