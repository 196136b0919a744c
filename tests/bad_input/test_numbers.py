"""Token ids outside of the vocabulary, positions beyond the maximum, segment ids that decrease: numbers outside of jit."""

import dataclasses

import jax
import numpy as np
import pytest

import deepseek_v4 as dsv4
from deepseek_v4.analysis import plots_layers
from deepseek_v4.analysis.gains import composite_gains
from deepseek_v4.analysis.selection_mass import model_mass
from deepseek_v4.analysis.trace import trace
from deepseek_v4.config import DataConfig, RunConfig
from deepseek_v4.generation.decode import ThinkingBudget
from deepseek_v4.generation.drift import storage_drift
from deepseek_v4.training import data, sources
from tests.bad_input.table import KEY, check, table
from tests.bad_input.test_dtypes import reply
from tests.bad_input.test_shapes import attention, f, i, loss, selection, step
from tests.model.small import T0, abstract_variables
from tests.training.small import random_batch

VOCABULARY, MOST = T0.vocab_size, T0.max_position_embeddings
ONES = np.ones((2, 6), np.int32)
MODEL = dsv4.DeepseekV4(T0, "reference")
SHORT = dsv4.DeepseekV4(dataclasses.replace(T0, max_position_embeddings=8), "reference")
PACKED = np.array([[1, 1, 1, 2, 2, 0]] * 2, np.int32)


def row(value, place=(0, 1), of=ONES):
  """A copy with one number changed."""
  changed = of.copy()
  changed[place] = value
  return changed


def network(*arguments, run=MODEL, **named):
  """A forward pass with known numbers; it is traced, but for what is looked at before."""
  return lambda _: jax.eval_shape(lambda v: run.apply(v, *arguments, **named), abstract_variables(T0))


def traced(*arguments):
  return lambda _: jax.eval_shape(lambda v: trace(MODEL, v, *arguments), abstract_variables(T0))


def cached(*arguments, **named):
  def call(_):
    cache = jax.eval_shape(lambda: dsv4.init_cache(T0, 2, 16))
    jax.eval_shape(lambda v, cache: MODEL.apply(v, *arguments, cache=cache, **named), abstract_variables(T0), cache)
  return call


def rows(value):
  """A training set of token ids with one that is too large, or none."""
  def call(folder):
    sources.write_array_record(folder / "a.array_record", [[1, 2, 3], [4, value]])
    data.make_dataset(DataConfig(source="array_record", path=str(folder), sequence_length=4, batch_size=1,
                                 held_out_percent=0), VOCABULARY, document_end=1)
  return call


