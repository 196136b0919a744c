"""Settings of stages: their arithmetic by counting, overrides by name and place, refusals; no JAX."""

import dataclasses
import json

import pytest

from deepseek_v4 import config as c
from deepseek_v4.config import StageConfig, override

DATA = c.DataConfig(sequence_length=64, batch_size=12, accumulation=6)
MODEL = c.ModelConfig(max_position_embeddings=512)
RUN = c.RunConfig(
  model=MODEL, data=DATA, optimizer=c.OptimizerConfig(warmup_steps=4),
  stages=(StageConfig("dense", steps=10, ramp_from=2, ramp_steps=7, attention_mode="dense", trainable="all_but_indexer"),
          StageConfig("warm-up", steps=5, sequence_length=128, batch_size=6, accumulation=1, attention_mode="dense",
                      trainable="indexer", learning_rate=1e-3, warmup_steps=2),
          StageConfig("sparse", tokens=50_000, sequence_length=512, batch_size=6, accumulation=3, mtp_weight=0.2)))


def rows_by_step(stage, data, count):
  """Rows of the first steps of a stage, from the line that the ramp follows: whole passes below it."""
  each = data.batch_size // data.accumulation
  first = (stage.ramp_from or data.batch_size) // each
  line = lambda i: first + (data.accumulation - first) * i // stage.ramp_steps if i < stage.ramp_steps else data.accumulation
  return [each * line(i) for i in range(count)]


@pytest.mark.parametrize("ramp_from, ramp_steps", [(None, 0), (2, 7), (2, 5), (2, 1), (4, 3), (10, 40), (2, 1000)])
def test_the_batch_grows_along_a_line(ramp_from, ramp_steps):
  stage = StageConfig("a", steps=1, ramp_from=ramp_from, ramp_steps=ramp_steps)
  sizes = stage.batch_sizes(DATA)
  assert sizes[0][0] == 0 and sizes[-1][1] == DATA.batch_size
  count = ramp_steps + 3
  found = [next(rows for first, rows in reversed(sizes) if first <= i) for i in range(count)]
  assert found == rows_by_step(stage, DATA, count)
  assert [rows for _, rows in sizes] == sorted({rows for _, rows in sizes})


@pytest.mark.parametrize("tokens", [1, 128, 129, 2000, 4992, 12_000, 100_000])
@pytest.mark.parametrize("ramp_from, ramp_steps", [(None, 0), (2, 7), (4, 300)])
def test_tokens_are_as_many_steps_as_it_takes(tokens, ramp_from, ramp_steps):
  stage = StageConfig("a", tokens=tokens, ramp_from=ramp_from, ramp_steps=ramp_steps)
  length = stage.length(DATA)
  taken = [64 * rows for rows in rows_by_step(stage, DATA, length)]
  assert sum(taken) >= tokens > sum(taken[:-1])


