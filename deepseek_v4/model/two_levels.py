"""A loop over repeated layers that keeps few streams: its backward pass recomputes a group of repeats, then layer by layer.

With R repeats in groups of g, ceil(R / g) streams outlive the forward pass, and while a group's gradient is made, one for
each of its layers. `jax.checkpoint` in two nested scans would do the same where g divides R, but Pro repeats its unit 29
times, and a shorter scan and the rest would need copies of all weights. So the gradient is written here: weights are read by
number from the stack that they lie in, and the last group's missing repeats are run in vain.

What no gradient is asked of costs none: frozen parameters are read but get no gradient, and where nothing that trains moves
the streams, as in the indexer's warm-up, no gradient goes through the layers at all, only from each layer's report.

Axis letters: B batch   S sequence   N streams   D hidden size   R repeats   G groups
"""

from __future__ import annotations

import functools
import math
from typing import Any, Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_v4 import sharding

# (parameters, what has no gradient, context, streams) -> (streams, report)
Layer = Callable[[Any, Any, Any, jax.Array], tuple[jax.Array, Any]]


def group_length(repeats: int, unit: int) -> int:
  """Repeats of a group so that the fewest streams exist at a time: of groups, and of the `unit` layers of its repeats.

  Among equals the one that runs the fewest repeats in vain. The best is near the square root (Chen et al. 2016).
  """
  def cost(length):
    groups = -(-repeats // length)
    return groups + length * unit, groups * length
  return min(range(1, repeats + 1), key=cost)


def run(layers: Sequence[Layer], params: Any, fixed: Any, context: Any, streams_BSND: jax.Array) -> tuple[jax.Array, Any]:
  """The streams, floating, after all repeats of a unit, dtype kept, and for each of its layers the reports, stacked over R.

  Where the streams in front of the loop have no gradient, each layer's is traced once more in the forward pass, to learn
  whether one of the streams behind it reaches anything (`_moves_streams`).

  Args:
    layers: of the unit.
    params: for each of them a tree of arrays [R, ...]; these and the streams get gradients, where one is asked for.
    fixed: the same of what has none.
    context: for all of them; without gradient.
  """
  repeats = jax.tree.leaves(params)[0].shape[0]
  length = group_length(repeats, len(layers))

  @jax.custom_vjp
  def loop(params, fixed, context, x):
    def step(x, number):
      _, x, reports = _unit(layers, *_read(params, fixed, number, x), context, x)
      return x, reports
    return jax.lax.scan(step, x, jnp.arange(repeats))

  def forward(params, fixed, context, x):
    trained, frozen = _parted(params)
    x_moves = x.perturbed
    params, fixed, context, x = jax.tree.map(lambda primal: primal.value, (params, fixed, context, x))
    through = x_moves or _moves_streams(layers, trained, frozen, fixed, context, x)

    def step(carry, number):
      x, kept = carry
      group = number // length
      old = jax.lax.dynamic_index_in_dim(kept, group, keepdims=False)
      kept = jax.lax.dynamic_update_index_in_dim(kept, jnp.where(number % length == 0, x, old), group, 0)
      _, x, reports = _unit(layers, *_read(params, fixed, number, x), context, x)
      return (x, kept), reports
    kept = sharding.constrain(jnp.zeros((-(-repeats // length), *x.shape), x.dtype), (None, "batch", "sequence", None, None))
    (x, kept), reports = jax.lax.scan(step, (x, kept), jnp.arange(repeats))
    # What is saved may only be arrays, so the answer is told by the form of a tree.
    return (x, reports), (trained, frozen, fixed, context, kept, () if through else None)

  loop.defvjp(forward, functools.partial(_backward, layers), symbolic_zeros=True)
  return loop(params, fixed, context, streams_BSND)


def _unit(layers: Sequence[Layer], params, fixed, context, x):
  """The inputs of each layer, what comes out of the last one, the reports."""
  inputs, reports = [], []
  for layer, own_params, own_fixed in zip(layers, params, fixed):
    inputs.append(x)
    x, report = layer(own_params, own_fixed, context, x)
    reports.append(report)
  return tuple(inputs), x, tuple(reports)


def _backward(layers: Sequence[Layer], saved, cotangents):
  """The gradients of `run`'s loop: group by group, of each its repeats' streams again, then layer by layer."""
  trained, frozen, fixed, context, kept, through = saved
  d_x, d_reports = jax.tree.map(_instantiated, cotangents)
  d_x = None if through is None else d_x
  params = _joined(trained, frozen)
  repeats = jax.tree.leaves(params)[0].shape[0]
  length = group_length(repeats, len(layers))

  def again(carry, number):
    inputs, x, _ = _unit(layers, *_read(params, fixed, jnp.minimum(number, repeats - 1), carry), context, carry)
    return x, inputs

  def back(carry, item):
    d_x, d_params = carry
    number, inputs = item
    own = jnp.minimum(number, repeats - 1)
    now, new = d_x, [None] * len(layers)
    for j in reversed(range(len(layers))):
      # Else a layer could be recomputed while another one's arrays still live.
      x, now, _ = jax.lax.optimization_barrier((inputs[j], now, new if now is None else None))
      (own_trained, own_frozen), own_fixed = _read((trained[j], frozen[j]), fixed[j], own, x if now is None else now)
      new[j], now = _layer_gradient(layers[j], own_trained, own_frozen, own_fixed, context, x, now, _at(d_reports[j], own))
    # What a missing repeat wrote is overwritten by the last one, which comes after it here.
    d_params = jax.tree.map(lambda all_, one: jax.lax.dynamic_update_index_in_dim(all_, one, own, 0), d_params, tuple(new))
    return (None if now is None else jnp.where(number < repeats, now, d_x), d_params), None

  def group(carry, item):
    first, start = item
    numbers = first + jnp.arange(length)
    _, inputs = jax.lax.scan(again, start, numbers)
    return jax.lax.scan(back, carry, (numbers, inputs), reverse=True)[0], None

  firsts = jnp.arange(kept.shape[0]) * length
  (d_x, d_params), _ = jax.lax.scan(group, (d_x, jax.tree.map(jnp.zeros_like, trained)), (firsts, kept), reverse=True)
  # Nobody reads these zeros.
  d_params = _joined(d_params, jax.tree.map(jnp.zeros_like, frozen))
  return d_params, None, None, jnp.zeros_like(kept[0]) if d_x is None else d_x


# ---- what a gradient is asked of ------------------------------------------------------------------------------------------
def _parted(primals: Any) -> tuple[Any, Any]:
  """(arrays of which gradients are asked, the others), each with None in the place of what is in the other tree."""
  part = lambda moves: jax.tree.map(lambda primal: primal.value if primal.perturbed == moves else None, primals)
  return part(True), part(False)


def _joined(one: Any, other: Any) -> Any:
  """The inverse of `_parted`."""
  return jax.tree.map(lambda a, b: b if a is None else a, one, other, is_leaf=lambda x: x is None)


def _instantiated(cotangent: Any) -> Any:
  """An array in the place of a zero that is only known to be one."""
  if not isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
    return cotangent
  if cotangent.dtype == jax.dtypes.float0:
    return np.zeros(cotangent.shape, jax.dtypes.float0)
  return jnp.zeros(cotangent.shape, cotangent.dtype)


def _moves_streams(layers: Sequence[Layer], trained: Any, frozen: Any, fixed: Any, context: Any, x: jax.Array) -> bool:
  """Whether a gradient of the streams behind a layer would reach what trains in it; nothing is computed."""
  reached = []

  @jax.custom_vjp
  def look(x):
    return x

  def forward(x):  # called while a gradient's program is traced, and only if there is one
    reached.append(x.perturbed)
    return x.value, None
  look.defvjp(forward, lambda _, d_x: (_instantiated(d_x),), symbolic_zeros=True)

  def gradient(j, number, trained, frozen, fixed, context, x):
    trained, frozen, fixed = _at((trained, frozen, fixed), number)
    streams = lambda own: look(layers[j](_joined(own, frozen), fixed, context, x)[0])
    return jax.vjp(streams, trained)[0]
  for j in range(len(layers)):
    jax.eval_shape(functools.partial(gradient, j), jnp.zeros((), jnp.int32), trained[j], frozen[j], fixed[j], context, x)
  return any(reached)


# ---- parts of the loop ----------------------------------------------------------------------------------------------------
def _at(tree: Any, number: jax.Array) -> Any:
  """What belongs to one repeat; cotangents of integers have no numbers."""
  return jax.tree.map(lambda x: x if x.dtype == jax.dtypes.float0
                      else jax.lax.dynamic_index_in_dim(x, number, keepdims=False), tree)


def _read(params: Any, fixed: Any, number: jax.Array, now: jax.Array) -> tuple[Any, Any]:
  """What belongs to one repeat, taken when `now` is there: else the casts of all repeats would be made before the loop."""
  params, _ = jax.lax.optimization_barrier((params, now))
  return _at((params, fixed), number)


def _layer_gradient(layer: Layer, trained, frozen, fixed, context, x, d_x, d_report):
  """Gradients of what trains in a layer and of its input; without `d_x` of the former alone, from the report."""
  differentiable = lambda report: [leaf for leaf in jax.tree.leaves(report) if jnp.issubdtype(leaf.dtype, jnp.inexact)]

  def value(trained, x):
    x, report = layer(_joined(trained, frozen), fixed, context, x)
    return x, differentiable(report)

  if d_x is None:
    return *jax.vjp(lambda own: value(own, x)[1], trained)[1](differentiable(d_report)), None
  return jax.vjp(value, trained, x)[1]((d_x, differentiable(d_report)))


def lone_length(layers: int) -> int:
  """Of so many layers that are not repeated, how many are recomputed together."""
  return math.isqrt(max(layers - 1, 0)) + 1
