"""What a model has to beat on the same held-out files: a bigram model over bytes, and zlib. Bits per byte, NumPy only.

Where a choice is open, it is made in the opponent's favour: the bigram model gets the smoothing that is best on the held-out
text itself, and zlib's main figure is the smaller one, all files in one stream (it then finds in a file what it saw in the
last 32 KiB of the files before it).
"""

from __future__ import annotations

import zlib
from typing import Sequence

import numpy as np

from deepseek_v4.config import DataConfig
from deepseek_v4.training import sources

SMOOTHING = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


def bigram_bits_per_byte(train: Sequence[bytes], held_out: Sequence[bytes], smoothing: Sequence[float] = SMOOTHING) -> float:
  """Bits per byte on `held_out` of P(byte | byte before), counted on `train`; a file's first byte by the frequency of bytes.

  Every count gets k added; the result is that of the best k in `smoothing`.

  Raises:
    ValueError: held_out has no byte.
  """
  pairs, firsts = _count(train)
  seen, starts = _count(held_out)
  bytes_in_all = seen.sum() + starts.sum()
  if not bytes_in_all:
    raise ValueError("held_out: expected at least one byte of text")
  # Each byte but a file's first is the second of one pair.
  frequency = pairs.sum(axis=0) + firsts
  first_bits = -(starts * np.log2((frequency + 1) / (frequency + 1).sum())).sum()
  bits = []
  for k in smoothing:
    probability = (pairs + k) / (pairs + k).sum(axis=1, keepdims=True)
    bits.append(-(seen * np.log2(probability)).sum())
  return float((min(bits) + first_bits) / bytes_in_all)


def _count(texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
  """Pairs of neighbouring bytes, float64 [256, 256], and first bytes, float64 [256]."""
  pairs, firsts = np.zeros(256 * 256), np.zeros(256)
  for text in texts:
    values = np.frombuffer(text, np.uint8).astype(np.int32)
    if len(values):
      firsts[values[0]] += 1
      pairs += np.bincount(values[:-1] * 256 + values[1:], minlength=256 * 256)
  return pairs.reshape(256, 256), firsts


def zlib_bits_per_byte(texts: Sequence[bytes]) -> tuple[float, float]:
  """Bits per byte of zlib at level 9: (all texts as one stream, each text by itself).

  Raises:
    ValueError: texts have no byte.
  """
  size = sum(map(len, texts))
  if not size:
    raise ValueError("texts: expected at least one byte of text")
  alone = sum(len(zlib.compress(text, 9)) for text in texts)
  return 8 * len(zlib.compress(b"".join(texts), 9)) / size, 8 * alone / size


def measure(config: DataConfig) -> dict[str, float]:
  """Both baselines on the held-out text of a run: {"bigram", "zlib", "zlib_by_file"} in bits per byte."""
  train, held_out = (sources.read_texts(config, split).texts for split in sources.SPLITS)
  stream, alone = zlib_bits_per_byte(held_out)
  return {"bigram": bigram_bits_per_byte(train, held_out), "zlib": stream, "zlib_by_file": alone}
