"""The figures of a long context: what a token reads along it, what it costs, and what the reading predicts.

What a token costs should grow with what it reads and with nothing else: the index keys it scores, the entries it selects of
them, and all heavily compressed entries. So its cost should be a line over the number of these entries, a fixed part and a
part per entry; the line through the chunks of the first quarter predicts the end. Cost is the time on the wall and, beside
it, that of the processor summed over its cores, which depends less on who else uses the machine.
"""

from __future__ import annotations

from typing import NamedTuple, Sequence

import numpy as np

from deepseek_v4.config import CSA, HCA, SLIDING, ModelConfig
from deepseek_v4.generation import decode
from launch.benchmarks.report import Row
from pallas_kernels.indexer import blockwise

PLACES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)  # of all tokens, where rows are made
FITTED = (1 / 16, 1 / 4)  # the chunks between these shares of the tokens predict the others
NEIGHBOURS = 7  # chunks whose median is a row: others use the machine, too
COSTS = ("seconds_per_token", "processor_seconds_per_token")
_FEWEST = 4  # chunks that make a line
LOGITS_APART, GROWTH, MEMORY, MINUTES = 1e-3, 1.3, 1.3, 60.0


def entries_seen(config: ModelConfig, position: float) -> float:
  """What the formulas need of a token at this position, over all layers: index keys to score, entries to select of them, and
  heavily compressed entries."""
  seen = {SLIDING: 0.0, CSA: position / config.csa_compress_rate, HCA: position / config.hca_compress_rate}
  seen[CSA] += min(seen[CSA], config.index_topk)
  return sum(seen[kind] for kind in config.layer_types)


