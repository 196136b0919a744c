"""The whole network in float64 NumPy, from the ops' oracles and the report's formulas, with DeepSeek's inference rounding
put in where it is asked for. Nothing of the model's own code and nothing of JAX is used.

Axis letters: B batch   S sequence   N streams   D hidden size   H heads   d head width   T entries   c index width
"""

import numpy as np

from deepseek_v4.config import CSA, HASH, SLIDING
from tests.kernels import oracles


# ---- rounding ---------------------------------------------------------------------------------------------------------
def values_of(exponent_bits, fraction_bits, bias, count):
  """Magnitudes of the first `count` codes of a small floating-point format, from its bit fields."""
  codes = range(count)
  fields = [(code >> fraction_bits, (code & (1 << fraction_bits) - 1) / 2.0**fraction_bits) for code in codes]
  assert all(exponent < 1 << exponent_bits for exponent, _ in fields)
  return np.array([fraction * 2.0 ** (1 - bias) if exponent == 0 else (1 + fraction) * 2.0 ** (exponent - bias)
                   for exponent, fraction in fields])


E4M3 = values_of(4, 3, 7, 127)  # 0 to 448; code 127 is no number
E2M1 = values_of(2, 1, 1, 8)  # 0 to 6
# kind: magnitudes, channels per scale, least magnitude that decides a scale
KINDS = {"kv": (E4M3, 64, 1e-4), "linear": (E4M3, 128, 1e-4), "index": (E2M1, 32, 6 * 2.0**-126)}


def exponents(x, kind):
  """Of each block's scale, int [..., blocks]: the smallest k with largest code * 2^k >= the block's largest magnitude."""
  values, block, least = KINDS[kind]
  x = np.asarray(x, np.float64)
  largest = np.stack([np.abs(x[..., i:i + block]).max(-1) for i in range(0, x.shape[-1], block)], -1)
  largest = np.maximum(largest, least)
  k = np.ceil(np.log2(largest / values[-1])).astype(int)
  k = np.where(np.ldexp(values[-1], k - 1) >= largest, k - 1, k)  # logarithms are rounded: put right by comparison
  return np.where(np.ldexp(values[-1], k) < largest, k + 1, k)


def codes(x, kind):
  """The nearest magnitude's code of each number, ties to the even code; with the sign, -1 for negative zero too."""
  values, block, _ = KINDS[kind]
  k = np.repeat(exponents(x, kind), block, -1)[..., :x.shape[-1]]
  scaled = np.abs(np.ldexp(np.asarray(x, np.float64), -k))
  above = np.searchsorted(values, scaled).clip(1, len(values) - 1)
  low, high = scaled - values[above - 1], values[above] - scaled
  nearest = np.where((low < high) | ((low == high) & (above % 2 == 1)), above - 1, above)
  return nearest, np.where(np.signbit(x), -1, 1), k


def rounded(x, kind):
  """float64 of x's shape."""
  nearest, sign, k = codes(x, kind)
  return np.copysign(np.ldexp(KINDS[kind][0][nearest], k), sign)


def rounded_bfloat16(x):
  """float32 numbers to eight bits of precision, ties to even."""
  bits = np.asarray(x, np.float32).view(np.uint32)
  return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32).astype(np.float64)


def hadamard(width):
  """The normalised Walsh-Hadamard matrix: minus where the row's and the column's number share an odd number of bits."""
  parity = [[bin(i & j).count("1") % 2 for j in range(width)] for i in range(width)]
  return (1 - 2 * np.array(parity)) / np.sqrt(width)


# ---- network ----------------------------------------------------------------------------------------------------------
PLACES = ("attention_in", "q_b", "o_b", "experts_in", "experts_down", "shared_down", "window", "entries", "index_keys",
          "index_queries", "embed_proj", "hidden_proj")


