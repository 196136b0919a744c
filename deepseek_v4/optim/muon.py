"""Muon as a chain of small Optax transformations, and AdamW's second moment with a floor (report 2.4, algorithm 1).

    M <- mu M + G                      optax.trace, a plain sum: no (1 - mu), no bias correction
    D  = mu M + G                      its Nesterov direction
    O  = orthogonal(D)                 orthogonalize, every matrix by itself
    O  = O sqrt(max(n, m)) 0.18        scale_by_shape: the update's RMS is 0.18 for any shape
    W <- W (1 - lr 0.1) - lr O         optax.add_decayed_weights, optax.scale_by_learning_rate
"""

from __future__ import annotations

import math
from typing import Any, Callable, Sequence

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from deepseek_v4.optim.assign import MatrixAxes, path_of
from deepseek_v4.optim.batches import map_matrices
from deepseek_v4.optim.newton_schulz import COEFFICIENTS, newton_schulz

_LAST_TWO = MatrixAxes((-2,), (-1,))


def _flat(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
  """Leaves by path, whatever a partition has masked out of the tree."""
  return {path_of(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf)[0]}


def axes_of(updates: Any, axes: Any) -> list[MatrixAxes]:
  """The matrix axes, counted from the front, of every leaf of `updates`; see `orthogonalize`.

  Raises:
    ValueError: a leaf that `axes` does not know, or with fewer axes than a matrix of it has.
  """
  known = None if axes is None else _flat(axes, lambda x: isinstance(x, MatrixAxes))
  found = []
  for name, x in _flat(updates).items():
    pair = _LAST_TWO if known is None else known.get(name)
    if pair is None:
      raise ValueError(f"axes has no entry for {name}: expected MatrixAxes for every leaf that Muon updates")
    if x.ndim < sum(map(len, pair)):
      raise ValueError(f"{name} has shape {list(x.shape)}: expected a matrix, rows on axes {pair[0]}, columns on {pair[1]}")
    found.append(MatrixAxes(*(tuple(axis % x.ndim for axis in side) for side in pair)))
  return found


def specs_of(updates: Any, shardings: Any) -> Sequence[PartitionSpec | None]:
  """How every leaf of `updates` is sharded; None = unknown."""
  if shardings is None:
    return [None] * len(jax.tree.leaves(updates))
  known = _flat(shardings, lambda x: isinstance(x, (NamedSharding, PartitionSpec)))
  specs = [known[name] for name in _flat(updates)]
  return [x.spec if isinstance(x, NamedSharding) else x for x in specs]


def _stateless(update: Callable[[Any], Any]) -> optax.GradientTransformation:
  def update_fn(updates: Any, state: Any, params: Any = None) -> Any:
    del params
    return update(updates), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update_fn)


def orthogonalize(*, axes: Any = None, shardings: Any = None, dtype: jax.typing.DTypeLike = jnp.float32,
                  coefficients: Sequence[tuple[float, float, float]] = COEFFICIENTS) -> optax.GradientTransformation:
  """Replaces every matrix of the updates by the nearest orthogonal one; a zero matrix stays exactly zero.

  Matrices of equal shape, from all leaves, layers and experts, are one batch, spread over the ambient mesh, each on one
  device (`batches.py`). With dtype bfloat16 they travel as bfloat16 too.

  Args:
    axes: Tree of `MatrixAxes` (`optim.matrix_axes(params)`); None = the last two axes of every leaf.
    shardings: Tree of NamedShardings or PartitionSpecs of the parameters. None = unknown: right, but the partitioner
      then finds its own way from the leaf to the batch and back.
    dtype: Of the operands of Newton-Schulz's products.
    coefficients: Of Newton-Schulz's steps.
  """

  def update(updates: Any) -> Any:
    leaves, treedef = jax.tree.flatten(updates)
    travel = [x.astype(dtype) if jnp.dtype(dtype) == jnp.bfloat16 else x for x in leaves]
    results = map_matrices(lambda x: newton_schulz(x, dtype=dtype, coefficients=coefficients), travel,
                           axes_of(updates, axes), specs_of(updates, shardings))
    return jax.tree.unflatten(treedef, [y.astype(x.dtype) for x, y in zip(leaves, results)])

  return _stateless(update)


