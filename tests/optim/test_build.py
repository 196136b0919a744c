"""The whole optimizer on small trees: against optax.adamw and Muon, clipping, frozen leaves, decay, one learning rate."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_v4.config import OptimizerConfig
from deepseek_v4.optim import build_optimizer, decay_mask, make_schedule, muon

CONFIG = OptimizerConfig(learning_rate=0.02, warmup_steps=2, decay_steps=3, clip_norm=1e9)


def normal(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def tree_of(seed):
  return {
      "embed": {"embedding": normal(seed, 11, 8)},
      "final_norm": {"scale": normal(seed + 1, 8)},
      "layers": {"unit_0": {
          "attention": {"sink": normal(seed + 2, 2, 4), "q_b": normal(seed + 3, 2, 5, 2, 4)},
          "moe": {"experts": {"gate": normal(seed + 4, 2, 8, 8, 5), "down": normal(seed + 5, 2, 8, 5, 8)}},
          "attn_hc": {"base": normal(seed + 6, 2, 8), "scale": normal(seed + 7, 2, 3)},
      }},
  }


@pytest.fixture(scope="module")
def params():
  return tree_of(0)


def run(optimizer, params, gradients):
  """Parameters after each gradient."""

  @jax.jit
  def step(params, state, gradient):
    update, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, update), state

  state, history = optimizer.init(params), []
  for gradient in gradients:
    params, state = step(params, state, gradient)
    history.append(params)
  return history


def first_update(config, params, gradients, **rest):
  optimizer = build_optimizer(config, params, **rest)
  return jax.jit(lambda p, g: optimizer.update(g, optimizer.init(p), p)[0])(params, gradients)


def close(got, want, atol=1e-6):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), got, want)


def test_adamw_leaves_equal_optax_adamw_and_muon_leaves_equal_muon(params):
  gradients = [tree_of(10 * i) for i in range(1, 5)]
  got = run(build_optimizer(CONFIG, params, steps=6), params, gradients)
  schedule = make_schedule(CONFIG, 6)
  adamw = lambda decay: optax.adamw(schedule, b1=0.9, b2=0.95, eps=1e-20, weight_decay=decay)
  for decay, pick in ((0.1, lambda t: [t["embed"], t["final_norm"]]),
                      (0.0, lambda t: [t["layers"]["unit_0"]["attention"]["sink"], t["layers"]["unit_0"]["attn_hc"]])):
    close([pick(p) for p in got], run(adamw(decay), pick(params), [pick(g) for g in gradients]))
  experts = lambda t: t["layers"]["unit_0"]["moe"]["experts"]
  close([experts(p) for p in got], run(muon(schedule), experts(params), [experts(g) for g in gradients]), atol=1e-5)


def test_adamw_alone_is_optax_adamw(params):
  """With matrix_owner = "adamw" every leaf follows optax.adamw, decayed as the table says; Muon keeps no momentum."""
  config = dataclasses.replace(CONFIG, matrix_owner="adamw")
  optimizer = build_optimizer(config, params, steps=6)
  gradients = [tree_of(10 * i) for i in range(1, 5)]
  want = run(optax.adamw(make_schedule(CONFIG, 6), b1=0.9, b2=0.95, eps=1e-20, weight_decay=0.1, mask=decay_mask(params)),
             params, gradients)
  close(run(optimizer, params, gradients), want)
  state = jax.eval_shape(optimizer.init, params)
  assert not any("trace" in jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state))
  for choice in (dict(muon_split="head"), dict(position_bias_owner="muon")):
    with pytest.raises(ValueError, match="matrix_owner = 'adamw': expected muon where"):
      dataclasses.replace(config, **choice)


def test_clipping_uses_the_norm_of_all_leaves_before_the_partition(params):
  gradients = tree_of(10)
  norm = float(optax.tree.norm(gradients))
  clipped = jax.tree.map(lambda g: g * (0.5 / norm), gradients)

  @jax.jit
  def states():
    optimizers = [build_optimizer(OptimizerConfig(clip_norm=norm), params) for norm in (0.5, 1e9)]
    return [optimizer.update(g, optimizer.init(params), params)[1] for optimizer, g in zip(optimizers, (gradients, clipped))]

  got, want = states()
  close(got, want)


def test_frozen_leaves_do_not_move_and_do_not_count(params):
  router = {"layers": {"unit_0": {"moe": {"router": {"bias": normal(0, 2, 8)}}},
                       "layer_03": {"moe": {"router": {"hash_table": jnp.arange(6, dtype=jnp.int32).reshape(3, 2)}}}}}
  variables = {"params": params, "router": router}
  gradients = {"params": tree_of(10), "router": jax.tree.map(lambda x: x + jnp.asarray(1000, x.dtype), router)}
  config = OptimizerConfig(clip_norm=0.5, warmup_steps=0)
  update = first_update(config, variables, gradients)
  for before, zero in zip(jax.tree.leaves(router), jax.tree.leaves(update["router"])):
    assert zero.dtype == before.dtype and not np.any(zero)
  close(update["params"], first_update(config, params, gradients["params"]))


def test_the_state_is_stable(params):
  """Built from shapes; structure, shapes and dtypes of state and updates stay what they are."""
  shapes = jax.eval_shape(lambda: params)
  optimizer = build_optimizer(CONFIG, shapes, steps=6)
  state = jax.eval_shape(optimizer.init, shapes)
  assert jax.eval_shape(optimizer.update, shapes, state, shapes) == (shapes, state)


def test_decay_alone_moves_what_the_mask_names(params):
  zeros = jax.tree.map(jnp.zeros_like, params)
  config = OptimizerConfig(learning_rate=0.5, warmup_steps=0, weight_decay=0.2)
  update = first_update(config, params, zeros)
  unit, old = update["layers"]["unit_0"], params["layers"]["unit_0"]
  assert not np.any(unit["attention"]["sink"])
  assert not np.any(unit["attn_hc"]["base"]) and not np.any(unit["attn_hc"]["scale"])
  close([update["embed"], update["final_norm"], unit["moe"], unit["attention"]["q_b"]],
        jax.tree.map(lambda p: -0.1 * p, [params["embed"], params["final_norm"], old["moe"], old["attention"]["q_b"]]))


OPTION_PARAMS = {
    "embed": {"embedding": normal(0, 11, 8)},
    "layers": {"layer_00": {"attention": {"q_b": normal(1, 8, 2, 3), "compressor": {"position_bias": normal(2, 1, 8, 6)}}}},
}


def second_update(**changes):
  """The update after two different gradients, the embedding's so small that floor and eps of Adam matter; leaf -> array."""

  @jax.jit
  def run_two():
    config = OptimizerConfig(warmup_steps=0, learning_rate=1.0, weight_decay=0.0, **changes)
    optimizer = build_optimizer(config, OPTION_PARAMS)
    gradients = dict(OPTION_PARAMS, embed={"embedding": 1e-17 * OPTION_PARAMS["embed"]["embedding"]})
    flipped = jax.tree.map(lambda g: jnp.flip(g, -1), gradients)
    _, state = optimizer.update(flipped, optimizer.init(OPTION_PARAMS), OPTION_PARAMS)
    return optimizer.update(gradients, state, OPTION_PARAMS)[0]

  return {path[-1].key: x for path, x in jax.tree_util.tree_flatten_with_path(run_two())[0]}


