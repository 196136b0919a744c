"""The bytes of quantised weights: FP8 in 128 x 128 blocks, FP4 in rows of 32, both with power-of-two scales.

A scale is one byte b for 2^(b - 127) (E8M0; 255 is no number). An FP4 byte holds two E2M1 codes along the input axis, the
even column in its low half. Everything is NumPy on one matrix [out, in] at a time. Both directions are exact where float32
can hold the value: a decoded matrix encoded with the scales it came with has the same bytes again, -0 included.
"""

from __future__ import annotations

import dataclasses
import math

import ml_dtypes
import numpy as np

from deepseek_v4.model import formats
from deepseek_v4.model.formats import NO_SCALE, SCALE_BIAS

# Values of the E2M1 codes 0 to 15 and, for every byte, those of its low and its high half.
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
_PAIRS = np.stack([E2M1[np.arange(256) & 15], E2M1[np.arange(256) >> 4]], axis=-1)
_E4M3 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Format:
  """A quantised format: rows and columns of a block, and its codes."""

  name: str
  block: tuple[int, int]
  element: formats.Element

  def grid(self, shape: tuple[int, ...]) -> tuple[int, int]:
    """Shape of the scales of a matrix; blocks at the edges may be smaller."""
    return math.ceil(shape[0] / self.block[0]), math.ceil(shape[1] / self.block[1])

  def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, int]:
    """Shape of the bytes of a matrix."""
    return shape[0], shape[1] if self is FP8 else math.ceil(shape[1] / 2)


FP8 = Format("fp8", (128, 128), formats.E4M3)
FP4 = Format("fp4", (1, formats.EXPERT_BLOCK), formats.E2M1)

# The largest exponent of (largest scale / smallest scale) among the FP4 tiles of a block of FP8 up to which DeepSeek's own
# kernels turn the tiles into FP8 (the block's scale is then the largest of theirs / 2^6, all values are kept exactly).
LOSSLESS_SPREAD = 11


def decode(stored: np.ndarray, scales: np.ndarray, format: Format) -> np.ndarray:
  """The values of a quantised matrix.

  Args:
    stored: bytes of any 8-bit dtype; [out, in] for FP8, [out, in / 2] for FP4.
    scales: bytes of any 8-bit dtype, `format.grid` of the matrix.
    format: FP8 or FP4.

  Returns:
    float32 [out, in].

  Raises:
    ValueError: codes or scales that are no number, or values beyond float32.
  """
  codes, scales = stored.view(np.uint8), scales.view(np.uint8)
  if (scales == NO_SCALE).any():
    raise ValueError(f"{int((scales == NO_SCALE).sum())} scales with code {NO_SCALE}, which is no number")
  if format is FP4:
    values = _PAIRS[codes].reshape(codes.shape[0], -1)
  else:
    if (bad := int(((codes & 0x7F) == 0x7F).sum())):
      raise ValueError(f"{bad} codes 0x7F or 0xFF, which are no number")
    values = _E4M3[codes]
  with np.errstate(over="ignore"):
    values *= _spread(np.ldexp(np.float32(1), scales.astype(np.int32) - SCALE_BIAS), values.shape, format)
  if not np.isfinite(values).all():
    raise ValueError("values beyond float32's largest")
  return values


