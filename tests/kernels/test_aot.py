"""Every kernel through the real TPU compiler, for v5p, v6e and TPU7x, at the released models' widths; nothing runs.

The suite compiles one shape per kernel, direction and chip; the long tier the whole grid of the bench. A gradient's program
holds the kernels of both directions.
"""

import pytest

from launch.benchmarks.kernels import bounds, cases, run
from launch.benchmarks.kernels.cases import FORWARD, GRADIENT, OURS, Case
from launch.benchmarks.kernels.chips import CHIPS
from launch.benchmarks.kernels.compile import Compiler
from launch.benchmarks.memory import cases as memory_cases
from launch.benchmarks.memory import run as memory_run

# Lengths at which the indexer leaves entries out, with little memory to plan for.
SMALL = (
    Case("attention", "pro", 8192, GRADIENT), Case("attention_sparse", "flash", 512, GRADIENT),
    Case("select", "flash", 4096, FORWARD), Case("kl_loss", "flash", 4096, GRADIENT),
    Case("expand_collapse", "pro", 512, GRADIENT), Case("collapse", "flash", 512, GRADIENT),
    Case("expand", "flash", 512, GRADIENT), Case("experts", "flash", 512, GRADIENT))
SPARSE_TEMP = 6 * 2**30  # bytes: rows, gradients of rows of some chunks and the sums of 262,144 entries, nothing longer
SAME_KERNEL = {"attention_heavy", "attention_window"}  # as another op in SMALL


def problems(case, answer, chip):
  """What is wrong with a compiled program, as text."""
  if not answer["ok"]:
    return [answer["error"]]
  found = []
  kernels = [part for part in answer["parts"] if part["kernel"]]
  if not kernels:
    found.append("no kernel in the program")
  for part in kernels:
    if part["vmem_bytes"] > chip.vmem_bytes:
      found.append(f"{part['name']} takes {part['vmem_bytes']} bytes of VMEM, there are {chip.vmem_bytes}")
  if case.op == "attention_sparse" and answer["memory"]["temp"] >= SPARSE_TEMP:
    found.append(f"{answer['memory']['temp']} bytes of temporary memory")
  quadratic = case.queries * case.entries * case.batch * 2  # the smallest array of a number per query and entry
  if case.op in ("attention", "select", "kl_loss") and case.length >= 65536 and answer["memory"]["temp"] >= quadratic:
    found.append(f"{answer['memory']['temp']} bytes of temporary memory, as much as an array [S, T] has: {quadratic}")
  return found


def compile_for(chip, wanted):
  """{case and chip: problems} of those programs that have any."""
  with Compiler(chip.topology, schedules=False) as compiler:
    answers = compiler.compile_all([run.request_of(case) for case in wanted])
  found = {f"{case.name} on {chip.name}": problems(case, answer, chip) for case, answer in zip(wanted, answers)}
  return {name: said for name, said in found.items() if said}


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
def test_every_kernel_compiles(chip):
  assert not compile_for(chip, SMALL)


def test_the_suite_compiles_every_op_in_every_direction():
  directions = {case.op: case.direction for case in SMALL}
  assert directions == {op.name: op.directions[-1] for op in cases.OPS if op.name not in SAME_KERNEL}


@pytest.mark.long
@pytest.mark.parametrize("op", cases.BY_NAME)
@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
def test_the_whole_grid_compiles(chip, op):
  wanted = [case for case in cases.all_cases((op,), cases.LENGTHS) if case.side == OURS and bounds.fits(case, chip)]
  assert not compile_for(chip, wanted)


def too_much_memory(length, kinds):
  """Rows at this length whose program does not compile or takes more than its part of `LIMIT`, which is for 64K tokens."""
  rows = memory_run.measure("v5p:2x2x2", (length,), (OURS,), lambda line: None, kinds)
  return [row for row in rows if row.get("beside", float("inf")) > memory_cases.LIMIT * length / memory_cases.LENGTH]


def test_attention_split_over_heads_takes_little_memory():
  """Forward and backward through the model's shard_map wrapper, heads over eight devices."""
  assert not too_much_memory(8192, (memory_cases.CSA,))


@pytest.mark.long
def test_attention_of_64k_tokens_takes_little_memory():
  assert not too_much_memory(memory_cases.LENGTH, memory_cases.KINDS)
