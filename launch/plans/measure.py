"""Compiles one step for a slice that is not there and puts its figures together."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import resource
import threading
import time
from typing import Any, Callable, Iterator, Mapping

import jax

from deepseek_v4.analysis.count import count, dense_layer
from deepseek_v4.config import RunConfig
from deepseek_v4.planning import bound, collectives, dots, lower, read, state
from deepseek_v4.training.state import abstract_state
from launch.benchmarks.kernels import chips, program
from launch.benchmarks.report import origin
from launch.plans import bundles, compiler, kernels

TRAIN, PREFILL, DECODE = "train", "prefill", "decode"
STEPS = (TRAIN, PREFILL, DECODE)

Figures = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Wanted:
  """What is planned.

  Attributes:
    run_config: without stages.
    topology: name of the slice.
    step: one of `STEPS`.
    chunk_size: tokens of a row that a prefill step feeds.
    storage: of the cache.
    bundles: whether kernels are compiled alone, too, for their schedules.
    layout: whether the compiler is left when the program is laid out, before it makes code.
  """

  run_config: RunConfig
  topology: str
  step: str = TRAIN
  chunk_size: int = 512
  storage: str = "compute"
  bundles: bool = False
  layout: bool = False

  @property
  def tokens(self) -> int:
    """Of a row, in a pass."""
    return {TRAIN: self.run_config.data.sequence_length, PREFILL: self.chunk_size, DECODE: 1}[self.step]

  @property
  def model_flops(self) -> float:
    """Of the whole step on all devices; one that serves is at the end of its context."""
    if self.step == TRAIN:
      return bound.step_flops(self.run_config)
    data = self.run_config.data
    return float(sum(count(self.run_config.model, data.sequence_length).flops_per_token.values())
                 * data.batch_size * self.tokens)


def measured(wanted: Wanted, say: Callable[[str], None]) -> Figures:
  """The figures of the compiled step; says once a minute that the compiler still works.

  Raises:
    ValueError: what does not fit the mesh or the slice, before anything is compiled.
    jax.errors.JaxRuntimeError: the compiler refuses it.
    compiler.NoProgram: its process says neither.
  """
  clock, stopped = time.perf_counter(), threading.Event()
  lower.mesh_on(wanted.run_config, wanted.topology)  # most mistakes show here, before any process is started
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    try:
      of_step = pool.submit(compiler.of_plan, wanted, stopped.is_set)
      # That process traces the step, too: beside this one, which says what is wrong with it.
      mesh, traced = traced_of(wanted)
      of_kernels = pool.submit(bundles.of_plan, wanted, say, stopped.is_set) if wanted.bundles else None
      say(f"traced in {time.perf_counter() - clock:.0f} s; {'laying out' if wanted.layout else 'compiling'} for "
          f"{mesh.size} x {mesh.devices.flat[0].device_kind}")
      with ticking(say):
        done = of_step.result()
      by_signature = of_kernels.result() if of_kernels else {}
    finally:  # also where a signal ends it
      stopped.set()
  (memory, text), chip = done.program, chips.chip_of(wanted.topology)
  host_bytes = done.host_bytes + resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
  return _head(wanted, mesh) | {
      "seconds": time.perf_counter() - clock, "compile_seconds": done.seconds, "host_bytes": host_bytes,
      "hbm_bytes": chip.hbm_bytes, "memory": memory, "fits": read.fits(memory, chip.hbm_bytes), "state": _held(wanted, mesh),
      **work_of(wanted, mesh, traced.jaxpr.jaxpr, text, chip, by_signature)}


def _head(wanted: Wanted, mesh: jax.sharding.Mesh) -> Figures:
  data, training = wanted.run_config.data, wanted.run_config.training
  where = origin()
  del where["machine"]["threads"]  # the compiler takes what there are
  return {**where, "step": wanted.step, "layout": wanted.layout, "topology": wanted.topology, "devices": mesh.size,
          "mesh": dict(mesh.shape),
          "sequence_length": data.sequence_length, "batch_size": data.batch_size, "accumulation": data.accumulation,
          "remat": wanted.run_config.model.remat, "attention_mode": training.attention_mode}


def traced_of(wanted: Wanted) -> tuple[jax.sharding.Mesh, jax.stages.Traced]:
  """The mesh on the slice, and the traced step.

  Raises:
    ValueError: as `measured`.
  """
  mesh = lower.mesh_on(wanted.run_config, wanted.topology)
  if wanted.step == TRAIN:
    return mesh, lower.trace_step(wanted.run_config, mesh)
  return mesh, lower.trace_serving(wanted.run_config, mesh, wanted.tokens, wanted.storage)


def pass_of(wanted: Wanted, mesh: jax.sharding.Mesh) -> kernels.Pass:
  """What the step computes at a time."""
  run_config, data = wanted.run_config, wanted.run_config.data
  rows = data.batch_size // (data.accumulation if wanted.step == TRAIN else 1)
  return kernels.Pass(run_config.model, rows, wanted.tokens, data.sequence_length, run_config.training.attention_mode,
                      dict(mesh.shape))


def _held(wanted: Wanted, mesh: jax.sharding.Mesh) -> dict[str, int]:
  data, model = wanted.run_config.data, wanted.run_config.model
  if wanted.step == TRAIN:
    return state.by_kind(abstract_state(wanted.run_config, mesh))
  variables = lower.abstract_variables(model, mesh)
  cache = lower.abstract_cache(model, data.batch_size, data.sequence_length, wanted.storage, mesh)
  return {"parameters": state.device_bytes(variables["params"]), "router": state.device_bytes(variables["router"]),
          "cache": state.device_bytes(cache)}


@contextlib.contextmanager
def ticking(say: Callable[[str], None]) -> Iterator[None]:
  """Says once a minute, while its block runs, that the compiler still works."""
  clock, done = time.perf_counter(), threading.Event()

  def tick():
    while not done.wait(60):
      say(f"  compiling for {time.perf_counter() - clock:.0f} s")
  threading.Thread(target=tick, daemon=True).start()
  try:
    yield
  finally:
    done.set()


def rates_of(chip: chips.Chip) -> bound.Rates:
  """The chip's rates as the bounds want them."""
  return bound.Rates(chip.clock * chip.flops_per_cycle, chip.hbm_rate, chip.link_rate)


