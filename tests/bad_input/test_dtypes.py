"""Numbers of another kind than is asked for: floating ids, whole-number weights, precisions that do not exist."""

import dataclasses

import jax
import numpy as np
import pytest

import deepseek_v4 as dsv4
from deepseek_v4.checkpoint.hf_write import release_plan
from deepseek_v4.generation.decode import ThinkingBudget
from deepseek_v4.generation.sample import Sampling
from tests.bad_input.table import KEY, check, table
from tests.bad_input.test_shapes import CACHE, TOKENS, attention, experts, f, i, loss, mixing, model, selection, step
from tests.model.small import T0
from tests.training.small import random_batch

MODEL = dsv4.DeepseekV4(T0, "reference")


def reply(**changed):
  """Asks for a reply with other options."""
  def call(_):
    options = {"prompts": [[1]], "keys": jax.ShapeDtypeStruct((1,), KEY), "max_new_tokens": 4}
    dsv4.generate(MODEL, {"params": {}}, **{**options, **changed})
  return call


WRONG = table(
  ("tokens", "float32(2, 6)", "integers [batch, sequence]", model(TOKENS.astype(np.float32))),
  ("tokens", "bool(2, 6)", "integers [batch, sequence]", model(TOKENS > 0)),
  ("tokens", "list(2, 6)", "integers [batch, sequence]", model(TOKENS.tolist())),
  ("positions", "float64(2, 6)", "integers", model(TOKENS, TOKENS + 0.5)),
  ("segment_ids", "bool(2, 6)", "integers", model(TOKENS, None, TOKENS > 0)),
  ("targets", "float64(2, 6)", "integers", model(TOKENS, targets=TOKENS / 2)),
  ("replay.mtp_experts", "float64(2, 6)", "integers", model(TOKENS, mtp=True, replay=dsv4.Replay(mtp_experts=TOKENS / 2))),
  ("compute_dtype", "'float64'", "jax_enable_x64", lambda _: jax.eval_shape(
    dsv4.DeepseekV4(dataclasses.replace(T0, compute_dtype="float64"), "reference").init, jax.ShapeDtypeStruct((), KEY),
    TOKENS)),
  ("compute_dtype", "'float16'", "one of 'float32', 'bfloat16', 'float64'",
   lambda _: dataclasses.replace(T0, compute_dtype="float16")),
  ("q", "int32[1, 4, 2, 3]", "floating numbers [B S H d]", attention(q=i(1, 4, 2, 3))),
  ("positions", "float32[1, 4]", "whole numbers [B S]", attention(positions=f(1, 4))),
  ("entry_last", "float32[1, 2]", "whole numbers [B T]", selection(entry_last=f(1, 2))),
  ("queries", "int32[1, 4, 2, 3]", "floating numbers", selection(queries=i(1, 4, 2, 3))),
  ("weights", "int32[1, 4, 2]", "floating numbers", loss(weights=i(1, 4, 2))),
  ("base", "int32[8]", "floating numbers", mixing(base=i(8))),
  ("group_sizes", "float32[1]", "whole numbers [E]", experts(group_sizes=f(1))),
  ("tile", "8.0", "a whole number, at least 1", experts(tile=8.0)),
  ("batch: loss_mask", "float32", "integers", step(loss_mask=random_batch()["loss_mask"].astype(np.float32))),
  ("lengths", "float32(2,)", "integers (2,)", lambda _: dsv4.rewind(CACHE, np.zeros(2, np.float32))),
  ("batch_size", "2.0", "a whole number, at least 1", lambda _: dsv4.init_cache(T0, 2.0, 8)),
  ("max_length", "True", "a whole number, at least 1", lambda _: dsv4.init_cache(T0, 1, True)),
  ("storage", "'fp8'", "one of compute, mixed", lambda _: dsv4.init_cache(T0, 1, 8, storage="fp8")),
  ("dtype", "'bfloat16'", "None with storage = 'mixed'",
   lambda _: dsv4.init_cache(T0, 1, 8, storage="mixed", dtype="bfloat16")),
  ("keys", "uint32(1,)", "typed keys of shape (1,)", reply(keys=np.zeros(1, np.uint32))),
  ("max_new_tokens", "1.5", "a whole number, at least 1", reply(max_new_tokens=1.5)),
  ("chunk_size", "0", "a whole number, at least 1", reply(chunk_size=0)),
  ("temperature", "'hot'", "float", reply(temperature="hot")),
  ("top_k", "0.5", "int", reply(top_k=0.5)),
  ("top_p", "[1.0, 1.0]", "one value, or one for each of the 1", reply(top_p=[1.0, 1.0])),
  ("speculative", "1.5", "True, False or a number of drafts", reply(speculative=1.5)),
  ("record", "('logits',)", "some of experts, kept", reply(record=("logits",))),
  ("cache_storage", "'fp8'", "one of compute, mixed", reply(cache_storage="fp8")),
  ("tokens", "'9'", "int", lambda _: ThinkingBudget("9", (1,))),
  ("temperature", "nan", "at least 0", lambda _: Sampling(temperature=float("nan"))),
  ("dtype", "'int8'", "a floating type", lambda _: dsv4.load_hf({}, T0, dtype="int8")),
  ("dtype", "'float16'", "one of", lambda _: release_plan(T0, None, "float16")),
  ("quantization", "'int4'", "one of None", lambda _: release_plan(T0, "int4")),
  ("form", "'torch'", "one of 'hf', 'release'", lambda _: dsv4.to_hf_names({}, T0, form="torch")),
  ("context", "1.5", "a whole number", lambda _: dsv4.count(T0, 1.5)),
)


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_refused(wrong, tmp_path, compiled):
  check(wrong, tmp_path, compiled)
