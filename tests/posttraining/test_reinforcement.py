"""Learning from rewards as a whole: sampler and trainer agree, packing and passes change nothing, a stopped run goes on."""

import dataclasses
import functools
import json
import types
import weakref

import jax
import numpy as np
import pytest

from deepseek_v4 import config as c
from deepseek_v4.checkpoint.store import restore_variables
from deepseek_v4.model.transformer import DeepseekV4
from deepseek_v4.posttraining import policy_step, problems, reinforcement
from deepseek_v4.posttraining.rollout import Request, Sample, sample_replies
from deepseek_v4.sharding import make_mesh
from deepseek_v4.training.stopping import Stopped, Stopping
from tests.model.small import T0, random_variables

MODEL = dataclasses.replace(T0, vocab_size=320, max_position_embeddings=256, num_nextn_predict_layers=1)
ROW = 64


def run_of(path, **changes):
  """A run with few programs: one layer, replies of eight bytes."""
  model = dataclasses.replace(
    MODEL, hidden_size=16, num_hidden_layers=1, layer_types=(c.SLIDING,), mlp_layer_types=(c.LEARNED,), scan_layers=False,
    num_nextn_predict_layers=0, init_std=0.1, hc_mult=2)
  config = c.ReinforcementConfig(
    rewards=("tests.posttraining.test_reinforcement.plain",), reasoning_effort="none", problems=8, replies=8, minibatches=2,
    max_new_tokens=8, decode_batch=32, reference_steps=4, kl_weight=0.01, clip=0.2, length_penalty=0.1, top_p=0.98)
  return c.RunConfig(
    model=model, reinforcement=dataclasses.replace(config, **changes), optimizer=c.OptimizerConfig(
      learning_rate=5e-2, warmup_steps=1, weight_decay=0.0),
    data=c.DataConfig(source="chat", path=str(path), sequence_length=96, batch_size=16, held_out_percent=30),
    training=c.TrainingConfig(steps=16, eval_every=4, eval_batches=1, checkpoint_every=4, log_every=1))


def plain(problem, message):
  """The reward: which share of the reply's eight characters is ASCII; about 0.4 before anything is learnt."""
  assert problem["messages"]
  return sum(letter < "\x80" for letter in message["content"]) / 8


@pytest.fixture(scope="module")
def path(tmp_path_factory):
  file = tmp_path_factory.mktemp("problems") / "say.jsonl"
  file.write_text("".join(json.dumps({"messages": [{"role": "user", "content": f"{i}"}]}) + "\n" for i in range(40)))
  return file


def policy_run(**changes):
  """A run around MODEL, which has every kind of layer; it is only asked for its programs."""
  config = c.ReinforcementConfig(problems=3, replies=2, minibatches=1, max_new_tokens=12, top_p=0.9, temperature=1.2,
                                 mask_above=0.01)
  return c.RunConfig(model=dataclasses.replace(MODEL, **changes), reinforcement=config, optimizer=c.OptimizerConfig(
    warmup_steps=0, adam_eps=1e-4, learning_rate=1e-2), data=c.DataConfig(
      source="chat", path="none", sequence_length=ROW, batch_size=2), training=c.TrainingConfig(steps=4))


def variables_of(run):
  return {name: jax.tree.map(jax.numpy.asarray, tree) for name, tree in random_variables(run.model).items()}


@functools.cache
def drawn(dtype="float32"):
  """Six samples of MODEL, with experts and kept sets."""
  run = policy_run(compute_dtype=dtype)
  requests = [Request(tuple(range(3, 3 + n)), (n,)) for n in (3, 5, 9, 14, 20, 30)]
  return sample_replies(DeepseekV4(run.model), variables_of(run), requests, max_new_tokens=12, batch_size=3,
                        stop_tokens=(50, 60, 70), temperature=1.2, top_p=0.9, record=("experts", "kept"))


