"""Arrays whose axes do not fit, of the model, of the operations and of the tools around them.

Axis letters: B batch   S sequence   H heads   T entries   d width
"""

import jax
import numpy as np
import pytest

import deepseek_v4 as dsv4
from deepseek_v4.analysis import gains, selection_mass
from deepseek_v4.optim.newton_schulz import newton_schulz
from deepseek_v4.posttraining import distillation
from deepseek_v4.training.step import make_train_step
from pallas_kernels.grouped_matmul import expert_mlp, few_picks
from pallas_kernels.hyper_connections import collapse, expand
from pallas_kernels.indexer import kl_loss, select
from pallas_kernels.selection import Selection
from pallas_kernels.sparse_attention import attend
from tests.bad_input.table import check, table
from tests.model.small import T0, abstract_variables
from tests.training.small import RUN, random_batch

TOKENS = np.ones((2, 6), np.int32)
CACHE = jax.eval_shape(lambda: dsv4.init_cache(T0, 2, 16))
MODEL = dsv4.DeepseekV4(T0, "reference")


def model(*arguments, **named):
  """Traces the network."""
  return lambda _: jax.eval_shape(lambda v: MODEL.apply(v, *arguments, **named), abstract_variables(T0))


def f(*shape):
  return jax.ShapeDtypeStruct(shape, np.float32)


def i(*shape):
  return jax.ShapeDtypeStruct(shape, np.int32)


PLACES = {"positions": i(1, 4), "segment_ids": i(1, 4), "entry_last": i(1, 2), "entry_segment": i(1, 2)}
EVERY = Selection.all  # made inside the traced function: it is an array
ATTEND = {"q": f(1, 4, 2, 3), "window_kv": f(1, 4, 3), "entries": f(1, 2, 3), "sink": f(2), **PLACES}
SELECT = {"queries": f(1, 4, 2, 3), "weights": f(1, 4, 2), "keys": f(1, 2, 3), **PLACES}
COLLAPSE = {"streams": f(1, 4, 2, 3), "fn": f(6, 8), "base": f(8), "scale": f(3)}
EXPERTS = {"x": f(8, 3), "gate": f(1, 3, 2), "up": f(1, 3, 2), "down": f(1, 2, 3), "group_sizes": i(1)}


def op(run, arrays, options, with_selection=False, **wrong):
  """Traces an operation with other arrays."""
  def call(arrays):
    chosen = {"selection": Selection.all(1, 4)} if with_selection else {}
    return run(**arrays, **options, **chosen)
  return lambda _: jax.eval_shape(call, {**arrays, **wrong})


attention = lambda **wrong: op(attend, ATTEND, {"window": 2, "scale": 1.0}, True, **wrong)
selection = lambda **wrong: op(select, SELECT, {"top_k": 1}, **wrong)
loss = lambda **wrong: op(kl_loss, {**SELECT, "attention_queries": f(1, 4, 2, 3), "entries": f(1, 2, 3), "lse": f(1, 4, 2)},
                          {"scale": 1.0}, True, **wrong)
mixing = lambda **wrong: op(collapse, COLLAPSE, {"norm_eps": 1e-6, "eps": 1e-6, "iterations": 2}, **wrong)
experts = lambda tile=8, **wrong: op(expert_mlp, EXPERTS, {"tile": tile, "limit": 1.0}, **wrong)


def step(**changed):
  """Lowers the training step for a batch with other arrays."""
  def call(_):
    batch = {name: x for name, x in {**random_batch(), **changed}.items() if x is not None}
    from deepseek_v4.training.state import abstract_state
    return make_train_step(RUN).lower(abstract_state(RUN), batch)
  return call