TOKENS = table(
  ("tokens[0, 1]", str(VOCABULARY), f"0 to vocab_size - 1 = {VOCABULARY - 1}", network(row(VOCABULARY)), "vocab_size - 1"),
  ("tokens[0, 1]", "-1", "vocab_size - 1", network(row(-1)), "negative"),
  ("tokens[1, 5]", "1000000", "vocab_size - 1", network(row(10**6, (1, 5)))),
  ("tokens[0, 0]", str(VOCABULARY), "vocab_size - 1", network(row(VOCABULARY, (0, 0)), None, PACKED)),
  ("tokens[0, 1]", "-2", "vocab_size - 1", network(row(-2), logits="last"), "negative"),
  ("tokens[0, 1]", "98", "vocab_size - 1", traced(row(98))),
  ("tokens[0, 1]", "99", "vocab_size - 1", cached(row(99))),
  ("tokens[1, 1]", "200", "vocab_size - 1", cached(row(200, (1, 1)), None, PACKED)),
  ("targets", str(VOCABULARY), "below vocab_size", network(ONES, targets=row(VOCABULARY))),
  ("targets", "-2", "-1 = not counted", network(ONES, targets=row(-2))),
  ("prompts[0]", f"ids from 1 to {VOCABULARY}", "below vocab_size", reply(prompts=[[1, VOCABULARY]])),
  ("prompts[0]", "ids from -1 to -1", "below vocab_size", reply(prompts=[[-1]]), "negative"),
  ("stop_tokens", "ids from 500 to 500", "below vocab_size", reply(stop_tokens=(500,))),
  ("close", "ids from 97 to 97", "below vocab_size", reply(thinking_budget=ThinkingBudget(2, (97,)))),
  ("close", "(-1,)", "at least one token id", lambda _: ThinkingBudget(2, (-1,))),
  ("begun[0]", "ids from 300 to 300", "below vocab_size", reply(begun=[[300]])),
  ("sequences[0]", "ids from 1 to 97", "below vocab_size = 97", lambda _: storage_drift(MODEL, {}, [[1, 97]])),
  ("token id 300", "300", "below model.vocab_size = 97", rows(300)),
  ("token id 97", "97", "below model.vocab_size = 97", rows(97)),
  ("documents[1]", "documents[1]", "a list of token ids in 0 ... 2147483647", rows(-1)),
  ("model.eos_token_id", "97", "an id below model.vocab_size = 97", lambda p: (
    sources.write_array_record(p / "a.array_record", [[1, 2, 3]]),
    data.make_dataset(DataConfig(source="array_record", path=str(p), sequence_length=4, batch_size=1), 97,
                      document_end=97))),
  ("eos_token_id", "97", "an id below vocab_size = 97", lambda _: dataclasses.replace(T0, eos_token_id=97)),
  ("replay.experts", "4", "ids from 0 to 3", network(ONES, replay=dsv4.Replay(row(4, (1, 0, 0, 0), np.tile(
    np.arange(2, dtype=np.int32), (3, 2, 6, 1)))))),
)
BEYOND = "max_position_embeddings - 1"
POSITIONS = table(
  ("positions[0, 1]", str(MOST), f"0 to max_position_embeddings - 1 = {MOST - 1}", network(ONES, row(MOST)), BEYOND),
  ("positions[0, 1]", "-1", f"max_position_embeddings - 1 = {MOST - 1}", network(ONES, row(-1)), "negative"),
  ("positions[1, 5]", "2147483647", BEYOND, network(ONES, row(2**31 - 1, (1, 5)))),
  ("positions[0, 0]", "8", "max_position_embeddings - 1 = 7", network(ONES, row(8, (0, 0)), run=SHORT), BEYOND),
  ("positions[0, 2]", "5000", BEYOND, network(ONES, row(5000, (0, 2)), PACKED)),
  ("positions[0, 1]", "5000", BEYOND, network(ONES, row(5000), targets=ONES)),
  ("positions[0, 1]", "5000", BEYOND, traced(ONES, row(5000))),
  ("tokens have length", "9", "max_position_embeddings = 8", network(np.ones((1, 9), np.int32), run=SHORT)),
  ("positions", "expected None beside a cache", "None beside a cache", cached(ONES, ONES)),
  ("max_length", "4097", f"at most max_position_embeddings = {MOST}", lambda _: dsv4.init_cache(T0, 1, 4097)),
  ("max_length", "0", "a whole number, at least 1", lambda _: dsv4.init_cache(T0, 1, 0)),
  ("data.sequence_length", "64", "at most model.max_position_embeddings = 8", lambda _: RunConfig(
    model=SHORT.config, data=DataConfig(sequence_length=64))),
  ("cache_reach", "0", "None or a number of tokens", cached(ONES, cache_reach=0)),
  ("prompts[0]", "4093 tokens", "max_position_embeddings - max_new_tokens = 4092", reply(prompts=[[1] * 4093])),
  ("prompts[1]", "0 tokens", "1 to max_position_embeddings", reply(
    prompts=[[1], []], keys=jax.ShapeDtypeStruct((2,), KEY))),
  ("prompts[0]", "1 tokens", "max_position_embeddings - max_new_tokens = -4", reply(max_new_tokens=4100)),
  ("begun[0]", "4 tokens", "fewer than max_new_tokens = 4", reply(begun=[[1, 2, 3, 4]])),
  ("sequences[0]", "4097 tokens", f"max_position_embeddings = {MOST}",
   lambda _: storage_drift(MODEL, {}, [[1] * 4097])),
  ("rewind", "-1", "at least 0", lambda _: dsv4.init_cache(T0, 1, 8, rewind=-1)),
  ("lengths", "[9, 0]", "at most [0, 0]", lambda _: dsv4.rewind(_known_cache(), np.array([9, 0], np.int32))),
  ("lengths", "[-1, 0]", "at most [0, 0]", lambda _: dsv4.rewind(_known_cache(), np.array([-1, 0], np.int32)), "negative"),
)
DECREASING = row(1, (0, 4), PACKED)
ORDERED, NUMBERED, IN_INT32 = "ids do not decrease", "a document's number, from 1, or 0 = not a token", "at most 2147483647"
WIDE = np.array([[1, 1, 1, 2, 2, 2**31]] * 2)  # int64, which a model would cut to int32 without a word
COMBS = [np.ones((2, 6, 2, 2))]
TRACED = {"layers/00/router/experts": np.zeros((2, 6, 2), np.int32), "layers/00/mhc_attn/comb": np.ones((2, 6, 2, 2))}


def of_batch(place, value, dtype=np.int32):
  """Lowers the training step for a batch with another segment id; row 1 holds documents of 9, 1, 11 and 5 tokens."""
  return step(segment_ids=row(value, (0, *place), random_batch()["segment_ids"].astype(dtype)))


