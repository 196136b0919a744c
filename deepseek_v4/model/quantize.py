"""DeepSeek's rounding: in inference keys and values to FP8, the indexer to FP4, inputs of quantised linear layers to FP8; in
quantisation-aware training routed experts' weights and the indexer to FP4 (MXFP4, report 5.2.1).

Blocks of channels share a scale: the smallest power of two that keeps the block's largest magnitude, or a least magnitude
where all are smaller, within the codes; a number becomes the nearest code times the scale, ties to the even code. A width
that no block divides ends with a smaller block. What is rounded here and what a mixed cache stores are the same numbers:
`round_kv` is `unpack(pack_kv)`, `round_index` is `unpack(pack_index)`, and both are exact on numbers that are already
rounded. A block that holds a number that is not finite comes back with none that is.

Rounding has derivative 0; `straight_through`, which is what training rounds with, has derivative 1.

Axis letters: d head width   p plain channels (d less the rotary ones)   r rotary channels   c index width   n channels
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from deepseek_v4.config import ModelConfig
from deepseek_v4.model import weights
from deepseek_v4.model.formats import (
  E2M1,
  E4M3,
  EXPERT_BLOCK,
  INDEX_BLOCK,
  KV_BLOCK,
  LINEAR_BLOCK,
  NO_SCALE,
  SCALE_BIAS,
  Element,
)

LEAST_E2M1 = 6 * 2.0**-126  # its scale is float32's smallest normal number
_DTYPES = {E4M3: jnp.float8_e4m3fn, E2M1: jnp.float4_e2m1fn}


@dataclasses.dataclass(frozen=True)
class Rule:
  """How one kind of tensor is rounded: its codes, channels per scale, the least magnitude that decides a scale."""

  element: Element
  block: int
  least: float


KV = Rule(E4M3, KV_BLOCK, 1e-4)
LINEAR = Rule(E4M3, LINEAR_BLOCK, 1e-4)
INDEX = Rule(E2M1, INDEX_BLOCK, LEAST_E2M1)
EXPERTS = Rule(E2M1, EXPERT_BLOCK, LEAST_E2M1)


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
def encode(x: jax.Array, rule: Rule, axis: int = -1) -> tuple[jax.Array, jax.Array]:
  """Floating numbers [..., n] -> (codes uint8 [..., n], one a byte, scales uint8 [..., ceil(n / block)]).

  `axis`, counted from the end, is where n and the blocks lie.
  """
  scaled, scales = _scaled(x, rule, axis)
  if rule.element is E2M1:
    codes = _codes_of_four_bits(scaled)
  else:
    codes = jax.lax.bitcast_convert_type(scaled.astype(_DTYPES[rule.element]), jnp.uint8)
  return _channels(codes, x.shape, axis), scales


def _step_of_four_bits(size: jax.Array) -> jax.Array:
  """Between E2M1's neighbours at this magnitude; an even multiple of it has an even code."""
  return jnp.where(size < 2, 0.5, jnp.where(size < 4, 1.0, 2.0))


def _codes_of_four_bits(x: jax.Array) -> jax.Array:
  """Floating numbers -> the codes uint8 of the nearest E2M1 numbers: a sign, and 0, 0.5, 1, 1.5, 2, 3, 4, 6 in order.

  By arithmetic: XLA's older emitter for CPUs, which a flag can choose and the tests do, rounds twice on the way to four bits
  and cannot take their bits. Of NaN and infinity, whose block has no finite scale, any code.
  """
  size = jnp.abs(x)
  step = _step_of_four_bits(size)
  place = jnp.round(size / step) + jnp.where(size < 2, 0, jnp.where(size < 4, 2, 4))
  return place.astype(jnp.uint8) & 7 | jnp.signbit(x).astype(jnp.uint8) << 3


def _scaled(x: jax.Array, rule: Rule, axis: int) -> tuple[jax.Array, jax.Array]:
  """(blocks over their scales, which the codes reach, as `_blocks` lays them out; the scales uint8)."""
  exact = _blocks(jax.lax.stop_gradient(x).astype(jnp.promote_types(x.dtype, jnp.float32)), rule, axis)
  largest = jnp.maximum(jnp.abs(exact).max(axis), rule.least)
  fraction, exponent = jnp.frexp(largest)
  scales = exponent - rule.element.exponent + (fraction > rule.element.fraction) + SCALE_BIAS
  scales = jnp.where(largest < jnp.inf, jnp.minimum(scales, NO_SCALE), NO_SCALE).astype(jnp.uint8)
  inverse = jnp.expand_dims(_power(2 * SCALE_BIAS - scales.astype(jnp.int32)), axis)
  return exact * inverse, scales


def decode(codes: jax.Array, scales: jax.Array, rule: Rule, dtype: Any, axis: int = -1) -> jax.Array:
  """The inverse of `encode`, [..., n] of `dtype`; exact where the dtype has three bits of fraction and the exponents."""
  bits = jnp.uint4 if rule.element is E2M1 else jnp.uint8
  values = jax.lax.bitcast_convert_type(codes.astype(bits), _DTYPES[rule.element])
  return _times_scales(_blocks(values.astype(jnp.float32), rule, axis), scales, codes.shape, dtype, axis)


def _times_scales(blocks: jax.Array, scales: jax.Array, shape: tuple[int, ...], dtype, axis: int) -> jax.Array:
  return _channels(blocks * jnp.expand_dims(_power(scales.astype(jnp.int32)), axis), shape, axis).astype(dtype)


