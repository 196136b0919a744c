"""The same attention (report 2.3), one block of queries at a time, with a written gradient: linear memory on any backend.

A block reads its queries, the window keys around it and either all entries or the gathered picks of its queries. The
backward pass recomputes the probabilities from lse, so nothing of size [S, T] is kept (Dao et al. 2022).

Axis letters: B batch   S queries   H heads   T entries   K picks   d head width
              N blocks of all rows   C queries of a block   W window keys that a block reads
              X window keys of a row: those of P earlier tokens and the queries' own
"""

from __future__ import annotations

import functools
from typing import Any, Callable

import jax
import jax.numpy as jnp

from pallas_kernels import blocks
from pallas_kernels.blocks import MASKED
from pallas_kernels.names import ATTENTION, named
from pallas_kernels.selection import Selection


def attend(q_BSHd: jax.Array, window_kv_BXd: jax.Array, entries_BTd: jax.Array, selection: Selection, sink_H: jax.Array,
           *, positions: jax.Array, segment_ids: jax.Array, key_segment: jax.Array, entry_last: jax.Array,
           entry_segment: jax.Array, window: int, scale: float, unpack: Callable[[Any], jax.Array] | None = None
           ) -> tuple[jax.Array, jax.Array]:
  """See `pallas_kernels.sparse_attention.attend`, for dtypes too; of the window keys the last S are the queries' own."""
  kind, selection = selection.kind, selection.listed()
  places = (positions, segment_ids, entry_last, entry_segment, key_segment)
  if unpack is not None and kind != "all":
    static = (kind, False, window, scale, unpack)
    return _attend_forward(q_BSHd, window_kv_BXd, entries_BTd, sink_H, selection.picks, places, static)[0]
  entries_BTd = entries_BTd if unpack is None else unpack(entries_BTd)
  # Unused memory is cleared where less is read: in all entries, or, when decoding, in the few that are gathered.
  cleared = kind == "all" or selection.picks[0].size >= entries_BTd.shape[1]
  if cleared:
    entries_BTd = jnp.where((entry_segment > 0)[..., None], entries_BTd, 0)
  static = (kind, cleared, window, scale, None)
  return _attend(q_BSHd, window_kv_BXd, entries_BTd, sink_H, selection.picks, places, static)


def _plan(q_BSHd, num_entries, picks_BSK, kind, window):
  """Queries per block and window keys in front of a block, both static."""
  _, length, heads, width = q_BSHd.shape
  reach = num_entries if kind == "all" else picks_BSK.shape[2]
  gathered = 0 if kind == "all" else reach * width
  size = blocks.block_size(length, 4 * (heads * (reach + 128 + window) + gathered))
  # With whole vectors of keys: XLA's CPU matmul takes three times as long for 129 columns as for 128.
  front = -(-(max(window - 1, 0) + size) // 8) * 8 - size
  return size, front


def _block_inputs(q_BSHd, picks_BSK, places, size):
  """What the loop walks over: one item per block."""
  positions, segment_ids = places[:2]
  batch, length = positions.shape
  row_N, start_N = blocks.block_numbers(batch, length, size)
  return (row_N, start_N, blocks.cut(q_BSHd, size), blocks.cut(picks_BSK, size), blocks.cut(positions, size),
          blocks.cut(segment_ids, size))


def _front_padded(x_BX, queries, front, size):
  """Keys [B, P + S, ...] with `front` rows before the queries' own S and whole blocks behind: every slice is inside."""
  padding = (front - (x_BX.shape[1] - queries), -queries % size)
  return jnp.pad(x_BX, ((0, 0), padding) + ((0, 0),) * (x_BX.ndim - 2))


def _block_keys(item, kv_BXd, segment_BX, entries_BTd, places, static, size, front):
  """Window keys [W, d], entries [T, d] or [C, K, d], and the two masks of one block."""
  kind, cleared, window, _, unpack = static
  row, start, _, picks_CK, position_C, segment_C = item
  entry_last, entry_segment = places[2:4]
  kv_Wd = jax.lax.dynamic_slice(kv_BXd, (row, start, 0), (1, size + front, kv_BXd.shape[2]))[0]
  segment_W = jax.lax.dynamic_slice(segment_BX, (row, start), (1, size + front))[0]
  apart_CW = jnp.arange(size)[:, None] + front - jnp.arange(size + front)[None, :]
  near_CW = (apart_CW >= 0) & (apart_CW < window) & (segment_C[:, None] == segment_W[None, :]) & (segment_C > 0)[:, None]
  if kind == "all":
    return kv_Wd, entries_BTd[row], near_CW, blocks.sees_entry(position_C, segment_C, entry_last[row], entry_segment[row])
  # Rows of bits name visible entries only.
  visible = picks_CK >= 0 if kind == "bits" else blocks.picked_sees(picks_CK, position_C, segment_C, entry_last[row],
                                                                   entry_segment[row])
  if cleared:
    return kv_Wd, entries_BTd[row][jnp.maximum(picks_CK, 0)], near_CW, visible
  # and no copy of a whole row of the batch
  entries = jax.tree.map(lambda x: x[row, jnp.maximum(picks_CK, 0)], entries_BTd)
  entries = entries if unpack is None else unpack(entries)
  return kv_Wd, jnp.where(visible[..., None], entries, 0), near_CW, visible


def _dot(a, b, spec):
  return jnp.einsum(spec, a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))


