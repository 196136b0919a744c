"""The two compressors side by side: CSA with overlapping windows (report 2.3.1), HCA without (2.3.2).

Every `rate` tokens of a document become one entry; a document's windows start at its first token and its left-over tokens
make no entry. In the release's channel order series 0 of a CSA compressor belongs to the NEXT window's entry and series 1
to the own window's (the report's letters are the other way round).

Axis letters: B batch   S sequence   D hidden size   T entries   m rate   o series (2 for CSA and the indexer, 1 for HCA)
              d entry width
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from deepseek_v4 import sharding
from deepseek_v4.config import CSA, HCA, ModelConfig
from deepseek_v4.model import cache, remat, rope, sequence, weights
from deepseek_v4.model.norm import RMSNorm, rms_norm

SERIES = {CSA: 2, HCA: 1}  # overlapping windows of an entry

@functools.partial(jax.tree_util.register_dataclass, meta_fields=["rate", "contiguous"],
                   data_fields=["closing", "has_previous", "last", "segment", "cos", "sin"])
@dataclasses.dataclass(frozen=True)
class EntryLayout:
  """Where the entries of a row lie, for one rate; the same for every layer of that rate.

  Attributes:
    closing: int32 [B, T], place in the row of the token that closes the entry's window; in a split sequence, whose entries
      lie with the part that holds this token, the place in that part behind the `lookback` tokens before it.
    has_previous: bool [B, T], the document has a whole window before this one.
    last: int32 [B, T], position inside the document of that token.
    segment: int32 [B, T], the entry's document; 0 = the row has fewer entries and this one is unused.
    cos, sin: [B, T, r / 2], at least float32, rotary phases at the position of the window's FIRST token.
    rate: tokens per entry.
    contiguous: the row is one document from place 0 on, so that windows are a reshape.
  """

  closing: jax.Array
  has_previous: jax.Array
  last: jax.Array
  segment: jax.Array
  cos: jax.Array
  sin: jax.Array
  rate: int
  contiguous: bool


def _closes_window(positions_BS: jax.Array, segment_ids_BS: jax.Array, rate: int) -> jax.Array:
  """bool [B, S]: a whole window of the token's document ends with it and lies inside the row."""
  place = jnp.arange(positions_BS.shape[1])
  start = jnp.maximum(place - rate + 1, 0)
  whole = (place >= rate - 1) & (segment_ids_BS[:, start] == segment_ids_BS)
  whole &= positions_BS[:, start] == positions_BS - (rate - 1)
  return ((positions_BS + 1) % rate == 0) & (segment_ids_BS > 0) & whole


def sees_an_entry(positions_BS: jax.Array, segment_ids_BS: jax.Array, rate: int) -> jax.Array:
  """bool [B, S], of int32 positions and segment ids: at least one entry of `rate` tokens of the token's document is closed
  when it comes."""
  if not sequence.is_split():
    return _sees_own_entry(positions_BS, segment_ids_BS, rate)

  def sees(positions, segment_ids):
    rows = [jnp.concatenate([sequence.last_of_previous(x, rate - 1), x], 1) for x in (positions, segment_ids)]
    here = _sees_own_entry(*rows, rate)[:, rate - 1:]
    # Of an entry in an earlier part the last token of that part's last document knows.
    earlier = sequence.any_earlier(segment_ids[:, -1], here[:, -1], segment_ids[:, 0])
    return here | ((segment_ids == segment_ids[:, :1]) & (segment_ids > 0) & earlier[:, None])
  return sequence.by_part(sees)(positions_BS, segment_ids_BS)


def _sees_own_entry(positions_BS: jax.Array, segment_ids_BS: jax.Array, rate: int) -> jax.Array:
  """`sees_an_entry` among the entries that close in these places."""
  place = jnp.arange(positions_BS.shape[1])
  last_close = jax.lax.cummax(jnp.where(_closes_window(positions_BS, segment_ids_BS, rate), place, -1), axis=1)
  own = jnp.take_along_axis(segment_ids_BS, jnp.maximum(last_close, 0), 1) == segment_ids_BS
  return (last_close >= 0) & own & (segment_ids_BS > 0)


def entry_layout(config: ModelConfig, attention: str, positions_BS: jax.Array, segment_ids_BS: jax.Array,
                 contiguous: bool) -> EntryLayout:
  """Finds the entries of each row: windows of `rate` tokens of one document, counted from the document's start; int32
  positions and segment ids.

  A part of a split sequence has room for as many entries as can close in it, whatever its documents; so T is the same
  as in one piece if the rate divides the part.
  """
  if not sequence.is_split():
    return _row_layout(config, attention, positions_BS, segment_ids_BS, contiguous, 0)
  front = config.lookback(attention)

  def find(positions, segment_ids):
    rows = (jnp.concatenate([sequence.last_of_previous(x, front), x], 1) for x in (positions, segment_ids))
    return _row_layout(config, attention, *rows, False, front)

  layout = sequence.by_part(find)(positions_BS, segment_ids_BS)
  return dataclasses.replace(layout, last=sequence.whole(layout.last), segment=sequence.whole(layout.segment))