def test_a_run_is_as_long_as_its_stages():
  assert RUN.training.steps == 10 + 5 + -(-50_000 // (6 * 512)) == 32
  assert dataclasses.replace(RUN, stages=()).training.steps == 32
  assert c.RunConfig().stages == () and c.RunConfig().training.steps == 10_000
  assert dataclasses.replace(RUN, stages=list(RUN.stages)) == RUN  # a list will do


def test_stages_go_through_json():
  assert c.from_dict(c.RunConfig, json.loads(json.dumps(c.to_dict(RUN)))) == RUN


# ---- overrides ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["warm-up", "1"])
def test_a_stage_is_called_by_its_name_or_its_place(name):
  run = override(RUN, [f"stages.{name}.steps=20", f"stages.{name}.learning_rate=2e-3", "stages.sparse.tokens=None",
                       "stages.sparse.steps=3", f"stages.{name}.accumulation=2", "data.seed=3"])
  assert (run.stages[1].steps, run.stages[1].learning_rate, run.stages[1].accumulation) == (20, 2e-3, 2)
  assert run.stages[0] == RUN.stages[0] and run.data.seed == 3
  assert run.training.steps == 33  # follows by itself


def test_stages_can_be_left_out():
  run = override(RUN, ["stages=()", "training.steps=7"])
  assert run.stages == () and run.training.steps == 7


@pytest.mark.parametrize("setting, expected", [
  ("stages.spares.steps=5", r"no stage stages.spares; there is dense, warm-up, sparse \(or 0 to 2\)"),
  ("stages.3.steps=5", r"no stage stages.3; there is dense"),
  ("stages.dense=5", r"stages.dense = '5': expected a setting of one of its fields"),
  ("stages.dense.step=5", r"StageConfig has no field 'stages.dense.step'; it has name, steps, tokens, sequence_length"),
  ("stages.dense.steps=many", r"stages.dense.steps = 'many': expected int"),
  ("stages.dense.steps=1.5", r"stages.dense.steps = '1.5': expected int"),
  ("stages.dense.trainable=head", r"stages.dense.trainable = 'head': expected one of None, 'all', 'indexer', 'all_but_ind"),
  ("stages.sparse.attention_mode=full", r"stages.sparse.attention_mode = 'full': expected one of None, 'sparse', 'dense'"),
  ("stages.sparse.steps=5", r"stages.sparse.steps = 5: expected steps or tokens, one of them, beside tokens = 50000"),
  ("stages.dense.steps=None", r"stages.dense.steps = None: expected steps or tokens"),
  ("stages.dense.steps=0", r"stages.dense.steps = 0: expected at least 1"),
  ("stages.dense.mtp_weight=-1", r"stages.dense.mtp_weight = -1.0: expected at least 0"),
  ("stages.warm-up.learning_rate=0", r"stages.warm-up.learning_rate = 0.0: expected a finite number above 0"),
  ("stages.dense.decay_steps=3", r"stages.dense.learning_rate = None: expected a number, where the stage has warmup_steps"),
  ("stages.warm-up.decay_steps=4", r"stages.warm-up.warmup_steps \+ decay_steps = 6: expected at most the stage's 5 steps"),
  ("stages.dense.ramp_from=3", r"stages.dense.ramp_from = 3: expected a multiple of batch_size / accumulation = 2"),
  ("stages.dense.ramp_from=12", r"stages.dense.ramp_from = 12: expected .* below batch_size = 12"),
  ("stages.dense.ramp_steps=0", r"stages.dense.ramp_steps = 0: expected above 0 with ramp_from, else 0"),
  ("stages.warm-up.ramp_steps=3", r"stages.warm-up.ramp_steps = 3: expected above 0 with ramp_from, else 0"),
  ("stages.dense.batch_size=10", r"stages.dense.batch_size = 10: expected a multiple of accumulation = 6"),
  ("stages.sparse.sequence_length=513", r"stages.sparse.sequence_length = 513: expected at most model.max_position_emb"),
  ("stages.dense.name=sparse", r"stages = .*: expected different names; 'sparse' is there twice"),
  ("stages.dense.name=3", r"stages: name = '3': expected letters, digits, _ and -"),
  ("loss.indexer_weight=0", r"stages.sparse.trainable = 'all': expected 'all_but_indexer', or loss.indexer_weight above"),
  ("model.num_nextn_predict_layers=0", r"stages.sparse.mtp_weight = 0.2: expected None, as model.num_nextn_predict_la"),
  ("stages.warm-up.mtp_weight=0.1", r"stages.warm-up.mtp_weight = 0.1: expected None, as only the indexer trains"),
  ("training.steps=40", r"training.steps = '40': expected no such setting beside stages, which take 32 steps"),
  ("stages=5", r"stages = '5': expected tuple"),
  ("optimizer.warmup_steps=33", r"warmup_steps \+ optimizer.decay_steps = 33: expected at most training.steps = 32"),
])
def test_wrong_settings_say_what_was_expected(setting, expected):
  with pytest.raises(ValueError, match=expected):
    override(RUN, [setting])


def test_a_weight_that_nobody_needs_may_be_zero():
  """The indexer alone learns by its own loss whatever weight that has beside others; nor is it needed where none trains."""
  first, second, third = RUN.stages
  third = dataclasses.replace(third, trainable="all_but_indexer")
  run = dataclasses.replace(RUN, loss=c.LossConfig(indexer_weight=0), stages=(first, second, third))
  assert run.loss.indexer_weight == 0
  model = dataclasses.replace(MODEL, layer_types=(c.SLIDING,) * MODEL.num_hidden_layers)
  assert dataclasses.replace(RUN, model=model, loss=run.loss, stages=(first, dataclasses.replace(third, trainable="all")))


def test_settings_of_stages_that_are_not_there():
  with pytest.raises(ValueError, match="no stage stages.dense; there is none"):
    override(c.RunConfig(), ["stages.dense.steps=5"])


@pytest.mark.parametrize("settings", [("stages.dense.trainable=indexer",), ("stages=()", "training.trainable=indexer")])
def test_an_indexer_must_be_there_to_train_alone(settings):
  model = dataclasses.replace(MODEL, layer_types=(c.HCA,) * 43)
  run = dataclasses.replace(RUN, model=model, stages=RUN.stages[::2])
  with pytest.raises(ValueError, match="trainable = 'indexer': expected another value: no layer of the model has"):
    override(run, settings)


def test_the_optimizers_first_step_counts():
  with pytest.raises(ValueError, match=r"= 20: expected at most training.steps = 30 - optimizer.first_step = 11"):
    c.RunConfig(optimizer=c.OptimizerConfig(first_step=11, warmup_steps=20), training=c.TrainingConfig(steps=30))
