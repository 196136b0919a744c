"""A bfloat16 model keeps in float32 what must be: read from the traced program, nothing executed."""

import dataclasses

import jax
import jax.numpy as jnp

import deepseek_v4 as dsv4
from deepseek_v4.config import CSA, HASH, HCA, LEARNED
from tests.model.small import T0, abstract_variables, equations

# an expert count that no other axis has, so that router tensors are known by their shape
CONFIG = dataclasses.replace(
    T0, compute_dtype="bfloat16", n_routed_experts=11, hidden_size=48, num_hidden_layers=2, layer_types=(CSA, HCA),
    mlp_layer_types=(HASH, LEARNED), num_nextn_predict_layers=0)
# exponentials and logarithms of softmax and scores, norms, Sinkhorn's divisions, RoPE's phases, selection
EXACT = {"exp", "exp2", "log", "log1p", "rsqrt", "sqrt", "sin", "cos", "top_k", "cumsum", "reduce_max", "div", "logsumexp"}


def test_exact_parts_of_a_bfloat16_model():
  model, variables = dsv4.DeepseekV4(CONFIG), abstract_variables(CONFIG)
  tokens = jax.ShapeDtypeStruct((1, 29), jnp.int32)
  assert {leaf.dtype for leaf in jax.tree.leaves(variables["params"])} == {jnp.dtype("float32")}
  traced = jax.make_jaxpr(lambda v, t: model.apply(v, t, targets=t))(variables, tokens)
  found = list(equations(traced.jaxpr))
  narrow = lambda variable: getattr(variable.aval, "dtype", None) == jnp.bfloat16
  dots = [e for e in found if e.primitive.name == "dot_general"]
  assert sum(any(map(narrow, e.invars)) for e in dots) > 20  # it is a bfloat16 model
  for e in found:
    if e.primitive.name in EXACT:
      assert not any(map(narrow, e.invars)), e
  routers = [e for e in dots if e.outvars[0].aval.shape[-1:] == (11,)]
  assert len(routers) == 2  # one per layer
  for e in routers:
    assert not any(map(narrow, (*e.invars, *e.outvars))), e
  scores = [e for e in found if e.primitive.name in ("log1p", "sqrt") and e.outvars[0].aval.shape[-1:] == (11,)]
  assert scores and all(e.outvars[0].aval.dtype == jnp.float32 for e in scores)
  out = jax.eval_shape(lambda v, t: model.apply(v, t, targets=t), variables, tokens)
  assert out.hidden.dtype == jnp.bfloat16
  assert {pair[0].dtype for pair in out.losses.values()} == {jnp.dtype("float32")}