gains_of = lambda ids: lambda _: composite_gains(COMBS, ids)
loads_of = lambda ids: lambda _: plots_layers.loads_of(TRACED, 4, ids)
mixing_of = lambda ids: lambda _: plots_layers.stream_mixing(TRACED, ids)
mass_of = lambda *arguments: lambda _: model_mass(MODEL, {}, *arguments)
SEGMENTS = table(
  ("segment_ids[0, 4]", "1", ORDERED, network(ONES, None, DECREASING)),
  ("segment_ids[1, 5]", "1", ORDERED, network(ONES, None, row(1, (1, 5), PACKED))),
  ("segment_ids[0, 1]", "2", ORDERED, network(ONES, None, np.array([[3, 2, 1, 1, 1, 1]] * 2, np.int32))),
  ("segment_ids[0, 5]", "1", ORDERED, network(ONES, None, np.array([[0, 5, 5, 0, 0, 1]] * 2, np.int32))),
  ("segment_ids[0, 4]", "1", ORDERED, network(ONES, None, DECREASING, targets=ONES)),
  ("segment_ids[0, 4]", "1", ORDERED, traced(ONES, None, DECREASING)),
  ("segment_ids[0, 4]", "1", ORDERED, mass_of(ONES, None, DECREASING)),
  ("segment_ids[0, 4]", "1", ORDERED, gains_of(DECREASING)),
  ("segment_ids", "-1", NUMBERED, network(ONES, None, row(-1, (0, 5), PACKED))),
  ("segment_ids", "-7", NUMBERED, network(ONES, None, -7 * ONES)),
  ("segment_ids", "-1", NUMBERED, cached(ONES, None, row(-1))),
  ("segment_ids", "-1", NUMBERED, mass_of(ONES, None, row(-1))),
  ("segment_ids", "-1", NUMBERED, mixing_of(row(-1))),
  ("segment_ids", "2147483648", IN_INT32, network(ONES, None, WIDE)),
  ("segment_ids", "2147483648", IN_INT32, cached(ONES, None, WIDE)),
  ("segment_ids", "all 0", "at least one token in combs", gains_of(0 * ONES)),
  ("segment_ids", "all 0", "at least one token in layers/00/router/experts", loads_of(0 * ONES)),
  ("segment_ids", "all 0", "at least one token in layers/00/mhc_attn/comb", mixing_of(0 * ONES)),
  ("segment_ids", "int32(2, 5)", "(2, 6), as combs has", gains_of(PACKED[:, 1:])),
  ("segment_ids", "int32(6,)", "(2, 6), as layers/00/router/experts has", loads_of(PACKED[0])),
  ("segment_ids", "float64(2, 6)", "integers (2, 6), as layers/00/mhc_attn/comb has", mixing_of(PACKED / 2)),
  ("batch: segment_ids[0, 1, 25]", "1", ORDERED, of_batch((1, 25), 1)),
  ("batch: segment_ids", "-1", NUMBERED, of_batch((7, 0), -1)),
  ("batch: segment_ids", "2147483648", IN_INT32, of_batch((0, 31), 2**31, np.int64)),
  ("batch: segment_ids", "bool", "integers [accumulation, batch, sequence]", step(
    segment_ids=random_batch()["segment_ids"] > 0)),
  ("segment_ids", "float32[1, 4]", "whole numbers [B S]", attention(segment_ids=f(1, 4))),
  ("segment_ids", "int32[1, 5]", "1, 4", selection(segment_ids=i(1, 5))),
  ("entry_segment", "int32[1, 3]", "1, 2", loss(entry_segment=i(1, 3))),
  ("entry_segment", "float32[1, 2]", "whole numbers [B T]", attention(entry_segment=f(1, 2))),
  ("past_segment", "float32[1, 3]", "whole numbers", attention(past_kv=f(1, 3, 3), past_segment=f(1, 3))),
  ("past_kv, past_segment", "None, (1, 3)", "[batch, past, width], [batch, past]", attention(past_segment=i(1, 3))),
)


def _known_cache():
  """An empty cache whose lengths are known; the rest of it is not looked at."""
  cache = jax.eval_shape(lambda: dsv4.init_cache(T0, 2, 16))
  return cache.replace(lengths=np.zeros(2, np.int32), furthest=np.zeros(2, np.int32))


@pytest.mark.parametrize("wrong", (*TOKENS, *POSITIONS, *SEGMENTS), ids=str)
def test_refused(wrong, tmp_path, compiled):
  check(wrong, tmp_path, compiled)


def test_what_is_no_token_may_hold_anything():
  tokens = row(10**6, (0, 5))
  network(tokens, row(10**6, (0, 5), PACKED * 0 + np.arange(6, dtype=np.int32)), PACKED)(None)
  cached(tokens, None, np.array([[0, 2, 2, 1, 1, 0]] * 2, np.int32))(None)
