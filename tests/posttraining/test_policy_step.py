"""The step of learning from rewards against the objective on whole logits, a sample a row; experts and kept sets are obeyed.

Axis letters: N samples   S places of a row   V vocabulary
"""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deepseek_v4 as dsv4
from deepseek_v4 import config as c
from deepseek_v4.posttraining import policy_step, problems
from deepseek_v4.posttraining.rollout import Sample
from tests.posttraining.small import MODEL, random_state
from tests.training.small import differing, on_host

SHALLOW = dataclasses.replace(MODEL, num_hidden_layers=1, layer_types=(c.CSA,), mlp_layer_types=(c.LEARNED,),
                              num_nextn_predict_layers=0, vocab_size=43)  # five bytes and three bits of a kept set
SETTINGS = c.ReinforcementConfig(replies=2, problems=2, minibatches=1, max_new_tokens=24, clip=0.2, kl_weight=0.3,
                                 mask_above=0.25, temperature=1.3, top_p=0.9)
RUN = c.RunConfig(
  model=SHALLOW, reinforcement=SETTINGS, optimizer=c.OptimizerConfig(warmup_steps=0, learning_rate=1e-2, adam_eps=1e-4),
  loss=c.LossConfig(balance_weight=0.1, indexer_weight=0.5, bias_update_speed=1e-2),
  data=c.DataConfig(source="chat", path="none", sequence_length=32, batch_size=2), training=c.TrainingConfig(steps=4))
LENGTHS, ADVANTAGES = ((4, 12), (5, 20), (2, 9), (8, 14)), np.array([0.5, -0.5, -0.75, 0.75])
S, FORCED = RUN.data.sequence_length, 2  # the third token of the second reply was put there by a budget


def random_samples():
  """Four samples whose experts and kept sets nobody would choose."""
  rng, found = np.random.default_rng(0), []
  for i, (asked, said) in enumerate(LENGTHS):
    tokens = rng.integers(1, SHALLOW.vocab_size, asked + said).tolist()
    kept = rng.random((said, SHALLOW.vocab_size)) < 0.5
    kept[np.arange(said), tokens[asked:]] = True
    drawn = tuple(not (i == 1 and t == FORCED) for t in range(said))
    experts = rng.random((1, asked + said - 1, SHALLOW.n_routed_experts)).argsort(-1)[..., :2].astype(np.uint16)
    found.append(Sample(tuple(tokens[:asked]), tuple(tokens[asked:]), (0.0,) * said, drawn, "stop", (i,), experts,
                        np.packbits(kept, axis=1)))
  return found


def alone(samples):
  """Arrays of samples that have a row each: tokens, segments, targets [N, S], experts [1, N, S, k], kept [N, S, V]."""
  shape = len(samples), S
  tokens, segments, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.full(shape, -1, np.int32)
  experts = np.broadcast_to(np.arange(2), (1, *shape, 2)).astype(np.int32)
  kept = np.ones((*shape, SHALLOW.vocab_size), bool)
  for i, sample in enumerate(samples):
    fed, first = len(sample.tokens) - 1, len(sample.prompt) - 1
    tokens[i, :fed], segments[i, :fed], experts[0, i, :fed] = sample.tokens[:-1], 1, sample.experts[0]
    targets[i, first:fed] = np.where(sample.drawn, sample.reply, -1)
    kept[i, first:fed] = np.unpackbits(sample.kept, axis=1)[:, :SHALLOW.vocab_size]
  return tokens, segments, targets, experts, kept


@jax.jit
def whole_logits(params, router, tokens, segments, targets, experts, kept):
  """(log-probabilities [N, S] of the targets from logits [N, S, V] at temperature 1.3, the losses)."""
  out = dsv4.DeepseekV4(SHALLOW, "reference").apply(
    {"params": params, "router": router}, tokens, None, segments, mtp=False, targets=jnp.full_like(tokens, -1),
    replay=None if experts is None else dsv4.Replay(experts))
  logits = out.hidden @ params["lm_head"]["kernel"] / 1.3
  logprobs = jax.nn.log_softmax(jnp.where(kept, logits, -1e30), -1)
  return jnp.take_along_axis(logprobs, jnp.maximum(targets, 0)[..., None], 2)[..., 0], out.losses


