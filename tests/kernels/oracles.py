"""The ops once more, as loops in float64 NumPy that build every list of visible keys from the rule's words.

They take the arguments of the ops and return a tuple of arrays. Nothing of JAX or of the ops' own masks is used.
"""

import math

import numpy as np


def _double(*arrays):
  return tuple(np.asarray(x).astype(np.float64) for x in arrays)


def _visible(b, i, t, places):
  """Entry t is seen by query i: same document, its last token not later than the query."""
  own = int(places["segment_ids"][b, i])
  return own > 0 and own == int(places["entry_segment"][b, t]) and \
      int(places["entry_last"][b, t]) <= int(places["positions"][b, i])


def _chosen(b, i, selection, num_entries, places):
  """Entries that query i reads, in the order of its picks."""
  everything = selection.kind == "all"
  candidates = range(num_entries) if everything else [int(t) for t in np.asarray(selection.indices())[b, i] if t >= 0]
  return [t for t in candidates if _visible(b, i, t, places)]


def _numpy_places(places):
  return {name: np.asarray(x) for name, x in places.items()}


def attend(q, window_kv, entries, selection, sink, *, window, scale, past_kv=None, past_segment=None, **places):
  q, window_kv, entries, sink = _double(q, window_kv, entries, sink)
  places = _numpy_places(places)
  segment_ids = key_segment = places["segment_ids"]
  past = 0
  if past_kv is not None:  # one row of keys; query i stands at its place `past` + i
    past = past_kv.shape[1]
    window_kv = np.concatenate([*_double(past_kv), window_kv], 1)
    key_segment = np.concatenate([np.asarray(past_segment), segment_ids], 1)
  out, lse = np.zeros_like(q), np.zeros(q.shape[:3])
  for b in range(q.shape[0]):
    for i in range(q.shape[1]):
      place = past + i
      keys = [window_kv[b, j] for j in range(max(0, place - window + 1), place + 1) if window and segment_ids[b, i] > 0
              and key_segment[b, j] == segment_ids[b, i]]
      keys += [entries[b, t] for t in _chosen(b, i, selection, entries.shape[1], places)]
      for h in range(q.shape[2]):
        logits = [float(q[b, i, h] @ key) * scale for key in keys] + [sink[h]]
        top = max(logits)
        lse[b, i, h] = top + math.log(sum(math.exp(x - top) for x in logits))
        for logit, key in zip(logits, keys):
          out[b, i, h] += math.exp(logit - lse[b, i, h]) * key
  return out, lse


def _index_score(b, i, t, queries, weights, keys):
  return sum(weights[b, i, h] * max(float(queries[b, i, h] @ keys[b, t]), 0.0) for h in range(queries.shape[2]))


def select(queries, weights, keys, *, top_k, **places):
  """The picks of each query in rising order, -1 in front where it has fewer."""
  queries, weights, keys = _double(queries, weights, keys)
  places = _numpy_places(places)
  picks = np.full((*queries.shape[:2], top_k), -1)
  for b in range(queries.shape[0]):
    for i in range(queries.shape[1]):
      seen = [t for t in range(keys.shape[1]) if _visible(b, i, t, places)]
      best = sorted(seen, key=lambda t: (-_index_score(b, i, t, queries, weights, keys), t))[:top_k]
      picks[b, i, top_k - len(best):] = sorted(best)
  return (picks,)


def kl_loss(queries, weights, keys, attention_queries, entries, lse, selection, *, scale, **places):
  queries, weights, keys, attention_queries, entries, lse = _double(queries, weights, keys, attention_queries, entries, lse)
  places = _numpy_places(places)
  kl = np.zeros(queries.shape[:2])
  for b in range(queries.shape[0]):
    for i in range(queries.shape[1]):
      chosen = _chosen(b, i, selection, keys.shape[1], places)
      if not chosen:
        continue
      heads = list(zip(attention_queries[b, i], lse[b, i]))
      mass = np.array([sum(math.exp(float(q @ entries[b, t]) * scale - z) for q, z in heads) for t in chosen])
      p = mass / mass.sum()
      scores = np.array([_index_score(b, i, t, queries, weights, keys) for t in chosen])
      log_q = scores - scores.max() - math.log(np.exp(scores - scores.max()).sum())
      kl[b, i] = (p * (np.log(p) - log_q)).sum()
  return (kl,)


def _sigmoid(x):
  return 1 / (1 + np.exp(-x))


def sinkhorn(logits, iterations, eps):
  """One matrix: softmax over each row plus eps, columns to sum 1, then (rows, columns) iterations - 1 times."""
  m = np.exp(logits - logits.max(1, keepdims=True))
  m = m / m.sum(1, keepdims=True) + eps
  m = m / (m.sum(0, keepdims=True) + eps)
  for _ in range(iterations - 1):
    m = m / (m.sum(1, keepdims=True) + eps)
    m = m / (m.sum(0, keepdims=True) + eps)
  return m


def collapse(streams, fn, base, scale, *, norm_eps, eps, iterations):
  streams, fn, base, scale = _double(streams, fn, base, scale)
  batch, length, n, hidden = streams.shape
  z, post, comb = np.zeros((batch, length, hidden)), np.zeros((batch, length, n)), np.zeros((batch, length, n, n))
  for b in range(batch):
    for i in range(length):
      flat = streams[b, i].reshape(-1)
      u = flat / math.sqrt((flat**2).mean() + norm_eps) @ fn
      pre = _sigmoid(u[:n] * scale[0] + base[:n]) + eps
      post[b, i] = 2 * _sigmoid(u[n:2 * n] * scale[1] + base[n:2 * n])
      comb[b, i] = sinkhorn((u[2 * n:] * scale[2] + base[2 * n:]).reshape(n, n), iterations, eps)
      z[b, i] = sum(pre[j] * streams[b, i, j] for j in range(n))
  return z, post, comb


def expand(streams, update, post, comb):
  streams, update, post, comb = _double(streams, update, post, comb)
  new, n = np.zeros_like(streams), streams.shape[2]
  for k in range(n):
    new[:, :, k] = post[:, :, k, None] * update + sum(comb[:, :, j, k, None] * streams[:, :, j] for j in range(n))
  return (new,)


def expand_collapse(streams, update, post, comb, fn, base, scale, *, norm_eps, eps, iterations):
  (new,) = expand(streams, update, post, comb)
  return new, *collapse(new, fn, base, scale, norm_eps=norm_eps, eps=eps, iterations=iterations)


def expert_mlp(x, gate, up, down, group_sizes, *, tile, limit):
  x, gate, up, down = _double(x, gate, up, down)
  out, start = np.zeros_like(x), 0
  for expert, size in enumerate(np.asarray(group_sizes)):
    for row in range(start, start + size):
      g, u = np.minimum(x[row] @ gate[expert], limit), np.clip(x[row] @ up[expert], -limit, limit)
      out[row] = (g * _sigmoid(g) * u) @ down[expert]
    start += -(-size // tile) * tile
  return (out,)
