"""DeepSeek's inference rounding: keys and values to FP8, the indexer to FP4, inputs of quantised linear layers to FP8.

Blocks of channels share a scale: the smallest power of two that keeps the block's largest magnitude, or a least magnitude
where all are smaller, within the codes; a number becomes the nearest code times the scale, ties to the even code. A width
that no block divides ends with a smaller block. What is rounded here and what a mixed cache stores are the same numbers:
`round_kv` is `unpack(pack_kv)`, `round_index` is `unpack(pack_index)`, and both are exact on numbers that are already
rounded. A block that holds a number that is not finite comes back with none that is.

Rounding has derivative 0. Training against it needs a straight-through gradient around these functions.

Axis letters: d head width   p plain channels (d less the rotary ones)   r rotary channels   c index width   n channels
"""

from __future__ import annotations

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from deepseek_v4.config import ModelConfig
from deepseek_v4.model.formats import E2M1, E4M3, INDEX_BLOCK, KV_BLOCK, LINEAR_BLOCK, NO_SCALE, SCALE_BIAS, Element

_DTYPES = {E4M3: jnp.float8_e4m3fn, E2M1: jnp.float4_e2m1fn}


@dataclasses.dataclass(frozen=True)
class Rule:
  """How one kind of tensor is rounded: its codes, channels per scale, the least magnitude that decides a scale."""

  element: Element
  block: int
  least: float


KV = Rule(E4M3, KV_BLOCK, 1e-4)
LINEAR = Rule(E4M3, LINEAR_BLOCK, 1e-4)
INDEX = Rule(E2M1, INDEX_BLOCK, 6 * 2.0**-126)


@flax.struct.dataclass
class PackedKV:
  """Keys = values as a mixed cache keeps them.

  Attributes:
    plain: uint8 [..., p], E4M3 codes.
    rotary: bfloat16 [..., r].
    scales: uint8 [..., ceil(p / 64)], E8M0.
  """

  plain: jax.Array
  rotary: jax.Array
  scales: jax.Array


@flax.struct.dataclass
class PackedIndex:
  """Index keys as a mixed cache keeps them.

  Attributes:
    pairs: uint8 [..., c / 2], two E2M1 codes, the even channel in the low half.
    scales: uint8 [..., ceil(c / 32)], E8M0.
  """

  pairs: jax.Array
  scales: jax.Array


# ---- codes and scales -------------------------------------------------------------------------------------------------
def encode(x: jax.Array, rule: Rule) -> tuple[jax.Array, jax.Array]:
  """Numbers [..., n] -> (codes uint8 [..., n], one a byte, scales uint8 [..., ceil(n / block)])."""
  exact = _blocks(jax.lax.stop_gradient(x).astype(jnp.promote_types(x.dtype, jnp.float32)), rule)
  largest = jnp.maximum(jnp.abs(exact).max(-1), rule.least)
  fraction, exponent = jnp.frexp(largest)
  scales = exponent - rule.element.exponent + (fraction > rule.element.fraction) + SCALE_BIAS
  scales = jnp.where(largest < jnp.inf, jnp.minimum(scales, NO_SCALE), NO_SCALE).astype(jnp.uint8)
  codes = (exact * _power(2 * SCALE_BIAS - scales.astype(jnp.int32))[..., None]).astype(_DTYPES[rule.element])
  bits = jnp.uint4 if rule.element is E2M1 else jnp.uint8
  return _channels(jax.lax.bitcast_convert_type(codes, bits).astype(jnp.uint8), x.shape), scales


def decode(codes: jax.Array, scales: jax.Array, rule: Rule, dtype) -> jax.Array:
  """The inverse of `encode`, [..., n] of `dtype`; exact where the dtype has three bits of fraction and the exponents."""
  bits = jnp.uint4 if rule.element is E2M1 else jnp.uint8
  values = jax.lax.bitcast_convert_type(codes.astype(bits), _DTYPES[rule.element])
  exact = _blocks(values.astype(jnp.float32), rule) * _power(scales.astype(jnp.int32))[..., None]
  return _channels(exact, codes.shape).astype(dtype)


