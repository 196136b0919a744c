"""What every layer of a forward pass shares: token ids, positions, documents, rotary phases, where the entries lie."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_v4 import sharding
from deepseek_v4.config import CSA, HCA, SLIDING, ModelConfig
from deepseek_v4.config_checks import refuse
from deepseek_v4.model import rope, sequence
from deepseek_v4.model.cache import Cache
from deepseek_v4.model.compression import EntryLayout, chunk_layout, entry_layout

Phases = tuple[jax.Array, jax.Array]
_INT32 = 2**31 - 1


@functools.partial(jax.tree_util.register_dataclass, meta_fields=["reach"], data_fields=["start", "count"])
@dataclasses.dataclass(frozen=True)
class Chunk:
  """What a row of new tokens continues: int32 [B] tokens in the cache before, int32 [B] new tokens (the first places of the
  row), and the largest number of tokens that a row has afterwards."""

  start: jax.Array
  count: jax.Array
  reach: int


@functools.partial(jax.tree_util.register_dataclass,
                   data_fields=["tokens", "positions", "segment_ids", "phases", "entries", "chunk", "past_segment"],
                   meta_fields=["attention_mode", "contiguous", "with_losses", "keep_selection"])
@dataclasses.dataclass(frozen=True)
class Context:
  """Inputs that layers read beside the residual streams.

  Attributes:
    tokens, positions, segment_ids: int32 [B, S]; segment 0 = not a token.
    phases: (cos, sin) [B, S, r / 2], at least float32, of the tokens by attention kind.
    entries: layout of the compressed entries by attention kind.
    attention_mode: "sparse", or "dense" = CSA layers attend to every visible entry.
    contiguous: each row is one document that starts at place 0.
    with_losses: layers compute their own losses (balance, indexer).
    chunk: with a cache; `entries` are then those that the new tokens can close.
    keep_selection: layers report the entries that their queries read.
    past_segment: in a split sequence, documents of the window keys in front of each part, int32 [B, N (window - 1)] for N
      parts.
  """

  tokens: jax.Array
  positions: jax.Array
  segment_ids: jax.Array
  phases: dict[str, Phases]
  entries: dict[str, EntryLayout]
  attention_mode: str
  contiguous: bool
  with_losses: bool
  chunk: Chunk | None = None
  past_segment: jax.Array | None = None
  keep_selection: bool = False

  def places(self, attention: str) -> tuple[jax.Array, jax.Array]:
    """(position of the last token, document) int32 [B, T] of all entries that attention of this kind may read."""
    if attention == SLIDING:
      return (jnp.zeros((self.positions.shape[0], 0), jnp.int32),) * 2
    layout = self.entries[attention]
    if self.chunk is None:
      return layout.last, layout.segment
    last_T = jnp.arange(1, self.chunk.reach // layout.rate + 1, dtype=jnp.int32) * layout.rate - 1
    closed_BT = last_T < (self.chunk.start + self.chunk.count)[:, None]
    return jnp.broadcast_to(last_T, closed_BT.shape), closed_BT.astype(jnp.int32)


def known_values(x: Any) -> np.ndarray | None:
  """The numbers of an array, shape and dtype as it has, if they are here: not inside jit, where it stands for any, nor on
  other processes' devices. None of what is not there."""
  if x is None or isinstance(x, jax.core.Tracer) or not getattr(x, "is_fully_addressable", True):
    return None
  return np.asarray(x)


def check_inputs(config: ModelConfig, tokens: jax.Array, positions: jax.Array | None, segment_ids: jax.Array | None,
                 attention_mode: str, *, cached: bool = False) -> None:
  """Refuses what does not fit.

  Args:
    cached: the rows continue a cache, and segment ids only say what is a token.

  Raises:
    ValueError: shapes or dtypes that do not fit, or an unknown attention mode; numbers that mean nothing, where they are
      known, that is outside jit.
  """
  if getattr(tokens, "ndim", None) != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
    raise ValueError(f"tokens = {form(tokens)}: expected integers [batch, sequence]")
  if not 1 <= tokens.shape[1] <= config.max_position_embeddings:
    raise ValueError(f"tokens have length {tokens.shape[1]}: expected 1 to max_position_embeddings = "
                     f"{config.max_position_embeddings}")
  for name, value in (("positions", positions), ("segment_ids", segment_ids)):
    if value is not None and (np.shape(value) != tokens.shape
                              or not jnp.issubdtype(getattr(value, "dtype", object), jnp.integer)):
      raise ValueError(f"{name} = {form(value)}: expected integers of the tokens' shape {tokens.shape}")
  if attention_mode not in ("sparse", "dense"):
    raise ValueError(f"attention_mode = {attention_mode!r}: expected sparse or dense")
  _check_values(config, *map(known_values, (tokens, positions, segment_ids)), segment_ids is None, cached)


def form(x: Any) -> str:
  """Dtype and shape of an array, or type and shape of what is there instead of one, for messages."""
  return f"{getattr(x, 'dtype', type(x).__name__)}{tuple(np.shape(x))}"


def _check_values(config: ModelConfig, tokens_BS: np.ndarray | None, positions_BS: np.ndarray | None,
                  segments_BS: np.ndarray | None, all_tokens: bool, cached: bool) -> None:
  """Refuses numbers without a meaning, of those arrays that are known; what is no token may hold anything."""
  if segments_BS is not None:
    check_documents("segment_ids", segments_BS, ordered=not cached)
  if segments_BS is None and not all_tokens:
    return
  token_BS = True if segments_BS is None else segments_BS > 0
  for name, values_BS, count in (("tokens", tokens_BS, ("vocab_size", config.vocab_size)),
                                 ("positions", positions_BS,
                                  ("max_position_embeddings", config.max_position_embeddings))):
    if values_BS is not None and (wrong := token_BS & ((values_BS < 0) | (values_BS >= count[1]))).any():
      row, place = np.argwhere(wrong)[0]
      refuse(f"{name}[{row}, {place}]", int(values_BS[row, place]), f"0 to {count[0]} - 1 = {count[1] - 1}")