def _row_layout(config: ModelConfig, attention: str, positions_BS: jax.Array, segment_ids_BS: jax.Array, contiguous: bool,
                front: int) -> EntryLayout:
  """The entries that close in rows behind their first `front` places; see `entry_layout`."""
  rate = config.compress_rate(attention)
  batch, length = positions_BS.shape
  count = (length - front + min(front, rate - 1)) // rate
  if contiguous:
    closing = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32) * rate + rate - 1, (batch, count))
    segment = jnp.ones_like(closing)
  else:
    closes_BS = _closes_window(positions_BS, segment_ids_BS, rate) & (jnp.arange(length) >= front)
    closing = jax.vmap(lambda c: jnp.nonzero(c, size=count, fill_value=0)[0])(closes_BS).astype(jnp.int32)
    used = jnp.arange(count) < closes_BS.sum(1, keepdims=True)
    segment = jnp.where(used, jnp.take_along_axis(segment_ids_BS, closing, 1), 0)
  last = jnp.take_along_axis(positions_BS, closing, 1)
  # The window before belongs to the entry if its first token is of the same document and the right position.
  before = jnp.maximum(closing - (2 * rate - 1), 0)
  has_previous = (closing >= 2 * rate - 1) & (jnp.take_along_axis(segment_ids_BS, before, 1) == segment)
  has_previous &= jnp.take_along_axis(positions_BS, before, 1) == last - (2 * rate - 1)
  cos, sin = rope.angles(config, attention, last - (rate - 1))
  return EntryLayout(closing, has_previous, last, segment, cos, sin, rate, contiguous)


def chunk_layout(config: ModelConfig, attention: str, start_B: jax.Array, count_B: jax.Array, length: int) -> EntryLayout:
  """Entries that `count_B` new tokens of each row can close, the row's first new token being its `start_B`-th; both int32.

  Places are those of a row of the `lookback` tokens before the chunk and the chunk's `length` places.
  """
  rate = config.compress_rate(attention)
  number_BT = start_B[:, None] // rate + jnp.arange(-(-length // rate))
  last_BT = number_BT * rate + rate - 1
  segment = (last_BT < (start_B + count_B)[:, None]).astype(jnp.int32)
  places = config.lookback(attention) + length
  closing = jnp.minimum(last_BT - start_B[:, None] + config.lookback(attention), places - 1)
  cos, sin = rope.angles(config, attention, number_BT * rate)
  return EntryLayout(closing, number_BT > 0, last_BT, segment, cos, sin, rate, contiguous=False)


def _windows(x_BSd: jax.Array, layout: EntryLayout, offset: int) -> jax.Array:
  """[B, T, m, d]: the tokens of each entry's window, or with offset = 1 of the window before it."""
  rate, count = layout.rate, layout.closing.shape[1]
  if layout.contiguous:
    shaped = x_BSd[:, :count * rate].reshape(x_BSd.shape[0], count, rate, x_BSd.shape[2])
    return jnp.pad(shaped, ((0, 0), (offset, 0), (0, 0), (0, 0)))[:, :count]
  place_BTm = layout.closing[..., None] - rate * offset - jnp.arange(rate - 1, -1, -1)
  return jax.vmap(lambda x, place: x[jnp.maximum(place, 0)])(x_BSd, place_BTm)


