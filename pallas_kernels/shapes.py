"""The sizes at which the released models run these operations, as integers."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Shapes:
  """Sizes of one released model, from its config.json.

  Attributes:
    heads, width: query heads that share one key = value vector of this width.
    window: keys of the sliding window, the query's own included.
    top_k: entries that the indexer picks per query.
    index_heads, index_width: heads of the indexer and their width.
    light_rate, heavy_rate: tokens per entry of the layers with and without an indexer.
    streams, hidden: residual streams and their width.
    experts, picks, expert_width: routed experts, those of a token, and their inner width.
    expert_limit: clamp inside an expert.
  """

  heads: int
  top_k: int
  hidden: int
  experts: int
  expert_width: int
  width: int = 512
  window: int = 128
  index_heads: int = 64
  index_width: int = 128
  light_rate: int = 4
  heavy_rate: int = 128
  streams: int = 4
  picks: int = 6
  expert_limit: float = 10.0


FLASH = Shapes(heads=64, top_k=512, hidden=4096, experts=256, expert_width=2048)
PRO = Shapes(heads=128, top_k=1024, hidden=7168, experts=384, expert_width=3072)
MODELS = {"flash": FLASH, "pro": PRO}
LENGTHS = (4096, 16384, 65536)
DECODE_BATCH, DECODE_ENTRIES = 32, 16384  # one token of each of so many conversations, at 64K tokens