# ---- what it does -----------------------------------------------------------------------------------------------------
def work_of(wanted: Wanted, mesh: jax.sharding.Mesh, jaxpr: Any, text: str, chip: chips.Chip,
            by_signature: Mapping[str, float]) -> Figures:
  """Kernels, collectives, FLOPs, bytes moved, time bounds, and the share of the peak that they allow; of one device.

  Args:
    by_signature: kernels' bundles.
  """
  of_kernels = kernels.total(list(kernels.traced_calls(jaxpr)), read.executed(text), pass_of(wanted, mesh), chip,
                             by_signature)
  exchanged = collectives.collectives(text)
  found = collectives.traffic(exchanged)
  executed = dots.flops(text)
  of_all = lambda field: sum(row[field] for row in of_kernels.values())
  moved = sum(part.times * part.hbm_bytes for part in program.parts(text) if part.certain and not part.kernel)
  work = bound.Work(executed["dots"], of_all("flops"), of_all("seconds"), moved + of_all("bytes"),
                    sum(row["bytes"] - row["hidden"] for row in found.values()),
                    sum(row["hidden"] for row in found.values()))
  rates = rates_of(chip)
  least, flops = bound.seconds(work, rates), wanted.model_flops
  return {"kernels": of_kernels, "with_bundles": len(by_signature), "traffic": found,
          "largest_gather": collectives.largest_gather(exchanged),
          "dense_layer": dense_layer(wanted.run_config.model), "hbm_bytes_moved": work.hbm_bytes,
          "flops": {"model": flops / mesh.size, "matmuls": work.matmul_flops, "kernels": work.kernel_flops,
                    "hardware": work.matmul_flops + work.kernel_flops, "more": executed["more"]},
          "bounds": least, "utilization": bound.utilization(flops, mesh.size, rates, least["step"])}