def gaps(dtype):
  """|sampler's - trainer's log-probability| of every token of the samples."""
  run = policy_run(compute_dtype=dtype)
  rows = problems.rows_of(drawn(dtype), np.zeros(6), ROW)
  found = policy_step.Programs(run).policy(variables_of(run), rows)
  asked = rows["targets"] >= 0
  assert asked.sum() == sum(len(sample.reply) for sample in drawn(dtype)) and len(asked) < 6
  return np.abs(np.asarray(found) - rows["old"])[asked]


@pytest.mark.long
def test_sampler_and_trainer_agree():
  assert gaps("float32").max() < 1e-5  # of one token at a time through a cache, and of packed rows


@pytest.mark.long
def test_sampler_and_trainer_in_bfloat16():
  """With the sampler's experts nothing but rounding is left: logits of these weights are small, a last bit of them is 1e-3;
  0.0003 was seen."""
  found = gaps("bfloat16")
  print(f"bfloat16: mean {found.mean():.1e}, largest {found.max():.1e} nats")
  assert 1e-5 < found.max() < 2e-3


def step_of(run, samples, advantages, mesh=None, row=ROW):
  """(new params, metrics) after one optimizer step; rows of `row` places."""
  programs = policy_step.Programs(run, mesh)
  shapes = policy_step.abstract_policy(run, mesh)
  fresh = lambda tree: jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), tree)
  variables, other = random_variables(run.model), random_variables(run.model, seed=1)
  state = policy_step.PolicyState(np.int32(0), variables["params"], variables["router"], fresh(shapes.opt_state),
                                  jax.random.key(0), {name: other[name] for name in ("params", "router")})
  state = jax.device_put(state, None if mesh is None else jax.tree.map(lambda x: x.sharding, shapes))
  rows = problems.rows_of(samples, advantages, row)
  passes = [programs.put_rows(part) for part in problems.in_passes(rows, run.data.batch_size)]
  passes = [rows | {"reference": programs.reference(state.reference, rows)} for rows in passes]
  counted = [jax.device_get(programs.count(rows)) for rows in passes]
  counts = {name: np.float32(sum(one[name] for one in counted)) for name in counted[0]}
  sums = programs.start()
  for rows in passes:
    sums = programs.add(state, sums, rows, counts)
  grads = jax.tree.map(np.array, sums.grads)
  state, values = programs.update(state, sums)
  return grads, jax.device_get(state.params), jax.device_get(values), variables


ADVANTAGES = np.array([1.0, -1.0, 0.5, -0.5, -0.75, 0.75])


@pytest.mark.long
def test_packing_passes_and_meshes_change_nothing():
  run = policy_run()
  grads, params, values, before = step_of(run, drawn(), ADVANTAGES)
  assert values["finite"] and values["kl"] > 0 and values["policy_gap"] < 1e-5
  alone = dataclasses.replace(run, data=dataclasses.replace(run.data, batch_size=1))
  together = dataclasses.replace(run, data=dataclasses.replace(run.data, batch_size=4))
  mesh = make_mesh(c.MeshConfig(data=2, expert=2, tensor=2))
  for other in (step_of(alone, drawn(), ADVANTAGES), step_of(together, drawn(), ADVANTAGES, mesh)):
    # Counted terms of the other losses are the same; float32 sums in another order.
    for x, y in zip(jax.tree.leaves(other[0]), jax.tree.leaves(grads), strict=True):
      np.testing.assert_allclose(x, y, atol=2e-5 * max(1, np.abs(y).max()))
    assert abs(other[2]["loss"] - values["loss"]) < 1e-4
  # the prediction block rests
  for x, y in zip(jax.tree.leaves(params["mtp"]), jax.tree.leaves(before["params"]["mtp"]), strict=True):
    np.testing.assert_array_equal(x, y)


# ---- whole runs -------------------------------------------------------------------------------------------------------
def weights(folder):
  return jax.tree.leaves(restore_variables(folder / "checkpoints")[0])


