"""Every op, every case, every implementation: values against float64 loops, gradients against their finite differences."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.cases import all_cases
from pallas_kernels.hyper_connections import collapse, expand
from pallas_kernels.selection import Selection
from pallas_kernels.sparse_attention import attend, attend_with, form
from tests.kernels import oracles

CASES = all_cases()
SPARSE = "interpret, sparse form"  # attention's other kernels, which no name of an implementation asks for
KERNEL_TOLERANCE = 5e-5  # in float32, of cases that name only float64; as the cases' own for float32


def tolerance(case, dtype):
  return case.tolerances.get(dtype, KERNEL_TOLERANCE)


def walk():
  """(case, dtype, implementation): plain JAX in every dtype of the case, the kernels (interpreted) in those of a TPU.

  Of the sparse form, whose program takes long to compile, in one dtype; bfloat16 is in `test_sparse_form`.
  """
  for case in CASES:
    for dtype in case.tolerances:
      yield from ((case, dtype, name) for name in ("reference", "blockwise") if dtype == "float64" or name == "blockwise")
    for dtype in {"float32": 0, **case.tolerances}:
      if dtype != "float64":
        yield case, dtype, "interpret"
  yield from ((case, "float32", SPARSE) for case in CASES if case.op is attend)


WALK = list(walk())
SPARSE_IN_SUITE = ("picks scattered, two packed rows", "earlier keys, fewer than the window")
# Cases of which the suite leaves out the kernels: two streams of `expand_collapse` are in `test_hyper_connections_kernel`,
# and keys of earlier tokens in another case.
WITHOUT_KERNELS = ("two streams", "earlier keys, more than the window")


def in_suite(case, dtype, name):
  """What the suite has time for: of every case plain JAX in float64, and the kernels of most; bfloat16 of every kernel
  but those of collapse and expand, which are joined in `expand_collapse`. float32 of plain JAX is what the model's tests
  run."""
  if name == SPARSE:
    return case.name in SPARSE_IN_SUITE
  if dtype == "bfloat16":
    return case.op not in (collapse, expand)  # `expand_collapse` is both
  return dtype == "float64" or name == "interpret" and case.name not in WITHOUT_KERNELS


def marked(items):
  """The same, with what the suite has no time for in the long tier."""
  return [item if in_suite(*item) else pytest.param(*item, marks=pytest.mark.long) for item in items]


BY_TITLE = {case.title: case for case in CASES}


def outputs(result):
  """Arrays to compare; a selection is a set per query."""
  if isinstance(result, Selection):
    return (jnp.sort(result.indices(), -1),)
  return result if isinstance(result, tuple) else (result,)


def cotangents(values):
  """Fixed random weights of every number of a result, so that one backward pass speaks about all of them."""
  rng = np.random.default_rng(7)
  return tuple(rng.normal(size=x.shape) for x in values)


def run(case, arrays, implementation):
  """The op's result."""
  if implementation != SPARSE:
    return case.run(arrays, implementation)
  return attend_with(form("sparse", interpret=True), **arrays, **case.options)


@functools.cache
def compiled(title, implementation):
  """(moving, fixed) -> (values, gradients of their weighted sum with respect to `moving`), jitted."""
  @jax.jit
  def both(moving, fixed):
    values, pull = jax.vjp(lambda moving: outputs(run(BY_TITLE[title], {**moving, **fixed}, implementation)), moving)
    return values, pull(tuple(w.astype(v.dtype) for w, v in zip(cotangents(values), values)))[0] if moving else {}
  return both


def evaluate(case, arrays, dtype, implementation):
  """(values, gradients) of one implementation as NumPy arrays."""
  with jax.enable_x64(dtype == "float64"):
    moving = {name: arrays[name] for name in case.differentiable}
    fixed = {name: x for name, x in arrays.items() if name not in moving}
    return jax.tree.map(np.asarray, compiled(case.title, implementation)(moving, fixed))


@functools.cache
def ours(title, dtype, implementation):
  """(inputs, values, gradients) of one implementation on the case's inputs."""
  case = BY_TITLE[title]
  with jax.enable_x64(True):  # the same numbers, rounded, in every dtype
    arrays = case.arrays(jnp.dtype(dtype))
  return arrays, *evaluate(case, arrays, dtype, implementation)