def scale_by_shape(update_rms: float = 0.18, *, axes: Any = None) -> optax.GradientTransformation:
  """Multiplies by sqrt(max(rows, columns)) * update_rms, so that an orthogonal matrix has the RMS update_rms.

  Args:
    update_rms: Root mean square of the result.
    axes: As for `orthogonalize`.
  """

  def update(updates: Any) -> Any:
    leaves, treedef = jax.tree.flatten(updates)
    sides = [max(math.prod(x.shape[i] for i in side) for side in pair) for x, pair in zip(leaves, axes_of(updates, axes))]
    return jax.tree.unflatten(treedef, [x * (update_rms * math.sqrt(side)) for x, side in zip(leaves, sides)])

  return _stateless(update)


def _momentum(decay: float, dtype: jax.typing.DTypeLike | None) -> optax.GradientTransformation:
  """optax.trace with Nesterov's direction whose state is kept in `dtype` but never computed with in it (optax's own
  `accumulator_dtype` would also multiply in bfloat16)."""
  trace = optax.trace(decay, nesterov=True)
  if dtype is None:
    return trace
  kept = lambda state: optax.tree.cast(state, dtype)

  def update(updates: Any, state: Any, params: Any = None) -> Any:
    exact = optax.TraceState(jax.tree.map(lambda m, g: m.astype(g.dtype), state.trace, updates))
    updates, state = trace.update(updates, exact, params)
    return updates, kept(state)

  return optax.GradientTransformation(lambda params: kept(trace.init(params)), update)


def scale_by_muon(*, momentum: float = 0.95, update_rms: float = 0.18, axes: Any = None, shardings: Any = None,
                  dtype: jax.typing.DTypeLike = jnp.float32, momentum_dtype: jax.typing.DTypeLike | None = None,
                  orthogonal: optax.GradientTransformation | None = None) -> optax.GradientTransformation:
  """Momentum, orthogonalisation, scale: Muon without decay and learning rate.

  State: the momentum, like params, rounded to `momentum_dtype` after every step if one is given; the direction of that step
  is that of the sum before it is rounded. `orthogonal`, if given, takes the place of `orthogonalize`.
  """
  return optax.chain(
      _momentum(momentum, momentum_dtype),
      orthogonal or orthogonalize(axes=axes, shardings=shardings, dtype=dtype),
      scale_by_shape(update_rms, axes=axes),
  )


def muon(learning_rate: optax.ScalarOrSchedule, *, momentum: float = 0.95, update_rms: float = 0.18,
         weight_decay: float = 0.1, axes: Any = None, shardings: Any = None,
         dtype: jax.typing.DTypeLike = jnp.float32) -> optax.GradientTransformation:
  """Muon for a tree of matrices: W <- W (1 - lr weight_decay) - lr O.

  Args:
    learning_rate: Number or Optax schedule.
    momentum: mu.
    update_rms: Root mean square of O for a gradient of full rank.
    weight_decay: Decoupled, times the learning rate.
    axes, shardings, dtype: See `orthogonalize`; by default the last two axes of every leaf are the matrix.
  """
  return optax.chain(
      scale_by_muon(momentum=momentum, update_rms=update_rms, axes=axes, shardings=shardings, dtype=dtype),
      optax.add_decayed_weights(weight_decay),
      optax.scale_by_learning_rate(learning_rate),
  )


def scale_by_adam(b1: float = 0.9, b2: float = 0.95, eps: float = 1e-20,
                  v_floor: float = 0.0) -> optax.GradientTransformation:
  """Adam's direction m / (sqrt(v) + eps), bias-corrected, with v at least v_floor.

  eps = 1e-20 is the report's (4.2.2). In float32 a gradient of 1e-19 has v = 0 (its square underflows) and would move by
  10 times the learning rate at first; a floor of 1e-36 makes that 0.1 and leaves gradients above 1e-18 alone.
  State: optax.ScaleByAdamState, the same with and without floor.
  """
  adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)
  if v_floor == 0:
    return adam

  def update(updates: Any, state: Any, params: Any = None) -> Any:
    _, state = adam.update(updates, state, params)
    m = optax.tree.bias_correction(state.mu, b1, state.count)
    v = optax.tree.bias_correction(state.nu, b2, state.count)
    return jax.tree.map(lambda m, v: m / (jnp.sqrt(jnp.maximum(v, v_floor)) + eps), m, v), state

  return optax.GradientTransformation(adam.init, update)