@pytest.fixture(scope="module")
def whole(path, tmp_path_factory):
  """(folder, summary, lines) of an undisturbed run."""
  folder = tmp_path_factory.mktemp("whole") / "run"
  summary = reinforcement.reinforce(run_of(path), folder)
  return folder, summary, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_rewards_are_learnt(whole):
  folder, summary, lines = whole
  of = lambda split, name: [line[name] for line in lines if line["split"] == split]
  assert of("held_out", "reward")[0] < 0.5 and summary["held_out"]["reward"] > 0.65
  assert of("train", "step") == list(range(2, 17, 2)) and of("held_out", "step") == [0, 4, 8, 12, 16]
  assert max(of("train", "sampler_gap_max")) < 2e-5  # the trainer sees what the sampler said, token for token
  for line in lines:
    if line["split"] == "train":
      assert line["sampler_gap"] <= line["sampler_gap_max"] <= line["policy_gap_max"] >= line["policy_gap"]
      assert 1 - line["masked"] - line["clipped"] - 1e-6 <= line["acceptance"] <= 1 - line["clipped"] + 1e-6
  assert of("train", "kl")[0] < 0.1 and all(np.isfinite(of("train", "kl")))
  assert {"masked", "clipped", "reply_length", "length_penalty", "finished"} <= set(lines[-2])
  assert (folder / "reinforcement.png").stat().st_size > 10_000


@pytest.mark.long
def test_a_stopped_run_goes_on_as_if_it_had_not_been(whole, path, tmp_path, monkeypatch):
  """Stopped between the batches of a rollout."""
  stop, draw = Stopping(), reinforcement.sample_replies

  def stopping(*args, on_batch, **options):
    def tell(samples):
      if options["record"] and stopping.calls == 3:
        stop.ask()
      on_batch(samples)
    stopping.calls += bool(options["record"])
    return draw(*args, on_batch=tell, **options)

  stopping.calls = 0
  monkeypatch.setattr(reinforcement, "sample_replies", stopping)
  with pytest.raises(Stopped, match="stopped after step 4, which is saved"):
    reinforcement.reinforce(run_of(path), tmp_path / "run", stop=stop)
  monkeypatch.undo()
  reinforcement.reinforce(run_of(path), tmp_path / "run")
  for x, y in zip(weights(tmp_path / "run"), weights(whole[0]), strict=True):
    np.testing.assert_array_equal(x, y)
  numbers = lambda folder: [{name: value for name, value in json.loads(line).items() if "second" not in name}
                            for line in (folder / "metrics.jsonl").read_text().splitlines()]
  assert numbers(tmp_path / "run") == numbers(whole[0])


def test_rows_of_one_step_at_a_time_are_on_the_devices(path):
  """Of a round's four minibatches; each has two passes, and all of them have the round's one reference."""
  run = run_of(path, minibatches=4, top_p=1.0)
  run = dataclasses.replace(run, data=dataclasses.replace(run.data, sequence_length=32, batch_size=4))
  diary, brought = [], []

  class Programs:
    def put_rows(self, rows):
      found = {name: jax.numpy.asarray(x) for name, x in rows.items()}
      brought.extend(weakref.ref(x) for x in found.values())
      diary.append(sum(x().nbytes for x in brought if x() is not None))
      return found

    count = staticmethod(lambda rows: {"balance": (rows["segment_ids"] > 0).sum()})
    reference = staticmethod(lambda variables, rows: diary.append(variables) or rows["old"])
    start = staticmethod(lambda: 0)
    add = staticmethod(lambda state, sums, rows, counts: sums + rows["reference"].sum())
    update = staticmethod(lambda state, sums: (state, dict.fromkeys(
      ("loss", "policy_gap", "policy_gap_max", "kl", "masked", "acceptance"), sums) | {"finite": True, "tokens": 1}))

  silent = types.SimpleNamespace(report=lambda *_: 0.0, say=lambda _: None, step=lambda _: None, write=lambda *_: None)
  tools = types.SimpleNamespace(run_config=run, programs=Programs(), progress=silent, writer=silent)
  samples = [Sample((1, 2), tuple(range(3, 11)), (-1.0,) * 8, (True,) * 8, "length", (i,)) for i in range(64)]
  judged = reinforcement.Judged(samples, np.random.default_rng(0).random((8, 8)), np.zeros((8, 8)))
  reinforcement.learn(tools, 0, types.SimpleNamespace(reference="old weights"), judged)
  sizes = [x for x in diary if x != "old weights"]
  assert len(sizes) == len(diary) // 2 == 8 and max(sizes) <= 2 * sizes[0]