class Network:
  """One forward pass.

  Args:
    config, variables: of a model whose layers are not scanned.
    places: which of `PLACES` are rounded.
  """

  def __init__(self, config, variables, places=()):
    assert set(places) <= set(PLACES)
    self.config, self.places = config, places
    double = lambda tree: {k: double(v) if isinstance(v, dict) else np.asarray(v, np.float64) for k, v in tree.items()}
    self.params, self.router = double(variables["params"]), variables["router"]

  def __call__(self, tokens):
    """Logits [B, S, V] and what the prediction block hands to the head [B, S, D]."""
    config, params = self.config, self.params
    embedded = params["embed"]["embedding"][tokens]
    streams = np.repeat(embedded[:, :, None], config.hc_mult, 2)
    for i, spec in enumerate(config.layer_specs):
      name = f"layer_{i:02d}"
      streams = self.layer(streams, tokens, spec, params["layers"][name], self.router["layers"].get(name))
    logits = self.output(streams, params) @ params["lm_head"]["kernel"]
    p = params["mtp"]
    following = np.concatenate([embedded[:, 1:], np.zeros_like(embedded[:, :1])], 1)
    e = self.linear(self.norm(following, p["embed_norm"]), "embed_proj") @ p["embed_proj"]
    h = self.linear(self.norm(streams, p["hidden_norm"]), "hidden_proj") @ p["hidden_proj"]
    streams = self.layer(e[:, :, None] + h, tokens, config.mtp_spec, p["block"], self.router["mtp"]["block"])
    return logits, self.output(streams, p)

  def linear(self, x, place):
    return rounded(x, "linear") if place in self.places else x

  def kv(self, x, place):
    r = self.config.qk_rope_head_dim
    if place not in self.places:
      return x
    return np.concatenate([rounded(x[..., :-r], "kv"), rounded_bfloat16(x[..., -r:])], -1)

  def norm(self, x, p=None):
    x = x / np.sqrt((x * x).mean(-1, keepdims=True) + self.config.rms_norm_eps)
    return x if p is None else x * p["scale"]

  def rotated(self, x, positions, attention, inverse=False):
    """x [B, positions, ..., d]."""
    config, r = self.config, self.config.qk_rope_head_dim
    assert config.rope_scaling is None
    base = config.rope_theta if attention == SLIDING else config.compress_rope_theta
    angles = positions[:, None] * (base ** (-np.arange(0, r, 2) / r)).astype(np.float32).astype(np.float64)
    turn = np.exp((-1j if inverse else 1j) * angles).reshape(len(positions), *(1,) * (x.ndim - 3), r // 2)
    pairs = (x[..., -r::2] + 1j * x[..., -r + 1::2]) * turn
    return np.concatenate([x[..., :-r], np.stack([pairs.real, pairs.imag], -1).reshape(*x.shape[:-1], r)], -1)

  def layer(self, streams, tokens, spec, p, router):
    config = self.config
    mixing = dict(norm_eps=config.rms_norm_eps, eps=config.hc_eps, iterations=config.hc_sinkhorn_iters)
    for hc, norm, sublayer in (("attn_hc", "attn_norm", lambda x: self.attention(x, spec.attention, p["attention"])),
                               ("ffn_hc", "ffn_norm", lambda x: self.moe(x, tokens, spec.router, p["moe"], router["moe"]))):
      fn = np.concatenate([p[hc][name] for name in ("fn_pre", "fn_post", "fn_res")], 1)
      z, post, comb = oracles.collapse(streams, fn, p[hc]["base"], p[hc]["scale"], **mixing)
      (streams,) = oracles.expand(streams, sublayer(self.norm(z, p[norm])), post, comb)
    return streams

  def output(self, streams, p):
    hc, flat = p["hc_head"], streams.reshape(*streams.shape[:2], -1)
    u = self.norm(flat) @ hc["fn"] * hc["scale"] + hc["base"]
    weight = 1 / (1 + np.exp(-u)) + self.config.hc_eps
    return self.norm((weight[..., None] * streams).sum(2), p["final_norm"])

  def attention(self, x, kind, p):
    config, positions = self.config, np.arange(x.shape[1])
    given = self.linear(x, "attention_in")
    latent = self.linear(self.norm(given @ p["q_a"], p["q_a_norm"]), "q_b")
    q = self.rotated(self.norm(np.einsum("BSr,rHd->BSHd", latent, p["q_b"])), positions, kind)
    window = self.kv(self.rotated(self.norm(given @ p["kv"], p["kv_norm"]), positions, kind), "window")
    rate = config.compress_rate(kind)
    entries = np.zeros((len(x), 0, config.head_dim))
    if rate:
      entries = self.kv(self.compressed(x, rate, kind, p["compressor"]), "entries")
    count = entries.shape[1]
    places = dict(positions=np.tile(positions, (len(x), 1)), segment_ids=np.ones(x.shape[:2], int),
                  entry_last=np.tile(np.arange(count) * rate + rate - 1, (len(x), 1)),
                  entry_segment=np.ones((len(x), count), int))
    selection = _Selection(None if kind != CSA else self.picks(x, latent, places, p["indexer"]))
    out, _ = oracles.attend(q, window, entries, selection, p["sink"], window=config.sliding_window,
                            scale=config.head_dim**-0.5, **places)
    out = self.rotated(out, positions, kind, inverse=True).reshape(*x.shape[:2], config.o_groups, -1)
    low = np.einsum("BSGc,GcR->BSGR", out, p["o_a"]).reshape(*x.shape[:2], -1)
    return self.linear(low, "o_b") @ p["o_b"]

  def compressed(self, x, rate, kind, p):
    """Entries [B, T, width]: per channel a softmax over the slots of the window, and in CSA over those of the one before."""
    entries = []
    for t in range(x.shape[1] // rate):
      values, gates = [], []
      for o in range(len(p["kv"])):
        start = (t - (len(p["kv"]) - 1 - o)) * rate
        if start >= 0:
          values.append(x[:, start:start + rate] @ p["kv"][o])
          gates.append(x[:, start:start + rate] @ p["gate"][o] + p["position_bias"][o])
      gate = np.concatenate(gates, 1)
      weight = np.exp(gate - gate.max(1, keepdims=True))
      entries.append((weight * np.concatenate(values, 1)).sum(1) / weight.sum(1))
    entries = np.stack(entries, 1) if entries else np.zeros((len(x), 0, p["kv"].shape[2]))
    return self.rotated(self.norm(entries, p["norm"]), np.arange(entries.shape[1]) * rate, kind)

  def picks(self, x, latent, places, p):
    config = self.config
    spread = hadamard(config.index_head_dim)
    keys = self.compressed(x, config.csa_compress_rate, CSA, p["compressor"]) @ spread
    queries = np.einsum("BSr,rhc->BShc", latent, p["q_b"])
    queries = self.rotated(queries, np.arange(x.shape[1]), CSA) @ spread
    keys = rounded(keys, "index") if "index_keys" in self.places else keys
    queries = rounded(queries, "index") if "index_queries" in self.places else queries
    weights = x @ p["head_weights"] * (config.index_n_heads * config.index_head_dim) ** -0.5
    if config.index_topk >= keys.shape[1]:
      return None
    return oracles.select(queries, weights, keys, top_k=config.index_topk, **places)[0]

  def moe(self, x, tokens, kind, p, router):
    config, (batch, length) = self.config, x.shape[:2]
    scores = np.sqrt(np.logaddexp(0, x @ p["router"]["gate"]))
    if kind == HASH:
      chosen = np.asarray(router["router"]["hash_table"])[tokens]
    else:
      chosen = np.argsort(-(scores + np.asarray(router["router"]["bias"], np.float64)), -1,
                          kind="stable")[..., :config.num_experts_per_tok]
    given = self.linear(x, "experts_in")
    out = self.expert(given, p["shared"], 1.0, "shared_down")
    for b in range(batch):
      for i in range(length):
        picked = scores[b, i, chosen[b, i]]
        for e, weight in zip(chosen[b, i], picked / picked.sum() * config.routed_scaling_factor):
          out[b, i] += self.expert(given[b, i], {name: w[e] for name, w in p["experts"].items()}, weight, "experts_down")
    return out

  def expert(self, x, p, weight, place):
    limit = self.config.swiglu_limit
    gate, up = np.minimum(x @ p["gate"], limit), np.clip(x @ p["up"], -limit, limit)
    return self.linear(gate / (1 + np.exp(-gate)) * up * weight, place) @ p["down"]


class _Selection:
  """What the oracles read of a selection."""

  def __init__(self, picks):
    self.kind, self._picks = "all" if picks is None else "indices", picks

  def indices(self):
    return self._picks
