"""Every kernel through the real TPU compiler, for v5p, v6e and TPU7x, at the released models' widths; nothing runs.

The suite compiles one shape per kernel, direction and chip, attention of each kind of layer on some chip; the long tier the
whole grid of the bench. A gradient's program holds the kernels of both directions. Of the sparse form the suite compiles
one chunk whole, which takes long, and of two chunks what is between their attentions.
"""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import pytest

from launch.benchmarks.kernels import bounds, cases, run
from launch.benchmarks.kernels.cases import DECODE, FORWARD, GRADIENT, OURS, Case
from launch.benchmarks.kernels.chips import CHIPS
from launch.benchmarks.kernels.compile import Compiler, Request
from launch.benchmarks.memory import cases as memory_cases
from launch.benchmarks.memory import run as memory_run
from pallas_kernels import bits, tpu
from pallas_kernels.selection import Selection
from pallas_kernels.shapes import FLASH, MODELS, PRO
from pallas_kernels.sparse_attention import attend, forms, sparse, sparse_lists, sparse_rows, tiles

# Lengths at which the indexer leaves entries out, with little memory to plan for.
SMALL = (
    Case("attention", "pro", 8192, GRADIENT), Case("attention_sparse", "flash", 512, GRADIENT),
    Case("select", "flash", 4096, FORWARD), Case("kl_loss", "flash", 4096, GRADIENT),
    # 32 tokens, for which the kernels cut fn into parts by themselves, and more.
    Case("expand_collapse", "pro", 512, GRADIENT), Case("collapse", "flash", DECODE, GRADIENT),
    Case("expand", "flash", DECODE, GRADIENT), Case("experts", "flash", 512, GRADIENT))
# Attention of the other kinds of layers, on one chip each. HCA's entries are one tile: 320 of them, which no other axis has;
# a row of bits has 128 words, the keys near a block of queries are 256.
FURTHER = {"v5p": Case("attention_heavy", "flash", 40960, GRADIENT),
           "v6e": Case("attention_window", "flash", 1024, GRADIENT)}
_EXPERTS = {"experts_hidden", "experts_down"}
_FORWARD = {
    **dict.fromkeys(("attention", "attention_heavy", "attention_window"), {"masked_attention"}),
    "attention_sparse": {"entry_tables", "list_entries", "gather_rows", "attend_rows"},
    "select": {"index_select"}, "kl_loss": {"index_loss"}, "collapse": {"hyper_collapse", "sinkhorn"},
    "expand": {"hyper_expand"}, "expand_collapse": {"hyper_expand_collapse", "sinkhorn"}, "experts": _EXPERTS}
_MORE_BACKWARD = {
    "attention_sparse": {"attend_rows_backward", "add_rows"},
    "experts": {"experts_d_hidden", "experts_d_rows", "experts_d_gate_up", "experts_d_down"}}
def expected(op, direction):
  """Names of the kernels of a program."""
  names = _FORWARD[op]
  if direction == GRADIENT:
    names = names | _MORE_BACKWARD.get(op, {name + "_backward" for name in names - {"sinkhorn"}})  # both ways one name
  return names


EXPECTED = {f"{op.name}/{direction}": expected(op.name, direction) for op in cases.OPS for direction in op.directions}
# The TensorCore's and the SparseCore's, of several chunks.
ALL_OF_SPARSE = expected("attention_sparse", GRADIENT) | {"add_rows_and_gather"}
SPARSE_TEMP = 6 * 2**30  # bytes: rows, gradients of rows of some chunks and the sums of 262,144 entries, nothing longer


def kernel_names(answer):
  """Names of the kernels in a compiled program, without those of the transformations around them and numbers behind."""
  names = [part["name"] for part in answer["parts"] if part["kernel"] or part["sparse_core"]]
  return [re.sub(r"^((transpose|jvp|vmap|checkpoint)_)+|_*(\.[\w\-]+)*$", "", name) for name in names]


def runs(sizes):
  """Products of neighbouring axes, with the number of the first axis and of the one behind the last."""
  return [(math.prod(sizes[i:j]), i, j) for i in range(len(sizes)) for j in range(i + 1, len(sizes) + 1)]


def quadratic(arrays, queries, keys):
  """Those of these arrays that have a number, of any type, for every query and key: axes, or neighbouring axes together, of
  both sizes, padding included. Rows of bits are shorter than rows of keys and no such array."""
  found = []
  for text in arrays:
    parts = runs([int(size) for size in re.search(r"\[(.*)\]", text)[1].split(",") if int(size) > 1])
    of = lambda size, parts=parts: [part for part in parts if size <= part[0] < size + 128]
    rows, columns = of(queries), of(keys)
    if any(row[2] <= column[1] or column[2] <= row[1] for row in rows for column in columns):
      found.append(text)
  return found


