"""Experts' matmuls on tokens sorted by expert (report 2.1; the clamp: 4.2.3): gate, up, clamp, SiLU, down.

What may not live here: who goes to which expert on which device, and with what weight, which `deepseek_v4/model` decides.
"""

from __future__ import annotations

import functools
from typing import Callable

import jax

from pallas_kernels import arguments, pick
from pallas_kernels.grouped_matmul import blockwise, kernel, reference


def expert_mlp(x: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array, group_sizes: jax.Array, *, tile: int,
               limit: float, rounding: tuple[Callable[[jax.Array], jax.Array], jax.Array] | None = None,
               implementation: str = "auto") -> jax.Array:
  """Each row through its expert: (silu(min(x gate, limit)) * clip(x up, -limit, limit)) down.

  Rows lie expert after expert. Each expert's rows start at a multiple of `tile`, so that a tile of rows has one expert:
  expert e owns rows [start_e, start_e + group_sizes_e) with start_e = tile * sum_{f < e} ceil(group_sizes_f / tile). The
  other rows may hold any finite numbers: their results have no meaning, and the gradient that comes back for them must be 0.

  Args:
    x: [M, D], floating, M a multiple of tile and at least the rows in use.
    gate, up: [E, D, F]; down: [E, F, D], floating; group_sizes: int32 [E].
    tile: rows per tile, static.
    limit: of the clamp, from above for the gate, both ways for up.
    rounding: (function [..., F] -> [..., F], weights [M]): `down` then multiplies function(hidden * row weight) in place
      of hidden, as a quantised model would round it; default: as it is.

  Returns:
    [M, D] in x's dtype, differentiable in x and the three weights where there is no rounding.

  Raises:
    NotImplementedError: a named implementation that does not exist, or a kernel on a chip without tile sizes.
    ValueError: arrays that do not fit together, or rows that are no whole tiles.
  """
  arguments.check("expert_mlp", x=(x, "M D"), gate=(gate, "E D F"), up=(up, "E D F"), down=(down, "E F D"),
                  group_sizes=(group_sizes, "int: E"))
  arguments.check_number("expert_mlp", "tile", tile, 1)
  if x.shape[0] % tile:
    raise ValueError(f"expert_mlp: x has {x.shape[0]} rows: expected a multiple of tile = {tile}")
  available = {"reference": reference.expert_mlp, "blockwise": blockwise.expert_mlp,
               "pallas": functools.partial(kernel.expert_mlp, interpret=False),
               "interpret": functools.partial(kernel.expert_mlp, interpret=True)}
  run = pick("grouped_matmul", implementation, available)
  return run(x, gate, up, down, group_sizes, tile=tile, limit=limit, rounding=rounding)


def few_picks(x: jax.Array, experts: jax.Array, weights: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array, *,
              limit: float, rounded: Callable[[jax.Array], jax.Array] | None = None,
              prepared: Callable[[jax.Array], jax.Array] | None = None) -> jax.Array:
  """Sum over each row's picks of weight * expert(row), without sorting: one pick after another, each a vector's product.

  In plain JAX, for fewer picks than experts, as when one sequence is decoded.

  Args:
    x: [T, D], floating; experts: int32 [T, k], none that is outside [0, E) counts; weights: [T, k], floating.
    gate, up, down, limit: as in `expert_mlp`.
    rounded: see `rounding` there; the weights are these.
    prepared: function of a chosen expert's matrix [D, F] or [F, D]: what is used in its place; default: itself.

  Returns:
    [T, D] in the weights' dtype if that is wider.

  Raises:
    ValueError: arrays that do not fit together.
  """
  arguments.check("few_picks", x=(x, "T D"), experts=(experts, "int: T k"), weights=(weights, "T k"))
  return blockwise.few_picks(x, experts, weights, gate, up, down, limit=limit, rounded=rounded,
                             prepared=prepared)


def row_tile(rows: int, num_experts: int, implementation: str = "blockwise") -> int:
  """Rows per tile so that padding costs about an eighth of the work with evenly loaded experts: 8 to 256.

  A matrix unit takes as long for 8 rows as for 128, so for the TPU kernels a few rows of an expert are one tile.
  """
  tile, least = 8, min(rows // num_experts, 128) if implementation in ("pallas", "interpret") else 0
  while tile < 256 and (tile * 2 * num_experts * 4 <= rows or tile < least):
    tile *= 2
  return tile


def padded_rows(rows: int, num_experts: int, tile: int) -> int:
  """Rows that hold `rows` tokens however they fall on the experts: every expert may leave one tile partly empty."""
  return -(-rows // tile) * tile + num_experts * tile
