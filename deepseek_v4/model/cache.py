"""Decode state: what earlier tokens leave behind for later ones, as a plain pytree of static shapes (report 2.3, 3.5.1).

A layer keeps its last tokens' keys in a ring (the window), its compressed entries, and the last tokens' unpooled values and
gates in a second ring (pending), from which the next entry is made; CSA layers keep the same for their index keys. A ring
holds the token of position p in row p mod rows. Both rings are longer than needed by `rewind` rows, so that a cache can be
taken back by as many tokens. Which rows and entries count follows from the lengths alone: what lies beyond is never read.

The storage "compute" keeps everything as it was computed. "mixed" keeps what the report publishes (a tenth of V3.2's cache):
windows and entries with E4M3 codes for their plain channels and bfloat16 rotary ones, index keys as pairs of E2M1 codes, and
their scales; see `quantize`. A layer then reads its own chunk's keys as rounded as the cache keeps them, so how tokens are
cut into chunks changes nothing. That is what `ModelConfig.inference_rounding` does to keys; the field alone rounds index
queries and inputs of linear layers, and with it a mixed cache gives the full pass.

Axis letters: B batch   R rows of a ring   S new tokens   C new entries   T entries   d entry width   c index width
              o series of a compressor (2 for CSA and the indexer, 1 for HCA)
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from deepseek_v4.config import CSA, HCA, SLIDING, ModelConfig
from deepseek_v4.config_checks import refuse
from deepseek_v4.model import quantize
from deepseek_v4.model.formats import STORAGES
from deepseek_v4.model.groups import LayerGroups, group_layers
from deepseek_v4.model.quantize import PackedIndex, PackedKV


@flax.struct.dataclass
class LayerCache:
  """One layer's state; scanned layers carry a leading axis of repeats; None where the kind of layer has no such part.

  Attributes:
    window: [B, sliding_window + rewind, d], keys = values of the last tokens.
    entries: [B, T, d], compressed entries; T = max_length // rate.
    pending: [B, R, 2, o, d], values and gates of the last tokens, at least float32; R = o * rate + rewind.
    index_keys: [B, T, c]; index_pending: [B, R, 2, o, c]; the same of the indexer.
    rate: tokens per entry, 0 for a sliding layer.
  """

  window: jax.Array | PackedKV
  entries: jax.Array | PackedKV | None = None
  pending: jax.Array | None = None
  index_keys: jax.Array | PackedIndex | None = None
  index_pending: jax.Array | None = None
  rate: int = flax.struct.field(pytree_node=False, default=0)

  @property
  def packed(self) -> bool:
    """Whether the storage is "mixed"."""
    return isinstance(self.window, PackedKV)


@flax.struct.dataclass
class Cache:
  """State of a batch of sequences.

  Attributes:
    layers: LayerCache by key of `groups`.
    lengths: int32 [B], tokens that each row has seen.
    furthest: int32 [B], the largest length since the row was empty; rings reach back from here.
    groups: which layers lie under which key.
    max_length: tokens that each row has room for.
    rewind: tokens that a row can be taken back by.
  """

  layers: dict[str, LayerCache]
  lengths: jax.Array
  furthest: jax.Array
  groups: LayerGroups = flax.struct.field(pytree_node=False)
  max_length: int = flax.struct.field(pytree_node=False)
  rewind: int = flax.struct.field(pytree_node=False)

  @property
  def bytes_by_kind(self) -> dict[str, int]:
    """Bytes of the arrays by the kinds of `analysis.count.cache_bytes`."""
    total = {"window": 0, "entries": 0, "index_keys": 0, "scales": 0, "pending": 0}
    for layer in self.layers.values():
      for name, kind in (("window", "window"), ("entries", "entries"), ("index_keys", "index_keys"),
                         ("pending", "pending"), ("index_pending", "pending")):
        for leaf, array in _leaves(getattr(layer, name)).items():
          total["scales" if leaf == "scales" else kind] += array.nbytes
    return total


def init_cache(config: ModelConfig, batch_size: int, max_length: int, *, rewind: int = 0, storage: str = "compute",
               dtype: Any = None) -> Cache:
  """An empty cache.

  Args:
    config: the model.
    batch_size: rows.
    max_length: tokens that each row has room for.
    rewind: tokens that `rewind` can take back.
    storage: "compute": everything in `dtype`; "mixed": FP8 and BF16 windows and entries, FP4 index keys.
    dtype: of windows, entries and index keys; default the model's compute dtype. None for "mixed".

  Raises:
    ValueError: sizes that are no such numbers, or a storage that does not exist.
  """
  for name, value, least in (("batch_size", batch_size, 1), ("max_length", max_length, 1), ("rewind", rewind, 0)):
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
      refuse(name, value, f"a whole number, at least {least}")
  if max_length > config.max_position_embeddings:
    refuse("max_length", max_length, f"at most max_position_embeddings = {config.max_position_embeddings}")
  if storage not in STORAGES:
    refuse("storage", storage, f"one of {', '.join(STORAGES)}")
  if storage == "mixed":
    if dtype is not None:
      refuse("dtype", dtype, "None with storage = 'mixed', which has its own")
    config.check_hadamard("storage = 'mixed'")
  dtype = jnp.dtype(config.compute_dtype if dtype is None else dtype)
  groups = group_layers(config)
  layers = {}
  for key in groups.keys:
    members = groups.layers_of(key)
    lead = (len(members), batch_size) if groups.scanned(key) else (batch_size,)
    layers[key] = _layer_cache(config, config.layer_types[members[0]], lead, max_length, rewind, dtype, storage)
  # Two arrays and not one twice: a donated cache must not name a buffer two times.
  return Cache(layers, jnp.zeros(batch_size, jnp.int32), jnp.zeros(batch_size, jnp.int32), groups, max_length, rewind)


def _layer_cache(config: ModelConfig, attention: str, lead: tuple[int, ...], max_length: int, rewind: int,
                 dtype, storage: str) -> LayerCache:
  d, c, rate = config.head_dim, config.index_head_dim, config.compress_rate(attention)
  packing = {"compute": (lambda x: x,) * 2,
             "mixed": (lambda x: quantize.pack_kv(x, config.qk_rope_head_dim), quantize.pack_index)}
  pack_kv, pack_index = packing[storage]

  def zeros(pack, rows, width):
    shapes = jax.eval_shape(pack, jax.ShapeDtypeStruct((*lead, rows, width), dtype))
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

  window = zeros(pack_kv, config.sliding_window + rewind, d)
  if attention == SLIDING:
    return LayerCache(window)
  series = {CSA: 2, HCA: 1}[attention]
  entries, rows = max_length // rate, series * rate + rewind
  pending = lambda width: jnp.zeros((*lead, rows, 2, series, width), jnp.promote_types(dtype, jnp.float32))
  index = (zeros(pack_index, entries, c), pending(c)) if attention == CSA else ()
  return LayerCache(window, zeros(pack_kv, entries, d), pending(d), *index, rate=rate)


def _leaves(part: Any) -> dict[str, jax.Array]:
  """The arrays of a part of a layer's cache by name: those of a packed one, the array itself under "", or none."""
  if part is None:
    return {}
  return {"": part} if isinstance(part, jax.Array) else dict(vars(part))


