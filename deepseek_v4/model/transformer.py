"""The whole network: embedding, residual streams, grouped layers, head, losses (report 2).

Axis letters: B batch   S sequence   N streams   D hidden size   V vocabulary   L layers   E experts   k experts per token
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels
from deepseek_v4 import sharding
from deepseek_v4.config import LayerSpec, ModelConfig
from deepseek_v4.config_checks import refuse
from deepseek_v4.model import losses, remat, two_levels, vocabulary, weights
from deepseek_v4.model.block import Block, LayerOutput
from deepseek_v4.model.cache import Cache, LayerCache
from deepseek_v4.model.context import (
  Chunk,
  Context,
  check_inputs,
  form,
  known_values,
  make_chunk_context,
  make_context,
)
from deepseek_v4.model.groups import LayerGroups, group_layers
from deepseek_v4.model.hyper_connections import HyperHead
from deepseek_v4.model.mtp import MTP, next_embeddings
from deepseek_v4.model.norm import RMSNorm
from deepseek_v4.model.replay import Choice, Replay, choices, stacked
from deepseek_v4.model.vocabulary import Embedding, LMHead

Pair = tuple[jax.Array, jax.Array]


@flax.struct.dataclass
class ModelOutput:
  """Result of `DeepseekV4`; what was not asked for is None.

  Attributes:
    logits: [B, S, V], at least float32 ([B, 1, V] for logits="last").
    hidden: [B, S, D] in the compute dtype, after the final norm, what the head multiplies.
    mtp_hidden: [B, S, D], the same of the multi-token-prediction block.
    losses: {"next_token", "mtp", "balance", "indexer": (sum, count)}, at least float32, when targets were given.
    routing: {"experts": int32 [L, B, S, k], "load": int32 [L, E] without padding}; of the prediction block, where it ran,
      also {"mtp_experts": int32 [B, S, k], "mtp_load": int32 [E]}; if asked for also {"selection": a Selection of each CSA
      layer}. `Replay.of(routing)` makes another pass choose the same.
    cache: after the tokens, when one was given.
    streams: [B, S, N, D] after the last layer, when a cache was given: what the prediction block reads.
  """

  logits: jax.Array | None
  hidden: jax.Array
  mtp_hidden: jax.Array | None
  losses: dict[str, Pair] | None
  routing: dict[str, jax.Array]
  cache: Cache | None = None
  streams: jax.Array | None = None


class _Unit(nn.Module):
  """The layers of one repetition; the blocks belong to the stack, so that their parameters lie under its keys."""

  blocks: tuple[Block, ...]

  def __call__(self, streams_BSND, layers, context, caches, given):
    reports, caches = [], list(caches)
    for j, block in enumerate(self.blocks):
      streams_BSND, report, caches[j] = block(streams_BSND, context, layers[j], caches[j], given[j])
      reports.append(report)
    return streams_BSND, (tuple(reports), tuple(caches))


class Stack(nn.Module):
  """All decoder layers: those of the repeated unit scanned, the others one by one, recomputed as `config.remat` says."""

  config: ModelConfig
  kernels: str

  @nn.compact
  def __call__(self, streams_BSND: jax.Array, context: Context, caches: dict[str, LayerCache], given: list[Choice]
               ) -> Any:
    """Returns the streams after the last layer, in the floating dtype that they came in, the reports of all layers, stacked
    over L, the selections of the CSA layers if they are kept, and the layers' caches.

    Args:
      caches: those of `Cache.layers`, or {} without a cache.
      given: choices that the layers do not make themselves.
    """
    groups = group_layers(self.config)
    reports: list[LayerOutput] = []
    new_caches: dict[str, LayerCache | None] = {}
    for layers in [*self._runs(0, groups.prefix), None, *self._runs(groups.suffix_start, groups.num_layers)]:
      if layers is not None:
        keys = [groups.key_of(layer)[0] for layer in layers]
        streams_BSND, found, of_layers = self._lone(streams_BSND, context, layers, keys, tuple(map(caches.get, keys)),
                                                    given[layers.start:layers.stop])
      elif groups.repeats:
        keys = [f"unit_{j}" for j in range(groups.unit)]
        scan = self._two_levels if self._forgets(caches) else self._scan
        streams_BSND, found, of_layers = scan(streams_BSND, context, groups, tuple(map(caches.get, keys)), given)
        found = [jax.tree.map(lambda x, r=r: x[r], found[j]) for r in range(groups.repeats) for j in range(groups.unit)]
      else:
        continue
      reports += found
      new_caches |= zip(keys, of_layers)
    selections = tuple(report.selection for report in reports if report.selection is not None)
    reports = [report.replace(selection=None) for report in reports]
    return streams_BSND, jax.tree.map(lambda *leaves: jnp.stack(leaves), *reports), selections, new_caches

  def _forgets(self, caches: dict[str, LayerCache]) -> bool:
    """Whether the streams between repeats are not kept; where there is no gradient nothing is, and flax's scan will do."""
    nothing_else = not (caches or self.is_initializing() or self.is_mutable_collection("intermediates"))
    return self.config.remat == "full" and nothing_else

  def _runs(self, start: int, end: int) -> list[range]:
    """Lone layers, as many together as the policy recomputes together."""
    size = two_levels.lone_length(end - start) if self.config.remat == "full" else 1
    return [range(first, min(first + size, end)) for first in range(start, end, size)]

  def _lone(self, streams_BSND, context: Context, layers: range, keys: list[str], caches: tuple[LayerCache | None, ...],
            given: list[Choice]):
    specs = self.config.layer_specs
    kind = remat.recomputed(Block, self.config)
    blocks = tuple(self._block(specs[layer], key, kind) for layer, key in zip(layers, keys))
    if len(blocks) == 1:
      streams_BSND, report, cache = blocks[0](streams_BSND, context, layers[0], caches[0], given[0])
      return streams_BSND, [report], (cache,)
    together = nn.remat(_Unit)(blocks, name=f"from_{keys[0]}")
    streams_BSND, (reports, caches) = together(streams_BSND, tuple(layers), context, caches, tuple(given))
    return streams_BSND, list(reports), caches

  def _block(self, spec: LayerSpec, name: str, kind: type[nn.Module]) -> nn.Module:
    return kind(self.config, spec, self.kernels, name=name)

  def _scan(self, streams_BSND, context: Context, groups: LayerGroups, caches: tuple[LayerCache | None, ...],
            given: list[Choice]):
    """The streams, the reports of each layer of the unit, stacked over the repeats, and the caches."""
    # mhc recomputes a unit's streams from its first ones, the other policies each layer from its own.
    again = functools.partial(remat.recomputed, config=self.config)
    kind, unit = (Block, again(_Unit)) if self.config.remat == "mhc" else (again(Block), _Unit)
    specs = self.config.layer_specs[groups.prefix:]
    blocks = tuple(self._block(specs[j], f"unit_{j}", kind) for j in range(groups.unit))
    scan = nn.scan(unit, variable_axes={"params": 0, "router": 0, "intermediates": 0}, split_rngs={"params": True},
                   in_axes=(0, nn.broadcast, 0, 0), length=groups.repeats)
    scanned = scan(blocks, name="scan")
    streams_BSND, (reports, caches) = scanned(streams_BSND, _numbers(groups), context, caches, _of_unit(given, groups))
    return streams_BSND, reports, caches

  def _two_levels(self, streams_BSND, context: Context, groups: LayerGroups, caches: tuple[LayerCache | None, ...],
                  given: list[Choice]):
    """`_scan` that keeps the streams in front of groups of repeats only."""
    def of(spec):
      block = Block(self.config, spec, self.kernels, parent=None)

      def layer(params, fixed, context, streams_BSND):
        number, router, given = fixed
        return block.apply({"params": params, **router}, streams_BSND, context, number, None, given)[:2]
      return layer

    layers = [of(self.config.layer_specs[groups.prefix + j]) for j in range(groups.unit)]
    keys, numbers = [f"unit_{j}" for j in range(groups.unit)], _numbers(groups)
    params = tuple(self.variables["params"][key] for key in keys)
    router = [{name: tree[key] for name, tree in self.variables.items() if name != "params"} for key in keys]
    fixed = tuple((numbers[:, j], router[j], choice) for j, choice in enumerate(_of_unit(given, groups)))
    return *two_levels.run(layers, params, fixed, context, streams_BSND), caches


