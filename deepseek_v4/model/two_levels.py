"""A loop over repeated layers that keeps few streams: its backward pass recomputes a group of repeats, then layer by layer.

With R repeats in groups of g, ceil(R / g) streams outlive the forward pass, and while a group's gradient is made, one for
each of its layers. `jax.checkpoint` in two nested scans would do the same where g divides R, but Pro repeats its unit 29
times, and a shorter scan and the rest would need copies of all weights. So the gradient is written here: weights are read by
number from the stack that they lie in, and the last group's missing repeats are run in vain.

Axis letters: B batch   S sequence   N streams   D hidden size   R repeats   G groups
"""

from __future__ import annotations

import math
from typing import Any, Callable, Sequence

import jax
import jax.numpy as jnp

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

  Args:
    layers: of the unit.
    params: for each of them a tree of arrays [R, ...]; these and the streams get gradients.
    fixed: the same of what has none.
    context: for all of them; without gradient.
  """
  repeats = jax.tree.leaves(params)[0].shape[0]
  length = group_length(repeats, len(layers))

  def unit(params, fixed, context, x):
    """The inputs of each layer, what comes out of the last one, the reports."""
    inputs, reports = [], []
    for layer, own_params, own_fixed in zip(layers, params, fixed):
      inputs.append(x)
      x, report = layer(own_params, own_fixed, context, x)
      reports.append(report)
    return tuple(inputs), x, tuple(reports)

  @jax.custom_vjp
  def loop(params, fixed, context, x):
    def step(x, number):
      _, x, reports = unit(*_read(params, fixed, number, x), context, x)
      return x, reports
    return jax.lax.scan(step, x, jnp.arange(repeats))

  def forward(params, fixed, context, x):
    def step(carry, number):
      x, kept = carry
      group = number // length
      old = jax.lax.dynamic_index_in_dim(kept, group, keepdims=False)
      kept = jax.lax.dynamic_update_index_in_dim(kept, jnp.where(number % length == 0, x, old), group, 0)
      _, x, reports = unit(*_read(params, fixed, number, x), context, x)
      return (x, kept), reports
    kept = sharding.constrain(jnp.zeros((-(-repeats // length), *x.shape), x.dtype), (None, "batch", "sequence", None, None))
    (x, kept), reports = jax.lax.scan(step, (x, kept), jnp.arange(repeats))
    return (x, reports), (params, fixed, context, kept)

  def backward(saved, cotangents):
    params, fixed, context, kept = saved
    d_x, d_reports = cotangents

    def again(carry, number):
      inputs, x, _ = unit(*_read(params, fixed, jnp.minimum(number, repeats - 1), carry), context, carry)
      return x, inputs

    def back(carry, item):
      d_x, d_params = carry
      number, inputs = item
      own = jnp.minimum(number, repeats - 1)
      now, new = d_x, [None] * len(layers)
      for j in reversed(range(len(layers))):
        # Else a layer could be recomputed while another one's arrays still live.
        x, now = jax.lax.optimization_barrier((inputs[j], now))
        own_params, own_fixed = _read(params[j], fixed[j], own, now)
        new[j], now = _layer_gradient(layers[j], own_params, own_fixed, context, x, now, _at(d_reports[j], own))
      # What a missing repeat wrote is overwritten by the last one, which comes after it here.
      d_params = jax.tree.map(lambda all_, one: jax.lax.dynamic_update_index_in_dim(all_, one, own, 0), d_params, tuple(new))
      return (jnp.where(number < repeats, now, d_x), d_params), None

    def group(carry, item):
      first, start = item
      numbers = first + jnp.arange(length)
      _, inputs = jax.lax.scan(again, start, numbers)
      return jax.lax.scan(back, carry, (numbers, inputs), reverse=True)[0], None

    firsts = jnp.arange(kept.shape[0]) * length
    (d_x, d_params), _ = jax.lax.scan(group, (d_x, jax.tree.map(jnp.zeros_like, params)), (firsts, kept), reverse=True)
    return d_params, None, None, d_x

  loop.defvjp(forward, backward)
  return loop(params, fixed, context, streams_BSND)


def _at(tree: Any, number: jax.Array) -> Any:
  """What belongs to one repeat; cotangents of integers have no numbers."""
  return jax.tree.map(lambda x: x if x.dtype == jax.dtypes.float0
                      else jax.lax.dynamic_index_in_dim(x, number, keepdims=False), tree)


def _read(params: Any, fixed: Any, number: jax.Array, now: jax.Array) -> tuple[Any, Any]:
  """What belongs to one repeat, taken when `now` is there: else the casts of all repeats would be made before the loop."""
  params, _ = jax.lax.optimization_barrier((params, now))
  return _at((params, fixed), number)


def _layer_gradient(layer: Layer, params, fixed, context, x, d_x, d_report):
  """Gradients of one layer's parameters and of its input."""
  differentiable = lambda report: [leaf for leaf in jax.tree.leaves(report) if jnp.issubdtype(leaf.dtype, jnp.inexact)]

  def value(params, x):
    x, report = layer(params, fixed, context, x)
    return x, differentiable(report)

  _, pull = jax.vjp(value, params, x)
  return pull((d_x, differentiable(d_report)))


def lone_length(layers: int) -> int:
  """Of so many layers that are not repeated, how many are recomputed together."""
  return math.isqrt(max(layers - 1, 0)) + 1