def cache_lengths(cache: Cache) -> jax.Array:
  """Tokens that each row has seen, int32 [B]."""
  return cache.lengths


def cache_entries(cache: Cache) -> dict[str, dict[str, jax.Array]]:
  """{"layers/NN": {"attention": int32 [B], "indexer": int32 [B]}}: closed entries of each row; a kind that a layer lacks is
  left out."""
  found = {}
  for i in range(cache.groups.num_layers):
    layer = cache.layers[cache.groups.key_of(i)[0]]
    parts = {"attention": layer.entries, "indexer": layer.index_keys}
    found[f"layers/{i:02d}"] = {name: jnp.minimum(cache.lengths // layer.rate, jax.tree.leaves(part)[0].shape[-2])
                                for name, part in parts.items() if part is not None}
  return found


def rewind(cache: Cache, lengths: Any) -> Cache:
  """The cache after only the first `lengths` tokens of each row; 0 empties a row for another sequence.

  Args:
    lengths: int [B], at most the present lengths, and 0 or at least the furthest length less `cache.rewind`.

  Raises:
    ValueError: lengths of another shape or dtype, or outside these bounds (where they are known, that is outside jit; inside
      it the caller answers for them).
  """
  lengths = lengths if hasattr(lengths, "dtype") else np.asarray(lengths)
  if lengths.shape != cache.lengths.shape or not jnp.issubdtype(lengths.dtype, jnp.integer):
    raise ValueError(f"lengths = {lengths.dtype}{lengths.shape}: expected integers {cache.lengths.shape}")
  if not any(isinstance(x, jax.core.Tracer) for x in (lengths, cache.lengths, cache.furthest)):
    new, old, far = (np.asarray(x) for x in (lengths, cache.lengths, cache.furthest))
    if ((new < 0) | (new > old) | ((new > 0) & (new < far - cache.rewind))).any():
      raise ValueError(f"lengths = {new.tolist()}: expected at most {old.tolist()}, and 0 or at least "
                       f"{np.maximum(far - cache.rewind, 0).tolist()} (rewind = {cache.rewind})")
  lengths = lengths.astype(jnp.int32)
  return cache.replace(lengths=lengths, furthest=jnp.where(lengths == 0, 0, cache.furthest))


# ---- rows and entries of one layer ------------------------------------------------------------------------------------
# A ring, entries and what is written to them may be arrays or packed ones: the functions do the same to every leaf.
def read_ring(ring: Any, start: jax.Array, count: int) -> Any:
  """[B, count, ...] in the ring's dtype: the tokens at positions start - count to start - 1 of each row (int32 [B]), zero
  where there is none."""
  position = start[:, None] + jnp.arange(-count, 0)

  def read(ring):
    rows = jax.vmap(lambda x, slot: x[slot])(ring, position % ring.shape[1])
    return jnp.where((position >= 0).reshape(*position.shape, *(1,) * (ring.ndim - 2)), rows, 0)
  return jax.tree.map(read, ring)


def write_ring(ring: Any, new: Any, start: jax.Array, count: jax.Array) -> Any:
  """The ring [B, R, ...], its dtype kept, after `count` (int32 [B]) tokens of `new` [B, S, ...], whose first one has
  position `start` (int32 [B]).

  Every row of the ring asks which token it holds now: a ring is small, and XLA's scatter copies its operand on a CPU.
  """
  return jax.tree.map(lambda ring, new: _written(ring, new, start, count), ring, new)


def _written(ring: jax.Array, new: jax.Array, start: jax.Array, count: jax.Array) -> jax.Array:
  newest = (start + count)[:, None] - 1
  position_BR = newest - (newest - jnp.arange(ring.shape[1])) % ring.shape[1]
  number_BR = position_BR - start[:, None]
  rows = jax.vmap(lambda x, number: x[number])(new, jnp.maximum(number_BR, 0)).astype(ring.dtype)
  return jnp.where((number_BR >= 0).reshape(*number_BR.shape, *(1,) * (ring.ndim - 2)), rows, ring)


def write_entries(entries: Any, new: Any, first: jax.Array, used: jax.Array) -> Any:
  """Entries [B, T, d] with those of `new` [B, C, d] that are `used` (bool [B, C]) at `first` (int32 [B]) and after, in
  place where the old ones are given up; their dtype stays."""
  return jax.tree.map(lambda entries, new: _with_entries(entries, new, first, used), entries, new)


def _with_entries(entries: jax.Array, new: jax.Array, first: jax.Array, used: jax.Array) -> jax.Array:
  count = min(new.shape[1], entries.shape[1])

  def row(b, entries):
    at = jnp.minimum(first[b], entries.shape[1] - count)
    corner = tuple(map(jnp.int32, (b, at, 0)))
    number_C = at + jnp.arange(count) - first[b]
    written_C = (number_C >= 0) & used[b, jnp.maximum(number_C, 0)]
    rows = jnp.where(written_C[:, None], new[b, jnp.maximum(number_C, 0)].astype(entries.dtype),
                     jax.lax.dynamic_slice(entries, corner, (1, count, entries.shape[2]))[0])
    return jax.lax.dynamic_update_slice(entries, rows[None], corner)

  if not count:
    return entries
  # A number of rows that XLA does not know: a loop of one row would be none, and then it writes into copies of the entries.
  return jax.lax.fori_loop(0, jnp.where(used.any(), entries.shape[0], 0), row, entries)
