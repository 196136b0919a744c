"""Every intermediate of a forward pass by name, without changing any number.

Axis letters: B batch   S sequence   N streams   D hidden size   H heads   d head width   T entries   K picks   E experts
              k experts per token   h index heads   c index width   w slots of a compressor's window
"""

from __future__ import annotations

from typing import Any, Sequence

import jax

from deepseek_v4.model.groups import group_layers
from deepseek_v4.model.transformer import DeepseekV4

# Path inside a layer -> name in a trace.
_NAMES = {
    "streams": "streams", "attn_hc/post": "mhc_attn/post", "attn_hc/comb": "mhc_attn/comb", "ffn_hc/post": "mhc_ffn/post",
    "ffn_hc/comb": "mhc_ffn/comb", "attn_input": "attention/input", "attn_output": "attention/output",
    "ffn_input": "ffn/input", "ffn_output": "ffn/output",
    **{f"attention/{name}": f"attention/{name}" for name in (
        "queries", "keys", "window_weight", "entry_weight", "sink_weight", "entries", "entry_segment", "entry_position")},
    "attention/compressor/weight": "compressor/weight", "attention/indexer/compressor/weight": "indexer/compressor/weight",
    **{f"attention/indexer/{name}": f"indexer/{name}" for name in ("queries", "weights", "keys", "scores", "selected")},
    **{f"moe/router/{name}": f"router/{name}" for name in ("scores", "experts", "weights")},
}


def trace(model: DeepseekV4, variables: Any, tokens: jax.Array, positions: jax.Array | None = None,
          segment_ids: jax.Array | None = None, *, layers: Sequence[int] | slice | None = None,
          **arguments: Any) -> dict[str, jax.Array]:
  """Runs the model and returns its intermediates; some are dense, so keep sequences short.

  The same pass as `model.apply`: of a training run (`{"params": state.params, "router": state.router}`), of a release, under
  a mesh (where a split row may have unused entries between used ones). Inside `jax.jit` what is not asked for is not
  computed.

  Args:
    model, variables, tokens, positions, segment_ids, arguments: as in `DeepseekV4.__call__`, without a cache.
    layers: numbers of the layers to return, or a slice of them; default all.

  Returns:
    {"embedding" [B, S, D],
     "layers/NN/streams" [B, S, N, D] after the layer,
     "layers/NN/mhc_attn/comb", "layers/NN/mhc_ffn/comb" [B, S, N, N] (used transposed), ".../post" [B, S, N],
     "layers/NN/attention/input", "layers/NN/attention/output" [B, S, D] of the sublayer, the input normalised,
     "layers/NN/attention/queries" [B, S, H, d], "layers/NN/attention/keys" [B, S, d] of the window (keys = values),
     "layers/NN/attention/window_weight" [B, S, H, S], "layers/NN/attention/entry_weight" [B, S, H, T],
     "layers/NN/attention/sink_weight" [B, S, H]; the three sum to 1,
     "layers/NN/attention/entries" [B, T, d] (keys = values; sliding layers have none),
     "layers/NN/attention/entry_segment" [B, T] (0 = unused), "layers/NN/attention/entry_position" [B, T] (of the entry's
     first token),
     "layers/NN/compressor/weight" [B, T, w, d]: of each token of an entry's window in each channel; in a CSA layer first the
     tokens of the window before, then the own (w = 2 m), in an HCA layer the own (w = m); "layers/NN/indexer/compressor/
     weight" [B, T, w, c] alike,
     "layers/NN/indexer/queries" [B, S, h, c], "layers/NN/indexer/weights" [B, S, h], "layers/NN/indexer/keys" [B, T, c],
     "layers/NN/indexer/scores" [B, S, T] (-inf where invisible), "layers/NN/indexer/selected" [B, S, K] (-1 = empty),
     "layers/NN/ffn/input", "layers/NN/ffn/output" [B, S, D] of the experts' sublayer, the input normalised,
     "layers/NN/router/scores" [B, S, E], "layers/NN/router/experts", "layers/NN/router/weights" [B, S, k],
     "mtp/..." the same of the prediction block where it runs, "final_norm" [B, S, D], "logits" where made}
    Selected entries, experts, segments and positions are int32, all others floating, as the pass computes them.

  Raises:
    ValueError: a layer that the model does not have, or a cache.
  """
  groups = group_layers(model.config)
  every = range(groups.num_layers)
  wanted = every if layers is None else every[layers] if isinstance(layers, slice) else layers
  for layer in wanted:
    groups.key_of(layer)
  if arguments.get("cache") is not None:
    raise ValueError("cache: expected none, as a trace is of whole rows")
  out, state = model.apply(variables, tokens, positions, segment_ids, mutable=["intermediates"], **arguments)
  sown = state["intermediates"]
  found = {"embedding": sown["embedding"][0]}
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
