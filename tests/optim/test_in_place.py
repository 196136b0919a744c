"""An update in place: the whole optimizer's numbers, in blocks of any size, on one device and on eight, in little room."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_v4.config import OptimizerConfig
from deepseek_v4.optim import block_of, build_optimizer, stays_finite, update_in_place
from tests.training.small import leaves, with_leaf

CONFIG = OptimizerConfig(learning_rate=0.02, warmup_steps=2, decay_steps=3, clip_norm=2.0)
REPEATS = 5
MATRIX_BYTES = 4 * 8 * 6  # of one expert's matrix


def tree_of(seed):
  """5 repeats of 8 experts' two matrices in each of two layers, a lone layer's, and others."""
  rng = np.random.default_rng(seed)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  experts = lambda *repeats: {"experts": {"gate": normal(*repeats, 8, 8, 6), "down": normal(*repeats, 8, 6, 8)}}
  return {
    "embed": {"embedding": normal(11, 8)},
    "layers": {
      "layer_00": {"moe": experts(), "attention": {"kv": normal(12, 16)}},
      "unit_0": {"moe": experts(REPEATS), "attention": {"q_b": normal(REPEATS, 5, 2, 4), "sink": normal(REPEATS, 4)}},
      "unit_1": {"moe": experts(REPEATS) | {"shared": {"up": normal(REPEATS, 8, 6)}}}}}


SPECS = {"gate": P("expert", "fsdp"), "down": P("expert", None, "fsdp")}


def shardings_on(mesh):
  def of_leaf(path, x):
    spec = SPECS.get(path[-1].key, P())
    return NamedSharding(mesh, P(*[None] * (x.ndim - 3), *spec) if spec else P())
  return jax.tree_util.tree_map_with_path(of_leaf, tree_of(0))


@pytest.fixture(scope="module")
def start():
  """(params, state with moments, gradients): the state after a step with others."""
  params = tree_of(0)
  optimizer = build_optimizer(CONFIG, params, steps=6)
  state = jax.jit(lambda g, p: optimizer.update(g, optimizer.init(p), p)[1])(tree_of(1), params)
  return params, jax.device_get(state), tree_of(2)


def by_optax(config, params, state, grads):
  optimizer = build_optimizer(config, params, steps=6)
  updates, state = optimizer.update(grads, state, params)
  return optax.apply_updates(params, updates), state


def in_place(params, state, grads, keep=lambda new, old: new, shardings=None, **rest):
  return update_in_place(CONFIG, grads, state, params, norm=optax.tree.norm(grads), keep=keep, steps=6, shardings=shardings,
                         **rest)


@pytest.fixture(scope="module")
def want(start):
  """The whole update by Optax."""
  return jax.jit(lambda *x: by_optax(CONFIG, *x))(*start)


def close(got, want):
  got, want = leaves(got), leaves(want)
  assert list(got) == list(want)
  for name, x in want.items():
    np.testing.assert_allclose(got[name], x, atol=1e-6, err_msg=name)  # updates are of 0.02 x 0.5: 1e-4 of them


# Of one device 32 matrices a repeat, of eight 4 a repeat.
# In every run a block that leaves repeats over, and all at once; blocks of one repeat are in the long tier.
@pytest.mark.parametrize("devices, repeats, expected", [
  pytest.param(1, 1, (1, 5), marks=pytest.mark.long), (1, 2, (2, 4)), (1, 9, (0, 0)),
  pytest.param(8, 1, (1, 5), marks=pytest.mark.long), (8, 3, (3, 3))])
def test_blocks_of_any_size_give_the_whole_update(start, want, devices, repeats, expected):
  params, state, grads = start
  bytes_of_block = repeats * 32 // devices * MATRIX_BYTES
  if devices == 1:
    assert block_of(CONFIG, params, None, bytes_of_block) == expected
    close(jax.jit(lambda *x: in_place(*x, block_bytes=bytes_of_block))(*start), want)
    return
  mesh = jax.make_mesh((2, 4), ("fsdp", "expert"), axis_types=(AxisType.Auto,) * 2)
  shardings = shardings_on(mesh)
  with jax.set_mesh(mesh):
    assert block_of(CONFIG, params, shardings, bytes_of_block) == expected
    placed = jax.device_put(params, shardings), state, jax.device_put(grads, shardings)
    close(jax.jit(lambda *x: in_place(*x, shardings=shardings, block_bytes=bytes_of_block))(*placed), want)


def test_a_block_spreads_evenly_over_the_devices():
  """64 places for the 8 x 4 matrices of a repeat: two repeats are the least of which every device has a matrix. With 24 a
  repeat it takes eight, and with 5 repeats no block is even."""
  sizes = (8, 8)
  with jax.sharding.use_abstract_mesh(AbstractMesh(sizes, ("fsdp", "expert"), axis_types=(AxisType.Auto,) * 2)):
    shardings = jax.tree.map(lambda x: P(), tree_of(0))
    assert block_of(CONFIG, tree_of(0), shardings, 1) == (2, 4)
    lone = {"layers": {"unit_0": {"moe": {"experts": {"gate": np.zeros((REPEATS, 24, 8, 6))}}}}}
    assert block_of(CONFIG, lone, {"layers": {"unit_0": {"moe": {"experts": {"gate": P()}}}}}, 1) == (0, 0)


@pytest.mark.parametrize("axis, expected", [("fsdp", (4, 4)), ("data", (2, 4))])
def test_a_block_counts_what_replicas_gather(axis, expected):
  """Two devices, each with half of 16 matrices a repeat, which over `data` both have in the end: room for 64 or 32."""
  tree = {"layers": {"unit_0": {"moe": {"experts": {"gate": np.zeros((REPEATS, 16, 8, 6))}}}}}
  spec = {"layers": {"unit_0": {"moe": {"experts": {"gate": P(None, axis if axis == "fsdp" else None)}}}}}
  with jax.sharding.use_abstract_mesh(AbstractMesh((2,), (axis,), axis_types=(AxisType.Auto,))):
    assert block_of(CONFIG, tree, spec, 32 * MATRIX_BYTES) == expected


def test_adamw_alone_walks_nothing():
  assert block_of(dataclasses.replace(CONFIG, matrix_owner="adamw"), tree_of(0), None, 1) == (0, 0)
  assert block_of(CONFIG, {"embed": tree_of(0)["embed"]}, None, 1) == (0, 0)


def test_what_is_kept_is_asked_of_every_number(start):
  old = jax.jit(lambda *x: in_place(*x, keep=lambda new, old: old, block_bytes=1))(*start)
  for name, x in leaves(start[:2]).items():
    np.testing.assert_array_equal(leaves(old)[name], x, err_msg=name)


def test_leaves_that_do_not_train_keep_their_moments(start):
  """Only the experts of unit_1 train; all else is the old state's, its counters apart."""
  params, state, grads = start
  only = lambda tree: jax.tree_util.tree_map_with_path(
    lambda path, x: x if "unit_1/moe/experts" in "/".join(str(k.key) for k in path) else None, tree)
  new, after = jax.jit(lambda *x: in_place(only(x[0]), x[1], only(x[2]), block_bytes=1))(*start)
  assert len(leaves(new)) == 2
  before, after = leaves(state), leaves(after)
  moved = {name for name, x in before.items() if not np.array_equal(after[name], x)}
  assert {name.split("/trace/")[1] for name in moved if "/trace/" in name} == {
    f"layers/unit_1/moe/experts/{name}" for name in ("gate", "down")}
  assert all(before[name].ndim == 0 for name in moved if "/trace/" not in name) and len(moved) > 2