def _scores(q_CHd, kv_Wd, entries, near_CW, visible, scale):
  """Masked logits [C, H, W] and [C, H, T or K]."""
  window_CHW = jnp.where(near_CW[:, None], _dot(q_CHd, kv_Wd, "CHd,Wd->CHW") * scale, MASKED)
  spec = "CHd,CKd->CHK" if entries.ndim == 3 else "CHd,Kd->CHK"
  entry_CHK = jnp.where(visible[:, None], _dot(q_CHd, entries, spec) * scale, MASKED)
  return window_CHW, entry_CHK


def _forward_block(q_CHd, keys, sink_H, scale):
  kv_Wd, entries, near_CW, visible = keys
  s_window, s_entry = _scores(q_CHd, kv_Wd, entries, near_CW, visible, scale)
  top_CH = jnp.broadcast_to(sink_H.astype(s_window.dtype), s_window.shape[:2])
  for scores in (s_window, s_entry):
    if scores.shape[-1]:
      top_CH = jnp.maximum(top_CH, scores.max(-1))
  p_window, p_entry = jnp.exp(s_window - top_CH[..., None]), jnp.exp(s_entry - top_CH[..., None])
  total_CH = p_window.sum(-1) + p_entry.sum(-1) + jnp.exp(sink_H - top_CH)
  dtype = kv_Wd.dtype
  out_CHd = _dot(p_window.astype(dtype), kv_Wd, "CHW,Wd->CHd")
  out_CHd += _dot(p_entry.astype(dtype), entries, "CHK,CKd->CHd" if entries.ndim == 3 else "CHK,Kd->CHd")
  return (out_CHd / total_CH[..., None]).astype(q_CHd.dtype), top_CH + jnp.log(total_CH)


