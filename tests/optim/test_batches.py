"""Batches of matrices on meshes of 8 devices: the same numbers, whole matrices per device, few collectives."""

import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_v4.optim import MatrixAxes, orthogonalize
from deepseek_v4.optim.batches import flops_of_devices, layout_of, map_matrices
from deepseek_v4.optim.newton_schulz import COEFFICIENTS, flops
from deepseek_v4.planning.collectives import collectives as planned

AXIS_NAMES = ("data", "fsdp", "expert", "context", "tensor")

# name: shape, matrix axes, sharding. Two matrix shapes: 16 x 24 for the first five, 8 x 16.
LEAVES = {
    "gate": ((3, 8, 16, 24), MatrixAxes((2,), (3,)), P(None, "expert", "fsdp", "tensor")),
    "down": ((3, 8, 24, 16), MatrixAxes((2,), (3,)), P(None, "expert", "tensor", "fsdp")),
    "shared": ((3, 16, 24), MatrixAxes((1,), (2,)), P(None, "fsdp", "tensor")),
    "q_b": ((16, 4, 6), MatrixAxes((0,), (1, 2)), P("fsdp", "tensor")),
    "lone": ((24, 16), MatrixAxes((0,), (1,)), P()),
    "two_on_one": ((16, 8), MatrixAxes((0,), (1,)), P(("fsdp", "tensor"), None)),
    "groups": ((3, 4, 16, 8), MatrixAxes((2,), (3,)), P(None, "tensor", "fsdp")),
}
AXES = {name: axes for name, (_, axes, _) in LEAVES.items()}


def mesh_of(**sizes):
  shape = tuple(sizes.get(name, 1) for name in AXIS_NAMES)
  return jax.make_mesh(shape, AXIS_NAMES, axis_types=(AxisType.Auto,) * len(AXIS_NAMES))


@pytest.fixture(scope="module")
def gradients():
  rng = np.random.default_rng(0)
  return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, (shape, _, _) in LEAVES.items()}


@pytest.fixture(scope="module")
def expected(gradients):
  return jax.device_get(jax.jit(lambda g: orthogonalize(axes=AXES).update(g, optax.EmptyState())[0])(gradients))


def compiled_update(mesh, gradients, known=True, coefficients=COEFFICIENTS):
  """The compiled update with everything sharded as LEAVES says, and the sharded arguments."""
  shardings = {name: NamedSharding(mesh, spec) for name, (_, _, spec) in LEAVES.items()}
  transform = orthogonalize(axes=AXES, shardings=shardings if known else None, coefficients=coefficients)
  update = jax.jit(lambda g: transform.update(g, optax.EmptyState())[0], in_shardings=(shardings,), out_shardings=shardings)
  with jax.set_mesh(mesh):
    return update.lower(gradients).compile(), jax.device_put(gradients, shardings)


def collectives(text):
  kinds = r"\b(all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|collective-broadcast)(?:-start)?\("
  return Counter(re.findall(kinds, text))


# Lists, not sets: a test's name must not hang on the hash seed, or two workers collect different tests.
@pytest.mark.parametrize("sizes, allowed", [
    (dict(data=8), ["all-gather", "all-reduce"]),
    (dict(data=2, expert=2, tensor=2), ["all-gather", "all-reduce", "all-to-all"]),
], ids=str)
def test_sharded_equals_one_device_and_exchanges_directly(gradients, expected, sizes, allowed):
  compiled, arguments = compiled_update(mesh_of(**sizes), gradients)
  got = compiled(arguments)
  for name, x in got.items():
    np.testing.assert_allclose(x, expected[name], atol=1e-6, err_msg=name)
    assert x.sharding.is_equivalent_to(arguments[name].sharding, x.ndim)
  # Only moves of whole matrices: no sums over devices but of few matrices with zeros, nothing sent around in rings.
  assert set(collectives(compiled.as_text())) <= set(allowed)


def test_collectives_do_not_grow_with_the_steps(gradients, expected):
  mesh = mesh_of(fsdp=2, expert=2, tensor=2)
  few, _ = compiled_update(mesh, gradients, coefficients=COEFFICIENTS[-2:])
  many, arguments = compiled_update(mesh, gradients)
  assert collectives(few.as_text()) == collectives(many.as_text())
  assert set(collectives(many.as_text())) == {"all-to-all", "all-gather", "all-reduce"}
  # None is inside a loop or a branch either: those are computations of their own.
  assert [c.startswith("ENTRY") for c in re.split(r"\n(?=\S)", many.as_text()) if collectives(c)] == [True]
  for name, x in many(arguments).items():
    np.testing.assert_allclose(x, expected[name], atol=1e-6, err_msg=name)


def test_unknown_shardings_give_the_same_numbers(gradients, expected):
  compiled, arguments = compiled_update(mesh_of(fsdp=2, expert=4), gradients, known=False)
  for name, x in compiled(arguments).items():
    np.testing.assert_allclose(x, expected[name], atol=1e-6, err_msg=name)


