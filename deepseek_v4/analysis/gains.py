"""How much the residual streams can grow on their way through the layers (mHC paper 3.1, figures 3, 7 and 8).

A sublayer maps the streams X to B X (and adds its own output), B = comb transposed. The composite map of a model is the
ordered product of B over its sublayers, and its gain is the largest absolute row sum (what a signal can grow by on the way
forward) or column sum (a gradient on the way back). Sinkhorn ends on comb's columns, B's rows: the forward gain is 1, the
backward gain leaves 1 by what the iterations have not settled.

Axis letters: B batch   S sequence   N streams   L sublayers
"""

from __future__ import annotations

import dataclasses
from typing import Any, Iterable

import jax
import numpy as np

from deepseek_v4.analysis.trace import trace
from deepseek_v4.model.context import check_documents
from deepseek_v4.model.transformer import DeepseekV4


@dataclasses.dataclass(frozen=True)
class Gains:
  """Gains of a composite map over all tokens.

  Attributes:
    forward, backward: each token's gain, averaged over tokens (figure 3 of the paper).
    forward_of_mean, backward_of_mean: gain of the composite matrix averaged over tokens (figure 8).
  """

  forward: float
  backward: float
  forward_of_mean: float
  backward_of_mean: float


def _forward(map_NN: np.ndarray) -> np.ndarray:
  return np.abs(map_NN.sum(-1)).max(-1)


def _backward(map_NN: np.ndarray) -> np.ndarray:
  return np.abs(map_NN.sum(-2)).max(-1)


def composite_gains(combs: Iterable[Any], segment_ids: Any = None) -> Gains:
  """Gains of the ordered product of sublayers' maps, in float64.

  Args:
    combs: comb [B, S, N, N] of each sublayer, used transposed, the first sublayer first.
    segment_ids: [B, S], 0 = not a token, which is left out; default: all are tokens.

  Raises:
    ValueError: no sublayer, shapes that differ, segment_ids of another shape or dtype, or no token.
  """
  product, shape = None, None
  for i, comb in enumerate(combs):
    map_BSNN = np.asarray(comb, np.float64).swapaxes(-1, -2)
    if map_BSNN.ndim != 4 or map_BSNN.shape[2] != map_BSNN.shape[3] or map_BSNN.shape != (shape or map_BSNN.shape):
      raise ValueError(f"combs[{i}] has shape {map_BSNN.shape}: expected {shape or '[batch, sequence, streams, streams]'}")
    product, shape = (map_BSNN if product is None else map_BSNN @ product), map_BSNN.shape
  if product is None:
    raise ValueError("combs is empty: expected a map of every sublayer")
  kept = places_of_tokens(segment_ids, product.shape[:2], "combs")
  maps = product[kept]
  mean = maps.mean(0)
  return Gains(*(float(x) for x in (_forward(maps).mean(), _backward(maps).mean(), _forward(mean), _backward(mean))))


def places_of_tokens(segment_ids: Any, shape: tuple[int, ...], what: str) -> np.ndarray:
  """bool [B, S]: places that hold a token.

  Args:
    segment_ids: integers [B, S], 0 = not a token; None = all are tokens.
    shape: (B, S) of the array that they belong to, which messages call `what`.

  Raises:
    ValueError: another shape or dtype, numbers that are no documents', or no token.
  """
  if segment_ids is None:
    return np.ones(shape, bool)
  ids = np.asarray(segment_ids)
  if ids.shape != shape or not np.issubdtype(ids.dtype, np.integer):
    raise ValueError(f"segment_ids = {ids.dtype}{ids.shape}: expected integers {shape}, as {what} has")
  check_documents("segment_ids", ids)
  if not ids.any():
    raise ValueError(f"segment_ids are all 0: expected at least one token in {what}")
  return ids > 0


def model_maps(model: DeepseekV4, variables: Any, tokens: jax.Array, positions: jax.Array | None = None,
               segment_ids: jax.Array | None = None) -> list[jax.Array]:
  """comb [B, S, N, N], at least float32, of every sublayer of a model on a text: two a layer, attention first. Arguments
  as in `dsv4.trace`."""
  found = trace(model, variables, tokens, positions, segment_ids, logits="none")
  return [found[f"layers/{layer:02d}/mhc_{part}/comb"] for layer in range(model.config.num_hidden_layers)
          for part in ("attn", "ffn")]


def model_gains(model: DeepseekV4, variables: Any, tokens: jax.Array, positions: jax.Array | None = None,
                segment_ids: jax.Array | None = None) -> Gains:
  """Gains of a model's whole stack on a text, in float64. Arguments as in `dsv4.trace`."""
  return composite_gains(model_maps(model, variables, tokens, positions, segment_ids), segment_ids)
