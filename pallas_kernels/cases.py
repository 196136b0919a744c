"""What a case is: one op on one set of inputs. The tests walk all of them.

Every op has a `cases.py` with `CASES`. An implementation is right if it passes the walk, and nothing about an op has to be
written twice when a kernel joins.

Axis letters: B batch   S queries   T entries   K picks
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any, Callable, Mapping, Sequence

import jax
import jax.numpy as jnp


def _tolerances() -> dict[str, float]:
  return {"float64": 1e-10, "float32": 5e-5}


@dataclasses.dataclass(frozen=True)
class Case:
  """One op on one set of inputs.

  Attributes:
    op: the public function, called as op(**arrays, **options, implementation=name).
    name: unique among the op's cases.
    inputs: key -> arrays (or pytrees of arrays) by argument name, floats in JAX's default float type.
    options: static arguments.
    differentiable: names of the arrays that have gradients.
    wide: names of the arrays that stay at least float32 when the others are rounded to bfloat16.
    meaning: (arrays, result) -> the result with 0 in place of numbers that the op leaves undefined; None = all are defined.
    tolerances: by the name of a dtype that the case makes sense in, the largest difference from the formula's values and
      gradients, as a share of the largest one. One rounding to bfloat16 is up to 0.4%; operands, probabilities and results
      are rounded one after another, so 3 to 4% stand for eight to ten roundings that all fall the same way.
  """

  op: Callable[..., Any]
  name: str
  inputs: Callable[[jax.Array], dict[str, Any]]
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  differentiable: tuple[str, ...] = ()
  wide: tuple[str, ...] = ()
  meaning: Callable[[Mapping[str, Any], Any], Any] | None = None
  tolerances: Mapping[str, float] = dataclasses.field(default_factory=_tolerances)

  @property
  def title(self) -> str:
    """The op's and the case's name, for reports."""
    return f"{self.op.__module__.split('.')[1]}.{self.op.__name__}: {self.name}"

  def arrays(self, dtype: Any, seed: int = 0) -> dict[str, Any]:
    """The inputs with floats in `dtype` (`wide` ones in float32 where dtype is narrower)."""
    def cast(x, name):
      if not jnp.issubdtype(x.dtype, jnp.floating):
        return jnp.asarray(x)
      return jnp.asarray(x.astype(jnp.promote_types(dtype, jnp.float32) if name in self.wide else dtype))

    # Rounded by NumPy: by JAX each shape and dtype would be a program to compile.
    arrays = jax.device_get(jax.jit(self.inputs)(jax.random.key(seed)))
    return {name: jax.tree.map(functools.partial(cast, name=name), value) for name, value in arrays.items()}

  def run(self, arrays: Mapping[str, Any], implementation: str) -> Any:
    """The op's result, undefined numbers as 0."""
    result = self.op(**arrays, **self.options, implementation=implementation)
    return result if self.meaning is None else self.meaning(arrays, result)


def all_cases() -> tuple[Case, ...]:
  """The cases of every op."""
  from pallas_kernels.grouped_matmul import cases as grouped_matmul
  from pallas_kernels.hyper_connections import cases as hyper_connections
  from pallas_kernels.indexer import cases as indexer
  from pallas_kernels.sparse_attention import cases as sparse_attention
  return sparse_attention.CASES + indexer.CASES + hyper_connections.CASES + grouped_matmul.CASES


# ---- inputs that several ops share ------------------------------------------------------------------------------------
def packed(rows: Sequence[Sequence[int]], length: int, rate: int, num_entries: int) -> dict[str, jax.Array]:
  """Rows of documents with these numbers of tokens, padding behind them; an entry per whole window of `rate` tokens.

  Returns:
    positions, segment_ids int32 [B, S] and entry_last, entry_segment int32 [B, T]; entries that a row lacks are unused
    memory: segment 0, and last = 0 so that nothing but the segment hides them.

  Raises:
    ValueError: documents that do not fit the row.
  """
  columns: dict[str, list[Any]] = {name: [] for name in ("positions", "segment_ids", "entry_last", "entry_segment")}
  for documents in rows:
    places = [(number + 1, place) for number, tokens in enumerate(documents) for place in range(tokens)]
    entries = [(segment, place) for segment, place in places if place % rate == rate - 1]
    if len(places) > length or len(entries) > num_entries:
      raise ValueError(f"documents {documents}: expected at most {length} tokens and {num_entries} entries")
    places += [(0, 0)] * (length - len(places))
    entries += [(0, 0)] * (num_entries - len(entries))
    for names, pairs in ((("segment_ids", "positions"), places), (("entry_segment", "entry_last"), entries)):
      for name, values in zip(names, zip(*pairs) if pairs else ((), ())):
        columns[name].append(values)
  return {name: jnp.array(values, jnp.int32) for name, values in columns.items()}


def normals(key: jax.Array, **shapes: tuple[int, ...]) -> dict[str, jax.Array]:
  """Independent standard normal float32 arrays of these shapes by name, from one draw."""
  sizes = {name: math.prod(shape) for name, shape in shapes.items()}
  numbers = jax.random.normal(key, (sum(sizes.values()),))
  ends = dict(zip(sizes, itertools.accumulate(sizes.values())))
  return {name: numbers[ends[name] - sizes[name]:ends[name]].reshape(shape) for name, shape in shapes.items()}


def scattered_picks(order: jax.Array, hole: jax.Array) -> jax.Array:
  """Distinct entries, int32 [B, S, K], in any order, visible or not, with -1 scattered among them.

  Args:
    order: [B, S, T], floating; the first K entries of their sorted order are picked.
    hole: float32 [B, S, K], standard normal numbers; three of ten picks become -1.
  """
  return jnp.where(hole > 0.5244, -1, jnp.argsort(order, axis=-1)[..., :hole.shape[-1]]).astype(jnp.int32)


def unused_to_nan(x: jax.Array, segment: jax.Array) -> jax.Array:
  """Entries or keys [B, T, ...], floating, dtype kept, with NaN where the memory is unused, which is where `segment`, int32
  [B, T], is 0."""
  used = segment.reshape(*segment.shape, *(1,) * (x.ndim - 2)) > 0
  return jnp.where(used, x, jnp.nan)
