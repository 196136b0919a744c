"""The program of a case: a function of arrays and the shapes of its operands.

Ours are the kernels, also at shapes for which an op's chooser takes plain XLA. The gradient's program returns results and
gradients of everything that has one, as a training step would.
"""

from __future__ import annotations

import functools
from typing import Any, Callable

import jax
import jax.numpy as jnp

from launch.benchmarks import splash
from launch.benchmarks.kernels.cases import BLOCKWISE, GRADIENT, OURS, RAGGED, SPLASH, SPLASH_RULE, Case
from pallas_kernels import bits, grouped_matmul, hyper_connections, indexer, sparse_attention
from pallas_kernels.selection import Selection

_MIXING = dict(norm_eps=1e-6, eps=1e-6, iterations=20)


def program(**fields: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
  """(fn, operands) of the case with these fields."""
  case = Case(**fields)
  forward, moving, fixed = _BUILDERS[case.op](case)
  if case.direction != GRADIENT:
    return lambda moving, fixed: forward(**moving, **fixed), (moving, fixed)

  def gradient(moving, fixed, cotangents):
    results, pull = jax.vjp(lambda moving: forward(**moving, **fixed), moving)
    return results, pull(cotangents)[0]

  return gradient, (moving, fixed, jax.eval_shape(lambda moving, fixed: forward(**moving, **fixed), moving, fixed))


def _run(op: Any, name: str, kernel: Any, side: str) -> Callable[..., Any]:
  """One side of an op: the kernel's own function, or the public one that insists on `blockwise`."""
  if side == OURS:
    return functools.partial(getattr(kernel, name), interpret=False)
  return functools.partial(getattr(op, name), implementation=BLOCKWISE)


def _array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, dtype)


def _wide(*shape: int) -> jax.ShapeDtypeStruct:
  return _array(*shape, dtype=jnp.float32)


def _places(case: Case) -> dict[str, jax.ShapeDtypeStruct]:
  integers = lambda length: _array(case.batch, length, dtype=jnp.int32)
  return {"positions": integers(case.queries), "segment_ids": integers(case.queries),
          "entry_last": integers(case.entries), "entry_segment": integers(case.entries)}


def _selection(case: Case) -> dict[str, jax.ShapeDtypeStruct]:
  """Rows of bits for our kernels, entry numbers for the others; nothing where every visible entry is attended to."""
  if case.op == "attention_heavy" or case.entries <= case.shapes.top_k:
    return {}
  if case.side == OURS:
    return {"words": _array(case.batch, case.queries, bits.num_words(case.entries), dtype=jnp.int32)}
  return {"picks": _array(case.batch, case.queries, case.shapes.top_k, dtype=jnp.int32)}


def _select(case: Case, words: jax.Array | None, picks: jax.Array | None) -> Selection:
  if words is not None:
    return Selection.from_words(words, case.entries, case.shapes.top_k)
  return Selection.all(case.batch, case.queries) if picks is None else Selection.from_indices(picks)


# ---- attention --------------------------------------------------------------------------------------------------------
def _attention(case: Case):
  s = case.shapes
  moving = {"q": _array(case.batch, case.queries, s.heads, s.width),
            "window_kv": _array(case.batch, case.queries, s.width), "entries": _array(case.batch, case.entries, s.width),
            "sink": _wide(s.heads)}

  def run(q, window_kv, entries, sink, words=None, picks=None, **places):
    if case.side == SPLASH:
      return splash.attend(q, window_kv, entries, _select(case, words, picks), sink, places, s.window, s.width**-0.5)
    if case.side == SPLASH_RULE:
      return splash.attend_by_rule(q, window_kv, entries, sink, places, s.window, case.rate, s.width**-0.5)
    ours = "sparse" if case.op == "attention_sparse" else "masked"
    form = sparse_attention.form(ours if case.side == OURS else BLOCKWISE, interpret=False)
    return sparse_attention.attend_with(
        form, q, window_kv, entries, _select(case, words, picks), sink, window=s.window, scale=s.width**-0.5, **places)

  past = {} if not case.past else {"past_kv": _array(case.batch, case.past, s.width),
                                   "past_segment": _array(case.batch, case.past, dtype=jnp.int32)}
  return run, moving, _places(case) | _selection(case) | past