WRONG = table(
  ("tokens", "int32(6,)", "integers [batch, sequence]", model(TOKENS[0])),
  ("tokens", "int32(2, 6, 1)", "integers [batch, sequence]", model(TOKENS[..., None])),
  ("tokens", "length 0", "1 to max_position_embeddings = 4096", model(TOKENS[:, :0])),
  ("positions", "int32(2, 5)", "the tokens' shape (2, 6)", model(TOKENS, TOKENS[:, :5])),
  ("segment_ids", "int32(1, 6)", "the tokens' shape (2, 6)", model(TOKENS, None, TOKENS[:1])),
  ("targets", "int32(2, 5)", "the tokens' shape (2, 6)", model(TOKENS, targets=TOKENS[:, 1:])),
  ("replay.experts", "int32(2, 6)", "(3, 2, 6, 2)", model(TOKENS, replay=dsv4.Replay(TOKENS))),
  ("layer", "3", "0 to 2", lambda _: jax.eval_shape(lambda v: dsv4.trace(MODEL, v, TOKENS, layers=[3]),
                                                    abstract_variables(T0))),
  ("window_kv", "float32[1, 5, 3]", "B S d = 1, 4, 3", attention(window_kv=f(1, 5, 3))),
  ("sink", "float32[3]", "H = 2", attention(sink=f(3))),
  ("positions", "int32[1, 5]", "B S = 1, 4", attention(positions=i(1, 5))),
  ("entry_segment", "int32[1, 3]", "B T = 1, 2", attention(entry_segment=i(1, 3))),
  ("entries", "float32[1, 2, 4]", "B T d = 1, 2, 3", attention(entries=f(1, 2, 4))),
  ("past_kv, past_segment", "(1, 3, 3), None", "[batch, past, width], [batch, past]", attention(past_kv=f(1, 3, 3))),
  ("weights", "float32[1, 4, 3]", "B S h = 1, 4, 2", selection(weights=f(1, 4, 3))),
  ("keys", "float32[1, 2, 5]", "B T c = 1, 2, 3", selection(keys=f(1, 2, 5))),
  ("lse", "float32[1, 4]", "B S H = 1, 4, 2", loss(lse=f(1, 4))),
  ("entries", "float32[1, 2, 7]", "B T d = 1, 2, 3", loss(entries=f(1, 2, 7))),
  ("fn", "float32[6, 7]", "[6, 8]", mixing(fn=f(6, 7))),
  ("scale", "float32[4]", "[3]", mixing(scale=f(4))),
  ("streams", "float32[4, 2, 3]", "B S N D", mixing(streams=f(4, 2, 3))),
  ("comb", "float32[1, 4, 2, 3]", "B S N N = 1, 4, 2, 2", op(
    expand, {"streams": f(1, 4, 2, 3), "update": f(1, 4, 3), "post": f(1, 4, 2), "comb": f(1, 4, 2, 3)}, {})),
  ("down", "float32[1, 3, 2]", "E F D = 1, 2, 3", experts(down=f(1, 3, 2))),
  ("group_sizes", "int32[2]", "E = 1", experts(group_sizes=i(2))),
  ("x", "8 rows", "a multiple of tile = 3", experts(tile=3)),
  ("weights", "float32[8, 3]", "T k = 8, 2", op(few_picks, {
    "x": f(8, 3), "experts": i(8, 2), "weights": f(8, 3), "gate": f(1, 3, 2), "up": f(1, 3, 2), "down": f(1, 2, 3)},
    {"limit": 1.0})),
  ("picks", "int32(4, 2)", "[batch, queries, picks]", lambda _: Selection.from_indices(np.zeros((4, 2), np.int32))),
  ("x", "float32[5]", "[..., n, m]", lambda _: newton_schulz(np.ones(5, np.float32))),
  ("student_head", "(4, 9)", "[3, V]", lambda _: distillation.reverse_kl(
    *(np.ones(s, np.float32) for s in ((1, 2, 3), (4, 9), (1, 2, 5), (5, 9), (1, 2))))),
  ("student_hidden, teacher_hidden, mask", "(1, 3)", "[B, S]", lambda _: distillation.reverse_kl(
    *(np.ones(s, np.float32) for s in ((1, 2, 3), (3, 9), (1, 2, 5), (5, 9), (1, 3))))),
  ("combs[0]", "(2, 2)", "[batch, sequence, streams, streams]", lambda _: gains.composite_gains([np.ones((2, 2))])),
  ("entry_weight", "(1, 2, 3)", "[batch, queries, heads", lambda _: selection_mass.selection_mass(
    np.ones((1, 2, 3)), np.ones((1, 2, 3)), 1)),
  ("batch: segment_ids", "int32(1, 8, 31)", "(1, 8, 32)", step(segment_ids=random_batch()["segment_ids"][..., 1:])),
  ("batch: tokens", "int32(8, 32)", "[accumulation, batch, sequence]", step(tokens=random_batch()["tokens"][0])),
  ("batch", "positions", "tokens, segment_ids, positions, loss_mask", step(positions=None)),
  ("lengths", "int32(1,)", "integers (2,)", lambda _: dsv4.rewind(CACHE, np.zeros(1, np.int32))),
)

@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_refused(wrong, tmp_path, compiled):
  check(wrong, tmp_path, compiled)
