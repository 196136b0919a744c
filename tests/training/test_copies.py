"""Gradients of copies: rounding without bias, sums that all copies share, half the bytes, a whole step over two slices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_v4 import config as c
from deepseek_v4 import sharding
from deepseek_v4.planning.collectives import collectives
from deepseek_v4.training.copies import round_stochastically, sum_gradients
from tests.training.small import LOSSES, RUN, Step, differing, gradients_of, random_batch, random_state, reference

MESH = c.MeshConfig(dcn_data=2, data=2, fsdp=2)
SHAPES = {"split": ((4, 6), P("fsdp", None)), "odd": ((2, 3, 5), P(None)), "scalar": ((), P())}


# ---- rounding ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("value", [1.0003, -1.0003, 3.1415927, 1e-30, -2.5e-20, 7e20])
def test_the_mean_of_many_roundings_is_the_number(value):
  """Between neighbours a and b, x becomes b with probability p = (x - a) / (b - a), to a 16-bit noise's 2^-16; the mean of
  200,000 is off by 5 standard deviations less than once in a million times."""
  count = 200_000
  x = np.float32(value)
  got = np.asarray(round_stochastically(jnp.full(count, x), jax.random.key(0)).astype(jnp.float32), np.float64)
  low = np.uint32(x.view(np.uint32) & 0xffff0000).view(np.float32).astype(np.float64)
  high = np.uint32((x.view(np.uint32) & 0xffff0000) + 0x10000).view(np.float32).astype(np.float64)
  assert set(got) == {low, high}
  p = (np.float64(x) - low) / (high - low)
  assert abs(got.mean() - x) <= abs(high - low) * (5 * np.sqrt(p * (1 - p) / count) + 2**-16)


def test_what_bfloat16_has_stays_and_what_is_not_finite_too():
  x = np.array([0, -0.0, 1, -1.5, 2.0**-126, np.inf, -np.inf, np.nan, 3.3895314e38], np.float32)
  for seed in range(20):
    got = np.asarray(round_stochastically(jnp.asarray(x), jax.random.key(seed)).astype(jnp.float32))
    np.testing.assert_array_equal(got, x)
    assert np.signbit(got[1])
  worst = np.array([0x7fffffff, 0xffffffff], np.uint32).view(np.float32)  # NaNs whose bits would carry over into 0
  assert np.isnan(round_stochastically(jnp.asarray(worst), jax.random.key(0)).astype(jnp.float32)).all()


# ---- sums --------------------------------------------------------------------------------------------------------------
@functools.cache
def gradients():
  rng = np.random.default_rng(0)
  return {name: rng.normal(size=(4, *shape)).astype(np.float32) for name, (shape, _) in SHAPES.items()}


@functools.cache
def compiled_sum(how):
  mesh = sharding.make_mesh(MESH)
  places = {name: spec for name, (_, spec) in SHAPES.items()}
  given = {name: NamedSharding(mesh, P(("dcn_data", "data"), *spec)) for name, spec in places.items()}
  out = {name: NamedSharding(mesh, spec) for name, spec in places.items()}
  run = jax.jit(lambda g, key: sum_gradients(g, places, how, key), in_shardings=(given, NamedSharding(mesh, P())),
                out_shardings=out)
  return sharding.OnMesh(run, mesh).lower(gradients(), jax.random.key(0)).compile(), given, NamedSharding(mesh, P())


def summed(how, seed=0):
  compiled, given, everywhere = compiled_sum(how)
  return compiled(jax.device_put(gradients(), given), jax.device_put(jax.random.key(seed), everywhere))


@pytest.mark.parametrize("how, tolerance", [("float32", 1e-6), ("bfloat16", 4 * 2**-7)])
def test_sums_of_four_copies(how, tolerance):
  """Each rounding moves a number by less than the step between bfloat16 neighbours, at most 2^-7 of it; normal numbers here
  are below 4."""
  for name, x in summed(how).items():
    np.testing.assert_allclose(x, gradients()[name].astype(np.float64).sum(0), rtol=0, atol=tolerance * 5)
    parts = {}
    for shard in x.addressable_shards:  # bit for bit the same on every copy
      parts.setdefault(str(shard.index), set()).add(np.asarray(shard.data).tobytes())
    assert {len(found) for found in parts.values()} == {1}


def test_rounded_sums_follow_their_key_and_have_no_bias():
  first, again, other = (jax.device_get(summed("bfloat16", seed)) for seed in (0, 0, 1))
  assert differing(first, again) == [] and differing(first, other) != []
  found = [jax.device_get(summed("bfloat16", seed)) for seed in range(300)]
  for name, x in gradients().items():
    values = np.stack([one[name] for one in found]).astype(np.float64)
    wrong = (values.mean(0) - x.astype(np.float64).sum(0)) / (values.std(0) / np.sqrt(len(found)) + 1e-6)
    assert np.abs(wrong).max() < 5.5, name  # of 55 numbers


def moved(text, mesh):
  """[(kind, bytes, dtypes)] of what goes from copy to copy."""
  found = []
  for one in collectives(text):
    places = np.array(np.unravel_index(one.devices, mesh.devices.shape))
    axes = {a for a, at in zip(mesh.axis_names, places) if len(set(at)) > 1}
    if axes & set(sharding.COPY_AXES):
      found.append((one.kind, one.bytes * one.runs, {dtype for dtype, _ in one.arrays}))
  return found


def test_rounded_sums_move_half_the_bytes():
  exact, rounded = (moved(compiled_sum(how)[0].as_text(), sharding.make_mesh(MESH)) for how in ("float32", "bfloat16"))
  kinds = lambda found: {kind for kind, _, _ in found}
  assert kinds(exact) == {"all-reduce"} and kinds(rounded) == {"all-to-all", "all-gather"}
  assert set.union(*(dtypes for _, _, dtypes in rounded)) == {"u16"}
  size = lambda found: sum(count for _, count, _ in found)
  # 12 + 30 + 1 numbers of a device; of 30 and 1 the pieces are filled up to 32 and 4
  assert size(exact) == 2 * 3 / 4 * 4 * 43 and size(rounded) == 2 * 3 / 4 * 2 * (12 + 32 + 4)


@pytest.mark.parametrize("mesh", [{"context": 2}, {"expert": 2, "tensor": 2}, {"fsdp": 2, "tensor": 2}])
def test_meshes_whose_copies_cannot_run_alone_are_refused(mesh):
  training = dataclasses.replace(RUN.training, gradient_reduction="bfloat16")
  with pytest.raises(ValueError, match="training.gradient_reduction = 'bfloat16': expected 'float32' with mesh.context = "):
    dataclasses.replace(RUN, training=training, mesh=c.MeshConfig(**mesh))


# ---- the whole step ----------------------------------------------------------------------------------------------------
def test_copies_of_one_slice_add_up_once_for_all_passes():
  """Two copies of two devices, two passes: the numbers of one device, and outside the loop over passes each number of a
  device's gradients once, in float32. Inside nothing goes from copy to copy."""
  run = dataclasses.replace(RUN, data=dataclasses.replace(RUN.data, accumulation=2))
  mesh = sharding.make_mesh(c.MeshConfig(data=2, fsdp=2), jax.devices()[:4])
  step = Step(run, mesh)
  state, metrics = step(random_state(), random_batch(2))
  expected_state, expected = reference()
  for name in (*LOSSES, "loss", "grad_norm"):
    assert metrics[name] == pytest.approx(float(expected[name]), rel=3e-6), name
  grads, wanted = gradients_of(state), gradients_of(expected_state)
  for name, g in wanted.items():  # as on other meshes, see test_mesh.py
    assert np.linalg.norm(grads[name] - g) <= 2e-5 * np.linalg.norm(g) + 1e-7, name
  found = moved(step.compiled.as_text(), mesh)
  summed = [count for kind, count, dtypes in found if kind == "all-reduce" and "f32" in dtypes]
  parameters = sum(x.addressable_shards[0].data.size for x in jax.tree.leaves(state.params))
  assert sum(summed) == pytest.approx(4 * parameters, rel=0.02)  # half of 2 x 4 bytes; and a few sums of losses and loads