def by_hand(logprobs, old, reference, targets):
  """J, sample by sample as the formula says; and which samples are masked."""
  total, masked = 0.0, []
  for i, advantage in enumerate(ADVANTAGES):
    at = np.flatnonzero(targets[i] >= 0)
    logp, was, ref = logprobs[i, at], old[i, at], reference[i, at]
    ratio = jnp.exp(logp - was)
    live = jnp.where((advantage < 0) & ((was - logp).mean() > 0.25), 0.0, 1.0)
    gain = jnp.minimum(ratio * advantage, jnp.clip(ratio, 0.8, 1.2) * advantage) * live
    kl = ratio * (jnp.exp(ref - logp) - (ref - logp) - 1)
    total += (gain - 0.3 * kl).mean() / len(ADVANTAGES)
    masked.append(1 - live)
  return total, jnp.stack(masked).mean()


@pytest.fixture(scope="module")
def world():
  """Samples with log-probabilities near the model's, their passes, the state, and what the step makes of them."""
  trained, other = random_state(RUN), random_state(RUN, 1)
  samples, rng = random_samples(), np.random.default_rng(3)
  arrays = alone(samples)
  logprobs = np.asarray(whole_logits(trained.params, trained.router, *arrays)[0])
  # Some ratios are outside the clip, on either side; the third sample has drifted away.
  old = logprobs + rng.choice([0.05, -0.08, 0.6, -0.6], logprobs.shape) + 0.5 * (np.arange(4) == 2)[:, None]
  samples = [dataclasses.replace(sample, logprobs=tuple(old[i, len(sample.prompt) - 1:len(sample.tokens) - 1].tolist()))
             for i, sample in enumerate(samples)]
  programs = policy_step.Programs(RUN)
  state = policy_step.as_policy(RUN, jax.tree.map(lambda x: jnp.array(x, copy=True), trained))
  state = state.replace(reference=jax.tree.map(jnp.asarray, {"params": other.params, "router": other.router}))
  packed = problems.rows_of(samples, ADVANTAGES, S)
  passes = [programs.put_rows(rows) for rows in problems.in_passes(packed, 2)]
  assert len(passes) == 2  # of two rows: 70 places are three of them, and one holds nothing
  passes = [rows | {"reference": programs.reference(state.reference, rows)} for rows in passes]
  counted = jax.device_get([programs.count(rows) for rows in passes])
  counts = {name: np.float32(sum(one[name] for one in counted)) for name in counted[0]}
  sums = programs.start()
  for rows in passes:
    sums = programs.add(state, sums, rows, counts)
  return types.SimpleNamespace(samples=samples, arrays=arrays, old=old, trained=trained, other=other, programs=programs,
                               state=state, passes=passes, counts=counts, sums=jax.device_get(sums))


def recorded(samples):
  """Tokens of each expert, as the sampler chose."""
  return sum(np.bincount(sample.experts.reshape(-1), minlength=SHALLOW.n_routed_experts) for sample in samples)


def test_passes_of_packed_rows_are_the_objective_on_whole_logits(world):
  """Loss, gradients and metrics of two passes are those of samples that have a row each, all their logits, and autodiff.
  float32 sums in another order: a few 1e-7 of each gradient's norm, more where terms cancel."""
  tokens, segments, targets, experts, kept = world.arrays
  reference = whole_logits(world.other.params, world.other.router, tokens, segments, targets, None, kept)[0]

  def objective(params):
    logprobs, losses = whole_logits(params, world.trained.router, *world.arrays)
    gain, masked = by_hand(logprobs, world.old, reference, targets)
    balance, indexer = (losses[name][0] / losses[name][1] for name in ("balance", "indexer"))
    return -gain + 0.1 * balance + 0.5 * indexer, (gain, masked, balance, indexer, logprobs)

  (loss, (gain, masked, balance, indexer, logprobs)), grads = jax.jit(jax.value_and_grad(objective, has_aux=True))(
    world.trained.params)
  values = world.sums.values
  for name, want in (("policy", -gain), ("balance", balance), ("indexer", indexer), ("masked", masked)):
    assert values[name] == pytest.approx(float(want), rel=2e-5), name
  assert masked == 0.25 and balance > 0.5 and indexer > 1e-3 and abs(gain) > 1e-3
  asked = targets >= 0
  assert values["policy_gap_max"] == pytest.approx(np.abs(logprobs - world.old)[asked].max(), abs=1e-5)
  ratio = np.exp(np.asarray(logprobs) - world.old)
  inside = [(np.abs(ratio[i] - 1) <= 0.2)[asked[i]].mean() for i in range(4)]
  assert values["acceptance"] == pytest.approx(np.mean([x for i, x in enumerate(inside) if i != 2]) * 3 / 4, rel=1e-5)
  assert values["clipped"] == pytest.approx(1 - np.mean(inside), rel=1e-5)
  found, grads = on_host(world.sums.grads), on_host(grads)
  assert found.keys() == grads.keys()
  for name, g in grads.items():
    assert np.linalg.norm(found[name] - g) <= 5e-5 * np.linalg.norm(g) + 1e-7, name
  assert sum(np.abs(g).max() > 0 for g in grads.values()) > 20