def test_every_device_has_its_share_of_whole_matrices(gradients):
  """24 + 24 + 3 matrices of 16 x 24 on 8 devices: a batch of 6 on each, and 3 devices have one more, alone."""
  seen, done = [], []

  def function(x):
    seen.append(x.shape)
    if x.ndim == 2:
      jax.debug.callback(lambda: done.append(1))
    return 2 * x

  names = ("gate", "down", "shared")
  with jax.set_mesh(mesh_of(fsdp=2, expert=4)):
    results = jax.jit(lambda g: map_matrices(function, [g[name] for name in names], [AXES[name] for name in names],
                                             [LEAVES[name][2] for name in names]))(gradients)
  jax.effects_barrier()
  assert seen == [(2, 4, 6, 16, 24), (16, 24)] and len(done) == 3
  for name, x in zip(names, results):
    np.testing.assert_array_equal(x, 2 * gradients[name])


@pytest.mark.parametrize("sizes", [dict(data=8), dict(data=2, fsdp=4), dict(fsdp=2, expert=2, tensor=2)], ids=str)
def test_large_matrices_leave_small_ones_to_others(sizes):
  """Of 3 large and 20 small matrices, no device has both a large one and as many small ones as others, and whatever order
  they travel in, each is back at its place."""
  rng = np.random.default_rng(1)
  g = {"large": jnp.asarray(rng.normal(size=(3, 32, 48)), jnp.float32), "small": jnp.asarray(rng.normal(
    size=(20, 16, 32)), jnp.float32)}
  spec = {"large": P(None, ("fsdp", "tensor")), "small": P(None, "fsdp", "expert")}
  shape = tuple(sizes.get(name, 1) for name in AXIS_NAMES)
  real = {name: size for name, size in zip(AXIS_NAMES, shape) if size > 1}
  axes = MatrixAxes((1,), (2,))
  work = flops_of_devices([x.shape for x in g.values()], [axes] * 2, list(spec.values()), real)
  assert work.sum() == 3 * flops(32, 48) + 20 * flops(16, 32) and work.max() < flops(32, 48) + flops(16, 32) * 20 / 8
  with jax.set_mesh(mesh_of(**sizes)):
    large, small = jax.jit(lambda g: map_matrices(lambda x: x * x.shape[-1], list(g.values()), [axes] * 2,
                                                  list(spec.values())))(g)
  np.testing.assert_array_equal(large, 48 * g["large"])
  np.testing.assert_array_equal(small, 32 * g["small"])


@pytest.mark.parametrize("sizes", [dict(fsdp=2, expert=4), dict(fsdp=4, expert=2), dict(data=2, fsdp=2, expert=2)], ids=str)
@pytest.mark.parametrize("count", [1, 3, 5, 8, 11])
def test_replicas_get_each_other_s_matrices_and_no_empty_room(count, sizes):
  """Rows of 16 x 24 are split over `expert`, of each part there are replicas. Gathered are from each as many matrices as the
  one with the most has made; where that is more than twice all of them, they are added up."""
  g = jnp.asarray(np.random.default_rng(2).normal(size=(count, 16, 24)), jnp.float32)
  mesh, spec = mesh_of(**sizes), P(None, "expert")
  place = NamedSharding(mesh, spec)
  with jax.set_mesh(mesh):
    run = jax.jit(lambda g: map_matrices(lambda x: 2 * x, [g], [MatrixAxes((1,), (2,))], [spec])[0], in_shardings=place,
                  out_shardings=place).lower(g).compile()
  np.testing.assert_array_equal(run(jax.device_put(g, place)), 2 * g)
  made = flops_of_devices([g.shape], [MatrixAxes((1,), (2,))], [spec], sizes) / flops(16, 24)
  made = made.reshape(8 // sizes["expert"], -1).sum(1)  # by each replica, all parts together
  (last,) = [one for one in planned(run.as_text()) if one.kind in ("all-gather", "all-reduce")]
  assert len(last.devices) == len(made) and made.sum() == count
  summed = len(made) * made.max() > 2 * count
  assert last.kind == ("all-reduce" if summed else "all-gather")
  matrices = count if summed else len(made) * made.max()
  assert max(np.prod(shape) for _, shape in last.arrays) == matrices * 16 // sizes["expert"] * 24


def test_without_a_mesh_there_is_one_batch_for_every_shape(gradients):
  seen = []
  jax.eval_shape(lambda g: map_matrices(lambda x: seen.append(x.shape) or x, list(g.values()), [AXES[name] for name in g]),
                 gradients)
  assert sorted(seen) == [(1 + 12, 8, 16), (24 + 24 + 3 + 1 + 1, 16, 24)]


def test_an_axis_that_does_not_divide_is_refused():
  with pytest.raises(ValueError, match=r"axis 0 of \[6, 8\].*expected a multiple of 4"):
    layout_of((6, 8), MatrixAxes((0,), (1,)), P("fsdp"), {"fsdp": 4})
