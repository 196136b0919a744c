"""How the sparse form of attention cuts its work: chunks of queries whose entries are gathered together.

A step is `queries` neighbouring queries of one batch row with all heads. A run is the steps that share one block of window
keys. A chunk is some runs: the lists and the gathered rows of a chunk exist at a time, nothing larger. Arrays over all
queries keep their place in memory; a kernel is told the number of its chunk.

Axis letters: B batch   S queries   H heads   T entries   d head width   N all steps   G all runs   R rows of a step
              C queries of a chunk   K places of a list   L 128 lanes   V blocks of window keys
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import bits, tpu
from pallas_kernels.sparse_attention import tiles
from pallas_kernels.tpu import LANES

GRANULE = 32  # direct places come in groups of this size: 128 queries x 32 are a batch of 64 rows for each of 64 subcores
_FEW_STEPS = 4
_NUMBER_BYTES = 2**18  # of row numbers of one run


@dataclasses.dataclass(frozen=True)
class Plan:
  """The static shape of all kernels of one call.

  Attributes:
    batch, heads, width: B, H and d with their padding.
    queries: of a step.
    run: steps of a run.
    runs: of a batch row.
    chunk: runs of a chunk; divides all runs.
    entries: T.
    places: K, a multiple of `tile`.
    tile: places that are attended to at once.
    reach: window keys are read in blocks of this size, the one around the queries and the one before.
    direct: the last places of a list, whose rows the attention kernel copies by itself; the SparseCore gathers the others.
  """

  batch: int
  heads: int
  width: int
  queries: int
  run: int
  runs: int
  chunk: int
  entries: int
  places: int
  tile: int
  reach: int
  direct: int

  @property
  def staged(self) -> int:
    """Places of a list whose rows the SparseCore gathers."""
    return self.places - self.direct

  @property
  def rows(self) -> int:
    """R."""
    return self.queries * self.heads

  @property
  def blocks(self) -> int:
    """Steps of a batch row."""
    return self.run * self.runs

  @property
  def windows(self) -> int:
    """V."""
    return math.ceil(self.blocks * self.queries / self.reach)

  @property
  def steps(self) -> int:
    """N."""
    return self.batch * self.blocks

  @property
  def chunks(self) -> int:
    """Chunks of all runs."""
    return self.batch * self.runs // self.chunk

  @property
  def chunk_queries(self) -> int:
    """C."""
    return self.chunk * self.run * self.queries


def make_plan(q_shape: tuple[int, ...], num_entries: int, top_k: int, itemsize: int, window: int, queries: int, tile: int,
              rows: int, cores: int = 1, direct: int = 0, past: int = 0) -> Plan:
  """The plan for steps of `queries`, tiles of at most `tile` places and chunks of about `rows` gathered rows.

  Args:
    q_shape: [B, S, H, d].
    top_k: most entries of a query.
    itemsize: bytes of an operand's number; of float32 a tile holds half as many places.
    cores: that share the runs of a chunk, evenly unless that makes chunks much smaller.
    direct: rows that the kernel may copy by itself for a query of 128 heads, fewer for fewer; only where the places of a
      list are one tile.
    past: window keys of earlier tokens.

  Raises:
    ValueError: a window beyond what a step can read at once.
  """
  batch, length, heads, width = q_shape
  reach = tiles.window_reach(window, length + past)
  heads = tpu.round_up(heads, 8 if heads <= 64 else 16)
  queries = min(queries, 1 << max(length - 1, 0).bit_length())
  while queries * heads % LANES:  # a step's rows fill whole rows of statistics
    queries *= 2
  places = tpu.round_up(max(top_k, 1), LANES)
  tile = max(tile * 2 // itemsize, LANES)
  tile = places if places <= tile else tile
  blocks = math.ceil(length / queries)
  run = min(max(reach // queries, 1), blocks)
  runs = math.ceil(blocks / run)
  most = max(rows // (run * queries * places), 1)
  direct = _direct(direct * heads // LANES, run, run * queries, places) if places == tile else 0
  sizes = [size for size in range(1, min(most, batch * runs) + 1) if batch * runs % size == 0]
  even = [size for size in sizes if size % cores == 0 and 2 * size >= sizes[-1]]  # a chunk costs something by itself
  chunk = (even or sizes)[-1]
  return Plan(batch, heads, tpu.round_up(width, LANES * (4 // itemsize)), queries, run, runs, chunk, num_entries,
              tpu.round_up(places, tile), tile, reach, direct)


def _direct(wanted: int, run: int, queries: int, places: int) -> int:
  """Places that the kernel copies by itself, of the wanted ones.

  Few steps a run have no step before them that hides the starts; a run's numbers must fit SMEM, two runs at a time; and the
  staged rows must be whole batches of all subcores, else their array is copied once more.
  """
  if run < _FEW_STEPS:
    return 0
  most = _NUMBER_BYTES // (4 * queries) // LANES * LANES
  return min(wanted, places // 2, most) // GRANULE * GRANULE


# ---- arrays as the kernels read them -----------------------------------------------------------------------------------
def by_query(x_BS: jax.Array, plan: Plan, value: int = 0) -> jax.Array:
  """[B, S, ...] -> [chunks, C, ...], dtype kept, `value` in the padding."""
  x_BS = tpu.pad_axis(x_BS, 1, plan.blocks * plan.queries, value)
  return x_BS.reshape(plan.chunks, plan.chunk_queries, *x_BS.shape[2:])


def as_steps(x_BSHd: jax.Array, plan: Plan) -> jax.Array:
  """[B, S, H, d] -> [N, R, d], dtype kept, zeros in the padding."""
  return tiles.as_rows(x_BSHd, plan).reshape(plan.steps, plan.rows, plan.width)


def from_steps(x_NRd: jax.Array, shape: tuple[int, ...], plan: Plan) -> jax.Array:
  """The inverse of `as_steps`, dtype kept, without the padding."""
  return tiles.from_rows(x_NRd, shape, plan)


def near(window_kv: jax.Array, segments: tuple[jax.Array, jax.Array], window: int, plan: Plan
         ) -> tuple[jax.Array, jax.Array]:
  """Window keys [B, V, 2 * reach, d], dtype kept, and who sees which of them: int32 [B, steps, queries, 128]."""
  words = tiles.near_words(*segments, window, plan)[:, :plan.blocks * plan.queries]
  return tiles.near_keys(window_kv, segments[0].shape[1], plan), words.reshape(plan.batch, plan.blocks, plan.queries, LANES)


def sink_logits(sink_H: jax.Array, plan: Plan) -> jax.Array:
  """float32 [H, 128] in base 2."""
  logit_H = jnp.maximum(tpu.pad_axis(sink_H.astype(jnp.float32), 0, plan.heads) * tpu.LOG2E, tiles.LOWEST)
  return jnp.broadcast_to(logit_H[:, None], (plan.heads, LANES))


def row_offsets(chunk: jax.Array, plan: Plan) -> jax.Array:
  """int32 [C, 1]: the first entry of each query's batch row, all rows behind each other."""
  query = chunk * plan.chunk_queries + jnp.arange(plan.chunk_queries, dtype=jnp.int32)
  return (query // (plan.blocks * plan.queries) * max(plan.entries, 1))[:, None]


def specs(plan: Plan) -> dict[str, pl.BlockSpec]:
  """Blocks over the grid (run of the chunk, step, tile) with the chunk's number prefetched.

  "steps" and "statistics" lie in arrays of all queries, "rows", "words" and the entry numbers "direct" in the chunk's own.
  """
  def step(i, j, t, chunk):
    return (chunk[0] * plan.chunk + i) * plan.run + j

  def in_row(i, chunk):
    run = chunk[0] * plan.chunk + i
    return lax.div(run, plan.runs), lax.rem(run, plan.runs)

  def near_words(i, j, t, chunk):
    row, run = in_row(i, chunk)
    return row, run * plan.run + j, 0, 0

  return {
      "steps": pl.BlockSpec((None, plan.rows, plan.width), lambda *at: (step(*at), 0, 0)),
      "statistics": pl.BlockSpec((None, plan.rows // LANES, LANES), lambda *at: (step(*at), 0, 0)),
      "words": pl.BlockSpec((None, plan.queries, LANES),
                            lambda i, j, t, chunk: (i * plan.run + j, 0, lax.div(t * plan.tile, bits.GROUP))),
      "near_words": pl.BlockSpec((None, None, plan.queries, LANES), near_words),
      "near_keys": pl.BlockSpec((None, None, 2 * plan.reach, plan.width),
                                lambda i, j, t, chunk: (*in_row(i, chunk), 0, 0)),
      "sink": pl.BlockSpec((plan.heads, LANES), lambda *_: (0, 0)),
      "direct": pl.BlockSpec((None, plan.run * plan.queries, plan.direct), lambda i, j, t, chunk: (i, 0, 0),
                             memory_space=pltpu.SMEM)}


def rows_spec(plan: Plan, width: int) -> pl.BlockSpec:
  """A step's gathered rows of this width, or their gradients: of [C / queries, queries, K, width]."""
  return pl.BlockSpec((None, plan.queries, min(plan.tile, plan.staged), width),
                      lambda i, j, t, chunk: (i * plan.run + j, 0, t, 0))