def test_what_the_steps_of_a_round_were_is_written_every_log_every_steps(path, monkeypatch):
  """After four steps of two, of which 3, 6, ... are due, and behind the last; the distances of the round's first step."""
  run = run_of(path)
  run = dataclasses.replace(run, training=dataclasses.replace(run.training, log_every=3, steps=8))
  gaps, written = iter([(0.1, 0.4), (0.3, 0.6)] * 4), {}
  step = lambda tools, state, passes: (state, dict(zip(("policy_gap", "policy_gap_max"), next(gaps))) | {
    "loss": 1.0, "kl": 0.0, "masked": 0.0, "acceptance": 1.0, "tokens": 5})
  monkeypatch.setattr(reinforcement, "one_step", step)
  progress = types.SimpleNamespace(report=lambda *_: 0.0, say=lambda _: None)
  writer = types.SimpleNamespace(write=lambda split, step, values: written.update({step: values}))
  samples = [Sample((1,), (2,), (-1.0,), (True,), "stop", (i,)) for i in range(64)]
  judged = reinforcement.Judged(samples, np.zeros((8, 8)), np.zeros((8, 8)))
  for done in (0, 2, 4, 6):
    reinforcement.learn(types.SimpleNamespace(run_config=run, progress=progress, writer=writer), done, None, judged)
  assert list(written) == [4, 6, 8]
  of = written[8]
  assert (of["policy_gap"], of["policy_gap_max"], of["sampler_gap"], of["sampler_gap_max"]) == (0.2, 0.6, 0.1, 0.4)
  assert of["tokens"] == 10


def test_what_is_not_finite_says_what_to_change(path):
  """Starting again would come to the same."""
  sums = {"loss": np.float32("nan"), "grad_norm": np.float32(2), "learning_rate": np.float32(0.05), "finite": False,
          "tokens": 1}
  programs = types.SimpleNamespace(put_rows=dict, reference=lambda *_: 0, count=lambda _: {"balance": 1}, start=lambda: 0,
                                   add=lambda *_: 0, update=lambda *_: (None, sums))
  tools = types.SimpleNamespace(run_config=run_of(path), programs=programs)
  with pytest.raises(FloatingPointError, match=r"same numbers: .* lower optimizer.learning_rate \(now 0.05\) or another"):
    reinforcement.one_step(tools, types.SimpleNamespace(reference=None), [{}])