def _numbers(groups: LayerGroups) -> jax.Array:
  """int32 [repeats, unit]: the layers that are scanned."""
  return groups.prefix + jnp.arange(groups.repeats * groups.unit).reshape(groups.repeats, groups.unit)


def _of_unit(given: list[Choice], groups: LayerGroups) -> tuple[Choice, ...]:
  """What is given to the layers that are scanned: for each of a unit, stacked over the repeats."""
  return tuple(stacked(given[groups.prefix + j:groups.suffix_start:groups.unit]) for j in range(groups.unit))


class DeepseekV4(nn.Module):
  """DeepSeek-V4 as a pure function of its variables.

      model = DeepseekV4(config)
      variables = model.init(key, tokens)      # {"params": ..., "router": ...}
      out = model.apply(variables, tokens)

  Attributes:
    config: the architecture.
    kernels: implementation of the ops: auto, reference, blockwise, pallas, interpret.
  """

  config: ModelConfig
  kernels: str = "auto"

  def __post_init__(self) -> None:
    self.kernels = pallas_kernels.resolve(self.kernels)
    super().__post_init__()

  @nn.compact
  def __call__(self, tokens: jax.Array, positions: jax.Array | None = None, segment_ids: jax.Array | None = None,
               cache: Cache | None = None, *, logits: str = "all", attention_mode: str = "sparse",
               replay: Replay | None = None, targets: jax.Array | None = None, mtp: bool | None = None,
               cache_reach: int | None = None, keep_selection: bool = False) -> ModelOutput:
    """Runs the network.

    Args:
      tokens: int32 [B, S].
      positions: int32 [B, S], restarting with each document; default: counted from each change of segment_ids.
      segment_ids: int32 [B, S], the document of each token, 0 = not a token; a document's tokens lie together, and its id
        does not come back later in the row. Default: a new document wherever the given positions do not go on by one,
        without positions one document per row.
      cache: of `init_cache`; the tokens continue its rows, and `ModelOutput.cache` is the cache after them. Positions then
        follow from the cache, and segment_ids only say what is a token (> 0) and what is not (0), on either side. A row that
        outgrows the cache gets NaN.
      logits: "all" places, "last" place only (with a cache: each row's last token, any place if it has none), or "none".
      attention_mode: "sparse", or "dense": CSA layers attend to every visible entry.
      replay: choices that the pass takes instead of making them itself: experts, compressed entries; see `Replay`.
      targets: int32 [B, S], next token of each place, -1 = not counted. Given: `losses` is filled and no logits are made.
      mtp: run the multi-token-prediction block; default: if targets are given.
      cache_reach: with a cache: no row has more tokens than this after the call, so that fewer entries are read; default
        all that there is room for.
      keep_selection: give the entries that the queries of CSA layers read back in `routing`; int32 [B, S, index_topk] of
        each layer, or what the kernels make.

    Returns:
      ModelOutput.

    Raises:
      ValueError: arguments that do not fit, before anything is computed.
    """
    config, kernels = self.config, self.kernels
    has_mtp = config.num_nextn_predict_layers == 1
    self._check(tokens, logits, targets, mtp and not has_mtp)
    run_mtp = has_mtp and (mtp or self.is_initializing() or (mtp is None and targets is not None))
    back = None
    if cache is None:
      context = make_context(config, tokens, positions, segment_ids, attention_mode, with_losses=targets is not None)
    else:
      self._check_cached(cache, cache_reach, tokens, positions, segment_ids, attention_mode, run_mtp or targets is not None)
      context, back = make_chunk_context(config, tokens, segment_ids, cache, attention_mode,
                                         min(cache.max_length, cache_reach or cache.max_length))
      tokens = context.tokens
    context = dataclasses.replace(context, keep_selection=keep_selection)
    given, given_to_mtp = choices(replay, config, context, segment_ids, back, run_mtp)

    embedded_BSD = Embedding(config, name="embed")(tokens)
    self.sow("intermediates", "embedding", embedded_BSD)
    streams_BSND = jnp.broadcast_to(embedded_BSD[:, :, None], (*tokens.shape, config.hc_mult, config.hidden_size))
    layer_caches = {} if cache is None else cache.layers
    stack = Stack(config, kernels, name="layers")
    streams_BSND, reports, selections, layer_caches = stack(streams_BSND, context, layer_caches, given)
    hidden_BSD = RMSNorm(config, name="final_norm")(HyperHead(config, name="hc_head")(streams_BSND))
    self.sow("intermediates", "hidden", hidden_BSD)
    head_DV = LMHead(config, name="lm_head")()
    routing = {"experts": reports.experts, "load": reports.load} | ({"selection": selections} if keep_selection else {})
    mtp_BSD = None
    if run_mtp:
      next_BSD = next_embeddings(embedded_BSD, context.segment_ids)
      mtp_BSD, _, mtp_report, _ = MTP(config, kernels, name="mtp")(streams_BSND, next_BSD, context, given=given_to_mtp)
      routing |= {"mtp_experts": mtp_report.experts, "mtp_load": mtp_report.load}
    found = None
    if targets is not None:
      found = self._losses(head_DV, hidden_BSD, reports, targets)
      if run_mtp:
        found |= self._mtp_losses(head_DV, mtp_BSD, mtp_report, found["balance"], targets, context)
      logits = "none"
    chosen = hidden_BSD[:, -1:] if logits == "last" else hidden_BSD
    if cache is not None:
      cache, hidden_BSD, chosen, routing = self._continued(cache, layer_caches, context.chunk, back, hidden_BSD, routing,
                                                           logits)
      streams_BSND = streams_BSND if back is None else jnp.take_along_axis(streams_BSND, back[..., None, None], 1)
    out = None
    if logits != "none":
      out = sharding.constrain(vocabulary.logits(config, chosen, head_DV), ("batch", "sequence", "vocab"))
    return ModelOutput(out, hidden_BSD, mtp_BSD, found, routing, cache, None if cache is None else streams_BSND)

  def _check(self, tokens: jax.Array, logits: str, targets: jax.Array | None, no_mtp: bool | None) -> None:
    """Refuses arguments that do not fit, whether there is a cache or not."""
    weights.check_dtype(self.config)
    if logits not in ("all", "last", "none"):
      raise ValueError(f"logits = {logits!r}: expected all, last or none")
    if targets is not None and (np.shape(targets) != np.shape(tokens)
                                or not jnp.issubdtype(getattr(targets, "dtype", object), jnp.integer)):
      raise ValueError(f"targets = {form(targets)}: expected integers of the tokens' shape {np.shape(tokens)}")
    values = None if targets is None else known_values(targets)
    if values is not None and values.size and not -1 <= values.min() <= values.max() < self.config.vocab_size:
      wrong = values[(values < -1) | (values >= self.config.vocab_size)][0]
      refuse("targets", int(wrong), f"ids below vocab_size = {self.config.vocab_size}, or -1 = not counted")
    if no_mtp:
      raise ValueError("mtp = True: expected a model with num_nextn_predict_layers = 1")

  def _check_cached(self, cache: Cache, reach: int | None, tokens, positions, segment_ids, attention_mode: str,
                    more: bool) -> None:
    """Refuses what does not go with a cache."""
    check_inputs(self.config, tokens, positions, segment_ids, attention_mode, cached=True)
    if positions is not None:
      raise ValueError("positions: expected None beside a cache, whose lengths they follow")
    if sharding.sequence_parts() > 1:
      raise ValueError(f"cache: expected a mesh with context = 1, not {sharding.sequence_parts()}")
    if more or self.is_mutable_collection("intermediates"):
      raise ValueError("cache: expected None with targets, mtp or in a trace")
    if cache.groups != group_layers(self.config) or cache.lengths.shape != tokens.shape[:1]:
      raise ValueError(f"cache: expected one of init_cache with this model's config and batch_size = {tokens.shape[0]}")
    if reach is not None and reach < 1:
      raise ValueError(f"cache_reach = {reach!r}: expected None or a number of tokens")

  def _continued(self, cache: Cache, layers: dict[str, LayerCache], chunk: Chunk, back, hidden_BSD, routing, logits: str):
    """(cache after the chunk, hidden states in the caller's places, hidden states that the head reads, the routing in the
    caller's places)."""
    lengths_B = chunk.start + chunk.count
    hidden_BSD = jnp.where((lengths_B <= chunk.reach)[:, None, None], hidden_BSD, jnp.nan)
    last_B = jnp.maximum(chunk.count - 1, 0)
    chosen = jnp.take_along_axis(hidden_BSD, last_B[:, None, None], 1)
    if back is not None:
      hidden_BSD = jnp.take_along_axis(hidden_BSD, back[..., None], 1)
      routing = routing | {"experts": jnp.take_along_axis(routing["experts"], back[None, ..., None], 2)}
      if "selection" in routing:
        at = lambda x: jnp.take_along_axis(x, back[..., None], 1)
        routing["selection"] = jax.tree.map(at, routing["selection"])
    cache = cache.replace(layers=layers, lengths=lengths_B, furthest=jnp.maximum(cache.furthest, lengths_B))
    return cache, hidden_BSD, chosen if logits == "last" else hidden_BSD, routing

  def _losses(self, head_DV, hidden_BSD, reports: LayerOutput, targets) -> dict[str, tuple[jax.Array, jax.Array]]:
    """(sum, count) of the losses of the layers and the head."""
    return {"next_token": losses.cross_entropy(hidden_BSD, head_DV, targets, chunk_size=self.config.loss_chunk_size),
            "balance": (reports.balance.sum(), reports.balance_count.max()),
            "indexer": (reports.indexer.sum(), reports.indexer_count.max())}

  def _mtp_losses(self, head_DV, mtp_BSD, report: LayerOutput, balance, targets, context: Context):
    """The prediction block's own loss, and the balance loss with its router's part."""
    further = losses.mtp_targets(targets, context.segment_ids)
    return {"mtp": losses.cross_entropy(mtp_BSD, head_DV, further, chunk_size=self.config.loss_chunk_size),
            "balance": (balance[0] + report.balance, jnp.maximum(balance[1], report.balance_count))}
