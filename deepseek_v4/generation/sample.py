"""Logits to tokens: greedy, temperature, top-k (Fan et al. 2018), top-p (Holtzman et al. 2020), min-p (Nguyen et al. 2024);
every row has its own settings and its own random key.

A token depends on its row's logits, the request's key and the token's number in the request, never on the batch around it.
The filters are applied in the order temperature, top-k, top-p, min-p, each to what the one before left, as transformers
does; among equal logits the lowest id comes first. Settings are arrays, so that no value of theirs compiles anything anew.

Axis letters: B rows of a batch   V vocabulary
"""

from __future__ import annotations

import dataclasses
from typing import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from deepseek_v4.config_checks import at_least, refuse, typed


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How one request is sampled.

  Attributes:
    temperature: 0 = greedy.
    top_p: the most probable tokens are kept until their probabilities reach this; 1 = all.
    top_k: so many of the most probable tokens are kept; 0 = all.
    min_p: tokens are kept whose probability is at least this share of the largest.
  """

  temperature: float = 1.0
  top_p: float = 1.0
  top_k: int = 0
  min_p: float = 0.0

  def __post_init__(self) -> None:
    typed(self)
    at_least(self, 0, "temperature", "top_k")
    if not 0 < self.top_p <= 1:
      refuse("top_p", self.top_p, "a number above 0, at most 1")
    if not 0 <= self.min_p <= 1:
      refuse("min_p", self.min_p, "a number from 0 to 1")


@flax.struct.dataclass
class Rows:
  """The settings of a batch: float32 [B], top_k int32 [B]."""

  temperature: jax.Array
  top_p: jax.Array
  top_k: jax.Array
  min_p: jax.Array


def rows(requests: Sequence[Sampling]) -> Rows:
  """The settings of these requests, one a row."""
  column = lambda name, dtype: jnp.asarray(np.array([getattr(r, name) for r in requests], dtype))
  # Below float32's normal numbers some devices take a number for 0, and some do not.
  temperatures = [r.temperature and max(r.temperature, np.finfo(np.float32).tiny) for r in requests]
  return Rows(jnp.asarray(np.array(temperatures, np.float32)), column("top_p", np.float32), column("top_k", np.int32),
              column("min_p", np.float32))


def token_keys(keys: jax.Array, numbers: jax.Array) -> jax.Array:
  """Typed keys [B] for the tokens with these numbers (int [B], counted within each request) of requests with keys [B]."""
  return jax.vmap(jax.random.fold_in)(keys, numbers)


def filtered(logits: jax.Array, settings: Rows) -> jax.Array:
  """(Logits [B, V] - their row's largest) / temperature, at least float32; -inf where a token is filtered out, all but one
  if greedy."""
  logits_BV = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
  logits_BV -= logits_BV.max(axis=1, keepdims=True)  # the largest is 0 over any temperature, however small
  greedy_B1 = (settings.temperature == 0)[:, None]
  scaled_BV = logits_BV / jnp.where(greedy_B1, 1, settings.temperature[:, None]).astype(logits_BV.dtype)
  filters_B = ((settings.top_k > 0) | (settings.top_p < 1) | (settings.min_p > 0)) & ~greedy_B1[:, 0]
  # Sorting a whole vocabulary costs more than everything else here.
  kept_BV = jax.lax.cond(filters_B.any(), lambda: _kept(scaled_BV, settings), lambda: jnp.ones(scaled_BV.shape, bool))
  only_BV = jnp.arange(logits.shape[1]) == jnp.argmax(logits_BV, axis=1)[:, None]
  return jnp.where(jnp.where(greedy_B1, only_BV, kept_BV), scaled_BV, -jnp.inf)


def _kept(scaled_BV: jax.Array, settings: Rows) -> jax.Array:
  """Which tokens the three filters leave: bool [B, V]; the most probable one always."""
  order_BV = jnp.argsort(-scaled_BV, axis=1, stable=True)
  sorted_BV = jnp.take_along_axis(scaled_BV, order_BV, axis=1)
  rank_V = jnp.arange(scaled_BV.shape[1])
  top_k_B1, top_p_B1, min_p_B1 = settings.top_k[:, None], settings.top_p[:, None], settings.min_p[:, None]
  alive_BV = (top_k_B1 == 0) | (rank_V < top_k_B1)
  probability_BV = jax.nn.softmax(jnp.where(alive_BV, sorted_BV, -jnp.inf), axis=1)
  before_BV = jnp.cumsum(probability_BV, axis=1) - probability_BV
  # Sums that rounding brings to 1 early must not cut the tail of a row that keeps everything.
  alive_BV &= (top_p_B1 >= 1) | (before_BV < top_p_B1)
  alive_BV &= sorted_BV >= sorted_BV[:, :1] + jnp.log(min_p_B1)
  alive_BV |= rank_V == 0
  rows_B1 = jnp.arange(scaled_BV.shape[0])[:, None]
  return jnp.zeros(scaled_BV.shape, bool).at[rows_B1, order_BV].set(alive_BV)


def log_probabilities(logits: jax.Array, settings: Rows) -> jax.Array:
  """The distribution that is sampled: [B, V], at least float32; -inf for what is filtered out, 0 for a greedy choice."""
  return jax.nn.log_softmax(filtered(logits, settings), axis=1)


def sample(keys: jax.Array, logits: jax.Array, settings: Rows) -> jax.Array:
  """One token per row.

  Args:
    keys: typed keys [B], one for each token; see `token_keys`.
    logits: [B, V], any floating dtype.
    settings: of the rows.

  Returns:
    int32 [B].
  """
  left_BV = filtered(logits, settings)
  noise = lambda: jax.vmap(lambda key: jax.random.gumbel(key, left_BV.shape[1:], left_BV.dtype))(keys)
  # Greedy rows have one token left, whatever is added.
  noise_BV = jax.lax.cond((settings.temperature > 0).any(), noise, lambda: jnp.zeros_like(left_BV))
  return jnp.argmax(left_BV + noise_BV, axis=1).astype(jnp.int32)