def rounded(x: jax.Array, rule: Rule) -> jax.Array:
  """The nearest representable numbers, [..., n] in x's dtype."""
  return decode(*encode(x, rule), rule, x.dtype)


def _blocks(x: jax.Array, rule: Rule) -> jax.Array:
  """[..., n] -> [..., ceil(n / block), block], zeros behind the last channel."""
  n = x.shape[-1]
  size = max(min(rule.block, n), 1)
  x = jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, -n % size),)) if n % size else x
  return x.reshape(*x.shape[:-1], -(-n // size), size)


def _channels(blocks: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """The inverse of `_blocks` for numbers of this shape."""
  return blocks.reshape(*shape[:-1], blocks.shape[-2] * blocks.shape[-1])[..., :shape[-1]]


def _power(biased: jax.Array) -> jax.Array:
  """2^(biased - 127) float32 for int32 1 to 254; not finite for 255 and for -1, its counterpart."""
  return jax.lax.bitcast_convert_type(biased << 23, jnp.float32)


# ---- the kinds of tensors ---------------------------------------------------------------------------------------------
def pack_kv(x: jax.Array, rotary: int) -> PackedKV:
  """Normalised and rotated keys = values [..., d] with `rotary` trailing rotary channels."""
  plain = x.shape[-1] - rotary
  codes, scales = encode(x[..., :plain], KV)
  return PackedKV(codes, x[..., plain:].astype(jnp.bfloat16), scales)


def pack_index(x: jax.Array) -> PackedIndex:
  """The indexer's keys [..., c] after `hadamard`."""
  codes, scales = encode(x, INDEX)
  return PackedIndex(codes[..., ::2] | codes[..., 1::2] << 4, scales)


def unpack(packed: PackedKV | PackedIndex | jax.Array, dtype) -> jax.Array:
  """What was packed, rounded, [..., d] or [..., c] of `dtype`; an array is only cast."""
  if isinstance(packed, PackedKV):
    return jnp.concatenate([decode(packed.plain, packed.scales, KV, dtype), packed.rotary.astype(dtype)], -1)
  if isinstance(packed, PackedIndex):
    codes = jnp.stack([packed.pairs & 15, packed.pairs >> 4], -1)
    return decode(codes.reshape(*codes.shape[:-2], -1), packed.scales, INDEX, dtype)
  return packed.astype(dtype)


def round_kv(x: jax.Array, rotary: int) -> jax.Array:
  """Keys = values as a mixed cache would give them back."""
  return jax.lax.stop_gradient(unpack(pack_kv(x, rotary), x.dtype))


def round_index(x: jax.Array) -> jax.Array:
  """The indexer's queries or keys [..., c] after `hadamard`, rounded."""
  return rounded(x, INDEX)


def linear_input(config: ModelConfig, x: jax.Array) -> jax.Array:
  """The input [..., n] of a linear layer that releases store in FP8 or FP4: rounded if `config.inference_rounding`."""
  return rounded(x, LINEAR) if config.inference_rounding else x


def hadamard(x: jax.Array) -> jax.Array:
  """[..., c] times the normalised Walsh-Hadamard matrix in Sylvester's order, c a power of two; its own inverse.

  It spreads large channels over all of them before they are rounded; dot products stay what they are.
  """
  matrix = np.ones((1, 1), np.float32)
  while len(matrix) < x.shape[-1]:
    matrix = np.block([[matrix, matrix], [matrix, -matrix]])
  exact = jnp.promote_types(x.dtype, jnp.float32)
  return (jnp.matmul(x.astype(exact), matrix.astype(exact), precision="highest") * len(matrix) ** -0.5).astype(x.dtype)