def encode(values: np.ndarray, format: Format, kept: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
  """A matrix as bytes and scales.

  Args:
    values: float32 [out, in]; an even number of columns for FP4.
    format: FP8 or FP4.
    kept: uint8 scales to use in every block whose values they represent exactly; of another shape: none is used.

  Returns:
    (uint8 bytes, uint8 scales). Other blocks get the smallest power of two that keeps their largest value in range, and the
    nearest codes, ties to even.

  Raises:
    ValueError: values that are not finite, or an odd number of columns for FP4.
  """
  if format is FP4 and values.shape[1] % 2:
    raise ValueError(f"{values.shape[1]} columns: expected an even number, as two share a byte")
  if not np.isfinite(values).all():
    raise ValueError("values that are not finite")
  usable = kept is not None and kept.shape == format.grid(values.shape)
  scales = kept if kept is not None and usable else _derived_scales(values, format)
  codes, exact = _with_scales(values, scales, format)
  if usable and not exact.all():
    derived = _derived_scales(values, format)
    fresh, _ = _with_scales(values, derived, format)
    codes = np.where(_spread(exact, values.shape, format), codes, fresh)
    scales = np.where(exact, scales, derived)
  return (codes[:, ::2] | codes[:, 1::2] << 4) if format is FP4 else codes, scales


def scale_spread(values: np.ndarray) -> int:
  """How far the FP4 scales of a matrix lie apart inside a block of FP8, for `LOSSLESS_SPREAD` (report 5.2.1).

  Args:
    values: float32 [out, in].

  Returns:
    The largest k over the 128 x 128 blocks, with 2^k = largest scale / smallest scale of the block's 1 x 32 tiles; tiles of
    zeros have no say, and a matrix of zeros has 0.
  """
  scales = _derived_scales(values, FP4).astype(np.int32)
  used = _over_blocks(np.maximum, np.abs(values), FP4) > 0
  tiles = Format("tiles", (FP8.block[0], FP8.block[1] // FP4.block[1]), formats.E2M1)
  largest = _over_blocks(np.maximum, np.where(used, scales, -1), tiles)
  smallest = _over_blocks(np.minimum, np.where(used, scales, NO_SCALE), tiles)
  return int(np.where(largest < 0, 0, largest - smallest).max(initial=0))


def fp4_values(values: np.ndarray) -> np.ndarray:
  """What quantisation-aware training computes with in place of expert weights float32 [out, in]: the nearest FP4 numbers.

  A tile's scale is that of `encode`, but at least 2^-126, where float32's normal numbers end.

  Raises:
    ValueError: values that are not finite.
  """
  if not np.isfinite(values).all():
    raise ValueError("values that are not finite")
  scales = np.maximum(_derived_scales(values, FP4), 1)
  exponent = _spread(scales.astype(np.int32) - SCALE_BIAS, values.shape, FP4)
  return np.ldexp(np.ldexp(values, -exponent).astype(ml_dtypes.float4_e2m1fn).astype(np.float32), exponent)


def _spread(grid: np.ndarray, shape: tuple[int, int], format: Format) -> np.ndarray:
  """A value per block as a value per element."""
  rows, columns = format.block
  wide = np.repeat(grid, columns, axis=1)[:, :shape[1]]
  return wide if rows == 1 else np.repeat(wide, rows, axis=0)[:shape[0]]


def _over_blocks(function: np.ufunc, x: np.ndarray, format: Format) -> np.ndarray:
  """`function` reduced over each block of [out, in]."""
  rows, columns = format.block
  narrow = function.reduceat(x, range(0, x.shape[1], columns), axis=1)
  return narrow if rows == 1 else function.reduceat(narrow, range(0, x.shape[0], rows), axis=0)


def _with_scales(values: np.ndarray, scales: np.ndarray, format: Format) -> tuple[np.ndarray, np.ndarray]:
  """(one nearest code per value, which blocks they represent exactly to the last bit)."""
  exponent = _spread(scales.astype(np.int32) - SCALE_BIAS, values.shape, format)
  with np.errstate(over="ignore", under="ignore", invalid="ignore"):
    codes = np.ldexp(values, -exponent).astype(ml_dtypes.float4_e2m1fn if format is FP4 else ml_dtypes.float8_e4m3fn)
    back = np.ldexp(codes.astype(np.float32), exponent)
  same = back.view(np.uint32) == values.view(np.uint32)  # bits, not values: -0 is not 0
  return codes.view(np.uint8), _over_blocks(np.logical_and, same, format)


def _derived_scales(values: np.ndarray, format: Format) -> np.ndarray:
  """2^ceil(log2(largest / largest code)) of each block, in whole numbers; 1 for a block of zeros."""
  largest = _over_blocks(np.maximum, np.abs(values), format)
  fraction, exponent = np.frexp(largest)
  exponent = exponent - format.element.exponent + (fraction > format.element.fraction)
  exponent = np.where(largest == 0, 0, exponent)
  return (np.clip(exponent, -SCALE_BIAS, SCALE_BIAS) + SCALE_BIAS).astype(np.uint8)
