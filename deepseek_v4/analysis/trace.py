"""Every intermediate of a forward pass by name, without changing any number.

Axis letters: B batch   S sequence   N streams   D hidden size   H heads   T entries   K picks   E experts
              k experts per token
"""

from __future__ import annotations

from typing import Any, Sequence

import jax

from deepseek_v4.model.groups import group_layers
from deepseek_v4.model.transformer import DeepseekV4

# Path inside a layer -> name in a trace.
_NAMES = {
    "streams": "streams", "attn_hc/post": "mhc_attn/post", "attn_hc/comb": "mhc_attn/comb", "ffn_hc/post": "mhc_ffn/post",
    "ffn_hc/comb": "mhc_ffn/comb", "attention/window_weight": "attention/window_weight",
    "attention/entry_weight": "attention/entry_weight", "attention/entry_segment": "attention/entry_segment",
    "attention/entry_position": "attention/entry_position", "attention/indexer/scores": "indexer/scores",
    "attention/indexer/selected": "indexer/selected", "moe/router/scores": "router/scores",
    "moe/router/experts": "router/experts",
}


def trace(model: DeepseekV4, variables: Any, tokens: jax.Array, positions: jax.Array | None = None,
          segment_ids: jax.Array | None = None, *, layers: Sequence[int] | None = None,
          **arguments: Any) -> dict[str, jax.Array]:
  """Runs the model and returns its intermediates; some are dense, so keep sequences short.

  Args:
    model, variables, tokens, positions, segment_ids, arguments: as in `DeepseekV4.__call__`.
    layers: numbers of the layers to return; default all.

  Returns:
    {"layers/NN/streams" [B, S, N, D] after the layer,
     "layers/NN/mhc_attn/comb", "layers/NN/mhc_ffn/comb" [B, S, N, N] (used transposed), ".../post" [B, S, N],
     "layers/NN/attention/window_weight" [B, S, H, S], "layers/NN/attention/entry_weight" [B, S, H, T],
     "layers/NN/attention/entry_segment", "layers/NN/attention/entry_position" [B, T] (of the entry's first token),
     "layers/NN/indexer/scores" [B, S, T] (-inf where invisible), "layers/NN/indexer/selected" [B, S, K] (-1 = empty),
     "layers/NN/router/scores" [B, S, E], "layers/NN/router/experts" [B, S, k],
     "mtp/..." the same of the prediction block where it runs, "final_norm" [B, S, D], "logits" where made}

  Raises:
    ValueError: a layer that the model does not have.
  """
  groups = group_layers(model.config)
  wanted = range(groups.num_layers) if layers is None else layers
  for layer in wanted:
    groups.key_of(layer)
  out, state = model.apply(variables, tokens, positions, segment_ids, mutable=["intermediates"], **arguments)
  sown = state["intermediates"]
  found = {}
  for layer in wanted:
    key, index = groups.key_of(layer)
    for name, value in _leaves(sown["layers"][key]).items():
      found[f"layers/{layer:02d}/{_NAMES[name]}"] = value if index is None else value[index]
  if "mtp" in sown:
    found |= {f"mtp/{_NAMES[name]}": value for name, value in _leaves(sown["mtp"]["block"]).items()}
  found["final_norm"] = sown["hidden"][0]
  if out.logits is not None:
    found["logits"] = out.logits
  return found


def _leaves(tree: Any, prefix: str = "") -> dict[str, jax.Array]:
  """{path: value} of a nested dictionary whose leaves are the one-element tuples that `sow` makes."""
  if isinstance(tree, tuple):
    return {prefix: tree[0]}
  return {k: v for name, child in tree.items() for k, v in _leaves(child, f"{prefix}/{name}" if prefix else name).items()}