@pytest.mark.long
def test_a_round_on_four_devices_is_that_of_one(path, tmp_path):
  """The same replies; float32 sums in another order, which the first updates enlarge up to a hundredth of a step."""
  run, rate = run_of(path), 1e-2
  run = dataclasses.replace(run, training=dataclasses.replace(run.training, steps=2), optimizer=c.OptimizerConfig(
    learning_rate=rate, warmup_steps=0, weight_decay=0.0, adam_eps=1e-4))
  reinforcement.reinforce(run, tmp_path / "one")
  reinforcement.reinforce(run, tmp_path / "four", make_mesh(c.MeshConfig(data=2, tensor=2), jax.devices()[:4]))
  found, wanted = ([json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
                   for name in ("four", "one"))
  for line, want in zip(found, wanted, strict=True):
    for name in want.keys() - {"seconds", "tokens_per_second", "split"}:
      assert line[name] == pytest.approx(want[name], rel=1e-3, abs=2e-5), name
  for x, y in zip(weights(tmp_path / "four"), weights(tmp_path / "one"), strict=True):
    np.testing.assert_allclose(x, y, atol=1e-2 * rate)


@pytest.mark.parametrize("changes, message", [
  (dict(rewards=("tests.posttraining.nothing.f",)), r"reinforcement.rewards\[0\] = .*No module named"),
  (dict(rewards=("deepseek_v4.posttraining.rewards.exact_answer",)), "say.jsonl, line .*: KeyError: 'answer'"),
  (dict(reasoning_effort="huge"), "reasoning_effort = 'huge': expected one of none, high, max"),
  (dict(max_new_tokens=95), "bad lines\n.*say.jsonl, line 1: messages = .*: expected at most data.sequence_length"),
  (dict(max_new_tokens=96), "reinforcement.max_new_tokens = 96: expected less than data.sequence_length = 96"),
  (dict(minibatches=3), "minibatches = 3: expected a divisor of problems x replies = 64"),
  (dict(minibatches=32), "training.steps = 16: expected a multiple of reinforcement.minibatches = 32"),
  (dict(replies=1), "replies = 1: expected at least 2"),
  (dict(top_p=0.0), "top_p = 0.0: expected a number above 0"),
  (dict(temperature=0.0), "temperature = 0.0: expected a finite number above 0"),
  (dict(rewards=()), r"rewards = \(\): expected at least one function"),
])
def test_refused_before_anything_is_compiled(path, tmp_path, changes, message):
  with pytest.raises(ValueError, match=message):
    reinforcement.reinforce(run_of(path, **changes), tmp_path / "run")


@pytest.mark.parametrize("changes, kept", [
  (dict(top_p=0.9), ["experts", "kept"]), (dict(top_k=5), ["experts", "kept"]), (dict(), ["experts"]),
  (dict(top_p=0.9, keep_routing=False), ["kept"]), (dict(top_p=0.9, keep_sampling_mask=False), ["experts"]),
  (dict(keep_routing=False), [])])
def test_what_the_sampler_keeps_for_the_trainer(changes, kept):
  assert reinforcement.kept_of(c.ReinforcementConfig(**changes)) == kept


def test_kept_sets_are_split_in_whole_bytes(path):
  mesh = types.SimpleNamespace(shape={"context": 1, "tensor": 16}, size=16)
  run = run_of(path, top_p=0.9)
  with pytest.raises(ValueError, match="model.vocab_size = 320: expected a multiple of 8 x mesh.tensor = 128, or"):
    reinforcement.check(run, mesh)


def test_problems_end_with_the_user(path, tmp_path):
  file = tmp_path / "bad.jsonl"
  talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
  file.write_text("\n".join(json.dumps({"messages": m}) for m in (talk[:1], talk, talk[1:])))
  config = dataclasses.replace(run_of(path).data, path=str(file), held_out_percent=0)
  read = lambda: problems.Problems(config, "train", "none", reinforcement.conversations.DEFAULT,
                                   reinforcement.tokenize.load_tokenizer(None, 320), 90)
  with pytest.raises(ValueError, match="2 bad lines\n.*line 2: .*end with the user's.*\n.*line 3: .*end with the user's"):
    read()
  file.write_text(file.read_text().splitlines()[0])
  assert [problem.place.rsplit(", ")[-1] for problem in read().take(0, 3)] == ["line 1"] * 3


def test_every_problem_comes_once_an_epoch(path):
  config = run_of(path).data
  found = problems.Problems(config, "train", "none", reinforcement.conversations.DEFAULT,
                            reinforcement.tokenize.load_tokenizer(None, 320), 90)
  count = len(found.all)
  epochs = [[problem.place for problem in found.take(epoch * count, count)] for epoch in range(2)]
  assert set(epochs[0]) == set(epochs[1]) and len(set(epochs[0])) == count and epochs[0] != epochs[1]
  assert [problem.place for problem in found.take(count - 2, 4)] == epochs[0][-2:] + epochs[1][:2]