@pytest.mark.long  # its program takes longer to compile than any other's; the sums alone and exact steps are in the suite
def test_a_step_over_two_slices_with_rounded_sums():
  """Like the step of one device but for the rounding: two of at most 2^-7 of each number, on average a third of that."""
  run = dataclasses.replace(RUN, training=dataclasses.replace(RUN.training, gradient_reduction="bfloat16"),
                            data=dataclasses.replace(RUN.data, accumulation=2))
  mesh = sharding.make_mesh(c.MeshConfig(dcn_data=2, data=1, expert=2), jax.devices()[:4])
  step = Step(run, mesh)
  state, metrics = step(random_state(), random_batch(2))
  expected_state, expected = reference()
  for name in (*LOSSES, "loss"):
    assert metrics[name] == pytest.approx(float(expected[name]), rel=3e-6), name
  assert metrics["grad_norm"] == pytest.approx(float(expected["grad_norm"]), rel=2**-7)
  grads, wanted = gradients_of(state), gradients_of(expected_state)
  for name, g in wanted.items():
    assert np.linalg.norm(grads[name] - g) <= 2**-6 * np.linalg.norm(g) + 1e-7, name
  assert differing(state.router, expected_state.router) == []
  # Between slices go rounded gradients once, however many passes, and orthogonalised matrices, which are gathered; of the
  # rest only numbers of the metrics and the router.
  found = moved(step.compiled.as_text(), mesh)
  parameters = sum(x.addressable_shards[0].data.size for x in jax.tree.leaves(state.params))
  large = [(kind, count) for kind, count, dtypes in found if "f32" in dtypes and kind != "all-gather" and count > 4 * 64]
  assert large == [], large
  rounded = sum(count for _, count, dtypes in found if dtypes == {"u16"})
  assert rounded == pytest.approx(2 * 1 / 2 * 2 * parameters, rel=0.02)
