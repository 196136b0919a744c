"""THE table of the optimizer: who updates a leaf, which of its axes are the matrix, whether it decays.

A leaf's name is its path from the layer downwards (`attention/q_b`), or from the top outside the layers (`embed/embedding`).
Axes of the table count from the end, so that a scanned layer's leading axis of repeats is one more batch axis. All axes that
are not named are batch axes: experts E, the compressor's series co, the groups of o_a.

Muon has every matrix; AdamW embedding, head, norm weights, mHC base and scale (report 2.4 and 4.2.2), and the vectors and
bias tables that the report does not name: sinks and position biases. Decay: all but sinks, position biases, mHC base and
scale. The router's bias and hash table follow no gradient.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Callable, NamedTuple

import jax

MUON = "muon"
ADAMW = "adamw"
FROZEN = "frozen"


class MatrixAxes(NamedTuple):
  """The axes of a leaf that make a matrix's rows and columns, merged in this order; all other axes are a batch."""

  rows: tuple[int, ...]
  columns: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Rule:
  """What holds for one leaf: owner, number of axes in one layer, matrix axes from the end (Muon only), decay."""

  owner: str
  ndim: int
  decay: bool
  axes: MatrixAxes | None = None


def _matrix(ndim: int = 2, rows: tuple[int, ...] = (-2,), columns: tuple[int, ...] = (-1,)) -> Rule:
  return Rule(MUON, ndim, True, MatrixAxes(rows, columns))


_NORM = Rule(ADAMW, 1, True)
_VECTOR = Rule(ADAMW, 1, False)
_TABLE = Rule(ADAMW, 2, True)
_BIAS_TABLE = Rule(ADAMW, 3, False)
_QUERIES = _matrix(3, (-3,), (-2, -1))  # [ql, H, d] is one matrix ql x (H d)

_COMPRESSOR = {
    "kv": _matrix(3),  # [co, D, d]: the series are separate matrices in the equations (2.3.1)
    "gate": _matrix(3),
    "position_bias": _BIAS_TABLE,
    "norm/scale": _NORM,
}
_HYPER_CONNECTION = {
    "fn_pre": _matrix(),
    "fn_post": _matrix(),
    "fn_res": _matrix(),
    "base": _VECTOR,
    "scale": _VECTOR,
}
_HYPER_HEAD = {"fn": _matrix(), "base": _VECTOR, "scale": _VECTOR}


def _under(prefix: str, rules: dict[str, Rule]) -> dict[str, Rule]:
  return {f"{prefix}/{name}": rule for name, rule in rules.items()}


LAYER_TABLE = {
    **_under("attn_hc", _HYPER_CONNECTION),
    **_under("ffn_hc", _HYPER_CONNECTION),
    "attn_norm/scale": _NORM,
    "ffn_norm/scale": _NORM,
    "attention/q_a": _matrix(),
    "attention/q_a_norm/scale": _NORM,
    "attention/q_b": _QUERIES,
    "attention/kv": _matrix(),
    "attention/kv_norm/scale": _NORM,
    "attention/sink": _VECTOR,
    "attention/o_a": _matrix(3),  # [G, H d / G, R]: block diagonal
    "attention/o_b": _matrix(),
    **_under("attention/compressor", _COMPRESSOR),
    "attention/indexer/q_b": _QUERIES,
    "attention/indexer/head_weights": _matrix(),
    **_under("attention/indexer/compressor", _COMPRESSOR),
    "moe/router/gate": _matrix(),
    "moe/router/bias": Rule(FROZEN, 1, False),
    "moe/router/hash_table": Rule(FROZEN, 2, False),
    **_under("moe/experts", {name: _matrix(3) for name in ("gate", "up", "down")}),
    **_under("moe/shared", {name: _matrix() for name in ("gate", "up", "down")}),
}

