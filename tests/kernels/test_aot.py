"""Every kernel through the real TPU compiler, for v5p, v6e and TPU7x, at the released models' widths; nothing runs.

The suite compiles one shape per kernel, direction and chip; the long tier the whole grid of the bench. A gradient's program
holds the kernels of both directions. Of the sparse form the suite compiles one chunk whole, which takes long, and of two
chunks what is between their attentions.
"""

import re

import jax
import jax.numpy as jnp
import pytest

from launch.benchmarks.kernels import bounds, cases, run
from launch.benchmarks.kernels.cases import FORWARD, GRADIENT, OURS, Case
from launch.benchmarks.kernels.chips import CHIPS
from launch.benchmarks.kernels.compile import Compiler, Request
from launch.benchmarks.memory import cases as memory_cases
from launch.benchmarks.memory import run as memory_run
from pallas_kernels import bits, tpu
from pallas_kernels.shapes import FLASH
from pallas_kernels.sparse_attention import sparse, sparse_lists, sparse_rows, tiles

# Lengths at which the indexer leaves entries out, with little memory to plan for.
SMALL = (
    Case("attention", "pro", 8192, GRADIENT), Case("attention_sparse", "flash", 512, GRADIENT),
    Case("select", "flash", 4096, FORWARD), Case("kl_loss", "flash", 4096, GRADIENT),
    Case("expand_collapse", "pro", 512, GRADIENT), Case("collapse", "flash", 512, GRADIENT),
    Case("expand", "flash", 512, GRADIENT), Case("experts", "flash", 512, GRADIENT))
ALL_OF_SPARSE = {"entry_tables", "list_entries", "gather_rows", "attend_rows", "attend_rows_backward", "add_rows_and_gather",
                 "add_rows"}  # the TensorCore's and the SparseCore's
SPARSE_TEMP = 6 * 2**30  # bytes: rows, gradients of rows of some chunks and the sums of 262,144 entries, nothing longer
SAME_KERNEL = {"attention_heavy", "attention_window"}  # as another op in SMALL


def kernel_names(answer):
  """Names of the kernels in a compiled program, without those of the transformations around them and numbers behind."""
  names = [part["name"] for part in answer["parts"] if part["kernel"] or part["sparse_core"]]
  return [re.sub(r"^((transpose|jvp|vmap|checkpoint)_)+|_*(\.[\w\-]+)*$", "", name) for name in names]


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


def between_two_chunks(length, share):
  """The program of what the sparse form's backward pass does between the attention of two chunks, and of what is added in
  the end: Flash, the last `share` tokens of a context."""
  options = tiles.Options(FLASH.window, 1.0, tpu.current_chip(interpret=False), False)
  static, array = (options, "bits", FLASH.top_k), jax.ShapeDtypeStruct
  q, entries = (array(shape, jnp.bfloat16) for shape in (
      (1, share, FLASH.heads, FLASH.width), (1, length // FLASH.light_rate, FLASH.width)))
  rows = sparse._backward_rows(entries.shape[1])
  plan = sparse._plan(q, entries, static, sparse.BACKWARD_STEP, rows)
  units = sparse_rows.Units.of(entries.shape[1], plan.width, options.chip)
  words = array((1, share, bits.num_words(entries.shape[1])), jnp.int32)
  assert plan.chunks > 1 and words.shape[2] > sparse_lists.DIRECT_WORDS

  def between(entries, words, seen, d_rows):
    lists, fetch, _ = sparse._readers(entries, (words, seen), plan, static)
    (first,), (second, third) = lists(jnp.int32(0)), lists(1, 2)
    part = lambda index: (index.reshape(-1), d_rows)
    sums, rows = fetch(second, units.zeros(plan.width), part(first))
    return fetch(first), rows, third, sparse_rows.add_rows(sums, *part(second), options.chip, False)

  d_rows = array((plan.chunk_queries * plan.places, plan.width), jnp.float32)
  return between, (entries, words, array(entries.shape[:2], bool), d_rows)


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
def test_lists_in_two_levels_and_what_is_between_two_chunks_compile(chip):
  """At 262,144 tokens; a chunk whose sums are added and the next one's rows are one call of the SparseCore."""
  request = Request("between", "tests.kernels.test_aot:between_two_chunks", {"length": 2**18, "share": 4096})
  with Compiler(chip.topology, schedules=False) as compiler:
    (answer,) = compiler.compile_all([request])
  assert answer["ok"], answer["error"]
  names = kernel_names(answer)
  assert set(names) == ALL_OF_SPARSE - {"attend_rows", "attend_rows_backward"}
  assert names.count("list_entries") == 4 and names.count("gather_rows") == 3  # two levels, twice; of words, twice, and rows


@pytest.mark.long
@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
def test_a_sparse_gradient_of_many_chunks_holds_all_kernels(chip):
  case = Case("attention_sparse", "flash", 2**18, GRADIENT)
  with Compiler(chip.topology, schedules=False) as compiler:
    (answer,) = compiler.compile_all([run.request_of(case)])
  assert not problems(case, answer, chip)
  assert set(kernel_names(answer)) == ALL_OF_SPARSE


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
