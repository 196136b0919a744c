"""Random inputs as NumPy arrays: made by JAX, each shape would have programs of its own to compile."""

import math

import numpy as np


def random_normals(seed=0, **shapes):
  """Standard normal float32 arrays of these shapes by name, from one draw."""
  rng = np.random.default_rng(seed)
  return {name: rng.standard_normal(math.prod(shape), np.float32).reshape(shape) for name, shape in shapes.items()}


def random_picks(entries, shape, seed=0):
  """Distinct entries, int32 [B, S, K], in any order, visible or not; three of ten are -1."""
  rng, (*rows, picks) = np.random.default_rng(seed), shape
  order = np.argsort(rng.random((*rows, entries)), axis=-1)[..., :picks]
  return np.where(rng.random(shape) < 0.3, -1, order).astype(np.int32)


def nan_where_unused(x, segment):
  """Entries or keys [B, T, ...] with NaN where the memory is unused, which is where `segment`, [B, T], is 0."""
  return np.where(np.asarray(segment).reshape(*segment.shape, *(1,) * (x.ndim - 2)) > 0, x, np.asarray(np.nan, x.dtype))