# ---- what is not finite -------------------------------------------------------------------------------------------------
def changed(x, value):
  x.reshape(-1)[3] = value
  return x


@pytest.mark.parametrize("tree, name, value, finite", [
  ("params", "layers/unit_0/moe/experts/gate", np.nan, False),
  ("params", "embed/embedding", np.inf, False),
  ("params", "embed/embedding", 1e38, True),
  ("state", "trace/layers/unit_1/moe/shared/up", np.inf, False),
  ("state", "mu/embed/embedding", np.nan, False),
  ("state", "nu/embed/embedding", np.inf, True),  # m / inf is no move
  ("grads", "layers/layer_00/attention/kv", np.nan, False),
  (None, None, None, True),
])
def test_a_number_that_would_not_be_finite_is_foreseen(start, tree, name, value, finite):
  """As the update itself shows it."""
  given = dict(zip(("params", "state", "grads"), start))
  if tree:
    path = next(path for path in leaves(given[tree]) if path.endswith(name))
    given[tree] = with_leaf(given[tree], path, lambda x: changed(x, value))
  new, _ = _WHOLE(*given.values())
  assert all(np.isfinite(x).all() for x in leaves(new).values()) == finite
  assert _FORESEEN(*given.values()) == finite


_WHOLE = jax.jit(lambda *x: by_optax(dataclasses.replace(CONFIG, clip_norm=1e9), *x))
_FORESEEN = jax.jit(lambda params, state, grads: stays_finite(
  dataclasses.replace(CONFIG, clip_norm=1e9), grads, state, params, norm=optax.tree.norm(grads), steps=6))


def test_a_rate_that_would_overflow_is_foreseen(start):
  params, state, grads = start
  config = dataclasses.replace(CONFIG, learning_rate=3e38, warmup_steps=0)
  assert not jax.jit(lambda *x: stays_finite(config, x[2], x[1], x[0], norm=optax.tree.norm(x[2]), steps=6))(*start)


# ---- room ---------------------------------------------------------------------------------------------------------------
def test_an_update_needs_little_room():
  """16 repeats walked one by one: temporaries are less than 0.4 of those of all at once. XLA for CPUs copies the momentum,
  which is as large as the parameters, and nothing else of that size."""
  shape = {"layers": {"unit_0": {"moe": {"experts": {name: jax.ShapeDtypeStruct((16, 8, 64, 64), jnp.float32)
                                                     for name in ("gate", "up", "down")}}}}}
  state = jax.eval_shape(build_optimizer(CONFIG, shape, steps=6).init, shape)
  size = sum(x.size * 4 for x in jax.tree.leaves(shape))

  def temporaries(block_bytes):
    def update(params, state, grads, norm, fine):
      return update_in_place(CONFIG, grads, state, params, norm=norm, steps=6, block_bytes=block_bytes,
                             keep=lambda new, old: jax.lax.select(fine, new, old))
    scalars = jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((), bool)
    compiled = jax.jit(update, donate_argnums=(0, 1)).lower(shape, state, shape, *scalars).compile()
    return compiled.memory_analysis().temp_size_in_bytes / size
  walked, whole = temporaries(size // 16), temporaries(size)
  print(walked, whole)
  assert walked < 1.25 and walked < 0.4 * whole