# ---- indexer ----------------------------------------------------------------------------------------------------------
def _index(case: Case) -> dict[str, jax.ShapeDtypeStruct]:
  s = case.shapes
  return {"queries": _array(case.batch, case.queries, s.index_heads, s.index_width),
          "weights": _wide(case.batch, case.queries, s.index_heads), "keys": _array(case.batch, case.entries, s.index_width)}


def _select_op(case: Case):
  def run(**arrays):
    found = _run(indexer, "select", indexer.kernel, case.side)(**arrays, top_k=case.shapes.top_k)
    return found.words if found.kind == "bits" else found.picks

  return run, _index(case), _places(case)


def _kl_loss(case: Case):
  s = case.shapes
  teacher = {"attention_queries": _array(case.batch, case.queries, s.heads, s.width),
             "entries": _array(case.batch, case.entries, s.width), "lse": _wide(case.batch, case.queries, s.heads)}

  def run(words=None, picks=None, **arrays):
    return _run(indexer, "kl_loss", indexer.kernel_loss, case.side)(
        selection=_select(case, words, picks), scale=s.width**-0.5, **arrays)

  return run, _index(case), teacher | _places(case) | _selection(case)


# ---- hyper-connections ------------------------------------------------------------------------------------------------
def _streams(case: Case) -> jax.ShapeDtypeStruct:
  return _array(case.batch, case.queries, case.shapes.streams, case.shapes.hidden)


def _projection(case: Case) -> dict[str, jax.ShapeDtypeStruct]:
  n, hidden = case.shapes.streams, case.shapes.hidden
  return {"fn": _wide(n * hidden, (2 + n) * n), "base": _wide((2 + n) * n), "scale": _wide(3)}


def _update(case: Case) -> dict[str, jax.ShapeDtypeStruct]:
  s = case.shapes
  rows = (case.batch, case.queries)
  return {"update": _array(*rows, s.hidden), "post": _wide(*rows, s.streams), "comb": _wide(*rows, s.streams, s.streams)}


def _mixing_op(name: str, operands: Callable[[Case], dict[str, Any]], options: dict[str, Any]):
  def build(case: Case):
    moving = {"streams": _streams(case)} | operands(case)
    op = _run(hyper_connections, name, hyper_connections.kernel, case.side)
    return lambda **arrays: op(*(arrays[name] for name in moving), **options), moving, {}
  return build


# ---- experts ----------------------------------------------------------------------------------------------------------
def _experts(case: Case):
  s = case.shapes
  tile = grouped_matmul.row_tile(case.rows, case.experts, "pallas" if case.side == OURS else "blockwise")
  rows = grouped_matmul.padded_rows(case.rows, case.experts, tile)
  weights = {"gate": _array(case.experts, s.hidden, s.expert_width), "up": _array(case.experts, s.hidden, s.expert_width),
             "down": _array(case.experts, s.expert_width, s.hidden)}

  def run(x, gate, up, down, group_sizes):
    if case.side == RAGGED:
      dot = lambda a, b: jax.lax.ragged_dot(a, b, group_sizes, preferred_element_type=jnp.float32)
      g, u = dot(x, gate), dot(x, up)
      inner = jax.nn.silu(jnp.minimum(g, s.expert_limit)) * jnp.clip(u, -s.expert_limit, s.expert_limit)
      return dot(inner.astype(x.dtype), down).astype(x.dtype)
    return _run(grouped_matmul, "expert_mlp", grouped_matmul.kernel, case.side)(
        x, gate, up, down, group_sizes, tile=tile, limit=s.expert_limit)

  return run, {"x": _array(rows, s.hidden)} | weights, {"group_sizes": _array(case.experts, dtype=jnp.int32)}


_BUILDERS = {
    "attention": _attention, "attention_sparse": _attention, "attention_heavy": _attention, "attention_window": _attention,
    "select": _select_op, "kl_loss": _kl_loss,
    "collapse": _mixing_op("collapse", _projection, _MIXING), "expand": _mixing_op("expand", _update, {}),
    "expand_collapse": _mixing_op("expand_collapse", lambda case: _update(case) | _projection(case), _MIXING),
    "experts": _experts,
}
