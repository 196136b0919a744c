"""Dispatch, experts and combination against a loop over tokens, and what they cost."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels.grouped_matmul as grouped_matmul
from deepseek_v4 import sharding
from deepseek_v4.config import MeshConfig
from deepseek_v4.model.dispatch import dispatch
from deepseek_v4.model.experts import num_waves, routed


def by_hand(x, experts, weights, gate, up, down, limit, rounded=None):
  """Sum over a token's picks of weight * expert(x), in float64; experts that are not here add nothing. `rounded` is what
  happens to the middle of an expert, which then carries the weight."""
  x, weights, gate, up, down = (np.asarray(a, np.float64) for a in (x, weights, gate, up, down))
  out = np.zeros_like(x)
  for place in np.ndindex(experts.shape):
    expert, token = experts[place], place[:-1]
    if 0 <= expert < gate.shape[0]:
      g, u = np.minimum(x[token] @ gate[expert], limit), np.clip(x[token] @ up[expert], -limit, limit)
      middle = weights[place] * (g / (1 + np.exp(-g)) * u)
      out[token] += (middle if rounded is None else rounded(middle)) @ down[expert]
  return out


@pytest.mark.parametrize("batch, length, count", [(2, 37, 5), (2, 4, 30)], ids=["sorted", "fewer picks than experts"])
def test_experts_equal_a_loop_over_tokens(batch, length, count):
  """Uneven loads, an expert without tokens, the same expert twice, and picks of experts that live on other devices."""
  rng = np.random.default_rng(0)
  d, f, k = 6, 4, 3
  experts = rng.choice([-7, -1, 0, 0, 0, 1, 3, 4, count, count + 4], (batch, length, k)).astype(np.int32)
  experts[0, 0] = [3, 3, 4]
  arrays = dict(x=rng.normal(size=(batch, length, d)), weights=rng.normal(size=(batch, length, k)),
                gate=rng.normal(size=(count, d, f)), up=rng.normal(size=(count, d, f)), down=rng.normal(size=(count, f, d)))
  direction = rng.normal(size=(batch, length, d))
  with jax.enable_x64(True):
    @jax.jit
    def both(arrays):
      def total(a):
        y = routed(a["x"], jnp.asarray(experts), a["weights"], a["gate"], a["up"], a["down"], limit=1.0, kernels="blockwise")
        return (y * direction).sum(), y
      return jax.grad(total, has_aux=True)(arrays)
    gradients, y = jax.device_get(both(arrays))
  loop = lambda a: by_hand(a["x"], experts, a["weights"], a["gate"], a["up"], a["down"], 1.0)
  np.testing.assert_allclose(y, loop(arrays), atol=1e-12)
  step = 1e-6
  for name, x in arrays.items():
    v = rng.normal(size=x.shape)
    moved = [(loop({**arrays, name: x + s * v}) * direction).sum() for s in (-step, step)]
    np.testing.assert_allclose((gradients[name] * v).sum(), (moved[1] - moved[0]) / (2 * step), rtol=1e-6, err_msg=name)
  assert (gradients["gate"][2] == 0).all()  # the expert without tokens


@pytest.mark.parametrize("length, count", [(37, 5), (4, 30)], ids=["sorted", "fewer picks than experts"])
def test_the_middle_of_an_expert_is_rounded_with_its_weight(length, count):
  rng = np.random.default_rng(2)
  d, f, k = 6, 4, 3
  experts = rng.integers(-1, count + 1, (1, length, k)).astype(np.int32)
  shapes = (1, length, d), (1, length, k), (count, d, f), (count, d, f), (count, f, d)
  x, weights, *matrices = (rng.normal(size=shape) for shape in shapes)
  with jax.enable_x64(True):
    one = functools.partial(routed, limit=1.0, kernels="blockwise", rounded=lambda h: jnp.round(h * 8) / 8)
    y = jax.device_get(jax.jit(one)(x, experts, weights, *matrices))
  wanted = by_hand(x, experts, weights, *matrices, 1.0, rounded=lambda h: np.round(h * 8) / 8)
  assert np.abs(wanted - by_hand(x, experts, weights, *matrices, 1.0)).max() > 0.05
  np.testing.assert_allclose(y, wanted, atol=1e-12)


def test_waves_equal_all_tokens_at_once():
  """Four devices with two experts each; values and gradients do not depend on how many tokens are shown at a time."""
  rng = np.random.default_rng(1)
  batch, length, d, f, count, k, shards = 4, 24, 6, 4, 8, 3, 4
  experts = rng.integers(0, count, (batch, length, k)).astype(np.int32)
  arrays = [rng.normal(size=shape).astype(np.float32) for shape in (
    (batch, length, d), (batch, length, k), (count, d, f), (count, d, f), (count, f, d))]
  axes = (("batch", "sequence"),) * 3 + (("expert",),) * 3
  mesh = sharding.make_mesh(MeshConfig(data=1, expert=shards), jax.devices()[:shards])

  @functools.partial(jax.jit, static_argnums=0)
  def run(wave, x, weights, *matrices):
    def total(x, weights, *matrices):
      one = functools.partial(routed, limit=1.0, kernels="blockwise", expert_axis="expert", wave=wave)
      y = sharding.per_shard(one, axes, ("batch", "sequence"))(x, experts, weights, *matrices)
      return (y ** 2).sum(), y
    return jax.grad(total, argnums=range(5), has_aux=True)(x, weights, *matrices)

  with jax.set_mesh(mesh):
    gradients, y = jax.device_get(run(1000, *arrays))
    in_waves, y_in_waves = jax.device_get(run(shards * 7, *arrays))  # 7 of a device's 24 tokens: the last wave has 3
  x, weights, *matrices = arrays
  np.testing.assert_allclose(y, by_hand(x, experts, weights, *matrices, 1.0), atol=1e-5)
  np.testing.assert_allclose(y_in_waves, y, atol=1e-5)
  for wanted, got in zip(gradients, in_waves):  # sums of up to 100 products of order 10 in float32
    np.testing.assert_allclose(got, wanted, atol=2e-4)


@pytest.mark.parametrize("tokens, shards, wave, waves", [
  (2048, 64, 16384, 8), (2048, 1, 16, 1), (2048, 8, 16384, 1), (24, 4, 50, 2), (6, 4, 1, 6), (7, 4, 8, 4), (1, 64, 8, 1),
  (4099, 64, 16384, 17),
])
def test_waves_are_as_few_as_memory_allows(tokens, shards, wave, waves):
  assert num_waves(tokens, shards, wave) == waves


def flops(run, *shapes):
  return jax.jit(run).lower(*shapes).compile().cost_analysis()["flops"]


def test_cpu_experts_cost_what_is_routed():
  """Compiled FLOPs at 2048 tokens, 16 experts, 4 picks: at most 1.3 times the model's 6 D F per pick.

  XLA counts a loop's body once, so the body - one tile through one expert - is counted as often as this routing runs it.
  `ragged_dot`, the control, multiplies every row by every expert on a CPU.
  """
  tokens, d, f, count, k = 2048, 128, 64, 16, 4
  real, whole = jax.ShapeDtypeStruct, functools.partial(routed, limit=10.0, kernels="blockwise")
  matrices = lambda n: (real((n, d, f), jnp.float32), real((n, d, f), jnp.float32), real((n, f, d), jnp.float32))
  counted = flops(whole, real((1, tokens, d), jnp.float32), real((1, tokens, k), jnp.int32),
                  real((1, tokens, k), jnp.float32), *matrices(count))
  rng = np.random.default_rng(0)
  popularity = rng.normal(size=count)
  experts = np.argsort(-(popularity + 2 * rng.gumbel(size=(tokens, count))), -1)[:, :k].astype(np.int32)
  plan = dispatch(jnp.asarray(experts.T), count, grouped_matmul.row_tile(experts.size, count))
  load = np.bincount(experts.reshape(-1), minlength=count)
  np.testing.assert_array_equal(plan.group_sizes, load)
  assert load.max() > 2 * load.min()  # a routing with uneven loads
  one_tile = functools.partial(grouped_matmul.expert_mlp, tile=plan.tile, limit=10.0, implementation="blockwise")
  body = flops(lambda x, *w: one_tile(x, *w, jnp.ones(1, jnp.int32)), real((plan.tile, d), jnp.float32), *matrices(1))
  assert 1 <= body / (plan.tile * 6 * d * f) < 1.1
  assert counted < 4 * body, "XLA counts more than one body: the sum below would be wrong"
  executed = counted + (-(-load // plan.tile)).sum() * body - body
  model = tokens * k * 6 * d * f
  assert model <= executed <= 1.3 * model, executed / model
  control = flops(jax.lax.ragged_dot, real((tokens * k, d), jnp.float32), real((count, d, f), jnp.float32),
                  real((count,), jnp.int32))
  assert control > 0.9 * count * tokens * k * 2 * d * f


@pytest.mark.parametrize("shards", [1, 2, 8])
def test_padding_costs_little_where_experts_are_spread(shards):
  """Tiles are sized for the picks that stay here, not for those of all devices: at most 1.3 times the rows, equal loads."""
  experts, k, tokens = 16 // shards, 4, 64 * shards
  rng = np.random.default_rng(0)
  picks = np.stack([rng.permutation(16)[:k] for _ in range(tokens * 8)]).astype(np.int32)
  plan = jax.jit(dispatch, static_argnums=(1, 2))(picks.T, experts, grouped_matmul.row_tile(picks.size // shards, experts))
  sizes = np.asarray(plan.group_sizes)
  assert sizes.sum() == (picks < experts).sum()
  assert (-(-sizes // plan.tile)).sum() * plan.tile <= 1.3 * sizes.sum()
