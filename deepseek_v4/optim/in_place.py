"""An update in the place of what it replaces: no second state, and of large leaves the matrices of a few layers at a time.

Whether all new numbers will be finite is found out first, by reductions that write nothing. Then every number is overwritten
by its successor, or by itself. What is updated element by element needs no room; whole matrices do: they travel and are
multiplied. Routed experts, nearly all of a large model, are therefore walked: a loop takes some repeats of the scanned
layers after another, and writes each back before it looks at the next. All other leaves, and the last repeats where their
number does not divide, go together, so that large and few matrices and small and plentiful ones share the devices evenly
(`placement.py`).
"""

from __future__ import annotations

import math
import re
from typing import Any, Callable

import jax
import jax.numpy as jnp
import optax

from deepseek_v4.config import OptimizerConfig
from deepseek_v4.optim import batches
from deepseek_v4.optim.assign import matrix_axes, path_of
from deepseek_v4.optim.build import chain_of, choices_of
from deepseek_v4.optim.muon import axes_of, specs_of

_WALKED = re.compile(r"(^|/)layers/unit_\d+/moe/experts/")
_NUMBERS_BYTES = 4  # of one number in Newton-Schulz

# Matrices of one device in a block of the walk; what Newton-Schulz and the exchanges hold is a few times as much.
BLOCK_BYTES = 2**29
# The busiest device of a block does at most this many times the mean work.
EVEN = 1.05


