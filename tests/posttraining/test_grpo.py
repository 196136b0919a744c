"""The objective against numbers worked out one token at a time in float64, and its gradient against finite differences."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_v4 import sharding
from deepseek_v4.config import MeshConfig, ReinforcementConfig
from deepseek_v4.posttraining import grpo, rewards
from deepseek_v4.posttraining.logprobs import token_logprobs

CONFIG = ReinforcementConfig(replies=2, problems=2, minibatches=1, clip=0.2, kl_weight=0.3, mask_above=0.25)
LENGTHS, ADVANTAGES = (3, 4, 2, 5), (0.5, -0.5, -0.75, 0.75)  # two samples a row; the third drifts away
ROW = 12


def packed(seed=0):
  """(logprobs [2, ROW], rows) of four samples in two rows, each with a place that is fed and not asked in front."""
  rng = np.random.default_rng(seed)
  rows = {"targets": np.full((2, ROW), -1, np.int32), "segment_ids": np.zeros((2, ROW), np.int32),
          **{name: np.zeros((2, ROW)) for name in ("old", "reference", "advantage", "weight")}}
  logprobs = rng.normal(size=(2, ROW))
  for i, (length, advantage) in enumerate(zip(LENGTHS, ADVANTAGES)):
    row, at = i // 2, 0 if i % 2 == 0 else LENGTHS[i - 1] + 1
    whole, asked = slice(at, at + length + 1), slice(at + 1, at + length + 1)
    rows["segment_ids"][row, whole], rows["advantage"][row, whole] = i % 2 + 1, advantage
    rows["targets"][row, asked], rows["weight"][row, asked] = 7, 1 / length / len(LENGTHS)
    logprobs[row, asked] = -rng.uniform(0.5, 3, length)
    # One ratio in three is far outside the clip, on either side.
    rows["old"][row, asked] = logprobs[row, asked] + rng.choice([0.05, -0.08, 0.9, -0.9], length) + 0.5 * (i == 2)
    rows["reference"][row, asked] = logprobs[row, asked] + rng.normal(size=length)
  return logprobs, rows


def by_hand(logprobs, rows, config):
  """J, token by token."""
  total, masked = 0.0, 0
  for i, (length, advantage) in enumerate(zip(LENGTHS, ADVANTAGES)):
    row, at = i // 2, 1 if i % 2 == 0 else LENGTHS[i - 1] + 2
    places = [(row, at + t) for t in range(length)]
    drift = sum(rows["old"][p] - logprobs[p] for p in places) / length
    live = 0 if config.mask_above is not None and advantage < 0 and drift > config.mask_above else 1
    masked += 1 - live
    for p in places:
      ratio = np.exp(logprobs[p] - rows["old"][p])
      within = min(max(ratio, 1 - config.clip), 1 + config.clip)
      gain = min(ratio * advantage, within * advantage) * live
      further = rows["reference"][p] - logprobs[p]
      total += (gain - config.kl_weight * ratio * (np.exp(further) - further - 1)) / length / len(LENGTHS)
  return total, masked / len(LENGTHS)


@pytest.mark.parametrize("changes", [{}, {"mask_above": None}, {"kl_weight": 0.0}, {"clip": 10.0}], ids=str)
def test_the_objective_and_its_gradient(changes):
  config = dataclasses.replace(CONFIG, **changes)
  with jax.enable_x64(True):
    logprobs, rows = packed()
    value = lambda x: grpo.objective(x, {name: jnp.asarray(y) for name, y in rows.items()}, config)
    (found, metrics), grad = jax.jit(jax.value_and_grad(value, has_aux=True))(jnp.asarray(logprobs))
    found, grad, metrics = jax.device_get((found, grad, metrics))
  expected, masked = by_hand(logprobs, rows, config)
  assert abs(found - expected) < 1e-12
  assert metrics["masked"] == pytest.approx(masked, abs=1e-12) and masked == (0 if config.mask_above is None else 0.25)
  for place in np.ndindex(*logprobs.shape):
    step = np.zeros_like(logprobs)
    step[place] = 1e-6
    slope = (by_hand(logprobs + step, rows, config)[0] - by_hand(logprobs - step, rows, config)[0]) / 2e-6
    assert abs(grad[place] - slope) < 1e-8, place  # central differences: an error of 1e-12 in the third derivative


def test_the_kl_is_unbiased_with_its_gradient():
  """Over all tokens of a vocabulary, weighted as the sampler draws them: KL(theta || reference) and its gradient, although
  the sampler is another distribution."""
  rng = np.random.default_rng(1)
  with jax.enable_x64(True):
    theta, sampler, reference = (jnp.asarray(rng.normal(size=9)) for _ in range(3))
    config = dataclasses.replace(CONFIG, kl_weight=1.0, clip=10.0, mask_above=None)

    def estimate(theta):
      old = jax.nn.log_softmax(sampler)
      rows = {"targets": jnp.ones((1, 9), jnp.int32), "segment_ids": jnp.ones((1, 9), jnp.int32), "old": old[None],
              "reference": jax.nn.log_softmax(reference)[None], "advantage": jnp.zeros((1, 9)),
              "weight": jnp.exp(old)[None]}
      return -grpo.objective(jax.nn.log_softmax(theta)[None], rows, config)[0]

    def exact(theta):
      p = jax.nn.log_softmax(theta)
      return (jnp.exp(p) * (p - jax.nn.log_softmax(reference))).sum()

    (ours, slope), (kl, slope_of_kl) = jax.device_get([jax.jit(jax.value_and_grad(f))(theta) for f in (estimate, exact)])
    np.testing.assert_allclose(ours, kl, rtol=1e-12)
    np.testing.assert_allclose(slope, slope_of_kl, atol=1e-12)


def test_advantages_are_centred_and_not_scaled():
  np.testing.assert_allclose(grpo.advantages([[1, 0, 0, 1], [1, 1, 1, 1], [10, 0, 0, 2]]),
                             [[0.5, -0.5, -0.5, 0.5], [0, 0, 0, 0], [7, -3, -3, -1]], atol=0)


# ---- log-probabilities ------------------------------------------------------------------------------------------------
def random_tokens(vocabulary=24, dtype=np.float64):
  rng = np.random.default_rng(2)
  hidden, head = (rng.normal(size=shape).astype(dtype) for shape in ((4, 5, 6), (6, vocabulary)))
  targets = rng.integers(0, vocabulary, (4, 5)).astype(np.int32)
  targets[0, :2] = -1
  kept = rng.random((4, 5, vocabulary)) < 0.4
  np.put_along_axis(kept, np.maximum(targets, 0)[..., None], True, 2)
  kept[targets < 0] = False
  return hidden, head, targets, kept


def dense(hidden, head, targets, kept, temperature):
  logits = jnp.asarray(hidden) @ head / temperature
  if kept is not None:
    logits = jnp.where(jnp.asarray(kept) | (targets < 0)[..., None], logits, -1e30)
  picked = jnp.take_along_axis(jax.nn.log_softmax(logits), np.maximum(targets, 0)[..., None], 2)[..., 0]
  return jnp.where(targets >= 0, picked, 0)


@pytest.mark.parametrize("filtered, chunk", [
  (False, 1), (True, 7), (False, 64), *(pytest.param(filtered, chunk, marks=pytest.mark.long)
                                        for filtered, chunk in ((True, 1), (False, 7), (True, 64)))])
def test_log_probabilities_in_chunks(chunk, filtered):
  with jax.enable_x64(True):
    hidden, head, targets, kept = random_tokens(vocabulary=21)  # not a multiple of 8
    bits = np.packbits(kept, axis=2) if filtered else None
    cotangent = np.random.default_rng(3).normal(size=targets.shape)
    ours = lambda h, w: token_logprobs(h, w, targets, chunk=chunk, temperature=1.7, kept=bits)
    theirs = lambda h, w: dense(h, w, targets, kept if filtered else None, 1.7)
    for x, y in zip(*(jax.tree.leaves((f(hidden, head), jax.vjp(f, jnp.asarray(hidden), jnp.asarray(head))[1](cotangent)))
                      for f in (ours, theirs)), strict=True):
      np.testing.assert_allclose(x, y, atol=1e-12)


def test_log_probabilities_on_a_mesh():
  """Tokens and vocabulary split: the same numbers and gradients."""
  hidden, head, targets, kept = random_tokens(vocabulary=32, dtype=np.float32)
  bits = np.packbits(kept, axis=2)
  cotangent = np.random.default_rng(3).normal(size=targets.shape).astype(np.float32)

  def both(h, w):
    value, back = jax.vjp(lambda h, w: token_logprobs(h, w, targets, chunk=2, temperature=1.7, kept=bits), h, w)
    return value, back(cotangent)

  expected = jax.jit(both)(hidden, head)
  with jax.set_mesh(sharding.make_mesh(MeshConfig(data=2, tensor=4))):
    found = jax.jit(both)(hidden, head)
  for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(x, y, atol=2e-6)  # float32 sums in another order


def test_kept_sets_of_another_width_are_refused():
  hidden, head, targets, kept = random_tokens()
  with pytest.raises(ValueError, match=r"kept = uint8\(4, 5, 2\): expected uint8 \(4, 5, 3\)"):
    token_logprobs(hidden, head, targets, chunk=4, kept=np.packbits(kept, axis=2)[..., :2])


# ---- rewards ----------------------------------------------------------------------------------------------------------
def test_rewards_are_found_by_name_and_refused_early():
  assert rewards.load(["deepseek_v4.posttraining.rewards.exact_answer"]) == [rewards.exact_answer]
  for name, cause in (("exact_answer", "module.function"), ("no_such_module.f", "No module named"),
                      ("deepseek_v4.posttraining.rewards.best", "has no attribute 'best'"),
                      ("deepseek_v4.posttraining.rewards.load", "too many positional"), ("math.pi", "not a callable")):
    with pytest.raises(ValueError, match=rf"reinforcement.rewards\[0\] = '{name}': expected .*{cause}"):
      rewards.load([name])


def test_what_a_reply_is_worth():
  template = rewards.ChatTemplate({}, "{tool_schemas}", "{schema}")
  message = lambda text, effort="high": rewards.message_of(text, "stop", effort, template)
  judge = lambda text, effort="high", answer=7: rewards.of_reply([rewards.exact_answer], {"answer": answer},
                                                                 message(text, effort), "f, line 1")
  assert judge("a thought</think> 7\n") == judge("7", "none", "7") == 1
  assert judge("7") == judge("7</think>8") == judge("7</think>7</think>") == judge("", "none") == 0
  assert message("think</think>yes")["reasoning_content"] == "think"
  with pytest.raises(ValueError, match="reward .*exact_answer of f, line 3: KeyError: 'answer'"):
    rewards.of_reply([rewards.exact_answer], {}, message("7", "none"), "f, line 3")
  with pytest.raises(ValueError, match="= nan: expected a finite number"):
    rewards.of_reply([lambda problem, message: float("nan")], {}, {}, "f, line 3")


def test_length_costs_in_proportion_up_to_a_cap():
  assert [rewards.length_penalty(n, 100, 0.5, 0.3) for n in (0, 10, 50, 60, 100)] == [0, 0.05, 0.25, 0.3, 0.3]