def entries_read(config: ModelConfig, start: int, end: int, max_length: int) -> float:
  """What the program of a chunk reads for a token, the mean over the chunk and the sum over all layers.

  That is more than `entries_seen`. A program is made for a reach and reads all heavily compressed entries inside it, masked
  ones as well; a block of queries scores whole tiles of index keys, up to its last query's; `index_topk` entries are
  gathered even where fewer are seen, and where the reach holds no more than these, all are read and no keys are scored.

  Args:
    config: the model.
    start, end: tokens before and after the chunk.
    max_length: tokens that the cache has room for.
  """
  reach = decode.reach_of(end, max_length)
  entries = reach // config.csa_compress_rate
  read = {SLIDING: 0.0, CSA: float(entries), HCA: float(reach // config.hca_compress_rate)}
  if config.index_topk < entries:
    size, tile = blockwise.sizes_of(end - start, entries, config.index_n_heads)
    blocks = np.arange(start, end, size)
    tiles = -(-(np.minimum(blocks + size, end) // config.csa_compress_rate) // tile)
    tokens = np.minimum(blocks + size, end) - blocks
    read[CSA] = float(np.average(np.minimum(tiles * tile, entries), weights=tokens)) + config.index_topk
  return sum(read[kind] for kind in config.layer_types)


class Chunk(NamedTuple):
  """Tokens before and after a chunk, what it took by the clock, and of the processor's time."""

  start: int
  end: int
  seconds: float
  processor_seconds: float

  def cost(self, name: str) -> float:
    """Seconds per token, one of `COSTS`."""
    seconds = {"seconds_per_token": self.seconds, "processor_seconds_per_token": self.processor_seconds}[name]
    return seconds / (self.end - self.start)


# ---- rows -------------------------------------------------------------------------------------------------------------
def _row(config: ModelConfig, name: str, chunks: Sequence[Chunk], chunk_size: int, tokens: int) -> Row:
  """Medians over chunks."""
  median = lambda of: float(np.median([of(chunk) for chunk in chunks]))
  return {"case": name, "side": "ours", "chunk_size": chunk_size, "chunks": len(chunks), "position": chunks[-1].end,
          "entries_seen": median(lambda chunk: entries_seen(config, (chunk.start + chunk.end) / 2)),
          "entries_read": median(lambda chunk: entries_read(config, chunk.start, chunk.end, tokens)),
          **{cost: median(lambda chunk, cost=cost: chunk.cost(cost)) for cost in COSTS}}


def line(entries: Sequence[float], costs: Sequence[float]) -> tuple[float, float]:
  """(fixed cost, cost of an entry) of the line through these points, whatever a few of them do: Theil and Sen's medians, of
  the slopes between all pairs and then of what is left."""
  x, y = np.asarray(entries), np.asarray(costs)
  i, j = np.triu_indices(len(x), 1)
  apart = x[j] - x[i]
  slope = max(float(np.median((y[j] - y[i])[apart != 0] / apart[apart != 0])), 0.0)
  return float(np.median(y - slope * x)), slope


def place_rows(config: ModelConfig, steady: Sequence[Chunk], tokens: int, chunk_size: int) -> list[Row]:
  """Rows of the very first chunk, of the first ones, of those before each place: medians of `NEIGHBOURS` chunks that waited
  for no compilation, or of fewer where there are no more; with what the line through the first quarter predicts.

  Args:
    steady: the chunks that waited for no compilation, in their order; the first one is the document's first.
  """
  if not steady:
    return []
  groups = {"very first chunk": steady[:1], "first chunks": steady[:NEIGHBOURS]}
  for share in PLACES:
    groups["last chunks" if share == 1 else f"at {share:.4g}"] = [c for c in steady if c.end <= share * tokens][-NEIGHBOURS:]
  rows = [_row(config, name, chunks, chunk_size, tokens) for name, chunks in groups.items() if chunks]
  fitted = [chunk for chunk in steady if FITTED[0] * tokens <= chunk.start and chunk.end <= FITTED[1] * tokens]
  entries = [entries_read(config, chunk.start, chunk.end, tokens) for chunk in fitted]
  if len(fitted) < _FEWEST or len(set(entries)) < 2:
    return rows
  for cost in COSTS:
    fixed, slope = line(entries, [chunk.cost(cost) for chunk in fitted])
    for row in rows:
      row[f"predicted_{cost}"] = fixed + slope * row["entries_read"]
      row[f"over_predicted_{cost}"] = row[cost] / row[f"predicted_{cost}"]
  return rows


def growths(rows: Sequence[Row]) -> dict[int, dict[str, float]]:
  """By size of chunks: cost of a token in the last chunks against the first ones, as it is and as it is predicted."""
  found = {}
  names = [name for cost in COSTS for name in (cost, f"predicted_{cost}")]
  for size in rows[-1]["chunk_sizes"]:
    at = {row["case"]: row for row in rows if row.get("chunk_size") == size}
    if {"first chunks", "last chunks"} <= set(at):
      first, last = at["first chunks"], at["last chunks"]
      found[size] = {name: last[name] / first[name] for name in names if name in last}
  return found


def targets(rows: Sequence[Row]) -> list[Row]:
  """What should be reached, with the values of these rows."""
  whole = rows[-1]
  ends = [row for row in rows if row["case"] == "last chunks"]
  over = lambda cost: max((row[f"over_predicted_{cost}"] for row in ends if f"over_predicted_{cost}" in row), default=None)
  apart = max(whole["logits_apart"], whole["logits_apart_after_decoding"])
  took = None
  if whole["temporary_bytes"] is not None:
    planned = whole["cache_bytes_predicted"] + whole["temporary_bytes_predicted"]
    took = (whole["cache_bytes"] + whole["temporary_bytes"]) / planned
  found = [("time of a token in the last chunks over what the entries read predict", GROWTH, over(COSTS[0])),
           ("the same of the processor's time", GROWTH, over(COSTS[1])),
           ("minutes in all", MINUTES, whole["seconds"] / 60),
           (f"logits of two chunk sizes apart (standard deviation {whole['logits_standard_deviation']:.2f})", LOGITS_APART,
            apart),
           ("bytes of the cache apart from dsv4.count's", 0, abs(whole["cache_bytes"] - whole["cache_bytes_predicted"])),
           ("bytes of the cache and beside it while a chunk is read, over dsv4.count's and the compiler's", MEMORY, took)]
  return [{"target": f"context: {text}, at most {bound:g}", "bound": bound, "value": value,
           "reached": None if value is None else value <= bound} for text, bound, value in found]


_COLUMNS = (  # title, figure, unit's factor, format
    ("chunks of", "chunk_size", 1, ",d"), ("median of", "chunks", 1, ",d"), ("tokens", "position", 1, ",d"),
    ("entries seen", "entries_seen", 1, ",.0f"), ("read", "entries_read", 1, ",.0f"),
    *(column for cost, title in zip(COSTS, ("us/token", "processor")) for column in (
        (title, cost, 1e6, ",.0f"), ("predicted", f"predicted_{cost}", 1e6, ",.0f"),
        ("over it", f"over_predicted_{cost}", 1, ".2f"))))


def table(rows: Sequence[Row]) -> str:
  """The rows as text; a figure that does not exist is a dash."""
  lines = [" " * 16 + "".join(title.rjust(13) for title, *_ in _COLUMNS)]
  for row in rows[:-1]:
    cells = [format(row[name] * factor, form) if name in row else "-" for _, name, factor, form in _COLUMNS]
    lines.append(row["case"].ljust(16) + "".join(cell.rjust(13) for cell in cells))
  for size, growth in growths(rows).items():
    words = [f"{growth[cost]:.2f}" + (f" (predicted {growth[f'predicted_{cost}']:.2f})" if f"predicted_{cost}" in growth
                                      else "") for cost in COSTS]
    lines.append(f"a token in the last chunks of {size:,} over one in the first: {words[0]} by the clock, {words[1]} of the "
                 f"processor's time")
  whole = rows[-1]
  mib = lambda name: "?" if whole[name] is None else f"{whole[name] / 2**20:,.1f} MiB"
  lines += [f"decoding: {whole['decode_seconds_per_token'] * 1e3:,.1f} ms a token",
            f"cache: {mib('cache_bytes')}, {mib('cache_bytes_predicted')} by dsv4.count; the process grew by "
            f"{mib('cache_resident_bytes')} for it",
            f"beside it while a chunk is read: {mib('temporary_bytes')}, {mib('temporary_bytes_predicted')} by the "
            f"compiler; the process at most {mib('peak_bytes')}, compiling included",
            f"both runs: {whole['seconds'] / 60:.1f} minutes; logits at most "
            f"{max(whole['logits_apart'], whole['logits_apart_after_decoding']):.1e} apart"]
  return "\n".join(lines)


EXPLANATION = f"""\
Rows are medians over so many neighbouring chunks that waited for no compilation, up to {NEIGHBOURS}; the very first chunk,
whose program was compiled before, stands alone. entries: index keys scored, entries selected of them and heavily compressed
entries of a token, over all layers; seen: what the formulas need; read: what the program reads, masked ones and whole tiles
included. us/token: by the clock on the wall; processor: time of all its cores. predicted: a fixed part (projections,
experts, the window) and a part per entry read, a line through all chunks between {FITTED[0]:.4g} and {FITTED[1]:.4g} of the
tokens (Theil and Sen's medians), the same line for every row."""
