"""The step of a distillation against the formulas on whole logits, on one device and on meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import deepseek_v4 as dsv4
from deepseek_v4 import config as c
from deepseek_v4.posttraining import distillation_step
from deepseek_v4.posttraining.distillation_step import Pass, Steps
from deepseek_v4.sharding import make_mesh
from deepseek_v4.training.state import optimizer_of
from deepseek_v4.training.step import update_router
from tests.model.small import equations
from tests.posttraining.small import STUDENT, random_rows, random_state, run_config
from tests.training.small import at, differing, leaves, on_host, with_leaf

RUN = run_config([("narrow", "a", "b", 0.5), ("wide", "a", "b", 2.0)], model=STUDENT)
# two passes of two rows: packed samples, one that is a whole row, and a row without any
ROWS = [random_rows(STUDENT, [[(5, 20), (3, 9)], [(8, 40)]], seed=1), random_rows(STUDENT, [[(1, 30)], []], seed=2)]
WIDTH, WEIGHTS, KNOWN = 24, (0.5, 2.0), 260  # teachers are wider, and know fewer ids


@functools.cache
def heard():
  """(hidden states [2, S, E], head [E, V]) of the teacher of each pass."""
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  return [(normal(2, 48, WIDTH), normal(WIDTH, STUDENT.vocab_size) / 3) for _ in WEIGHTS]


@functools.cache
def steps_on(mesh=None):
  return Steps(RUN, mesh)


def stepped(mesh=None, change=lambda state: state):
  """(sums, KL of each pass, state, metrics) of one step."""
  steps = steps_on(mesh)
  state = jax.tree.map(lambda x: jnp.array(x, copy=True), change(random_state(RUN)))
  if mesh is not None:
    state = jax.device_put(state, jax.tree.map(lambda x: x.sharding, dsv4.training.abstract_state(RUN, mesh)))
  rows = [steps.put_rows(x) for x in ROWS]
  counted = jax.device_get([steps.count(x) for x in rows])
  counts = {name: sum(x[name] for x in counted) for name in counted[0]}
  sums, kl = steps.start(), []
  for x, (hidden, head), weight in zip(rows, heard(), WEIGHTS):
    part = Pass(x, steps.put_hidden(hidden), steps.put_head(head), np.float32(weight), KNOWN)
    sums, found = steps.add(state, sums, part, counts)
    kl.append(float(found))
  on_the_way = jax.device_get(sums)
  state, metrics = steps.update(state, sums)
  return on_the_way, kl, jax.device_get(state.replace(key=jax.random.key_data(state.key))), jax.device_get(metrics), counts


@functools.cache
def single():
  return stepped()


@functools.cache
def dense():
  """(loss, gradients, experts' load) of all rows together, the logits of every place and autodiff through the formula."""
  state, model = random_state(RUN), dsv4.DeepseekV4(STUDENT, "reference")
  rows = {name: jnp.concatenate([x[name] for x in ROWS]) for name in ROWS[0]}
  logits_t = [jnp.asarray(hidden) @ head for hidden, head in heard()]
  following = lambda x: np.concatenate([x[:, 1:], 0 * x[:, :1]], 1)
  mask = [(following(x["loss_mask"]) == 1) & (following(x["segment_ids"]) == x["segment_ids"]) for x in ROWS]
  places = sum(x.sum() for x in mask)

  def objective(params):
    out = model.apply({"params": params, "router": state.router}, rows["tokens"], rows["positions"], rows["segment_ids"],
                      mtp=False, targets=jnp.full_like(rows["tokens"], -1))
    logits_s, total = out.hidden @ params["lm_head"]["kernel"], 0.0
    for i in (0, 1):
      ls, lt = (jax.nn.log_softmax(x[..., :KNOWN], -1) for x in (logits_s[2 * i:2 * i + 2], logits_t[i]))
      total += WEIGHTS[i] * ((jnp.exp(ls) * (ls - lt)).sum(-1) * mask[i]).sum() / places
    balance, indexer = (out.losses[name][0] / out.losses[name][1] for name in ("balance", "indexer"))
    others = 0.1 * balance + 0.5 * indexer
    return total + others, (total, out.routing["load"])

  (loss, (kl, load)), grads = jax.jit(jax.value_and_grad(objective, has_aux=True))(state.params)
  return float(loss), float(kl), on_host(grads), np.asarray(load)


def test_passes_of_several_teachers_are_the_loss_of_all_rows():
  """float32 in another order of summation: a few 1e-7 of each gradient's norm, more where terms cancel."""
  loss, distillation, grads, load = dense()
  sums, kl, _, metrics, counts = single()
  assert counts["distillation"] == 20 + 9 + 40 + 30 and counts["balance"] == 25 + 12 + 48 + 31
  assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
  assert metrics["distillation"] == pytest.approx(distillation, rel=1e-5)
  assert sum(w * x for w, x in zip(WEIGHTS, kl)) / counts["distillation"] == pytest.approx(distillation, rel=1e-5)
  np.testing.assert_array_equal(sums.load, load)
  found = on_host(sums.grads)
  assert found.keys() == grads.keys()
  for name, g in grads.items():
    assert np.linalg.norm(found[name] - g) <= 2e-5 * np.linalg.norm(g) + 1e-7, name
  assert sum(np.abs(g).max() > 0 for g in grads.values()) > 25
  assert metrics["finite"] and metrics["tokens"] == 116


def test_the_prediction_block_rests_and_the_rest_learns():
  before, after = random_state(RUN), single()[2]
  moved = {name for name in differing(after.params, before.params)}
  assert moved and not [name for name in moved if name.startswith("mtp/")]
  assert {name for name in leaves(before.params) if not name.startswith("mtp/")} - moved == set()
  assert differing(after.router["mtp"], before.router["mtp"]) == []
  without = {name: tree for name, tree in before.router.items() if name != "mtp"}
  want = update_router(STUDENT, without, {"layers": jnp.asarray(single()[0].load)}, RUN.loss.bias_update_speed)
  assert differing(after.router["layers"], want["layers"]) == []
  assert differing(after.router["layers"], before.router["layers"]) != []
  assert int(after.step) == 1


def test_the_update_is_the_optimizer_s_and_what_rests_keeps_its_moments():
  """Against the whole transformation of Optax; float32 in programs that are fused otherwise, times a rate of 0.01."""
  before, (sums, _, after, metrics, _) = random_state(RUN), single()
  moving = before.replace(opt_state=jax.tree.map(lambda x: x if x.ndim == 0 else x + 1, before.opt_state))
  optimizer = optimizer_of(RUN, before.params, None)
  updates, moments = jax.jit(optimizer.update)(sums.grads, before.opt_state, before.params)
  wanted, found = on_host(optax.apply_updates(before.params, updates)), on_host(after.params)
  for name, x in wanted.items():
    if not name.startswith("mtp/"):
      np.testing.assert_allclose(found[name], x, atol=1e-6, err_msg=name)
  found = on_host(after.opt_state)
  for name, x in on_host(moments).items():
    np.testing.assert_allclose(found[name], x, rtol=1e-5, atol=1e-7, err_msg=name)  # no moment of mtp: they began as zeros
  assert metrics["finite"] and metrics["grad_norm"] == pytest.approx(float(optax.tree.norm(sums.grads)), rel=1e-6)
  state = jax.tree.map(lambda x: jnp.array(x, copy=True), moving)
  kept = on_host(steps_on().update(state, sums)[0].opt_state)
  resting = {name for name in kept if "/mtp/" in name}
  changed = {name for name, x in on_host(moving.opt_state).items() if kept[name].tobytes() != x.tobytes()}
  assert resting and not resting & changed and len(changed) > 30


def test_not_finite_gives_the_old_state_back():
  broken = lambda state: state.replace(params=with_leaf(state.params, "final_norm/scale", at(0, np.nan)))
  state, metrics = stepped(change=broken)[2:4]
  assert not metrics["finite"]
  assert differing(state.replace(key=()), broken(random_state(RUN)).replace(key=())) == []


def test_nothing_holds_the_vocabulary_of_all_places():
  """In the whole program of a pass, forward and backward: ids beside at most as many rows as a chunk or a head has."""
  steps, (hidden, head) = steps_on(), heard()[0]
  part = Pass(steps.put_rows(ROWS[0]), steps.put_hidden(hidden), steps.put_head(head), np.float32(1), KNOWN)
  counts = dict.fromkeys(("distillation", "balance", "indexer"), np.float32(9))
  program = jax.make_jaxpr(lambda *args: distillation_step._add_pass(RUN, None, *args))(
    random_state(RUN), steps.start(), part, counts)
  shapes = {v.aval.shape for e in equations(program.jaxpr) for v in e.outvars}
  wide = [shape for shape in shapes if {KNOWN, STUDENT.vocab_size} & set(shape)]
  rows = {shape: np.prod(shape) // max(n for n in shape if n in (KNOWN, STUDENT.vocab_size)) for shape in wide}
  both = 2 * STUDENT.loss_chunk_size  # the student's and the teacher's logits of a chunk
  assert max(rows.values()) <= max(WIDTH, STUDENT.hidden_size, both) < 2 * 48, rows
  places = 2 * 48 * KNOWN
  assert not [shape for shape in shapes if np.prod(shape) >= places]  # nor under another shape


MESHES = [dict(data=2, tensor=2), dict(data=1, fsdp=2, context=2, tensor=2), dict(data=1, expert=2)]


@pytest.mark.long
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_meshes_give_the_numbers_of_one_device(sizes):
  mesh = make_mesh(c.MeshConfig(**sizes), jax.devices()[:np.prod(list(sizes.values()))])
  (sums, kl, state, metrics, _), (want, wanted_kl, wanted, expected, _) = stepped(mesh), single()
  np.testing.assert_allclose(kl, wanted_kl, rtol=1e-5)
  for name in ("loss", "distillation", "balance", "indexer", "grad_norm"):
    assert metrics[name] == pytest.approx(expected[name], rel=1e-5), name
  grads = on_host(want.grads)
  for name, g in on_host(sums.grads).items():
    assert np.linalg.norm(g - grads[name]) <= 2e-5 * np.linalg.norm(grads[name]) + 1e-7, name
  assert differing(state.router, wanted.router) == []


def test_teachers_and_students_of_equal_sizes_need_one_program():
  """Teachers differ in what a pass holds, never in what is compiled, if they are of one size."""
  steps, programs = steps_on(), []
  state = jax.tree.map(lambda x: jnp.array(x, copy=True), random_state(RUN))
  hidden, head = heard()[1]
  for i in range(3):
    part = Pass(steps.put_rows(ROWS[i % 2]), steps.put_hidden(hidden * i), steps.put_head(head + i), np.float32(i), KNOWN)
    steps.add(state, steps.start(), part, dict.fromkeys(("distillation", "balance", "indexer"), np.float32(9)))
    programs.append(steps._add.jitted._cache_size())
  assert programs[0] == programs[2]
