"""The program of a case: attention's results and gradients, through the model's own shard_map wrapper."""

from __future__ import annotations

from typing import Any, Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from deepseek_v4 import config as c
from deepseek_v4 import sharding
from deepseek_v4.model.attention import Attention
from deepseek_v4.model.compression import EntryLayout
from deepseek_v4.model.context import Context
from launch.benchmarks import splash
from launch.benchmarks.memory.cases import BLOCKWISE, CSA, FORMULA, OURS, SLIDING, SPLASH, Case
from pallas_kernels import bits
from pallas_kernels.selection import Selection

_KERNELS = {OURS: "pallas", BLOCKWISE: "blockwise", FORMULA: "reference"}


def program(**fields: Any) -> tuple[Callable[..., Any], tuple[Any, ...], Any, Any]:
  """(fn, operands, their PartitionSpecs, those of the results) of the case with these fields."""
  case = Case(**fields)
  moving, fixed = _moving(case), _fixed(case)

  def both(moving, fixed, cotangents):
    results, pull = jax.vjp(lambda moving: _attend(case, moving, fixed), moving)
    return results, pull(cotangents)[0]

  by_heads = sharding.spec((None, None, "heads"))
  moving_specs = {"q": by_heads, "kv": PartitionSpec(), "entries": PartitionSpec(), "sink": sharding.spec(("heads",))}
  results = moving["q"], jax.ShapeDtypeStruct(moving["q"].shape[:3], jnp.float32)
  fixed_specs = jax.tree.map(lambda _: PartitionSpec(), fixed)
  result_specs = (by_heads, by_heads)
  return both, (moving, fixed, results), (moving_specs, fixed_specs, result_specs), (result_specs, moving_specs)


def _moving(case: Case) -> dict[str, jax.ShapeDtypeStruct]:
  s = case.shapes
  array = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
  return {"q": array(1, case.length, s.heads, s.width), "kv": array(1, case.length, s.width),
          "entries": array(1, case.entries, s.width), "sink": array(s.heads, dtype=jnp.float32)}


def _fixed(case: Case) -> dict[str, Any]:
  """Positions and documents of tokens and entries, and the selection in the form that the side's indexer makes."""
  array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
  top_k = case.shapes.top_k
  if case.kind != CSA or top_k >= case.entries:
    selection = Selection(array(1, case.length, 0), "all")
  elif case.side == OURS:
    words = array(1, case.length, bits.num_words(case.entries))
    selection = Selection(array(1, case.length, 0), "bits", words, case.entries, top_k)
  else:
    selection = Selection(array(1, case.length, top_k))
  return {"tokens": {name: array(1, case.length) for name in ("positions", "segment_ids")},
          "entries": {name: array(1, case.entries) for name in ("last", "segment")}, "selection": selection}


def _attend(case: Case, moving: dict[str, jax.Array], fixed: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
  """What a layer does between its projections; of splash attention the sums come with the output's gradient only."""
  if case.side == SPLASH:
    return _on_mesh_splash(case, moving, fixed)
  s, tokens = case.shapes, fixed["tokens"]
  config = c.ModelConfig(num_attention_heads=s.heads, head_dim=s.width, sliding_window=s.window, layer_types=(case.kind,),
                         num_hidden_layers=1, mlp_layer_types=(c.LEARNED,), compute_dtype="bfloat16")
  layout = EntryLayout(None, None, **fixed["entries"], cos=None, sin=None, rate=0, contiguous=False)
  context = Context(None, **tokens, phases={}, entries={} if case.kind == SLIDING else {case.kind: layout},
                    attention_mode="sparse", contiguous=False, with_losses=True)
  layer = Attention(config, case.kind, _KERNELS[case.side])
  return layer.apply({}, moving["q"], moving["kv"], moving["entries"], fixed["selection"], moving["sink"], context,
                     method="_attend")


def _on_mesh_splash(case: Case, moving: dict[str, jax.Array], fixed: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
  tokens, rows, heads = ("batch", "sequence"), ("batch",), ("batch", "sequence", "heads")
  def run(q, kv, entries, sink, selection, tokens, of_entries):
    places = tokens | {f"entry_{name}": x for name, x in of_entries.items()}
    return splash.attend(q, kv, entries, selection, sink, places, case.shapes.window, case.shapes.width**-0.5)

  split = sharding.per_shard(run, (heads, tokens, rows, ("heads",), tokens, tokens, rows), heads)
  out = split(moving["q"], moving["kv"], moving["entries"], moving["sink"], fixed["selection"], fixed["tokens"],
              fixed["entries"])
  return out, jnp.zeros(out.shape[:3], jnp.float32)