# ---- parts of trees ---------------------------------------------------------------------------------------------------
def _by_path(tree: Any) -> dict[str, Any]:
  return {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def _part(whole: Any, like: Any) -> Any:
  """The tree `like`, whose paths are some of those of `whole`, filled from that."""
  known = _by_path(whole)
  return jax.tree_util.tree_map_with_path(lambda path, _: known[jax.tree_util.keystr(path)], like)


def _overlaid(whole: Any, part: Any) -> Any:
  """`whole` with the leaves of `part` in the place of its own."""
  new = _by_path(part)
  return jax.tree_util.tree_map_with_path(lambda path, x: new.get(jax.tree_util.keystr(path), x), whole)


def _walked(path: Any) -> bool:
  """Whether a parameter, or a moment of it, is one of the leaves that a walk takes."""
  return _WALKED.search(path_of(path)) is not None


def _map_walked(walked: Callable[[jax.Array], Any], other: Callable[[jax.Array], Any], tree: Any) -> Any:
  return jax.tree_util.tree_map_with_path(lambda path, x: walked(x) if _walked(path) else other(x), tree)


# ---- how far a walk goes at a time --------------------------------------------------------------------------------------
def block_of(optimizer_config: OptimizerConfig, params: Any, shardings: Any = None,
             block_bytes: int = BLOCK_BYTES) -> tuple[int, int]:
  """How an update on the ambient mesh walks: (repeats of the scanned layers in a block, repeats that are walked).

  A block holds at most `block_bytes` of one device's matrices in float32, those gathered that replicas have made for each
  other, or, where so few do not spread evenly over the devices, as few as do. (0, 0): there is nothing to walk, or all of it
  is no more than one block.

  Args:
    params, shardings: as for `build_optimizer`; arrays or shapes.
  """
  part = _map_walked(lambda x: x, lambda x: None, params)
  axes = matrix_axes(part, **choices_of(optimizer_config))
  leaves = jax.tree.leaves(part)
  if not leaves or not jax.tree.leaves(axes):
    return 0, 0
  sizes = batches.mesh_sizes()
  specs = specs_of(part, shardings)
  repeats = leaves[0].shape[0]
  layouts = [batches.layout_of((1, *x.shape[1:]), pair, spec, sizes)
             for x, pair, spec in zip(leaves, axes_of(part, axes), specs)]
  parts = [math.prod(sizes.values()) / batches.replicas(layout.stack, sizes) for layout in layouts]
  of_one = _NUMBERS_BYTES * sum(math.prod(x.shape[1:]) / part for x, part in zip(leaves, parts))
  fitting = max(1, int(block_bytes // of_one))

  def even(length: int) -> bool:
    counts = {stack: length * count for stack, count in batches.counts_of(layouts).items()}
    _, work = batches.plans_of(counts, sizes)
    return work.max() <= EVEN * work.mean()
  lengths = [*range(min(fitting, repeats), 0, -1), *range(fitting + 1, repeats)]
  length = next(filter(even, lengths), repeats)
  return (0, 0) if length >= repeats else (length, repeats - repeats % length)


# ---- the update -----------------------------------------------------------------------------------------------------------
def stays_finite(optimizer_config: OptimizerConfig, grads: Any, opt_state: Any, params: Any, *, norm: jax.Array,
                 steps: int | None = None) -> jax.Array:
  """Whether every parameter is finite after an update, bool [], without making it: nothing of the parameters' size is held.

  Orthogonal matrices of finite numbers are finite, and no entry is above 2 (`newton_schulz`), so that they need not be
  known. Parameters and updates within a factor of 2 of float32's largest number count as not finite.

  Args: as for `update_in_place`; the norm is a float32 scalar.
  """
  bounded = optax.stateless(lambda updates, _: jax.tree.map(
    lambda x: jnp.where(jnp.isfinite(x), 2.0, jnp.nan).astype(x.dtype), updates))
  probe = chain_of(optimizer_config, params, steps=steps, norm=norm, orthogonal=bounded)
  updates, _ = probe.update(grads, _part(opt_state, jax.eval_shape(probe.init, params)), params)
  fine = jax.tree.map(lambda x, update: jnp.isfinite(jnp.abs(x) + jnp.abs(update)).all(), params, updates)
  return jnp.stack(jax.tree.leaves(fine)).all()


def update_in_place(optimizer_config: OptimizerConfig, grads: Any, opt_state: Any, params: Any, *, norm: jax.Array,
                    keep: Callable[[jax.Array, jax.Array], jax.Array], steps: int | None = None, shardings: Any = None,
                    block_bytes: int = BLOCK_BYTES) -> tuple[Any, Any]:
  """What `build_optimizer(...).update` and `optax.apply_updates` give, in little room if the old numbers are donated.

  Args:
    optimizer_config, steps, shardings: as for `build_optimizer`.
    grads: Like params, before clipping.
    opt_state: As of `build_optimizer(...).init`, for params or for more leaves than these, which stay as they are.
    params: The leaves that are updated, None in the place of others.
    norm: The global norm of `grads`, a float32 scalar.
    keep: (new number, old number) -> the one that stays; elementwise, of arrays of any shape.
    block_bytes: See `block_of`.

  Returns:
    New params and opt_state, dtypes kept.
  """
  def updated(params: Any, grads: Any, opt_state: Any) -> tuple[Any, Any]:
    optimizer = chain_of(optimizer_config, params, steps=steps, shardings=shardings, norm=norm)
    state = _part(opt_state, jax.eval_shape(optimizer.init, params))
    updates, new = optimizer.update(grads, state, params)
    return jax.tree.map(keep, optax.apply_updates(params, updates), params), jax.tree.map(keep, new, state)

  length, end = block_of(optimizer_config, params, shardings, block_bytes)
  if not length:
    new_params, new_state = updated(params, grads, opt_state)
    return new_params, _overlaid(opt_state, new_state)
  nothing, all_of_it = lambda x: None, lambda x: x

  def step(i: jax.Array, walked: tuple[Any, Any]) -> tuple[Any, Any]:
    cut = lambda tree, other: _map_walked(lambda x: jax.lax.dynamic_slice_in_dim(x, i * length, length), other, tree)
    new = updated(cut(walked[0], nothing), cut(grads, nothing), cut(_overlaid(opt_state, walked[1]), all_of_it))
    return _written(walked, new, i * length)

  walked = (_map_walked(all_of_it, nothing, params), _map_walked(all_of_it, nothing, opt_state))
  walked = jax.lax.fori_loop(0, end // length, step, walked)
  rest = lambda tree: _map_walked(lambda x: x[end:] if end < x.shape[0] else None, all_of_it, tree)
  others = updated(rest(params), rest(grads), rest(opt_state))
  walked = _written(walked, others, end)
  return tuple(_overlaid(_overlaid(old, new), done) for old, new, done in zip((params, opt_state), others, walked))


def _written(walked: tuple[Any, Any], parts: tuple[Any, Any], start: jax.typing.ArrayLike) -> tuple[Any, Any]:
  """(params, opt_state) of walked leaves, overwritten from the repeat `start` on by what `parts` have of them."""
  def write(tree: Any, part: Any) -> Any:
    known = _by_path(part)

    def leaf(path: Any, x: jax.Array) -> jax.Array:
      new = known.get(jax.tree_util.keystr(path))
      return x if new is None else jax.lax.dynamic_update_slice_in_dim(x, new, start, 0)
    return jax.tree_util.tree_map_with_path(leaf, tree)
  return write(walked[0], parts[0]), write(walked[1], parts[1])
