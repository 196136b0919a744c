"""How much of what attention looks at the lightning indexer keeps: attention mass on its picks (report 2.3.1).

The teacher is the attention of a CSA layer over all visible entries, as in the indexer's KL loss: one softmax of a head over
window, entries and sink; its probabilities of the entries, summed over heads, and only then made to sum to one. An indexer
of k picks holds the share that lies on the k visible entries with the highest scores. No indexer can hold more than the
share of the k entries with most mass.

Axis letters: B batch   S queries   H heads   T entries
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from deepseek_v4.analysis.trace import trace
from deepseek_v4.config import CSA
from deepseek_v4.model.context import check_inputs
from deepseek_v4.model.transformer import DeepseekV4


@dataclasses.dataclass(frozen=True)
class Mass:
  """Shares of the teacher's mass, means over queries that see more entries than may be picked: the others keep all.

  Attributes:
    held: on the indexer's picks.
    best: on the picks that hold most.
    even: on as many picks at random, on average.
    queries: how many there are; without any the shares are NaN.
  """

  held: float
  best: float
  even: float
  queries: int


def selection_mass(entry_weight: Any, scores: Any, top_k: int) -> Mass:
  """The mass that the `top_k` best-scored entries hold, in float64; of equal scores the lowest entry comes first.

  Args:
    entry_weight: [B, S, H, T], attention probabilities of the entries, 0 where invisible.
    scores: [B, S, T] of the indexer, -inf where invisible.
    top_k: picks of a query, at least 1.

  Raises:
    ValueError: shapes that do not fit, or no picks.
  """
  weight_BSHT, scores_BST = np.asarray(entry_weight, np.float64), np.asarray(scores, np.float64)
  if weight_BSHT.ndim != 4 or scores_BST.shape != weight_BSHT.shape[:2] + weight_BSHT.shape[3:]:
    raise ValueError(f"entry_weight {weight_BSHT.shape}, scores {scores_BST.shape}: expected [batch, queries, heads, "
                     "entries] and [batch, queries, entries]")
  if top_k < 1:
    raise ValueError(f"top_k = {top_k}: expected at least 1")
  mass_BST = weight_BSHT.sum(2)
  seen_BS = (scores_BST > -np.inf).sum(-1)
  chosen = (seen_BS > top_k) & (mass_BST.sum(-1) > 0)
  mass_QT, scores_QT = mass_BST[chosen], scores_BST[chosen]
  share_QT = mass_QT / mass_QT.sum(-1, keepdims=True)
  of_best = lambda order_QT: np.take_along_axis(share_QT, np.argsort(-order_QT, -1, kind="stable")[:, :top_k], -1).sum(-1)
  mean = lambda x: float(x.mean()) if len(x) else float("nan")
  return Mass(mean(of_best(scores_QT)), mean(of_best(share_QT)), mean(top_k / seen_BS[chosen]), int(chosen.sum()))


def model_mass(model: DeepseekV4, variables: Any, tokens: jax.Array, positions: jax.Array | None = None,
               segment_ids: jax.Array | None = None, top_k: int | None = None) -> dict[int, Mass]:
  """`selection_mass` of every CSA layer of a model on a text of int32 tokens, {layer: Mass}; attention is dense.

  Args:
    model, variables, tokens, positions, segment_ids: as in `dsv4.trace`, which keeps [S, S] weights: short texts only.
    top_k: picks of a query; default the model's `index_topk`.

  Raises:
    ValueError: tokens, positions or segment_ids that the model refuses.
  """
  check_inputs(model.config, tokens, positions, segment_ids, "dense")
  found = jax.device_get(_dense_weights(model, variables, tokens, positions, segment_ids))
  return {layer: selection_mass(weight, scores, top_k or model.config.index_topk)
          for layer, (weight, scores) in found.items()}


@functools.partial(jax.jit, static_argnums=0)
def _dense_weights(model: DeepseekV4, *arguments: Any) -> dict[int, tuple[jax.Array, jax.Array]]:
  """Of every CSA layer the entries' weights and the indexer's scores; what else a trace holds is not computed."""
  layers = [layer for layer, kind in enumerate(model.config.layer_types) if kind == CSA]
  found = trace(model, *arguments, layers=layers, attention_mode="dense", logits="none")
  return {layer: (found[f"layers/{layer:02d}/attention/entry_weight"], found[f"layers/{layer:02d}/indexer/scores"])
          for layer in layers}