def rounded(x: jax.Array, rule: Rule, axis: int = -1) -> jax.Array:
  """The nearest representable numbers, of x's shape and dtype: what `decode` makes of `encode`'s codes.

  FP4 is rounded by arithmetic: of numbers that are rounded where they are read XLA's CPU compiler (jaxlib 0.12) makes a
  program with casts between 8 and 4 bits that its own check refuses.
  """
  if rule.element is not E2M1:
    return decode(*encode(x, rule, axis), rule, x.dtype, axis)
  scaled, scales = _scaled(x, rule, axis)
  step = _step_of_four_bits(jnp.abs(scaled))
  blocks = (jnp.round(scaled / step) * step).astype(jnp.float32)
  return _times_scales(blocks, scales, x.shape, x.dtype, axis)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def straight_through(x: jax.Array, rule: Rule, axis: int = -1) -> jax.Array:
  """`rounded` to the last bit, shape and dtype kept, with derivative 1 everywhere: what is learnt about the rounded numbers
  goes to x."""
  return rounded(x, rule, axis)


@straight_through.defjvp
def _straight_through_jvp(rule, axis, primals, tangents):
  return straight_through(*primals, rule, axis), tangents[0]


def _blocks(x: jax.Array, rule: Rule, axis: int) -> jax.Array:
  """[..., n] -> [..., ceil(n / block), block], zeros behind the last channel; n and then the block lie at `axis`."""
  n, before, after = x.shape[axis], x.shape[:x.ndim + axis], x.shape[x.ndim + axis + 1:]
  size = max(min(rule.block, n), 1)
  if n % size:
    x = jnp.pad(x, (*((0, 0) for _ in before), (0, -n % size), *((0, 0) for _ in after)))
  return x.reshape(*before, -(-n // size), size, *after)


def _channels(blocks: jax.Array, shape: tuple[int, ...], axis: int) -> jax.Array:
  """The inverse of `_blocks` for numbers of this shape."""
  place = len(shape) + axis
  merged = blocks.reshape(*shape[:place], blocks.shape[place] * blocks.shape[place + 1], *shape[place + 1:])
  return jax.lax.slice_in_dim(merged, 0, shape[axis], axis=place)


def _power(biased: jax.Array) -> jax.Array:
  """2^(biased - 127) float32 for int32 1 to 254; not finite for 255 and for -1, its counterpart."""
  return jax.lax.bitcast_convert_type(biased << 23, jnp.float32)


# ---- the kinds of tensors ---------------------------------------------------------------------------------------------
def pack_kv(x: jax.Array, rotary: int) -> PackedKV:
  """Normalised and rotated keys = values [..., d], floating, with `rotary` trailing rotary channels."""
  plain = x.shape[-1] - rotary
  codes, scales = encode(x[..., :plain], KV)
  return PackedKV(codes, x[..., plain:].astype(jnp.bfloat16), scales)


def pack_index(x: jax.Array) -> PackedIndex:
  """The indexer's keys [..., c], floating, after `hadamard`."""
  codes, scales = encode(x, INDEX)
  return PackedIndex(codes[..., ::2] | codes[..., 1::2] << 4, scales)


def unpack(packed: PackedKV | PackedIndex | jax.Array, dtype: Any) -> jax.Array:
  """What was packed, rounded, [..., d] or [..., c] of `dtype`; an array is only cast."""
  if isinstance(packed, PackedKV):
    return jnp.concatenate([decode(packed.plain, packed.scales, KV, dtype), packed.rotary.astype(dtype)], -1)
  if isinstance(packed, PackedIndex):
    codes = jnp.stack([packed.pairs & 15, packed.pairs >> 4], -1)
    return decode(codes.reshape(*codes.shape[:-2], -1), packed.scales, INDEX, dtype)
  return packed.astype(dtype)


def round_kv(x: jax.Array, rotary: int) -> jax.Array:
  """Keys = values [..., d] as a mixed cache would give them back, in their own dtype; no gradient."""
  return jax.lax.stop_gradient(unpack(pack_kv(x, rotary), x.dtype))


def round_index(x: jax.Array) -> jax.Array:
  """The indexer's queries or keys [..., c] after `hadamard`, rounded, dtype kept, with a straight-through gradient."""
  return straight_through(x, INDEX)


def expert_weights(config: ModelConfig, weight: jax.Array) -> jax.Array:
  """Routed experts' float32 parameters [..., in, out] as their matmuls use them: in `config.compute_dtype`, and with
  `config.qat` = "fp4" rounded before that, 32 along the input axis to a scale as a release stores them.

  The gradient goes straight through to the parameters. Already rounded weights stay what they are.
  """
  weight = weight if config.qat is None else straight_through(weight, EXPERTS, -2)
  return weights.cast(weight, config.compute_dtype)


def linear_input(config: ModelConfig, x: jax.Array) -> jax.Array:
  """The input [..., n], floating, of a linear layer that releases store in FP8 or FP4: rounded, its dtype kept, if
  `config.inference_rounding`."""
  return rounded(x, LINEAR) if config.inference_rounding else x


def hadamard(x: jax.Array) -> jax.Array:
  """[..., c], dtype kept, times the normalised Walsh-Hadamard matrix in Sylvester's order, c a power of two; its own
  inverse.

  It spreads large channels over all of them before they are rounded; dot products stay what they are.
  """
  matrix = np.ones((1, 1), np.float32)
  while len(matrix) < x.shape[-1]:
    matrix = np.block([[matrix, matrix], [matrix, -matrix]])
  exact = jnp.promote_types(x.dtype, jnp.float32)
  return (jnp.matmul(x.astype(exact), matrix.astype(exact), precision="highest") * len(matrix) ** -0.5).astype(x.dtype)
