"""The prediction block behind its own cache equals the same block over whole rows, fed by the model or by itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import deepseek_v4 as dsv4
from deepseek_v4.model.draft import Drafter, init_draft_cache
from tests.model.small import T0, random_tokens, random_variables

CONFIG = T0.cut_layers(1)  # the block reads the streams behind the last layer, whatever the layers are
LENGTH, REWIND = 24, 3  # three windows
IDS = random_tokens(2, LENGTH + 1, seed=8)
TOLERANCE = 1e-4  # of logits that reach 10


@functools.cache
def variables():
  return random_variables(CONFIG)


def logits(hidden):
  """What the head makes of hidden states, in NumPy."""
  return hidden @ variables()["params"]["lm_head"]["kernel"]


@functools.cache
def whole():
  """(streams [B, S, N, D], the block's hidden states [B, S, D]) of the rows without a cache."""
  model = dsv4.DeepseekV4(CONFIG, "reference")

  @jax.jit
  def run(variables):
    out, found = model.apply(variables, IDS, mtp=True, mutable=["intermediates"])
    return found["intermediates"]["layers"]["layer_00"]["streams"][0], out.mtp_hidden
  return jax.device_get(run(variables()))


@functools.cache
def step():
  """(streams, tokens, count, cache) -> what the drafter gives, jitted for chunks of eight."""
  run = jax.jit(lambda v, *arguments: Drafter(CONFIG, "reference").apply(v, *arguments))
  return lambda *arguments: run(variables(), *arguments)


def feed(cache, start, counts):
  """The next `counts` positions of each row, which begin at `start`; behind them stand others."""
  place = np.minimum(np.array(start)[:, None] + np.arange(8), LENGTH - 1)
  streams = np.take_along_axis(whole()[0], place[..., None, None], 1)
  return step()(streams, np.take_along_axis(IDS, place + 1, 1), jnp.array(counts, jnp.int32), cache)


def test_chunks_equal_whole_rows():
  """Rows of different lengths, and one that gets nothing."""
  cache = init_draft_cache(CONFIG, 2, 64, rewind=REWIND)
  start = np.zeros(2, int)
  for counts in ((8, 3), (5, 8), (1, 0), (1, 1), (8, 7)):
    guess, streams, cache = feed(cache, start, counts)
    start += counts
    np.testing.assert_array_equal(dsv4.cache_lengths(cache), start)
    for i in np.flatnonzero(counts):
      np.testing.assert_allclose(guess[i], logits(whole()[1][i, start[i] - 1]), atol=TOLERANCE)
  assert streams.shape == (2, 1, CONFIG.hc_mult, CONFIG.hidden_size)


def test_its_cache_is_one_window():
  cache = init_draft_cache(CONFIG, 2, 64, rewind=REWIND)
  window = 2 * (CONFIG.sliding_window + REWIND) * CONFIG.head_dim * 4
  assert cache.bytes_by_kind == {"window": window, "entries": 0, "index_keys": 0, "scales": 0, "pending": 0}


def test_guesses_of_its_own_are_taken_back():
  """Three positions fed with the block's own streams and then rewound leave no trace."""
  cache = init_draft_cache(CONFIG, 2, 64, rewind=REWIND)
  _, streams, cache = feed(cache, (0, 0), (8, 8))
  settled = dsv4.cache_lengths(cache)
  for number in range(REWIND):
    padded = jnp.pad(streams, ((0, 0), (0, 7), (0, 0), (0, 0)))
    _, streams, cache = step()(padded, np.full((2, 8), 5 + number, np.int32), jnp.ones(2, jnp.int32), cache)
  guess, _, cache = feed(dsv4.rewind(cache, settled), settled, (8, 2))
  np.testing.assert_allclose(guess, logits(whole()[1][[0, 1], [15, 9]]), atol=TOLERANCE)
