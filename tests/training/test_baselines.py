"""The baselines against counts by hand and zlib itself."""

import math
import zlib

import numpy as np
import pytest

from deepseek_v4.training import baselines


def test_bigram_against_a_count_by_hand():
  """Train "abab" + "b", test "ab": b follows a always, first bytes 2 a and 3 b."""
  k = 0.5
  expected = -(math.log2((2 + 1) / (5 + 256)) + math.log2((2 + k) / (2 + 256 * k))) / 2
  assert baselines.bigram_bits_per_byte([b"abab", b"b"], [b"ab"], smoothing=(k,)) == pytest.approx(expected, rel=1e-12)
  # The best of several smoothings counts; unseen bytes cost a finite number of bits; empty files cost nothing.
  several = baselines.bigram_bits_per_byte([b"abab", b"b"], [b"ab", b""], smoothing=(1.0, k, 0.001))
  assert several == pytest.approx(-(math.log2(3 / 261) + math.log2((2 + 0.001) / (2 + 0.256))) / 2, rel=1e-12)
  assert 8 <= baselines.bigram_bits_per_byte([b"a"], [b"\x00\xff" * 50]) < 50
  rng = np.random.default_rng(0)
  noise = [rng.integers(0, 256, 1 << 21, np.uint8).tobytes()]
  assert baselines.bigram_bits_per_byte(noise, noise) == pytest.approx(8, abs=0.03)


def test_zlib_bits():
  texts = [b"spam and eggs " * 20, b"eggs and spam " * 20, b""]
  stream, alone = baselines.zlib_bits_per_byte(texts)
  assert stream == 8 * len(zlib.compress(b"".join(texts), 9)) / 560 < alone
