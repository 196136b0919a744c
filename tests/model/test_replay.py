"""Replayed choices: one's own change no bit, another's change what NumPy says; with a cache, on a mesh; what is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deepseek_v4 as dsv4
from deepseek_v4 import sharding
from deepseek_v4.config import CSA, HASH, LEARNED, SLIDING, MeshConfig
from deepseek_v4.model.context import make_context
from deepseek_v4.model.experts import MoE
from deepseek_v4.model.losses import next_token_targets
from deepseek_v4.model.replay import Replay
from pallas_kernels.selection import Selection
from tests.model.small import T0, abstract_variables, pack, random_tokens, random_variables

# A hash layer, two learned ones with indexers in a scan, the prediction block.
CONFIG = dataclasses.replace(T0, layer_types=(SLIDING, CSA, CSA), mlp_layer_types=(HASH, LEARNED, LEARNED))
PLAIN, RECOMPUTED = ("reference", "none"), ("blockwise", "block")  # kernels, remat
TOKENS, SEGMENTS = (np.concatenate(x) for x in zip(
  pack(random_tokens(21), random_tokens(6, seed=1), length=32), pack(random_tokens(32, seed=2), length=32)))


def differentiated(given, mesh=None, form=PLAIN):
  """replay -> (output with losses, gradient of their means by the parameters), compiled; `given`: the replay is one of all
  choices, else None."""
  return _differentiated(given, mesh, form)


@functools.cache  # by arguments as they are written: here always so
def _differentiated(given, mesh, form):
  model = dsv4.DeepseekV4(dataclasses.replace(CONFIG, remat=form[1]), form[0])

  def total(params, router, tokens, segment_ids, replay):
    targets = next_token_targets(tokens, segment_ids, jnp.ones_like(tokens))
    out = model.apply({"params": params, "router": router}, tokens, None, segment_ids, targets=targets, replay=replay,
                      keep_selection=True)
    return sum(total / count for total, count in out.losses.values()), out

  graded = jax.value_and_grad(total, has_aux=True)
  run = sharding.OnMesh(jax.jit(lambda v, replay: graded(v["params"], v["router"], TOKENS, SEGMENTS, replay)), mesh)
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), own(form)[2]) if given else None
  compiled = run.lower(random_variables(CONFIG), shapes).compile()

  def both(replay):
    (_, out), gradient = jax.device_get(compiled(random_variables(CONFIG), replay))
    return out, gradient
  return both


@functools.cache
def own(form=PLAIN):
  """(output, gradient) of a pass that chooses itself, and its choices as a replay."""
  out, gradient = differentiated(False, form=form)(None)
  return out, gradient, Replay.of(out.routing)


def differing(a, b):
  xs, ys = (jax.tree_util.tree_leaves_with_path(tree) for tree in (a, b))
  return [jax.tree_util.keystr(path) for (path, x), (_, y) in zip(xs, ys, strict=True) if x.tobytes() != y.tobytes()]


def other_experts(experts, seed=0):
  """Random experts in the form of `experts`, distinct along k."""
  order = np.random.default_rng(seed).random((*experts.shape[:-1], T0.n_routed_experts)).argsort(-1)
  return order[..., :experts.shape[-1]].astype(np.int32)


# ---- one's own choices -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("form", [PLAIN, pytest.param(RECOMPUTED, marks=pytest.mark.long)])
def test_own_choices_change_no_bit_of_outputs_and_gradients(form):
  out, gradient, replay = own(form)
  assert replay.experts.shape == (3, 2, 32, 2) and replay.mtp_experts.shape == (2, 32, 2) and len(replay.selection) == 2
  again, same = differentiated(True, form=form)(replay)
  assert not differing(out, again) and not differing(gradient, same)


# ---- those of another --------------------------------------------------------------------------------------------------
def test_experts_of_some_tokens_in_the_last_layer_change_these_tokens_only():
  out, _, replay = own()
  experts = replay.experts.copy()
  experts[0] = -3  # a hash layer reads its table
  experts[:, SEGMENTS == 0] = 99  # no token
  places = ([0, 0, 1], [3, 25, 31])
  experts[(2, *places)] = other_experts(experts)[(2, *places)]
  changed, _ = differentiated(True)(replay.replace(experts=experts))
  expected = np.zeros(TOKENS.shape, bool)
  expected[places] = (np.sort(experts[2], -1) != np.sort(replay.experts[2], -1)).any(-1)[places]
  assert expected.any()
  moved = (changed.hidden != out.hidden).any(-1)
  np.testing.assert_array_equal(moved[SEGMENTS > 0], expected[SEGMENTS > 0])
  np.testing.assert_array_equal(changed.routing["experts"][1:, SEGMENTS > 0], experts[1:, SEGMENTS > 0])
  np.testing.assert_array_equal(changed.routing["experts"][0], out.routing["experts"][0])
  for layer in (1, 2):
    load = np.bincount(experts[layer][SEGMENTS > 0].reshape(-1), minlength=4)
    np.testing.assert_array_equal(changed.routing["load"][layer], load)


def test_a_selection_of_one_entry_has_no_indexer_loss_and_reaches_later_tokens_only():
  """KL of a distribution over one entry is 0; a query without its second entry changes itself and what follows."""
  out, _, replay = own()
  single = [dataclasses.replace(x, picks=np.stack([x.picks[..., 0], np.full_like(x.picks[..., 0], -1)], -1))
            for x in replay.selection]
  changed, _ = differentiated(True)(replay.replace(selection=tuple(single)))
  assert float(out.losses["indexer"][0]) > 0.1 and abs(float(changed.losses["indexer"][0])) < 1e-6
  assert out.losses["indexer"][1] == changed.losses["indexer"][1]
  picks = replay.selection[1].picks.copy()
  assert (picks[0, 17] >= 0).all()
  picks[0, 17, 1] = -1
  changed, _ = differentiated(True)(replay.replace(selection=(replay.selection[0], Selection(picks))))
  moved = (changed.hidden != out.hidden).any(-1)
  assert moved[0, 17] and not moved[0, :17].any() and not moved[1].any()


def layer_in_numpy(params, x, experts, segments):
  """(output, load, balance loss) of one MoE layer with these experts, in float64."""
  silu = lambda g: g / (1 + np.exp(-g))
  mlp = lambda row, w: (silu(np.minimum(row @ w["gate"], 10)) * np.clip(row @ w["up"], -10, 10)) @ w["down"]
  scores = np.sqrt(np.log1p(np.exp(x @ params["router"]["gate"])))
  y, load, balance = np.zeros_like(x), np.zeros(4, int), 0.0
  for row, place in np.ndindex(segments.shape):
    chosen = experts[row, place]
    weights = 1.5 * scores[row, place, chosen] / scores[row, place, chosen].sum()
    y[row, place] = mlp(x[row, place], params["shared"])
    for expert, weight in zip(chosen, weights):
      y[row, place] += weight * mlp(x[row, place], {k: w[expert] for k, w in params["experts"].items()})
      load[expert] += segments[row, place] > 0
  for row in range(len(segments)):
    for segment in set(segments[row].tolist()) - {0}:
      at = segments[row] == segment
      f = np.bincount(experts[row, at].reshape(-1), minlength=4) * 4 / (2 * at.sum())
      balance += at.sum() * (f * (scores[row, at] / scores[row, at].sum(-1, keepdims=True)).mean(0)).sum()
  return y, load, balance


def test_a_layer_with_given_experts_against_numpy():
  """Outputs, load and balance loss with experts that the router would not choose; the gradient by finite differences, which
  see the weights and no choice."""
  config = dataclasses.replace(T0, hidden_size=8, moe_intermediate_size=4, routed_scaling_factor=1.5)
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.normal(size=shape)
  params = {"router": {"gate": normal(8, 4)}, "shared": {"gate": normal(8, 4), "up": normal(8, 4), "down": normal(4, 8)},
            "experts": {"gate": normal(4, 8, 4), "up": normal(4, 8, 4), "down": normal(4, 4, 8)}}
  x, segments = normal(2, 7, 8), np.array([[1, 1, 1, 2, 2, 2, 2], [5, 5, 5, 5, 5, 0, 0]], np.int32)
  experts, direction = other_experts(np.zeros((2, 7, 2))), normal(8, 4)
  single = jax.tree.map(np.float32, params)

  @jax.jit
  def run(params, x, experts):
    context = make_context(config, jnp.ones_like(segments), None, jnp.asarray(segments), "sparse", with_losses=True)

    def total(params):
      y, chosen, load, balance = MoE(config, LEARNED, "blockwise").apply(
        {"params": params, "router": {"router": {"bias": jnp.zeros(4)}}}, x, context, 0, experts)
      return jnp.cos(y).sum() + balance[0], (y, chosen, load, balance[0])
    return jax.grad(total, has_aux=True)(params)

  gradient, (y, chosen, load, balance) = run(single, np.float32(x), experts)
  want = layer_in_numpy(params, x, experts, segments)
  np.testing.assert_array_equal(chosen, experts)
  np.testing.assert_allclose(y, want[0], rtol=1e-4, atol=1e-4)  # float32 sums of products of numbers up to 20
  np.testing.assert_array_equal(load, want[1])
  assert float(balance) == pytest.approx(want[2], rel=1e-5)

  def along(step):
    moved = params | {"router": {"gate": params["router"]["gate"] + step * direction}}
    y, _, balance = layer_in_numpy(moved, x, experts, segments)
    return np.cos(y).sum() + balance
  slope = (along(1e-5) - along(-1e-5)) / 2e-5
  assert float((gradient["router"]["gate"] * direction).sum()) == pytest.approx(slope, rel=1e-3, abs=1e-3)
  # Inside jit nothing can be refused: a token with an unknown expert is NaN, and no other.
  for wrong in (-1, 4):
    broken = experts.copy()
    broken[0, 2, 1] = broken[1, 6, 0] = wrong  # the second is no token
    y = run(single, np.float32(x), broken)[1][0]
    np.testing.assert_array_equal(np.isnan(y).any(-1), (np.arange(14) == 2).reshape(2, 7))


# ---- a cache, a mesh ---------------------------------------------------------------------------------------------------
def test_chunks_with_a_cache_take_their_part_of_a_replay():
  """Padding on either side; with another's experts and entries the chunks give the full pass with the same ones. The rows of
  the cache are the first documents of the rows."""
  _, _, replay = own()
  picks = np.random.default_rng(1).permuted(np.tile([0, 1, 2, 3, -1], (2, 2, 32, 1)), axis=-1)[..., :2].astype(np.int32)
  replay = replay.replace(experts=other_experts(replay.experts), selection=tuple(map(Selection, picks)))
  want, _ = differentiated(True)(replay)
  model, width = dsv4.DeepseekV4(CONFIG, "reference"), 16

  @jax.jit
  def run(v, cache, tokens, segments, replay):
    return model.apply(v, tokens, None, segments, cache, replay=replay, keep_selection=True, logits="none")

  def cut(x, axis, chunks, side):
    """Of each row of x, whose batch is axis 0 behind `axis` others, a chunk; zeros around it, which as experts of a token
    would be refused."""
    out = np.zeros((*x.shape[:axis + 1], width, *x.shape[axis + 2:]), x.dtype)
    for row, chunk in enumerate(chunks):
      count = chunk.stop - chunk.start
      where = slice(width - count, width) if side == "left" else slice(0, count)
      out[(slice(None),) * axis + (row, where)] = x[(slice(None),) * axis + (row, chunk)]
    return out

  cache, done = dsv4.init_cache(CONFIG, 2, 32), [0, 0]
  for counts, side in (((7, 16), "left"), ((1, 1), "right"), ((13, 0), "left"), ((0, 15), "right")):
    chunks = [slice(start, start + count) for start, count in zip(done, counts)]
    part = Replay(cut(replay.experts, 1, chunks, side), tuple(Selection(cut(x.picks, 0, chunks, side))
                                                              for x in replay.selection))
    tokens, segments = (cut(x, 0, chunks, side) for x in (TOKENS, (SEGMENTS > 0).astype(np.int32)))
    out = run(random_variables(CONFIG), cache, tokens, segments, part)
    place = segments > 0
    expected = cut(want.hidden, 0, chunks, side)
    # hidden states reach 3, and the sums of a chunk run in another order
    np.testing.assert_allclose(out.hidden[place], expected[place], atol=3e-5)
    np.testing.assert_array_equal(out.routing["experts"][1:, place], part.experts[1:, place])
    for found, given in zip(out.routing["selection"], part.selection):
      np.testing.assert_array_equal(found.picks[place], given.picks[place])
    cache, done = out.cache, [chunk.stop for chunk in chunks]


@pytest.mark.long
@pytest.mark.parametrize("sizes", [dict(data=2), dict(expert=2), dict(context=2)], ids=str)
def test_a_replay_on_a_mesh_gives_the_numbers_of_one_device(sizes):
  """float32 sums in another order."""
  mesh = sharding.make_mesh(MeshConfig(**({"data": 1} | sizes)), jax.devices()[:2])
  _, _, replay = own()
  replay = replay.replace(experts=other_experts(replay.experts), mtp_experts=other_experts(replay.mtp_experts))
  want, gradient = differentiated(True)(replay)
  out, found = differentiated(True, mesh)(replay)
  np.testing.assert_allclose(out.hidden, want.hidden, atol=2e-4)
  np.testing.assert_array_equal(out.routing["load"], want.routing["load"])
  for name, (total, count) in want.losses.items():
    assert float(out.losses[name][0]) == pytest.approx(float(total), rel=1e-4) and out.losses[name][1] == count
  for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(gradient)):
    np.testing.assert_allclose(x, y, atol=1e-4 * max(1, np.abs(y).max()))


# ---- what is refused ---------------------------------------------------------------------------------------------------
EXPERTS = np.broadcast_to(np.int32([0, 3]), (3, 2, 6, 2))
ONES = np.ones((2, 6), np.int32)
PICKS = np.zeros((2, 6, 1), np.int32)


def with_expert(value, place=(1, 0, 0, 1)):
  experts = EXPERTS.copy()
  experts[place] = value
  return experts


@pytest.mark.parametrize("replay, arguments, message", [
  ("again", {}, "replay = 'str': expected None or a dsv4.Replay"),
  (Replay(EXPERTS[:2]), {}, r"replay.experts = int32\(2, 2, 6, 2\): expected integers \[layers, .*\] = \(3, 2, 6, 2\)"),
  (Replay(EXPERTS[..., :1]), {}, r"replay.experts = int32\(3, 2, 6, 1\): expected"),
  (Replay(EXPERTS + 0.5), {}, r"replay.experts = float64\(3, 2, 6, 2\): expected integers"),
  (Replay(EXPERTS.tolist()), {}, r"replay.experts = list\(3, 2, 6, 2\): expected integers"),
  (Replay(with_expert(4)), {}, r"replay.experts = 4: expected ids from 0 to 3 \(n_routed_experts = 4\)"),
  (Replay(with_expert(-1)), {}, "replay.experts = -1: expected ids from 0 to 3"),
  (Replay(with_expert(0)), {}, "replay.experts = 0: expected each expert of a token once, not twice"),
  (Replay(mtp_experts=EXPERTS[0]), {}, r"replay.mtp_experts = 'int32\(2, 6, 2\)': expected None in a pass without"),
  (Replay(mtp_experts=EXPERTS), {"mtp": True}, r"replay.mtp_experts = int32\(3, 2, 6, 2\): expected integers \[batch"),
  (Replay(selection=Selection(PICKS)), {}, "replay.selection = Selection: expected one Selection for each of the 1 CSA"),
  (Replay(selection=(Selection(PICKS),) * 2), {}, "replay.selection = 2 entries: expected one Selection for each of the 1"),
  (Replay(selection=(PICKS,)), {}, r"replay.selection\[0\] = 'ndarray': expected a Selection"),
  (Replay(selection=(Selection(PICKS[:1]),)), {}, r"replay.selection\[0\] = int32\(1, 6, 1\): expected .*shape \(2, 6\)"),
  (Replay(selection=(Selection(PICKS + 0.5),)), {}, r"replay.selection\[0\] = float64\(2, 6, 1\): expected integers"),
  (Replay(selection=(Selection(PICKS + 1),)), {}, r"replay.selection\[0\] = 1: expected entry numbers below 1, or -1"),
  (Replay(selection=(Selection.from_words(np.zeros((2, 6, 128), np.int32), 5, 1),)), {},
   r"replay.selection\[0\].num_entries = 5: expected 1, the entries of these rows"),
  (Replay(selection=(Selection(PICKS),)), {"attention_mode": "dense"}, "replay.selection: expected None with attention"),
])
def test_what_does_not_fit_is_refused_before_compilation(replay, arguments, message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(lambda v: dsv4.DeepseekV4(T0, "reference").apply(v, ONES, replay=replay, **arguments),
                   abstract_variables(T0))


def test_ids_where_no_token_is_may_be_anything():
  segments = ONES.copy()
  segments[0, 0] = 0
  jax.eval_shape(lambda v: dsv4.DeepseekV4(T0, "reference").apply(
    v, ONES, None, segments, replay=Replay(with_expert(-1))), abstract_variables(T0))
