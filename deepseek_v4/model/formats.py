"""Facts about the 8- and 4-bit numbers of the releases' weights, of DeepSeek's inference and of caches; no JAX here.

A block of numbers shares a scale, a power of two stored as one byte b for 2^(b - 127) (E8M0; 255 is no number). E4M3 has
four bits of exponent and three of fraction, E2M1 two and one; neither has an infinity (Rouhani et al. 2023).
"""

from __future__ import annotations

import dataclasses

SCALE_BIAS = 127
NO_SCALE = 255  # the E8M0 code that is no number

# What a cache may keep: everything as it was computed, or the published FP8, BF16 and FP4 (`init_cache`).
STORAGES = ("compute", "mixed")

# Numbers that share a scale in DeepSeek's inference (report 2.3.4, 3.5.1, 5.2.1 and the release's own code).
KV_BLOCK = 64  # of window keys and compressed entries, their rotary channels left out
INDEX_BLOCK = 32  # of the indexer's queries and keys
EXPERT_BLOCK = 32  # of an expert's weights, along the axis that a matmul sums over
LINEAR_BLOCK = 128  # of the input of a linear layer whose weights are FP8 or FP4


@dataclasses.dataclass(frozen=True)
class Element:
  """The codes of a number without its scale; the largest one is fraction * 2^exponent with a fraction in [0.5, 1)."""

  name: str
  fraction: float
  exponent: int


E4M3 = Element("e4m3", 0.875, 9)  # 448
E2M1 = Element("e2m1", 0.75, 3)  # 6
