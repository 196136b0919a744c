"""Which compressed entries each query attends to: made by the indexer, used by attention, the indexer's loss and replay.

Axis letters: B batch   S queries   K picks per query   T entries
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.tree_util.register_dataclass, data_fields=["picks"], meta_fields=["kind"])
@dataclasses.dataclass(frozen=True)
class Selection:
  """An opaque pytree of arrays with the batch and query axes first.

  Attributes:
    picks: int32 [B, S, K], distinct entry numbers in any order, -1 = empty anywhere; [B, S, 0] for kind "all".
    kind: "indices", or "all" = every entry that causality and the documents let the query see.
  """

  picks: jax.Array
  kind: str = "indices"

  @staticmethod
  def from_indices(picks: jax.Array) -> "Selection":
    """A selection from entry numbers [B, S, K], -1 = empty."""
    if picks.ndim != 3 or not jnp.issubdtype(picks.dtype, jnp.integer):
      raise ValueError(f"picks = {picks.dtype}{picks.shape}: expected integers [batch, queries, picks]")
    return Selection(picks.astype(jnp.int32))

  @staticmethod
  def all(batch_size: int, num_queries: int) -> "Selection":
    """Every visible entry."""
    return Selection(jnp.zeros((batch_size, num_queries, 0), jnp.int32), "all")

  def indices(self) -> jax.Array:
    """Entry numbers int32 [B, S, K], -1 = empty.

    Raises:
      ValueError: kind "all", which names no entries.
    """
    if self.kind == "all":
      raise ValueError("a selection of kind 'all' names no entries: it stands for every visible one")
    return self.picks

  def mask(self, num_entries: int) -> jax.Array:
    """Dense bool [B, S, T]; for tests and references, never on a long sequence."""
    if self.kind == "all":
      return jnp.ones((*self.picks.shape[:2], num_entries), bool)
    return (self.picks[..., None] == jnp.arange(num_entries)).any(-2)
