"""What the TPU kernels share: matmuls with float32 sums, row statistics over lanes, and what is known of each chip.

Rows of a tile are (query, head) pairs: one key head serves all heads, so [rows, d] x [d, entries] fills the matrix unit.
Statistics of a row are kept in all 128 lanes, [rows, 128]: a [rows, 1] array would cost a broadcast at every use.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

LANES = 128
SUBLANES = 8
LOG2E, LN2 = math.log2(math.e), math.log(2)


@dataclasses.dataclass(frozen=True)
class Chip:
  """One TPU generation as the kernels see it.

  Attributes:
    name: short name, the key of the kernels' tables of tile sizes.
    vmem: MiB that a kernel may ask for.
    cores: TensorCores that share one device's grid.
  """

  name: str
  vmem: int
  cores: int


V5P, V6E, TPU7X = Chip("v5p", 62, 2), Chip("v6e", 126, 1), Chip("tpu7x", 62, 1)
_BY_KIND = {"TPU v5": V5P, "TPU v5p": V5P, "TPU v6 lite": V6E, "TPU v6e": V6E, "TPU7x": TPU7X}


def current_chip(interpret: bool) -> Chip:
  """The chip that the surrounding mesh or default device compiles for; v5p's sizes when interpreted.

  Raises:
    NotImplementedError: a device without tile sizes.
  """
  if interpret:
    return V5P
  mesh = jax.sharding.get_abstract_mesh()
  device = getattr(mesh, "abstract_device", None)
  kind = device.device_kind if device is not None else jax.devices()[0].device_kind
  if kind not in _BY_KIND:
    raise NotImplementedError(f"kernels = 'pallas' on {kind!r}: there are tile sizes for {', '.join(_BY_KIND)}; expected "
                              f"'blockwise' elsewhere")
  return _BY_KIND[kind]


def compiler_params(chip: Chip, *semantics: str) -> pltpu.CompilerParams:
  """"parallel" or "arbitrary" per grid axis, with all of the chip's VMEM."""
  return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=chip.vmem * 2**20)


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
  """Product over axis contract[0] of a and contract[1] of b, summed in float32; float32 operands keep all their bits."""
  precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  return lax.dot_general(a, b, ((contract[:1], contract[1:]), ((), ())), precision=precision,
                         preferred_element_type=jnp.float32)


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
  """[m, k] [k, n] -> float32 [m, n], as `dot`."""
  return dot(a, b, (1, 0))


def matmul_t(a: jax.Array, b: jax.Array) -> jax.Array:
  """[m, k] [n, k] -> float32 [m, n], as `dot`."""
  return dot(a, b, (1, 1))


def t_matmul(a: jax.Array, b: jax.Array) -> jax.Array:
  """[k, m] [k, n] -> float32 [m, n], as `dot`."""
  return dot(a, b, (0, 0))


def widen(x: jax.Array, width: int) -> jax.Array:
  """[rows, 128] with equal lanes -> [rows, width], dtype kept."""
  return jnp.concatenate([x] * (width // LANES), -1)


def lane_sums(x: jax.Array) -> jax.Array:
  """[rows, n] -> [rows, 128], dtype kept: sums of groups of 128 lanes; the sum over lanes can wait."""
  return functools.reduce(jnp.add, [x[:, start:start + LANES] for start in range(0, x.shape[1], LANES)])


def round_up(number: int, multiple: int) -> int:
  """The smallest multiple that is not below."""
  return -(-number // multiple) * multiple


def pad_axis(x: jax.Array, axis: int, size: int, value: float = 0) -> jax.Array:
  """x (any shape and dtype) with `value` behind it along an axis, up to `size`."""
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, size - x.shape[axis])
  return jnp.pad(x, widths, constant_values=value) if size > x.shape[axis] else x