def check_documents(name: str, segment_ids: np.ndarray, *, ordered: bool = True) -> None:
  """Refuses numbers that are no documents'.

  Args:
    name: what the message calls them.
    segment_ids: integers [..., S].
    ordered: the rows are whole, and so documents come in the order of their numbers.

  Raises:
    ValueError: a number below 0 or beyond int32, or a row in which ids decrease.
  """
  if (segment_ids < 0).any():
    refuse(name, int(segment_ids.min()), "a document's number, from 1, or 0 = not a token")
  if (segment_ids > _INT32).any():
    refuse(name, int(segment_ids.max()), f"at most {_INT32}, the largest int32")
  highest = np.maximum.accumulate(segment_ids, axis=-1)
  if ordered and (sinks := (segment_ids > 0) & (segment_ids < highest)).any():
    place = tuple(map(int, np.argwhere(sinks)[0]))
    refuse(f"{name}{list(place)}", int(segment_ids[place]), f"at least {highest[place]}, that of a document before it: the "
           "tokens of a document lie together, and ids do not decrease")


def make_context(config: ModelConfig, tokens: jax.Array, positions: jax.Array | None, segment_ids: jax.Array | None,
                 attention_mode: str, with_losses: bool) -> Context:
  """Checks the inputs of a forward pass, int32 [B, S] as `DeepseekV4` takes them, and computes what its layers share; see
  `check_inputs`.

  Raises:
    ValueError: also a sequence that the ambient mesh cannot split.
  """
  check_inputs(config, tokens, positions, segment_ids, attention_mode)
  sharding.check_parts(config, "length of tokens", tokens.shape[1], sharding.sequence_parts())
  tokens, positions, segment_ids = (None if x is None else jnp.asarray(x) for x in (tokens, positions, segment_ids))
  contiguous = positions is None and segment_ids is None and not sequence.is_split()
  if segment_ids is None:
    segment_ids = jnp.ones_like(tokens) if positions is None else document_numbers(positions)
  positions = document_positions(segment_ids) if positions is None else positions
  # Where the indexer splits its queries over more devices, these and what is made of them stay as they are.
  tokens, positions, segment_ids = (sharding.constrain(x, sequence.TOKENS) for x in (tokens, positions, segment_ids))
  kinds = dict.fromkeys(config.layer_types)
  phases = {kind: rope.angles(config, kind, positions) for kind in (*kinds, SLIDING)}
  entries = {kind: entry_layout(config, kind, positions, segment_ids, contiguous) for kind in kinds if kind in (CSA, HCA)}
  past = sequence.before_parts(segment_ids, config.sliding_window - 1) if sequence.is_split() else None
  return Context(tokens, positions, segment_ids, phases, entries, attention_mode, contiguous, with_losses, past_segment=past)


def make_chunk_context(config: ModelConfig, tokens: jax.Array, segment_ids: jax.Array | None, cache: Cache,
                       attention_mode: str, reach: int) -> tuple[Context, jax.Array | None]:
  """What the layers share when rows continue those of a cache.

  Returns:
    The context, whose rows hold their new tokens first, in order, and the place int32 [B, S] that each of the caller's
    places has in them; None = the same.
  """
  batch, length = tokens.shape
  back = None
  if segment_ids is None:
    count = jnp.full(batch, length, jnp.int32)
  else:
    # Tokens first, whatever side the padding is on: behind them it touches neither windows nor compressors.
    order = jnp.argsort(jnp.asarray(segment_ids) == 0, axis=1, stable=True)
    tokens, back = jnp.take_along_axis(tokens, order, 1), jnp.argsort(order, axis=1)
    count = (jnp.asarray(segment_ids) > 0).sum(1, dtype=jnp.int32)
  place = jnp.arange(length, dtype=jnp.int32)
  positions, segments = cache.lengths[:, None] + place, (place < count[:, None]).astype(jnp.int32)
  kinds = dict.fromkeys(config.layer_types)
  phases = {kind: rope.angles(config, kind, positions) for kind in (*kinds, SLIDING)}
  entries = {kind: chunk_layout(config, kind, cache.lengths, count, length) for kind in kinds if kind in (CSA, HCA)}
  chunk = Chunk(cache.lengths, count, reach)
  return Context(tokens, positions, segments, phases, entries, attention_mode, False, False, chunk), back


def document_numbers(positions_BS: jax.Array) -> jax.Array:
  """Segment ids int32 [B, S], from 1: a new document wherever positions do not go on by one."""
  breaks = positions_BS[:, 1:] != positions_BS[:, :-1] + 1
  return 1 + jnp.pad(jnp.cumsum(breaks, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))


def document_positions(segment_ids_BS: jax.Array) -> jax.Array:
  """Positions int32 [B, S] that restart wherever the segment id changes."""
  place = jnp.broadcast_to(jnp.arange(segment_ids_BS.shape[1], dtype=jnp.int32), segment_ids_BS.shape)
  changes = jnp.pad(segment_ids_BS[:, 1:] != segment_ids_BS[:, :-1], ((0, 0), (1, 0)), constant_values=True)
  return place - jax.lax.cummax(jnp.where(changes, place, 0), axis=1)
