"""FP8 and FP4 bytes against decodings written from the formats' bit fields; encoding gives the same bytes back."""

import dataclasses

import numpy as np
import pytest

from deepseek_v4.checkpoint.hf_format import FP4, FP8, LOSSLESS_SPREAD, decode, encode, fp4_values, scale_spread
from deepseek_v4.model import quantize
from tests.model.small import T0


def e4m3(code):
  """Value of one byte: sign, four bits of exponent (bias 7), three of fraction."""
  code = int(code)
  sign, exponent, fraction = -1.0 if code >> 7 else 1.0, code >> 3 & 15, code & 7
  return sign * (fraction / 8 * 2.0**-6 if exponent == 0 else (1 + fraction / 8) * 2.0 ** (exponent - 7))


def e2m1(code):
  """Value of four bits: sign, two bits of exponent (bias 1), one of fraction."""
  code = int(code)
  sign, exponent, fraction = -1.0 if code >> 3 else 1.0, code >> 1 & 3, code & 1
  return sign * (fraction / 2 if exponent == 0 else (1 + fraction / 2) * 2.0 ** (exponent - 1))


def by_hand(stored, scales, format):
  """Element by element, in double precision."""
  rows, columns = (128, 128) if format is FP8 else (1, 32)
  width = stored.shape[1] * (1 if format is FP8 else 2)
  out = np.empty((stored.shape[0], width))
  for i in range(out.shape[0]):
    for j in range(width):
      value = e4m3(stored[i, j]) if format is FP8 else e2m1(stored[i, j // 2] >> 4 * (j % 2) & 15)
      out[i, j] = value * 2.0 ** (int(scales[i // rows, j // columns]) - 127)
  return out


def random_matrix(shape, format, seed=0, largest_scale=240):
  """Bytes with every finite code, and scales that are far from minimal; one block holds zeros of both signs only."""
  rng = np.random.default_rng(seed)
  stored = rng.integers(0, 256, format.stored_shape(shape)).astype(np.uint8)
  scales = rng.integers(0, largest_scale, format.grid(shape)).astype(np.uint8)
  if format is FP8:
    stored[(stored & 127) == 127] = 0x80
    stored[:128, :128] = rng.choice([0, 0x80], stored[:128, :128].shape)
  else:
    stored[0, :16] = rng.choice([0x00, 0x08, 0x80, 0x88], 16)
  return stored, scales


def same_bits(a, b):
  return a.dtype == b.dtype and np.array_equal(a.view(np.uint32), b.view(np.uint32))


@pytest.mark.parametrize("format, shape", [(FP8, (150, 130)), (FP8, (1, 3)), (FP8, (128, 256)), (FP4, (5, 96)),
                                           (FP4, (3, 40))])
def test_there_and_back(format, shape):
  stored, scales = random_matrix(shape, format)
  values = decode(stored, scales, format)
  assert same_bits(values, by_hand(stored, scales, format).astype(np.float32))
  again, kept = encode(values, format, scales)
  assert np.array_equal(again, stored) and np.array_equal(kept, scales)
  # without the scales: other bytes, the same values, no scale larger than it was
  fresh, derived = encode(values, format)
  assert same_bits(decode(fresh, derived, format), values)
  used = np.maximum.reduceat(np.maximum.reduceat(values != 0, range(0, shape[0], format.block[0])),
                             range(0, shape[1], format.block[1]), axis=1)
  assert (derived <= scales)[used].all() and (derived[~used] == 127).all()
  wrong, _ = encode(values, format, scales[:, :-1])  # scales of another grid are not used
  assert np.array_equal(wrong, fresh)


def test_all_codes():
  codes = np.arange(256, dtype=np.uint8).reshape(2, 128)
  finite = (codes & 127) != 127
  one = np.full((1, 1), 127, np.uint8)
  assert np.array_equal(decode(np.where(finite, codes, 0), one, FP8)[finite], [e4m3(c) for c in codes[finite]])
  assert np.array_equal(decode(codes, np.full((2, 8), 127, np.uint8), FP4)[0, :4], [0.0, 0.0, 0.5, 0.0])
  for bad in (0x7F, 0xFF):
    with pytest.raises(ValueError, match="1 codes 0x7F or 0xFF, which are no number"):
      decode(np.full((1, 1), bad, np.uint8), one, FP8)


def test_blocks_at_the_edges():
  """CHECKS A10.1 and 2: every block its own scale, the last ones 104 rows and 44 columns, a boundary at row 128."""
  for rows in (1000, 576):
    grid = FP8.grid((rows, 300))
    scales = (127 + np.arange(grid[0])[:, None] - np.arange(grid[1])).astype(np.uint8)
    values = decode(np.full((rows, 300), 0x38, np.uint8), scales, FP8)  # 0x38 is 1
    i, j = np.arange(rows)[:, None] // 128, np.arange(300) // 128
    assert grid == (-(-rows // 128), 3) and np.array_equal(values, 2.0 ** (i - j))


def test_nibbles_and_scales():
  """CHECKS A10.3 and 4."""
  packed = np.zeros((4, 32), np.uint8)
  packed[1, 3], packed[2, 31] = 0x21, 0xF9
  values = decode(packed, np.full((4, 2), 127, np.uint8), FP4)
  assert values.shape == (4, 64)
  assert values[1, 6:8].tolist() == [0.5, 1.0] and values[2, 62:].tolist() == [-0.5, -6.0]
  for code, factor in ((127, 1.0), (126, 0.5), (128, 2.0), (0, 2.0**-127), (254, 2.0**127)):
    assert decode(np.full((1, 16), 0x22, np.uint8), np.full((1, 1), code, np.uint8), FP4)[0, 0] == np.float32(factor)
  with pytest.raises(ValueError, match="scales with code 255"):
    decode(packed, np.full((4, 2), 255, np.uint8), FP4)
  with pytest.raises(ValueError, match="beyond float32"):
    decode(np.full((1, 1), 0x7E, np.uint8), np.full((1, 1), 254, np.uint8), FP8)


@pytest.mark.parametrize("format", [FP8, FP4])
def test_a_changed_block_gets_a_scale_of_its_own(format):
  shape = (256, 256) if format is FP8 else (4, 128)
  stored, scales = random_matrix(shape, format, seed=1, largest_scale=130)
  scales += 60
  values = decode(stored, scales, format)
  values[-1, -1] = 0.3  # no multiple of a power of two that the codes could hold
  again, derived = encode(values, format, scales)
  changed = np.zeros(scales.shape, bool)
  changed[-1, -1] = True
  assert np.array_equal(derived[~changed], scales[~changed])
  inside = np.zeros(stored.shape, bool)
  inside[-format.block[0]:, -(128 if format is FP8 else 16):] = True
  assert np.array_equal(again[~inside], stored[~inside])


@pytest.mark.parametrize("format, codes, largest", [(FP8, [c for c in range(256) if c & 127 != 127], 448.0),
                                                    (FP4, range(16), 6.0)])
def test_new_blocks_get_the_smallest_scale_and_the_nearest_codes(format, codes, largest):
  values = (np.random.default_rng(3).normal(size=(40, 64)) * 0.02).astype(np.float32)
  values[0, :3] = 2.5 * 2.0**-9, -largest * 2.0**-9, 0  # a tie of FP4's, and a block whose largest value is the largest code
  stored, scales = encode(values, format)
  back = decode(stored, scales, format)
  table = np.unique([(e4m3 if format is FP8 else e2m1)(c) for c in codes])
  for i in range(scales.shape[0]):
    for j in range(scales.shape[1]):
      rows, columns = format.block
      block = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
      scale, amax = 2.0 ** (int(scales[i, j]) - 127), np.abs(values[block]).max()
      assert scale * largest >= amax > scale / 2 * largest
      error = np.abs(values[block][..., None] - table * scale).min(-1)
      assert np.array_equal(np.abs(back[block].astype(float) - values[block]), error)
  assert np.signbit(encode(np.full((1, 32), -0.0, np.float32), format)[0].view(np.int8)).all()


def test_what_cannot_be_encoded():
  with pytest.raises(ValueError, match="not finite"):
    encode(np.array([[np.nan, 1]], np.float32), FP8)
  with pytest.raises(ValueError, match="3 columns: expected an even number"):
    encode(np.zeros((1, 3), np.float32), FP4)


# ---- what quantisation-aware training computes with --------------------------------------------------------------------
def test_fp4_values_are_the_nearest_and_those_of_the_forward_pass():
  rng = np.random.default_rng(5)
  values = (rng.normal(size=(70, 72)) * np.exp(2 * rng.normal(size=(70, 72)))).astype(np.float32)
  values[0], values[1, :40], values[2] = 0, -0.0, values[2] * np.float32(2.0**-120)
  values[2, 0] = 0.3 * 2.0**-120  # a scale that is 2^-123 of its own
  found = fp4_values(values)
  want = quantize.expert_weights(dataclasses.replace(T0, qat="fp4"), values.T).T
  normal = np.abs(found) >= np.finfo(np.float32).tiny  # processors may flush what is smaller
  assert same_bits(found[normal], np.asarray(want)[normal]) and normal.mean() > 0.2
  assert np.array_equal(np.signbit(found), np.signbit(values))
  assert same_bits(fp4_values(found), found) and same_bits(decode(*encode(found, FP4), FP4), found)
  with pytest.raises(ValueError, match="not finite"):
    fp4_values(np.full((1, 2), np.inf, np.float32))


@pytest.mark.parametrize("low, high, spread", [
  (0, 0, 0), (-11, 0, 11), (-3, 8, 11), (-12, 0, 12), (-14, 0, 14), (-17, 0, 17)])
def test_tiles_in_fp8(low, high, spread):
  """Tiles of scales 2^low and 2^high in one block of 128 x 128: up to 2^11 apart FP8 holds every value, to 2^14 with its
  subnormal numbers, and further apart it does not. Other blocks and tiles of zeros have no say."""
  rng = np.random.default_rng(0)
  values = rng.choice([v for code in range(16) if (v := e2m1(code))], (130, 300)).astype(np.float32)
  values[:, ::32] = 6  # decides every tile's scale
  values[:128, :128] *= 2.0**high
  values[5, 32:64] *= 2.0 ** (low - high)
  values[7, 64:96] = 0
  values[128:, 128:] *= 2.0**40
  assert scale_spread(values) == spread and (spread <= LOSSLESS_SPREAD) == (spread <= 11)
  assert scale_spread(np.zeros((3, 40), np.float32)) == 0
  back = decode(*encode(values, FP8), FP8)
  assert same_bits(back, values) == (spread <= 14)
