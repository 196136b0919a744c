"""What every layer of a forward pass shares: token ids, positions, documents, rotary phases, where the entries lie."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from deepseek_v4.config import CSA, HCA, SLIDING, ModelConfig
from deepseek_v4.model import rope
from deepseek_v4.model.compression import EntryLayout, entry_layout

Phases = tuple[jax.Array, jax.Array]


@functools.partial(jax.tree_util.register_dataclass, meta_fields=["attention_mode", "contiguous", "with_losses"],
                   data_fields=["tokens", "positions", "segment_ids", "phases", "entries"])
@dataclasses.dataclass(frozen=True)
class Context:
  """Inputs that layers read beside the residual streams.

  Attributes:
    tokens, positions, segment_ids: int32 [B, S]; segment 0 = not a token.
    phases: (cos, sin) [B, S, r / 2] of the tokens by attention kind.
    entries: layout of the compressed entries by attention kind.
    attention_mode: "sparse", or "dense" = CSA layers attend to every visible entry.
    contiguous: each row is one document that starts at place 0.
    with_losses: layers compute their own losses (balance, indexer).
  """

  tokens: jax.Array
  positions: jax.Array
  segment_ids: jax.Array
  phases: dict[str, Phases]
  entries: dict[str, EntryLayout]
  attention_mode: str
  contiguous: bool
  with_losses: bool


def make_context(config: ModelConfig, tokens: jax.Array, positions: jax.Array | None, segment_ids: jax.Array | None,
                 attention_mode: str, with_losses: bool) -> Context:
  """Checks the inputs of a forward pass and computes what its layers share.

  Raises:
    ValueError: shapes or dtypes that do not fit, or an unknown attention mode.
  """
  if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
    raise ValueError(f"tokens = {tokens.dtype}{tokens.shape}: expected integers [batch, sequence]")
  if not 1 <= tokens.shape[1] <= config.max_position_embeddings:
    raise ValueError(f"tokens have length {tokens.shape[1]}: expected 1 to max_position_embeddings = "
                     f"{config.max_position_embeddings}")
  for name, value in (("positions", positions), ("segment_ids", segment_ids)):
    if value is not None and (value.shape != tokens.shape or not jnp.issubdtype(value.dtype, jnp.integer)):
      raise ValueError(f"{name} = {value.dtype}{value.shape}: expected integers of the tokens' shape {tokens.shape}")
  if attention_mode not in ("sparse", "dense"):
    raise ValueError(f"attention_mode = {attention_mode!r}: expected sparse or dense")
  tokens, positions, segment_ids = (None if x is None else jnp.asarray(x) for x in (tokens, positions, segment_ids))
  contiguous = positions is None and segment_ids is None
  if segment_ids is None:
    segment_ids = jnp.ones_like(tokens) if positions is None else document_numbers(positions)
  positions = document_positions(segment_ids) if positions is None else positions
  kinds = dict.fromkeys(config.layer_types)
  phases = {kind: rope.angles(config, kind, positions) for kind in (*kinds, SLIDING)}
  entries = {kind: entry_layout(config, kind, positions, segment_ids, contiguous) for kind in kinds if kind in (CSA, HCA)}
  return Context(tokens, positions, segment_ids, phases, entries, attention_mode, contiguous, with_losses)


def document_numbers(positions_BS: jax.Array) -> jax.Array:
  """Segment ids int32 [B, S], from 1: a new document wherever positions do not go on by one."""
  breaks = positions_BS[:, 1:] != positions_BS[:, :-1] + 1
  return 1 + jnp.pad(jnp.cumsum(breaks, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))


def document_positions(segment_ids_BS: jax.Array) -> jax.Array:
  """Positions int32 [B, S] that restart wherever the segment id changes."""
  place = jnp.broadcast_to(jnp.arange(segment_ids_BS.shape[1], dtype=jnp.int32), segment_ids_BS.shape)
  changes = jnp.pad(segment_ids_BS[:, 1:] != segment_ids_BS[:, :-1], ((0, 0), (1, 0)), constant_values=True)
  return place - jax.lax.cummax(jnp.where(changes, place, 0), axis=1)
