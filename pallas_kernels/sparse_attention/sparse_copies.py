"""Rows that the sparse form's forward kernel copies by itself, from the table of entries straight into VMEM.

A row that the SparseCore gathers is read, written and read again; one that the TensorCore copies is read once. Starting a
copy takes seven scalar operations, which the compiler puts beside the vector work of a step, where the scalar unit has
nothing else to do. So as many rows go this way as fit there, and the SparseCore brings the others at the same time.

Axis letters: T entries   w words of a packed row   K places of a list
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu import LANES, SUBLANES

PARTS = 4  # a query's starts come in parts between its matmuls and the steps of its softmax


def scratch(plan: Any, table: Any = None) -> Any:
  """Where the rows land, for this step and the next one, in the order of the vector registers; and who has arrived."""
  if not plan.direct:
    return []
  landing = (2, plan.queries, plan.direct // SUBLANES, table.shape[1], SUBLANES, LANES)
  return [pltpu.VMEM(landing, table.dtype), pltpu.SemaphoreType.DMA((2,))]


def compiler_params(plan: Any, params: Any) -> Any:
  """Compiler parameters without a check of each copy's address, which would take most of its time; all numbers are rows."""
  return dataclasses.replace(params, disable_bounds_checks=plan.direct > 0)


def of(plan: Any, table: Any = None, numbers: Any = None, landing: Any = None, arrived: Any = None) -> Any:
  """The copies of a kernel, inside of it."""
  return Copies(plan, table, numbers, landing, arrived) if plan.direct else NoCopies()


class NoCopies:
  """Of a kernel all of whose rows are staged."""

  def begin(self) -> None:
    """At the start of a step."""

  def wait(self) -> None:
    """Until the rows of this step are here."""

  def start_next(self, query: Any, part: Any) -> None:
    """Starts one of `PARTS` parts of the copies for a query of the next step."""

  def join(self, staged_Kw: jax.Array, query: Any) -> jax.Array:
    """Staged rows [K, w], of the table's dtype, and those of the copies behind them."""
    return staged_Kw

  def end(self) -> None:
    """At the end of a step."""


class Copies(NoCopies):
  """The rows of a run's next step arrive while a step computes."""

  def __init__(self, plan: Any, table: Any, numbers: Any, landing: Any, arrived: Any) -> None:
    self.plan, self.table, self.numbers, self.landing, self.arrived = plan, table, numbers, landing, arrived
    self.step = pl.program_id(1)
    self.slot = lax.rem(self.step, 2)

  def _start(self, step, slot, query, part, parts):
    count = self.plan.direct
    for place in range(count * part // parts, count * (part + 1) // parts):
      number = self.numbers[step * self.plan.queries + query, place]
      here = self.landing.at[slot, query, place // SUBLANES, :, place % SUBLANES]
      pltpu.make_async_copy(self.table.at[number], here, self.arrived.at[slot]).start()

  def _wait(self, slot):
    here = self.landing.at[slot]
    pltpu.make_async_copy(here, here, self.arrived.at[slot]).wait()  # for as many bytes as all its rows have

  def begin(self) -> None:
    """A run's first step has nobody before it."""
    @pl.when(self.step == 0)
    def _():
      lax.fori_loop(0, self.plan.queries, lambda query, _: self._start(0, 0, query, 0, 1), None)

  def wait(self) -> None:
    """Waits for the copies of this step."""
    self._wait(self.slot)

  def start_next(self, query: Any, part: Any) -> None:
    """Without a condition, so that the compiler can put it between the matmuls: the last step copies its own rows again."""
    self._start(jnp.minimum(self.step + 1, self.plan.run - 1), 1 - self.slot, query, part, PARTS)

  def join(self, staged_Kw: jax.Array, query: Any) -> jax.Array:
    """Staged rows [K, w], of the table's dtype, and those that were copied behind them."""
    columns = [self.landing[self.slot, query, :, column] for column in range(self.landing.shape[3])]
    return jnp.concatenate([staged_Kw, jnp.concatenate([x.reshape(-1, LANES) for x in columns], 1)], 0)

  def end(self) -> None:
    """Nothing may be on its way when a run ends: its cores may end with it."""
    pl.when(self.step == self.plan.run - 1)(lambda: self._wait(1 - self.slot))