def problems(case, answer, chip):
  """What is wrong with a compiled program, as text."""
  if not answer["ok"]:
    return [answer["error"]]
  found = []
  if (names := set(kernel_names(answer)) - {"add_rows_and_gather"}) != EXPECTED[f"{case.op}/{case.direction}"]:
    found.append(f"kernels: {', '.join(sorted(names))}")
  for part in answer["parts"]:
    if part["vmem_bytes"] > chip.vmem_bytes:
      found.append(f"{part['name']} takes {part['vmem_bytes']} bytes of VMEM, there are {chip.vmem_bytes}")
  if case.op == "attention_sparse" and answer["memory"]["temp"] >= SPARSE_TEMP:
    found.append(f"{answer['memory']['temp']} bytes of temporary memory")
  found += [f"{text} has a number for every query and key" for text in quadratic_of(case, answer)]
  return found


def told_apart(case, keys, heads):
  """Whether nothing that every query has anyway, such as heads x width, has as many numbers as there are keys."""
  window, width = case.shapes.window, case.shapes.width
  others = {product for product, _, _ in runs([heads, width])} | {2 * window, bits.num_words(keys), 1}
  return not any(keys <= size < keys + 128 for size in others)


def quadratic_of(case, answer):
  """Quadratic arrays of a case whose sizes tell queries, keys and widths apart."""
  looked_at = case.op in ("attention", "attention_heavy", "attention_window", "select", "kl_loss")
  if not looked_at or not case.length or not apart(case):
    return []
  return quadratic(answer["arrays"], case.queries, case.entries or case.queries)


def apart(case):
  """`told_apart`, of a case of the bench."""
  return told_apart(case, case.entries or case.queries, case.shapes.heads)


def test_most_cases_tell_queries_keys_and_widths_apart():
  """HCA's entries are few: 32, 128 and 512 of them are also sizes of other things, 320 and 8,192 are not; Pro's 128 heads of
  512 make 65,536 numbers of a query. What is left out at one length is looked at at another."""
  alike = {case.name for op in ("attention", "attention_window", "select", "kl_loss") for case in grid(op)
           if case.length and not apart(case)}
  assert alike == {"attention_window forward pro 65,536", "attention_window gradient pro 65,536"}
  assert apart(FURTHER["v5p"])
  assert {case.length for case in grid("attention_heavy") if case.length and apart(case)} == {2**20}


def all_problems(wanted, answers, chip):
  """{case and chip: problems} of those programs that have any."""
  found = {f"{case.name} on {chip.name}": problems(case, answer, chip) for case, answer in zip(wanted, answers)}
  return {name: said for name, said in found.items() if said}


def compile_for(chip, wanted):
  """`all_problems` of these cases."""
  with Compiler(chip.topology, schedules=False) as compiler:
    return all_problems(wanted, compiler.compile_all([run.request_of(case) for case in wanted]), chip)


def small_on(chip):
  """What the suite compiles for one device of a chip."""
  return [*SMALL, *(case for name, case in FURTHER.items() if name == chip.name)]


@pytest.fixture(scope="module", autouse=True)
def users_flags():
  """The flags that the tests give to XLA's CPU compiler would also reach the one for TPUs."""
  with pytest.MonkeyPatch.context() as patch:
    patch.delenv("XLA_FLAGS", raising=False)
    yield


@pytest.fixture(scope="module", params=CHIPS, ids=lambda chip: chip.name)
def compiled(request):
  """(chip, answers to `small_on`, answer to `BETWEEN`), by one process."""
  chip = request.param
  with Compiler(chip.topology, schedules=False) as compiler:
    *answers, between = compiler.compile_all([*map(run.request_of, small_on(chip)), BETWEEN])
  return chip, answers, between


def test_every_kernel_compiles(compiled):
  chip, answers, _ = compiled
  assert not all_problems(small_on(chip), answers, chip)


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
    (first,), (second,) = lists(jnp.int32(0)), lists(1)
    part = lambda index: (index.reshape(-1), d_rows)
    sums, rows = fetch(second, units.zeros(plan.width), part(first))
    return fetch(first), rows, sparse_rows.add_rows(sums, *part(second), options.chip, False)

  d_rows = array((plan.chunk_queries * plan.places, plan.width), jnp.float32)
  return between, (entries, words, array(entries.shape[:2], bool), d_rows)


BETWEEN = Request("between", "tests.kernels.test_aot:between_two_chunks", {"length": 2**18, "share": 4096})


