"""What the forward and backward kernels share: loops over a block, exact float32 operands for a bfloat16 matrix unit
(in parts, Henry et al. 2019), sizes.

In HBM the streams lie as [N, T, D]: a stream of a block is then a whole [C, D] tile, where [T, N, D] would leave 4 of 8 rows
of every register empty. XLA gives [B, S, N, D] that order by itself, so no copy stands between the model and the kernels.

Numbers per token travel as one float32 row of 128 lanes, a sheet. The one that `collapse` leaves for its gradient holds in
lanes 0 .. U - 1 the normalised projections u (of pre, post, comb) and in lane U the norm's factor r.

Axis letters: T tokens   C tokens of a block   N, j, k streams   D hidden size   U columns of fn, rounded up to 8
              P bfloat16 parts of a float32 number, stacked
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu

GROUP = 16  # rows that stay in registers: one packed bfloat16 tile
WIDE_UNIT = {"v5p": False, "v6e": True, "tpu7x": True}
_BLOCKS = (128, 64, 32, 16)  # rows of a block
# Up to so many tokens a core has one block, and the kernel cuts fn into parts by itself: XLA would write them to HBM first.
# With more blocks each of them would cut it again.
_CUT_IN_KERNEL = 128


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Static numbers of one call.

  Attributes:
    streams: N.
    width: hidden size of the caller; D is this, rounded up to 128.
    dtype: of the streams.
    wide_unit: the matrix unit holds weights of 256 x 256.
    norm_eps, eps: see `collapse`.
  """

  streams: int
  width: int
  dtype: Any
  wide_unit: bool
  norm_eps: float = 0.0
  eps: float = 0.0

  @property
  def columns(self) -> int:
    """U."""
    return tpu.round_up((2 + self.streams) * self.streams, 8)

  @property
  def parts(self) -> int:
    """How many operands of the matrix unit hold all bits of a float32."""
    return 1 if self.dtype == jnp.float32 else 3

  @property
  def padded(self) -> int:
    """D."""
    return tpu.round_up(self.width, tpu.LANES)

  def row_bytes(self, kind: Any) -> int:
    """Bytes per token of an array of this kind, 0 for arrays without tokens."""
    update = self.padded * jnp.dtype(self.dtype).itemsize
    return {"streams": self.streams * update, "update": update, "sheet": 4 * tpu.LANES}.get(kind, 0)

  def result(self, kind: Any, tokens: int, cores: int) -> jax.ShapeDtypeStruct:
    """A kernel's result of this kind; see `Call`."""
    shapes = {"streams": (self.streams, tokens, self.padded), "update": (tokens, self.padded),
              "sheet": (tokens, tpu.LANES)}
    exact = kind not in ("streams", "update")
    return jax.ShapeDtypeStruct(shapes.get(kind, (cores, *kind)), jnp.float32 if exact else self.dtype)


def check(sizes: Sizes) -> None:
  """Raises NotImplementedError where u and its parts do not fit one row of lanes."""
  if 3 * sizes.columns > tpu.LANES:
    raise NotImplementedError(f"hyper_connections: the TPU kernel holds at most 5 streams, not {sizes.streams}")