def test_the_sampler_s_experts_are_obeyed(world):
  """Whatever they are: of a packed row the same as of the sample alone with them, and others give other numbers."""
  variables, rows = {"params": world.trained.params, "router": world.trained.router}, world.passes[0]
  tokens, segments, targets, experts, kept = world.arrays
  policy = lambda rows: np.asarray(world.programs.policy(variables, rows))
  before, asked = policy(rows), np.asarray(rows["targets"]) >= 0
  after = policy(rows | {"experts": (rows["experts"] + 1) % SHALLOW.n_routed_experts})
  assert (np.abs(after - before)[asked] > 1e-6).mean() > 0.9 and np.abs(after - before).max() > 1e-2
  for found, given in ((before, experts), (after, (experts + 1) % SHALLOW.n_routed_experts)):
    want = np.asarray(whole_logits(world.trained.params, world.trained.router, tokens, segments, targets, given, kept)[0])
    for x in found[asked]:  # the pass holds some of the samples, in an order of its own
      assert np.abs(want[targets >= 0] - x).min() < 2e-5


def test_without_experts_and_sets_the_model_chooses_among_all_tokens(world):
  """As with keep_routing = keep_sampling_mask = False: the log-probabilities are those of the whole softmax."""
  samples = [dataclasses.replace(sample, experts=None, kept=None) for sample in world.samples]
  variables = {"params": world.trained.params, "router": world.trained.router}
  rows = problems.rows_of(samples, ADVANTAGES, S)
  found = np.asarray(world.programs.policy(variables, rows))[rows["targets"] >= 0]
  tokens, segments, targets, _, kept = world.arrays
  want = np.asarray(whole_logits(*variables.values(), tokens, segments, targets, None, np.ones_like(kept))[0])
  np.testing.assert_allclose(np.sort(found), np.sort(want[targets >= 0]), atol=2e-5)  # packed in an order of its own


def test_a_router_that_moved_since_does_not_choose(world):
  """Its load is what the sampler recorded, not what its new weights would choose."""
  np.testing.assert_array_equal(world.sums.load[0], recorded(world.samples))
  turned = jax.tree_util.tree_map_with_path(
    lambda path, x: -x if "router" in [p.key for p in path] else x, world.state.params)
  assert differing(turned, world.state.params)
  sums = world.programs.start()
  for rows in world.passes:
    sums = world.programs.add(world.state.replace(params=turned), sums, rows, world.counts)
  np.testing.assert_array_equal(sums.load[0], recorded(world.samples))
  assert abs(float(sums.values["policy"]) - world.sums.values["policy"]) > 1e-4  # but its gates count


def test_not_finite_gives_the_old_state_back_with_its_reference(world):
  """The state that came in is given up; what comes back has the same bits, and its reference can be asked again."""
  own = lambda tree: jax.tree.map(lambda x: jnp.array(x, copy=True), tree)
  before, kept = own(world.state), on_host(world.state)
  bad = world.sums.replace(grads=jax.tree.map(lambda x: np.full_like(x, np.nan), world.sums.grads))
  state, values = world.programs.update(before, bad)
  assert not values["finite"] and all(x.is_deleted() for x in jax.tree.leaves(before.params))
  found = on_host(state)
  assert [name for name, x in kept.items() if x.tobytes() != found[name].tobytes()] == []
  again = world.programs.reference(state.reference, world.passes[0])
  np.testing.assert_array_equal(again, world.passes[0]["reference"])
  # and the same programs go on from there: a sound update moves all weights and leaves the reference alone
  state, values = world.programs.update(state, world.sums)
  assert values["finite"] and int(state.step) == 1
  assert len(differing(state.params, world.state.params)) > 20
  assert differing(state.reference, world.state.reference) == []