TOP_TABLE = {
    "embed/embedding": _TABLE,
    "lm_head/kernel": _TABLE,
    "final_norm/scale": _NORM,
    **_under("hc_head", _HYPER_HEAD),
    "mtp/embed_norm/scale": _NORM,
    "mtp/hidden_norm/scale": _NORM,
    "mtp/embed_proj": _matrix(),
    "mtp/hidden_proj": _matrix(),
    "mtp/final_norm/scale": _NORM,
    **_under("mtp/hc_head", _HYPER_HEAD),
}


def path_of(path: tuple[Any, ...]) -> str:
  """A key path of `jax.tree_util` as names joined by slashes."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def rule_of(name: str, ndim: int, *, muon_split: str = "none", position_bias_owner: str = ADAMW,
            matrix_owner: str = MUON) -> Rule:
  """The rule of the leaf at path `name` (`layers/unit_0/attention/q_b`); arguments as in `OptimizerConfig`.

  Raises:
    ValueError: the table does not know the leaf, or its number of axes is not the table's.
  """
  for choice, value, choices in (("muon_split", muon_split, ("none", "head")),
                                 ("position_bias_owner", position_bias_owner, (ADAMW, MUON)),
                                 ("matrix_owner", matrix_owner, (MUON, ADAMW))):
    if value not in choices:
      raise ValueError(f"{choice} = {value!r}: expected one of {choices}")
  parts = name.split("/")
  if parts[0] in ("params", "router"):  # the collections of whole variables
    parts = parts[1:]
  inside = 2 if parts[0] == "layers" or parts[:2] == ["mtp", "block"] else 0
  local = "/".join(parts[inside:])
  rule = (LAYER_TABLE if inside else TOP_TABLE).get(local)
  if rule is None:
    raise ValueError(f"{name}: no such leaf in the optimizer's table: expected a name of deepseek_v4/optim/assign.py")
  if muon_split == "head" and rule is _QUERIES:
    rule = _matrix(3, (-3,), (-1,))
  if matrix_owner == ADAMW and rule.owner == MUON:
    rule = dataclasses.replace(rule, owner=ADAMW, axes=None)
  if position_bias_owner == MUON and rule is _BIAS_TABLE:
    rule = dataclasses.replace(_matrix(3), decay=rule.decay)
  expected = rule.ndim + (parts[0] == "layers" and parts[1].startswith("unit_"))
  if ndim != expected:
    raise ValueError(f"{name} has {ndim} axes: expected {expected}")
  return rule


def _tree_of(leaf_of: Callable[..., Any], params: Any, choices: dict[str, str]) -> Any:
  return jax.tree_util.tree_map_with_path(
      lambda path, leaf: leaf_of(rule_of(path_of(path), len(leaf.shape), **choices), leaf), params)


def assign(params: Any, **choices: str) -> Any:
  """The owner of every leaf: "muon", "adamw" or "frozen", in a tree like params.

  Args:
    params: Parameters, or whole variables with the collections params and router; arrays or ShapeDtypeStructs.
    **choices: `muon_split` ("none", "head"), `position_bias_owner` ("adamw", "muon"), `matrix_owner` ("muon", "adamw"),
      as in `OptimizerConfig`.

  Raises:
    ValueError: a leaf is not in the table or has another number of axes; the message names it.
  """
  return _tree_of(lambda rule, leaf: rule.owner, params, choices)


def matrix_axes(params: Any, **choices: str) -> Any:
  """`MatrixAxes` of every Muon leaf, counted from the front, None for the others, in a tree like params; see `assign`."""

  def leaf_of(rule: Any, leaf: Any) -> Any:
    if rule.axes is None:
      return None
    return MatrixAxes(*(tuple(axis + len(leaf.shape) for axis in axes) for axes in rule.axes))

  return _tree_of(leaf_of, params, choices)


def decay_mask(params: Any, **choices: str) -> Any:
  """Whether weight decay applies, True or False for every leaf, in a tree like params; see `assign`."""
  return _tree_of(lambda rule, leaf: rule.decay, params, choices)