# ---- loops over a block -----------------------------------------------------------------------------------------------
def each_group(rows: int, step: Callable[[Any, Any], None]) -> None:
  """step(number, slice of rows) for every group of 16 rows of a block."""
  def body(i, nothing):
    step(i, pl.ds(pl.multiple_of(i * GROUP, GROUP), GROUP))
    return nothing
  lax.fori_loop(0, rows // GROUP, body, 0)


def each_chunk(width: int, largest: int, step: Callable[..., Any], carry: Any = 0) -> Any:
  """carry = step(slice of lanes, carry) over the hidden size, in chunks of at most `largest` lanes."""
  chunk = next(size for size in range(largest, 0, -tpu.LANES) if width % size == 0)
  lanes = lambda i: pl.ds(pl.multiple_of(i * chunk, chunk), chunk)
  return lax.fori_loop(0, width // chunk, lambda i, carry: step(lanes(i), carry), carry)


def wide(x: jax.Array) -> jax.Array:
  """x in float32, the dtype of all arithmetic; any shape."""
  return x.astype(jnp.float32)


def spread(sheet: jax.Array, lane: int) -> jax.Array:
  """float32 [rows, n] -> [rows, 128] with one lane in all lanes."""
  return jnp.broadcast_to(sheet[:, lane:lane + 1], (sheet.shape[0], tpu.LANES))


def gather_lanes(columns: dict[int, jax.Array], rows: int) -> jax.Array:
  """{lane: float32 [rows, 1]} -> [rows, 128], zeros elsewhere."""
  lane = lax.broadcasted_iota(jnp.int32, (rows, tpu.LANES), 1)
  return sum(jnp.where(lane == j, column, 0.0) for j, column in columns.items())


# ---- float32 numbers as operands of a bfloat16 matrix unit ------------------------------------------------------------
def in_parts(x: jax.Array, count: int, dtype: Any) -> list[jax.Array]:
  """float32 -> `count` arrays of `dtype` whose sum is x: three bfloat16 hold 24 bits."""
  parts = []
  for _ in range(count):
    # Not a pair of casts: XLA may drop one, and what is left over would be zero.
    part = lax.reduce_precision(x, 8, 7) if count > 1 else x
    parts.append(part.astype(dtype))
    x = x - part
  return parts


def in_parts_in_kernel(x: jax.Array, count: int, dtype: Any) -> list[jax.Array]:
  """The same inside a kernel, each part in x's shape and still float32."""
  parts = []
  for _ in range(count):
    part = wide(x.astype(dtype))
    parts.append(part)
    x = x - part
  return parts


def side_by_side(parts: list[jax.Array], columns: int, dtype: Any) -> jax.Array:
  """[C, 128] parts, each with zeros behind its first U lanes -> [C, 128] of `dtype` with part p from lane p U on."""
  moved = [part if p == 0 else pltpu.roll(part, p * columns, 1) for p, part in enumerate(parts)]
  return functools.reduce(jnp.add, moved).astype(dtype)


def fn_rows(fn: jax.Array, sizes: Sizes) -> jax.Array:
  """[N * width, (2 + N) N] -> float32 [N, U, D], zeros where padded."""
  by_stream = wide(fn).reshape(sizes.streams, sizes.width, -1).transpose(0, 2, 1)
  return tpu.pad_axis(tpu.pad_axis(by_stream, 1, sizes.columns), 2, sizes.padded)


def projection_operand(fn: jax.Array, sizes: Sizes, tokens: int) -> jax.Array:
  """fn for u = x fn^T: [N, P U, D], the parts one below the other; for few tokens float32 [U, N D], the order in which XLA
  lays fn out by itself. See `projection_rows`."""
  if tokens > _CUT_IN_KERNEL:
    return jnp.concatenate(in_parts(fn_rows(fn, sizes), sizes.parts, sizes.dtype), 1)
  by_stream = tpu.pad_axis(wide(fn).T.reshape(-1, sizes.streams, sizes.width), 2, sizes.padded)
  return tpu.pad_axis(by_stream.reshape(-1, sizes.streams * sizes.padded), 0, sizes.columns)


def projection_rows(fn: Any, stream: int, lanes: Any, sizes: Sizes) -> jax.Array:
  """Inside a kernel: what `projection_operand` gave, of a stream and a slice of its lanes -> [P U, lanes] in
  the streams' dtype."""
  if len(fn.shape) == 3:
    return fn[stream, :, lanes]
  at = pl.ds(pl.multiple_of(stream * sizes.padded + lanes.start, tpu.LANES), lanes.size)
  return jnp.concatenate(in_parts_in_kernel(fn[:, at], sizes.parts, sizes.dtype), 0).astype(sizes.dtype)


def gradient_operand(fn: jax.Array, sizes: Sizes) -> jax.Array:
  """fn for dv fn: [N, P U, D] in the streams' dtype; high, high and middle parts stand against dv's high, middle
  and high ones."""
  parts = in_parts(fn_rows(fn, sizes), min(sizes.parts, 2), sizes.dtype)
  return jnp.concatenate([parts[0], parts[0], parts[1]] if len(parts) > 1 else parts, 1)


def affine(base: jax.Array, scale: jax.Array, sizes: Sizes) -> jax.Array:
  """float32 [2, 128]: of each column its scale and its base, zeros behind."""
  n = sizes.streams
  scales = jnp.repeat(wide(scale), jnp.array([n, n, n * n]), total_repeat_length=(2 + n) * n)
  return tpu.pad_axis(jnp.stack([scales, wide(base)]), 1, tpu.LANES)


# ---- calls ------------------------------------------------------------------------------------------------------------
def block_rows(chip: tpu.Chip, tokens: int, bytes_per_row: int, fixed: int) -> int:
  """C: rows of a block that fit beside `fixed` bytes and leave no core idle; if possible a divisor of the tokens."""
  fits = lambda rows: rows * bytes_per_row + fixed < 0.95 * chip.vmem * 2**20
  sizes = [rows for rows in _BLOCKS if fits(rows) and rows * chip.cores < 2 * tokens] or [GROUP]
  return next((rows for rows in sizes if rows > 32 and tokens % (rows * chip.cores) == 0), sizes[0])


@dataclasses.dataclass(frozen=True)
class Call:
  """One kernel over blocks of tokens: body(*inputs, *outputs, *scratch, sizes=sizes).

  Arrays come in kinds: "streams" [N, T, D], "update" [T, D] and "sheet" [T, 128] are cut into blocks of C tokens, "whole"
  ones are not. An output may be a shape instead: a float32 sum over all tokens, which the body starts and adds to.

  Attributes:
    inputs, outputs: kinds in the order of the body's arguments.
    scratch: C -> VMEM arrays.
    flops: per token.
  """

  name: str
  body: Callable[..., None]
  inputs: tuple[str, ...]
  outputs: tuple[Any, ...]
  scratch: Callable[[int], list]
  flops: int

  def run(self, sizes: Sizes, interpret: bool, *arrays: jax.Array) -> list[jax.Array]:
    """The outputs for these inputs, shapes and dtypes by their kind (`Sizes.result`); sums have one more axis in front, one
    partial sum per core."""
    chip = tpu.current_chip(interpret)
    tokens = next(x.shape[-2] for kind, x in zip(self.inputs, arrays) if kind != "whole")
    sums = [shape for shape in self.outputs if not isinstance(shape, str)]
    per_row = sum(sizes.row_bytes(kind) for kind in (*self.inputs, *self.outputs))
    scratch_row = sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in self.scratch(GROUP)) // GROUP
    whole = sum(x.nbytes for kind, x in zip(self.inputs, arrays) if kind == "whole")
    rows = block_rows(chip, tokens, 2 * per_row + scratch_row, whole + 8 * sum(map(math.prod, sums)))
    steps = pl.cdiv(tokens, rows * chip.cores)
    padded = chip.cores * steps * rows
    arrays = [x if kind == "whole" else tpu.pad_axis(x, x.ndim - 2, padded) for kind, x in zip(self.inputs, arrays)]
    shapes = [sizes.result(kind, padded, chip.cores) for kind in self.outputs]
    spec = functools.partial(_spec, rows, steps)
    moved = per_row * padded + whole + 4 * chip.cores * sum(map(math.prod, sums))
    results = pl.pallas_call(
        functools.partial(self.body, sizes=sizes), grid=(chip.cores, steps), name=self.name, interpret=interpret,
        in_specs=[spec(kind, x.shape) for kind, x in zip(self.inputs, arrays)],
        out_specs=[spec(kind, x.shape) for kind, x in zip(self.outputs, shapes)], out_shape=shapes,
        scratch_shapes=self.scratch(rows), compiler_params=tpu.compiler_params(chip, "parallel", "arbitrary"),
        cost_estimate=pl.CostEstimate(flops=self.flops * tokens, transcendentals=0, bytes_accessed=moved),
    )(*arrays)
    cut = lambda kind, x: x if not isinstance(kind, str) else x[:, :tokens] if kind == "streams" else x[:tokens]
    return [cut(kind, x) for kind, x in zip(self.outputs, results)]


def _spec(rows: int, steps: int, kind: Any, shape: tuple[int, ...]) -> pl.BlockSpec:
  """Grid (cores, steps): each core has a contiguous share of the tokens."""
  if kind == "whole":
    return pl.BlockSpec(shape, lambda core, i: (0,) * len(shape), pipeline_mode=pl.Buffered(1))
  if kind == "streams":
    return pl.BlockSpec((shape[0], rows, shape[2]), lambda core, i: (0, core * steps + i, 0))
  if isinstance(kind, str):
    return pl.BlockSpec((rows, shape[1]), lambda core, i: (core * steps + i, 0))
  return pl.BlockSpec((1, *kind), lambda core, i: (core,) + (0,) * len(kind))
