"""What does not fit is refused with a name, a value and what was expected, while the program is traced."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deepseek_v4 as dsv4
import pallas_kernels
from deepseek_v4.model.context import make_context
from pallas_kernels.grouped_matmul import expert_mlp
from pallas_kernels.hyper_connections import collapse, expand
from pallas_kernels.indexer import kl_loss, select
from pallas_kernels.selection import Selection
from pallas_kernels.sparse_attention import attend
from tests.model.small import T0, abstract_variables

TOKENS = np.ones((2, 6), np.int32)


def trace(*arguments, config=T0, kernels="reference", **named):
  """Traces a call; nothing is compiled or run."""
  return jax.eval_shape(lambda v: dsv4.DeepseekV4(config, kernels).apply(v, *arguments, **named), abstract_variables(T0))


@pytest.mark.parametrize("call, message", [
  (lambda: trace(TOKENS[0]), r"tokens = int32\(6,\): expected integers \[batch, sequence\]"),
  (lambda: trace(TOKENS[..., None]), r"tokens = int32\(2, 6, 1\): expected integers"),
  (lambda: trace(TOKENS.astype(np.float32)), r"tokens = float32\(2, 6\): expected integers"),
  (lambda: trace(TOKENS[:, :0]), "tokens have length 0: expected 1 to max_position_embeddings = 4096"),
  (lambda: trace(np.ones((1, 4097), np.int32)), "tokens have length 4097: expected 1 to max_position_embeddings = 4096"),
  (lambda: trace(TOKENS, TOKENS[:, :5]), r"positions = int32\(2, 5\): expected integers of the tokens' shape \(2, 6\)"),
  (lambda: trace(TOKENS, TOKENS + 0.5), r"positions = float64\(2, 6\): expected integers"),
  (lambda: trace(TOKENS, None, TOKENS[:1]), r"segment_ids = int32\(1, 6\): expected integers of the tokens' shape"),
  (lambda: trace(TOKENS, None, TOKENS > 0), r"segment_ids = bool\(2, 6\): expected integers"),
  (lambda: trace(TOKENS, targets=TOKENS[:, 1:]), r"targets = int32\(2, 5\): expected integers of the tokens' shape"),
  (lambda: trace(TOKENS, targets=TOKENS / 2), r"targets = float64\(2, 6\): expected integers of the tokens' shape"),
  (lambda: trace(TOKENS, logits="first"), "logits = 'first': expected all, last or none"),
  (lambda: trace(TOKENS, attention_mode="full"), "attention_mode = 'full': expected sparse or dense"),
  (lambda: trace(TOKENS, kernels="triton"), "kernels = 'triton': expected auto, reference, blockwise, pallas, interpret"),
  (lambda: trace(TOKENS, config=dataclasses.replace(T0, num_nextn_predict_layers=0), mtp=True),
   "mtp = True: expected a model with num_nextn_predict_layers = 1"),
])
def test_model_inputs(call, message):
  with pytest.raises(ValueError, match=message):
    call()


@pytest.mark.parametrize("layers", [[3], [-1], [0, 7]])
def test_trace_refuses_layers_that_do_not_exist(layers):
  with pytest.raises(ValueError, match="layer = .*: expected 0 to 2"):
    jax.eval_shape(lambda v: dsv4.trace(dsv4.DeepseekV4(T0, "reference"), v, TOKENS, layers=layers), abstract_variables(T0))


def test_what_is_asked_for_is_there():
  out = trace(TOKENS)
  assert out.logits.shape == (2, 6, 97) and out.logits.dtype == jnp.float32 and out.losses is None and out.mtp_hidden is None
  assert trace(TOKENS, logits="last").logits.shape == (2, 1, 97)
  out = trace(TOKENS, logits="none", mtp=True)
  assert out.logits is None and out.mtp_hidden.shape == (2, 6, 32)
  out = trace(TOKENS, targets=TOKENS)
  assert out.logits is None and set(out.losses) == {"next_token", "mtp", "balance", "indexer"}
  assert out.routing["experts"].shape == (3, 2, 6, 2) and out.routing["load"].shape == (3, 4)
  assert set(trace(TOKENS, targets=TOKENS, mtp=False).losses) == {"next_token", "balance", "indexer"}
  model = dsv4.DeepseekV4(T0, "reference")
  found = jax.eval_shape(lambda v: dsv4.trace(model, v, TOKENS, layers=[1], targets=TOKENS), abstract_variables(T0))
  assert {name.split("/")[1] for name in found if name.startswith("layers/")} == {"01"}
  assert found["layers/01/streams"].shape == (2, 6, 4, 32) and found["mtp/streams"].shape == (2, 6, 4, 32)
  assert found["layers/01/indexer/selected"].shape == (2, 6, 1)


def test_numpy_arrays_are_welcome_inside_jit():
  """Positions and segments as constants of a traced function."""
  segments = np.array([[1, 1, 1, 2, 2, 0]] * 2, np.int32)
  positions = np.array([[0, 1, 2, 0, 1, 0]] * 2, np.int32)
  for arguments in ((None, segments), (positions, None), (positions, segments)):
    context = jax.eval_shape(lambda a=arguments: make_context(T0, TOKENS, *a, "sparse", with_losses=False))
    assert context.positions.shape == context.segment_ids.shape == (2, 6)


def test_doubles_stay_doubles():
  with jax.enable_x64(True):
    config = dataclasses.replace(T0, compute_dtype="float64")
    out = trace(TOKENS, config=config, kernels="blockwise", targets=TOKENS)
    assert {x.dtype for x in jax.tree.leaves((out.hidden, out.mtp_hidden, out.losses))} == {jnp.dtype("float64")}


# ---- ops --------------------------------------------------------------------------------------------------------------
def call_ops(implementation):
  """Every op with arguments that fit, by name."""
  f = jnp.zeros
  token, entry = f((1, 4), int), f((1, 2), int)
  places = dict(positions=token, segment_ids=token, entry_last=entry, entry_segment=entry)
  every = Selection.all(1, 4)
  index = (f((1, 4, 2, 3)), f((1, 4, 2)), f((1, 2, 3)))
  return {
      "sparse_attention": lambda: attend(f((1, 4, 2, 3)), f((1, 4, 3)), f((1, 2, 3)), every, f(2), window=2, scale=1.0,
                                         implementation=implementation, **places),
      "indexer.select": lambda: select(*index, top_k=1, implementation=implementation, **places),
      "indexer.kl_loss": lambda: kl_loss(*index, f((1, 4, 2, 3)), f((1, 2, 3)), f((1, 4, 2)), every, scale=1.0,
                                         implementation=implementation, **places),
      "hyper_connections.collapse": lambda: collapse(f((1, 4, 2, 3)), f((6, 8)), f(8), f(3), norm_eps=1e-6, eps=1e-6,
                                                     iterations=3, implementation=implementation),
      "hyper_connections.expand": lambda: expand(f((1, 4, 2, 3)), f((1, 4, 3)), f((1, 4, 2)), f((1, 4, 2, 2)),
                                                 implementation=implementation),
      "grouped_matmul": lambda: expert_mlp(f((8, 3)), f((1, 3, 2)), f((1, 3, 2)), f((1, 2, 3)), jnp.ones(1, int), tile=8,
                                           limit=1.0, implementation=implementation),
  }


@pytest.mark.parametrize("op", call_ops("auto"))
def test_a_named_implementation_insists_or_says_why_not(op):
  for name in ("auto", "reference", "blockwise", "interpret"):
    jax.eval_shape(call_ops(name)[op])
  with pytest.raises(NotImplementedError, match="kernels = 'pallas' on 'cpu': there are tile sizes for TPU v5"):
    jax.eval_shape(call_ops("pallas")[op])
  with pytest.raises(ValueError, match="kernels = 'fast': expected auto, reference, blockwise, pallas, interpret"):
    jax.eval_shape(call_ops("fast")[op])


def test_a_model_with_an_unknown_implementation_is_not_built():
  with pytest.raises(ValueError, match="kernels = 'triton': expected auto, reference"):
    dsv4.DeepseekV4(T0, "triton")


def test_double_precision_is_not_narrowed_silently():
  model = dsv4.DeepseekV4(dataclasses.replace(T0, compute_dtype="float64"), "reference")
  with pytest.raises(ValueError, match="compute_dtype = 'float64': expected jax_enable_x64"):
    jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))


@pytest.mark.parametrize("backend, implementation", [("cpu", "blockwise"), ("gpu", "blockwise"), ("tpu", "pallas")])
def test_auto_is_resolved_when_a_model_is_built(monkeypatch, backend, implementation):
  before = dsv4.DeepseekV4(T0)
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  assert before.kernels == "blockwise"
  assert dsv4.DeepseekV4(T0).kernels == pallas_kernels.resolve("auto") == implementation
  assert dsv4.DeepseekV4(T0, "reference").kernels == "reference"