def truth(case, arrays):
  """The loops' values for these inputs."""
  loop = getattr(oracles, case.op.__name__)
  known = {name: x for name, x in {**arrays, **case.options}.items() if name in inspect.signature(loop).parameters
           or name in ("positions", "segment_ids", "entry_last", "entry_segment")}
  return loop(**known)


def close(got, want, share, what):
  """Equal within a share of the largest number."""
  got = np.asarray(got).astype(np.float64)
  assert got.shape == want.shape
  limit = share * max(np.abs(want).max(initial=0.0), 1e-30)
  error = np.abs(got - want).max(initial=0.0)
  assert error <= limit, f"{what}: {error:.2e} apart, allowed {limit:.2e}"


def ids(value):
  return value.title if hasattr(value, "title") and not isinstance(value, str) else str(value)


@pytest.mark.parametrize("case, dtype, implementation", marked(WALK), ids=ids)
def test_values_equal_float64_loops(case, dtype, implementation):
  arrays, values, _ = ours(case.title, dtype, implementation)
  for i, (got, want) in enumerate(zip(values, truth(case, arrays), strict=True)):
    close(got, want, tolerance(case, dtype), f"result {i}")


@pytest.mark.parametrize("case", [case for case in CASES if case.differentiable], ids=ids)
def test_reference_gradients_equal_finite_differences(case):
  """d(weighted sum)/d(input along a random direction), for every input by itself, by central differences of the loops."""
  arrays, values, gradients = ours(case.title, "float64", "reference")
  weights = cotangents(values)
  rng = np.random.default_rng(3)
  for name in case.differentiable:
    x = np.asarray(arrays[name])
    direction = np.where(np.isnan(x), 0, rng.normal(size=x.shape))
    step = 1e-6  # small enough that no clamp and no relu changes sides
    total = lambda moved, name=name: sum((w * v).sum() for w, v in zip(weights, truth(case, {**arrays, name: moved})))
    numeric = (total(x + step * direction) - total(x - step * direction)) / (2 * step)
    assert np.isfinite(gradients[name]).all()
    analytic = (gradients[name] * direction).sum()
    size = max(abs(numeric), np.linalg.norm(gradients[name]), 1e-3)
    assert abs(analytic - numeric) < 2e-6 * size, f"{name}: {analytic} by the gradient, {numeric} by differences"


@pytest.mark.parametrize("case, dtype, implementation", marked(
  item for item in WALK if item[0].differentiable and item[2] != "reference"), ids=ids)
def test_gradients_equal_the_reference(case, dtype, implementation):
  """Against the formula's gradient in float64 at the same numbers."""
  arrays, _, gradients = ours(case.title, dtype, implementation)
  if dtype == "float64":
    want = ours(case.title, "float64", "reference")[2]
  else:
    widen = lambda x: np.asarray(x).astype(np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else np.asarray(x)
    want = evaluate(case, jax.tree.map(widen, arrays), "float64", "reference")[1]
  for name in case.differentiable:
    assert gradients[name].dtype == arrays[name].dtype
    close(gradients[name], want[name], tolerance(case, dtype), f"gradient of {name}")


FIRST = list({case.op: case for case in reversed(CASES)}.values())  # one of each op


@pytest.mark.parametrize("implementation", ["blockwise", "interpret"])
@pytest.mark.parametrize("case", [case if case in FIRST else pytest.param(case, marks=pytest.mark.long) for case in CASES],
                         ids=ids)
def test_without_jit_it_is_the_same(case, implementation):
  """Outside `jax.jit`, operation by operation; programs round differently, so up to float32's own tolerance."""
  arrays, want, _ = ours(case.title, "float32", implementation)
  for i, (got, whole) in enumerate(zip(outputs(run(case, arrays, implementation)), want, strict=True)):
    close(got, whole.astype(np.float64), tolerance(case, "float32"), f"result {i}")


def test_cases_have_names_of_their_own():
  titles = [case.title for case in CASES]
  assert len(set(titles)) == len(titles)