class Compressor(nn.Module):
  """Tokens -> entries: per channel a softmax over the window's slots weighs the slots' values.

  Attributes:
    config: the model.
    attention: CSA (overlapping windows; also the indexer's own compressor) or HCA.
    width: channels of an entry.
  """

  config: ModelConfig
  attention: str
  width: int

  @nn.compact
  def __call__(self, x_BSD: jax.Array, layout: EntryLayout, earlier: Callable[[], jax.Array] | None = None
               ) -> tuple[jax.Array, jax.Array | None]:
    """Returns (entries [B, T, d], normalised and rotated, and the tokens' values and gates [B, S, 2, o, d] for a cache).

    Both are of x's floating dtype; pooling is at least in float32. Unused entries hold finite values without meaning.
    `earlier` gives values and gates [B, P, 2, o, d] of the tokens before, for a `chunk_layout`; without it there is nothing
    to cache, and the second result is None.

    entry = sum over slots of softmax(gate + position bias) * value; CSA's slots are the previous window's series 0 and
    the own window's series 1, and the first entry of a document has only the latter (report eqs. 9-12, 20-23).
    """
    config, m = self.config, layout.rate
    series = SERIES[self.attention]
    shape = (series, config.hidden_size, self.width)
    kv_oDd = weights.matrix(self, config, "kv", shape)
    gate_oDd = weights.matrix(self, config, "gate", shape)
    bias_omd = weights.exact(self, config, "position_bias", (series, m, self.width), nn.initializers.zeros)
    norm_d = RMSNorm(config, name="norm").weight(self.width)
    raw = remat.keep([(x_BSD @ kv_oDd[o], x_BSD @ gate_oDd[o]) for o in range(series)])

    def entries():
      if earlier is None and sequence.is_split():
        pooled_BTd = _by_part(_pooled, raw, bias_omd, layout)
      else:
        pooled_BTd = _pooled(raw, None if earlier is None else earlier(), bias_omd, layout)
      entries_BTd = rms_norm(pooled_BTd.astype(x_BSD.dtype), norm_d, config.rms_norm_eps)
      return rope.rotate(entries_BTd, layout.cos, layout.sin)

    if earlier is None:
      if self.is_mutable_collection("intermediates"):  # [B, T, slots, d], for `dsv4.trace` only
        of_slots = _by_part(_slots, raw, bias_omd, layout) if sequence.is_split() else _slots(raw, None, bias_omd, layout)
        self.sow("intermediates", "weight", of_slots[0])
      return entries(), None
    stacked = jnp.stack([jnp.stack(pair, 2) for pair in raw], 3)
    if x_BSD.shape[1] >= m:
      return entries(), stacked
    # Most chunks of few tokens close no entry.
    shape = jax.eval_shape(entries)
    return jax.lax.cond((layout.segment > 0).any(), entries, lambda: jnp.zeros(shape.shape, shape.dtype)), stacked


def _pooled(raw, earlier, bias_omd: jax.Array, layout: EntryLayout) -> jax.Array:
  """[B, T, d], at least float32: the weighted sum of each entry's slots. Arguments of `_slots`."""
  weight, value = _slots(raw, earlier, bias_omd, layout)
  return (weight * value.astype(weight.dtype)).sum(2)


def _slots(raw, earlier, bias_omd: jax.Array, layout: EntryLayout) -> tuple[jax.Array, jax.Array]:
  """Weights, at least float32, and values [B, T, slots, d] of each entry's slots; weights sum to 1 over the slots.

  Args:
    raw: (values, gates) [B, S, d] of each series; earlier: as in `Compressor`, or None.
  """
  values, gates, series = [], [], len(raw)
  for o, (value, gate) in enumerate(raw):
    offset = series - 1 - o
    if earlier is not None:
      value = jnp.concatenate([earlier[:, :, 0, o].astype(value.dtype), value], 1)
      gate = jnp.concatenate([earlier[:, :, 1, o].astype(gate.dtype), gate], 1)
    values.append(_windows(value, layout, offset))
    gate = _windows(gate, layout, offset).astype(bias_omd.dtype) + bias_omd[o]
    gates.append(jnp.where(layout.has_previous[..., None, None], gate, -jnp.inf) if offset else gate)
  value, gate = (jnp.concatenate(parts, 2) if series > 1 else parts[0] for parts in (values, gates))
  return jax.nn.softmax(gate, 2), value


def _by_part(fn: Callable, raw, bias_omd: jax.Array, layout: EntryLayout) -> Any:
  """`_pooled` or `_slots` of a split sequence: the part before hands over values and gates of its last tokens."""
  count = len(raw) * layout.rate - 1

  def run(raw, layout, bias_omd):
    last = jnp.stack([jnp.stack([x[:, x.shape[1] - count:] for x in pair], 2) for pair in raw], 3)
    return fn(raw, sequence.last_of_previous(last, count), bias_omd, layout)

  layout = dataclasses.replace(layout, last=None, segment=None)  # these are whole already and not needed
  return sharding.per_shard(run, (sequence.TOKENS, sequence.TOKENS, ()), sequence.TOKENS)(raw, layout, bias_omd)


def extend(compressor: Compressor, x_BSD: jax.Array, layout: EntryLayout, start_B: jax.Array, count_B: jax.Array,
           entries: Any, pending: jax.Array, stored: Callable[[jax.Array], Any]) -> tuple[Any, jax.Array]:
  """The entries and the pending tokens of a cache after the first `count_B` tokens (int32) of each row of x, which is
  floating; see `chunk_layout`. What a cache holds keeps its dtype.

  `stored` makes of new entries [B, C, d] what `entries` hold.
  """
  count = compressor.config.lookback(compressor.attention)
  earlier = functools.partial(cache.read_ring, pending, start_B, count)
  new_BTd, raw = compressor(x_BSD, layout, earlier)
  write = sharding.per_shard(cache.write_entries, (("batch",),) * 4, ("batch",))
  entries = write(entries, stored(new_BTd), start_B // layout.rate, layout.segment > 0)
  return entries, cache.write_ring(pending, raw, start_B, count_B)
