"""Which compressed entries each query attends to: made by the indexer, used by attention, the indexer's loss and replay.

Axis letters: B batch   S queries   K picks per query   T entries
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels import arguments, bits


@functools.partial(jax.tree_util.register_dataclass, data_fields=["picks", "words"],
                   meta_fields=["kind", "num_entries", "top_k"])
@dataclasses.dataclass(frozen=True)
class Selection:
  """An opaque pytree of arrays with the batch and query axes first.

  Attributes:
    picks: int32 [B, S, K], distinct entry numbers in any order, -1 = empty anywhere; [B, S, 0] for the other kinds.
    kind: "indices"; "bits", what the TPU kernels make; or "all" = every entry that causality and the documents let the
      query see.
    words: of kind "bits": int32 [B, S, W] in the layout of `bits`, visible entries only; else None.
    num_entries, top_k: of kind "bits": T, and the most bits of a query.
  """

  picks: jax.Array
  kind: str = "indices"
  words: jax.Array | None = None
  num_entries: int = 0
  top_k: int = 0

  @staticmethod
  def from_indices(picks: jax.Array) -> "Selection":
    """A selection from entry numbers [B, S, K], -1 = empty.

    Raises:
      ValueError: picks of another shape or dtype.
    """
    if picks.ndim != 3 or not jnp.issubdtype(picks.dtype, jnp.integer):
      raise ValueError(f"picks = {picks.dtype}{picks.shape}: expected integers [batch, queries, picks]")
    return Selection(picks.astype(jnp.int32))

  @staticmethod
  def all(batch_size: int, num_queries: int) -> "Selection":
    """Every visible entry."""
    return Selection(jnp.zeros((batch_size, num_queries, 0), jnp.int32), "all")

  @staticmethod
  def from_words(words: jax.Array, num_entries: int, top_k: int) -> "Selection":
    """A selection from rows of bits int32 [B, S, W] (see `bits`) with at most `top_k` visible entries each.

    Raises:
      ValueError: words of another type, or not as many as `num_entries` have.
    """
    width = bits.num_words(num_entries)
    if words.ndim != 3 or words.dtype != jnp.int32 or words.shape[2] != width:
      raise ValueError(f"words = {words.dtype}{list(words.shape)}: expected int32 [batch, queries, {width}] for "
                       f"{num_entries} entries")
    return Selection(jnp.zeros((*words.shape[:2], 0), jnp.int32), "bits", words, num_entries, top_k)

  def indices(self) -> jax.Array:
    """Entry numbers int32 [B, S, K], -1 = empty.

    Raises:
      ValueError: kind "all", which names no entries.
    """
    if self.kind == "all":
      raise ValueError("a selection of kind 'all' names no entries: it stands for every visible one")
    return bits.to_picks(self.words, self.top_k) if self.kind == "bits" else self.picks

  def check(self, op: str, batch_size: int, num_queries: int, num_entries: int) -> None:
    """That it speaks about these queries and entries, as far as its arrays tell.

    Raises:
      ValueError: it does not.
    """
    rows = f"int: {batch_size} {num_queries}"
    arguments.check(op, **{"selection.picks": (self.picks, f"{rows} ...")})
    if self.words is not None:
      arguments.check(op, **{"selection.words": (self.words, f"{rows} {bits.num_words(num_entries)}")})
      if self.num_entries != num_entries:
        raise ValueError(f"{op}: selection.num_entries = {self.num_entries}: expected {num_entries}, the entries of a row")

  def listed(self) -> "Selection":
    """The same selection as entry numbers where it is rows of bits; itself otherwise."""
    return Selection(self.indices()) if self.kind == "bits" else self

  def mask(self, num_entries: int) -> jax.Array:
    """Dense bool [B, S, T]; for tests and references, never on a long sequence."""
    if self.kind == "all":
      return jnp.ones((*self.picks.shape[:2], num_entries), bool)
    if self.kind == "bits":
      return bits.unpack(self.words, num_entries)
    return (self.picks[..., None] == jnp.arange(num_entries)).any(-2)