@pytest.fixture(scope="module")
def default_update():
  return second_update()


@pytest.mark.parametrize("changes, expected", [
    ({"adam_v_floor": 1e-30}, {"embedding"}),
    ({"adam_b2": 0.5}, {"embedding", "position_bias"}),
    ({"muon_split": "head"}, {"q_b"}),
    ({"momentum": 0.5}, {"q_b"}),
    ({"momentum_dtype": "bfloat16"}, {"q_b"}),
    ({"newton_schulz_dtype": "bfloat16"}, {"q_b"}),
    ({"position_bias_owner": "muon"}, {"position_bias"}),
], ids=lambda value: ",".join(sorted(value)))
def test_an_option_reaches_its_leaves_and_no_others(default_update, changes, expected):
  other = second_update(**changes)
  moved = {name for name in other if np.abs(other[name] - default_update[name]).max() > 1e-4}
  assert moved == expected


def test_eight_devices_equal_one(params):
  """Experts on the mesh: the same parameters and state after two steps."""
  mesh = jax.make_mesh((2, 4), ("fsdp", "expert"), axis_types=(AxisType.Auto,) * 2)
  shardings = jax.tree.map(lambda x: NamedSharding(mesh, P()), params)
  shardings["layers"]["unit_0"]["moe"]["experts"] = {"gate": NamedSharding(mesh, P(None, "expert", "fsdp")),
                                                     "down": NamedSharding(mesh, P(None, "expert", None, "fsdp"))}
  gradients = [tree_of(10), tree_of(20)]
  want = run(build_optimizer(CONFIG, params, steps=6), params, gradients)
  with jax.set_mesh(mesh):
    got = run(build_optimizer(CONFIG, params, steps=6, shardings=shardings), jax.device_put(params, shardings),
              [jax.device_put(g, shardings) for g in gradients])
  close(got, want)