def _backward_block(q_CHd, keys, sink_H, scale, lse_CH, d_out_CHd, delta_CH):
  """Gradients of one block; delta = sum(out * d_out) - d_lse, so that ds = p (dp - delta)."""
  kv_Wd, entries, near_CW, visible = keys
  s_window, s_entry = _scores(q_CHd, kv_Wd, entries, near_CW, visible, scale)
  p_window, p_entry = jnp.exp(s_window - lse_CH[..., None]), jnp.exp(s_entry - lse_CH[..., None])
  gathered = entries.ndim == 3
  dtype = q_CHd.dtype
  dp_window = _dot(d_out_CHd, kv_Wd, "CHd,Wd->CHW")
  ds_window = (p_window * (dp_window - delta_CH[..., None]) * scale).astype(dtype)
  dp_entry = _dot(d_out_CHd, entries, "CHd,CKd->CHK" if gathered else "CHd,Kd->CHK")
  ds_entry = (p_entry * (dp_entry - delta_CH[..., None]) * scale).astype(dtype)
  # A key's gradient is one matmul: its part as key (ds . q) and as value (p . d_out), stacked along the summed rows.
  rows_d = jnp.concatenate([q_CHd, d_out_CHd], 1)
  d_kv_Wd = _dot(jnp.concatenate([ds_window, p_window.astype(dtype)], 1), rows_d, "CHW,CHd->Wd")
  both = jnp.concatenate([ds_entry, p_entry.astype(dtype)], 1)
  d_entries = _dot(both, rows_d, "CHK,CHd->CKd" if gathered else "CHK,CHd->Kd")
  dq_CHd = _dot(ds_window, kv_Wd, "CHW,Wd->CHd")
  dq_CHd += _dot(ds_entry, entries, "CHK,CKd->CHd" if gathered else "CHK,Kd->CHd")
  d_sink_H = -(jnp.exp(sink_H - lse_CH) * delta_CH).sum(0)
  return dq_CHd.astype(dtype), d_kv_Wd, d_entries, d_sink_H


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attend(q, kv, entries, sink, picks, places, static):
  return _attend_forward(q, kv, entries, sink, picks, places, static)[0]


def _attend_forward(q, kv, entries, sink, picks, places, static):
  kind, _, window, scale, _ = static
  size, front = _plan(q, places[2].shape[1], picks, kind, window)
  padded, segments = (_front_padded(x, q.shape[1], front, size) for x in (kv, places[4]))

  def one(item):
    keys = _block_keys(item, padded, segments, entries, places, static, size, front)
    return _forward_block(item[2], keys, sink, scale)

  out_NCHd, lse_NCH = jax.lax.map(one, _block_inputs(q, picks, places, size))
  out, lse = named(ATTENTION, *(blocks.join(x, *q.shape[:2]) for x in (out_NCHd, lse_NCH)))
  return (out, lse), (q, kv, entries, sink, picks, places, out, lse)


def _attend_backward(static, saved, gradients):
  kind, _, window, scale, _ = static
  q, kv, entries, sink, picks, places, out, lse = saved
  d_out, d_lse = gradients
  size, front = _plan(q, entries.shape[1], picks, kind, window)
  padded, segments = (_front_padded(x, q.shape[1], front, size) for x in (kv, places[4]))
  exact = lse.dtype
  delta = (out.astype(exact) * d_out.astype(exact)).sum(-1) - d_lse

  def one(carry, item):
    d_kv, d_entries, d_sink = carry
    block, lse_CH, d_out_CHd, delta_CH = item
    keys = _block_keys(block, padded, segments, entries, places, static, size, front)
    dq, d_window, d_chosen, d_sink_H = _backward_block(block[2], keys, sink, scale, lse_CH, d_out_CHd, delta_CH)
    row, start, picks_CK = block[0], block[1], block[3]
    old = jax.lax.dynamic_slice(d_kv, (row, start, 0), (1, size + front, d_kv.shape[2]))
    d_kv = jax.lax.dynamic_update_slice(d_kv, old + d_window[None], (row, start, 0))
    if kind != "all":
      d_entries = d_entries.at[row, jnp.maximum(picks_CK, 0)].add(d_chosen)
    elif entries.shape[1]:
      d_entries = d_entries.at[row].add(d_chosen)
    return (d_kv, d_entries, d_sink + d_sink_H), dq

  zeros = (jnp.zeros(padded.shape, exact), jnp.zeros(entries.shape, exact), jnp.zeros(sink.shape, exact))
  items = (_block_inputs(q, picks, places, size), *(blocks.cut(x, size) for x in (lse, d_out, delta)))
  (d_kv, d_entries, d_sink), dq_NCHd = jax.lax.scan(one, zeros, items)
  d_kv = jax.lax.slice_in_dim(d_kv, front + q.shape[1] - kv.shape[1], front + q.shape[1], axis=1)
  return (blocks.join(dq_NCHd, *q.shape[:2]), d_kv.astype(kv.dtype), d_entries.astype(entries.dtype),
          d_sink.astype(sink.dtype), None, None)


_attend.defvjp(_attend_forward, _attend_backward)