def test_lists_in_two_levels_and_what_is_between_two_chunks_compile(compiled):
  """At 262,144 tokens; a chunk whose sums are added and the next one's rows are one call of the SparseCore."""
  _, _, answer = compiled
  assert answer["ok"], answer["error"]
  assert not quadratic(answer["arrays"], 4096, 2**18 // FLASH.light_rate)
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


def gradient_near_the_border(chip, dtype, beyond):
  """The gradient of attention, Pro, with as many entries as the masked form's has room for, or one more."""
  queries, entries = 1024, forms.MASKED_GRADIENT[jnp.dtype(dtype).itemsize][chip] + beyond
  array = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct(shape, dtype)
  places = [array(1, n, dtype=jnp.int32) for n in (queries, queries, entries, entries)]
  moving = (array(1, queries, PRO.heads, PRO.width), array(1, queries, PRO.width), array(1, entries, PRO.width),
            array(PRO.heads))

  def total(q, window_kv, entries_BTd, sink, words, *places):
    selection = Selection.from_words(words, entries, entries // 4)
    names = ("positions", "segment_ids", "entry_last", "entry_segment")
    out, lse = attend(q, window_kv, entries_BTd, selection, sink, **dict(zip(names, places)), window=PRO.window, scale=0.1,
                      implementation="pallas")
    return out.astype(jnp.float32).sum() + lse.sum()
  words = array(1, queries, bits.num_words(entries), dtype=jnp.int32)
  return jax.grad(total, argnums=(0, 1, 2, 3)), (*moving, words, *places)


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
def test_the_compiler_has_room_at_the_border_of_the_masked_form_and_beyond(chip, dtype):
  requests = [Request(f"border + {beyond}", "tests.kernels.test_aot:gradient_near_the_border",
                      {"chip": chip.name, "dtype": dtype, "beyond": beyond}) for beyond in (0, 1)]
  with Compiler(chip.topology, schedules=False) as compiler:
    masked, sparse_one = compiler.compile_all(requests)
  assert masked["ok"] and sparse_one["ok"], (masked.get("error"), sparse_one.get("error"))
  assert "masked_attention_backward" in kernel_names(masked) and "attend_rows_backward" in kernel_names(sparse_one)


def test_the_suite_compiles_every_op_in_every_direction():
  found = {case.op: case.direction for chip in CHIPS for case in small_on(chip)}
  assert found == {op.name: op.directions[-1] for op in cases.OPS}


def test_arrays_with_a_number_for_every_query_and_key_are_found():
  dense = ["pred[1,8192,2048]", "bf16[8192,16,128]", "s8[1024,8,2048]", "f32[1,2048,8192]", "u8[8200,2100]"]
  fine = ["s32[1,8192,128]", "bf16[1,8192,128,512]", "bf16[2048,512]", "f32[1,1024,8,128]", "bf16[1,1048576,512]"]
  assert quadratic(dense + fine, 8192, 2048) == dense


def grid(op):
  """The bench's cases of an op, ours; of those that it measures at one length, since a token costs the same at all, also the
  other lengths, and sliding layers in decoding; selection and HCA also at a million tokens."""
  found = [case for case in cases.all_cases((op,), cases.LENGTHS) if case.side == OURS]
  if cases.BY_NAME[op].lengths == (4096,):
    found += [dataclasses.replace(case, length=length) for case in found if case.length for length in cases.LENGTHS[1:]]
  if op == "attention_window":
    found += [Case(op, model, DECODE, FORWARD) for model in MODELS]
  if op in ("select", "attention_heavy"):
    found += [Case(op, model, 2**20, cases.BY_NAME[op].directions[-1]) for model in MODELS]
  return found


def test_the_grid_has_every_op_at_every_length():
  lengths = {op.name: {case.length for case in grid(op.name)} for op in cases.OPS if not op.fixed}
  assert lengths.pop("kl_loss") == {*cases.LENGTHS}  # trains only
  assert all(2**20 in lengths[op] and not lengths[op].discard(2**20) for op in ("select", "attention_heavy"))
  assert all(found == {*cases.LENGTHS, DECODE} for found in lengths.values()), lengths


@pytest.mark.long
@pytest.mark.parametrize("op", cases.BY_NAME)
@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
def test_the_whole_grid_compiles(chip, op):
  wanted = [case for case in grid(op) if bounds.fits(case, chip)]
  assert not compile_for(chip, wanted)


def wrong_with_memory(length, kinds):
  """What is wrong with programs at this length: they do not compile, take more than their part of `LIMIT`, which is for 64K
  tokens, or hold a number for every query and entry."""
  found = []
  for case, answer in memory_run.compiled("v5p:2x2x2", (length,), (OURS,), lambda line: None, kinds):
    row = memory_run.row_of(case, answer)
    if row.get("beside", float("inf")) > memory_cases.LIMIT * length / memory_cases.LENGTH:
      found.append(row)
    keys = case.entries or length
    if told_apart(case, keys, case.shapes.heads // case.devices):  # HCA's 512 entries of 64K tokens are not
      found += quadratic(answer.get("arrays", ()), length, keys)
  return found


def test_attention_split_over_heads_takes_little_memory():
  """Forward and backward through the model's shard_map wrapper, heads over eight devices."""
  assert not wrong_with_memory(8192, (memory_cases.CSA,))


@pytest.mark.long
def test_attention_of_64k_tokens_takes_little_memory():
  assert not wrong_with_memory(memory_cases.LENGTH, memory_cases.KINDS)
