"""Collectives as XLA's text writes them: devices, bytes, whether the program waits, how often they run."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from deepseek_v4 import sharding
from deepseek_v4.config import MeshConfig
from deepseek_v4.planning.collectives import collectives, largest_gather, traffic

ARRAY = "bf16[8,128]{1,0:T(8,128)(2,1)}"  # 2,048 bytes
LINES = {
  f"%a.1 = {ARRAY} all-gather(%x), channel_id=1, replica_groups=[2,4]<=[8], dimensions={{0}}":
    ("all-gather", (0, 1, 2, 3), 1536, False),
  f"%a.2 = ({ARRAY}, {ARRAY}) all-to-all(%x, %y), replica_groups={{{{0,2}},{{1,3}}}}": ("all-to-all", (0, 2), 2048, False),
  f"%a.3 = {ARRAY} reduce-scatter(%x), replica_groups=[4,2]<=[2,4]T(1,0), dimensions={{0}}, to_apply=%add":
    ("reduce-scatter", (0, 4), 2048, False),
  f"%a.4 = {ARRAY} all-reduce(%x), replica_groups=[1,8]<=[8], to_apply=%add": ("all-reduce", tuple(range(8)), 3584, False),
  f"%a.5 = ({ARRAY}, {ARRAY}, u32[], u32[]) collective-permute-start(%x), source_target_pairs={{{{0,1}},{{1,0}}}}":
    ("collective-permute", (0, 1), 2048, True),
  "%a.6 = (bf16[2,128]{1,0}, bf16[8,128]{1,0}) all-gather-start(%x), replica_groups=[2,4]<=[8], dimensions={0}":
    ("all-gather", (0, 1, 2, 3), 1536, True),
  "%a.9 = (bf16[8,128]{1,0}, bf16[4,128]{1,0}) all-reduce-start(%x, %y), replica_groups={{0,1}}, to_apply=%add":
    ("all-reduce", (0, 1), 3072, True),
  "%a.10 = ((bf16[2,128]{1,0}, bf16[4,128]{1,0}), (bf16[8,128]{1,0}, bf16[16,128]{1,0})) all-gather-start(%x, %y), "
  "replica_groups=[2,4]<=[8], dimensions={0}": ("all-gather", (0, 1, 2, 3), 4608, True),
  f"%a.7 = {ARRAY} ragged-all-to-all(%x, %y, %a, %b, %c, %d), replica_groups=mesh['e'=4] {{'e'}}":
    ("ragged-all-to-all", (0, 1, 2, 3), 1536, False),
  f"%a.8 = ((bf16[32,128]{{1,0}}, {ARRAY}, s32[4]{{0}}), {ARRAY}, u32[]) ragged-all-to-all-start(%x, %y, %a), "
  "replica_groups={{0,1}}": ("ragged-all-to-all", (0, 1), 1024, True),
}


WORK = "  %work.1 = bf16[16,128] fusion(%z), kind=kLoop, calls=%other\n"


def until_done(line, work=WORK):
  """The line of a program and, if it starts something, other work and then its end."""
  done = f"{work}  %done = {ARRAY} {LINES[line][0]}-done({line.split()[0]})\n" if "-start(" in line else ""
  return f"  {line}\n{done}"


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.split()[0])
def test_one_instruction(line):
  (found,) = collectives(until_done(line))
  assert (found.kind, found.devices, found.bytes, found.starts) == LINES[line]
  (alone,) = collectives(until_done(line, work=""))  # the program has nothing to do until its end
  assert (alone.bytes, alone.starts) == (found.bytes, False)


FUSED = """HloModule step

%all-reduce-scatter.1.clone (input.3: bf16[3,64,32]) -> bf16[3,16,32] {
  %input.3 = bf16[3,64,32]{2,1,0} parameter(0)
  %all-reduce.7 = bf16[3,64,32]{2,1,0} all-reduce(%input.3), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %dynamic-slice.2 = bf16[3,16,32]{2,1,0:T(8,128)(2,1)} dynamic-slice(%all-reduce.7, %zero, %start, %zero)
}

ENTRY %main (p: bf16[3,64,32]) -> bf16[3,16,32] {
  %p = bf16[3,64,32]{2,1,0} parameter(0)
  ROOT %fusion.1 = bf16[3,16,32]{2,1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1.clone
}
"""
OTHERWISE = {  # line by line: what stands there instead
  "the sum itself is kept": (("%all-reduce.7 =", "ROOT %all-reduce.7 ="), ("ROOT %dynamic-slice.2", "%dynamic-slice.2")),
  "something else is sliced": (("dynamic-slice(%all-reduce.7", "dynamic-slice(%input.3"),),
  "another collective": (("%input.3 = bf16[3,64,32]{2,1,0} parameter(0)",
                          "%p = bf16[3,64,32] parameter(0)\n"
                          "  %input.3 = bf16[3,64,32] all-reduce(%p), replica_groups={{0,1,2,3}}"),),
  "it is only started": (("all-reduce(%input", "all-reduce-start(%input"),),
}


def test_a_fused_all_reduce_and_slice_is_a_reduce_scatter():
  """As libtpu 0.0.42 writes it: each of 4 devices receives three quarters of what all of them add."""
  (found,) = collectives(FUSED)
  assert (found.kind, found.bytes, found.runs) == ("reduce-scatter", 3 * 64 * 32 * 2 * 3 // 4, 1)


@pytest.mark.parametrize("changes", OTHERWISE.values(), ids=OTHERWISE)
def test_a_computation_of_that_name_that_does_something_else_is_not(changes):
  """All that is added arrives everywhere, twice three quarters of it."""
  text = FUSED
  for before, after in changes:
    assert text.count(before) == 1
    text = text.replace(before, after)
  assert {(one.kind, one.bytes) for one in collectives(text)} == {("all-reduce", 3 * 64 * 32 * 2 * 3 // 2)}


STARTED = """HloModule step

%async_computation.3 (p.1: bf16[8,128], p.2: bf16[32,128]) -> bf16[32,128] {
  %p.1 = bf16[8,128]{1,0} parameter(0)
  %p.2 = bf16[32,128]{1,0} parameter(1)
  ROOT %ragged.1 = bf16[32,128]{1,0} ragged-all-to-all(%p.1, %p.2, %a, %b, %c, %d), replica_groups={{0,1}}
}

ENTRY %main (x: bf16[8,128], y: bf16[32,128]) -> bf16[32,128] {
  %x = bf16[8,128]{1,0} parameter(0)
  %y = bf16[32,128]{1,0} parameter(1)
  %start.1 = ((bf16[8,128], bf16[32,128]), bf16[32,128], u32[]) async-start(%x, %y), calls=%async_computation.3
  %work.1 = bf16[16,128] fusion(%z), kind=kLoop, calls=%other
  ROOT %done.1 = bf16[32,128]{1,0} async-done(%start.1)
}
"""


def test_a_computation_that_is_started_may_run_beside_others():
  """As libtpu 0.0.42 writes a ragged exchange before it makes code of it: half of the 32 rows come from elsewhere."""
  (found,) = collectives(STARTED)
  assert (found.kind, found.bytes, found.starts, found.runs) == ("ragged-all-to-all", 32 * 128 * 2 // 2, True, 1)
  for text in (STARTED.replace("async-start", "call").replace("async-done", "copy"), STARTED.replace(WORK, "")):
    (waited,) = collectives(text)
    assert (waited.bytes, waited.starts) == (found.bytes, False)


SPARSE_CORE = """HloModule step

%called_computation (p.1: bf16[8,128], t.1: token[]) -> bf16[32,128] {
  ROOT %gather.1 = bf16[32,128] all-gather(%p.1), replica_groups={{0,1,2,3}}, dimensions={0}
}, execution_thread="sparsecore"

ENTRY %main (p: bf16[8,128], t: token[]) -> bf16[32,128] {
  %s = ((bf16[8,128], token[]), bf16[32,128]) call-start(%p, %t), to_apply=%called_computation
  %work.1 = bf16[16,128] fusion(%z), kind=kLoop, calls=%other
  ROOT %d = bf16[32,128] call-done(%s)
}
"""
NEWER = SPARSE_CORE.replace("  %s = ((bf16[8,128], token[]), bf16[32,128]) call-start(%p, %t), to_apply", """\
  %begin = ((), (), (s32[1]{0:T(128)S(2)})) call-start(), to_apply""").replace(WORK, f"""\
  %s = ((bf16[8,128]), bf16[32,128]) call-update(%begin, %p)
{WORK}""")
LAID_OUT = SPARSE_CORE.replace("call-start(%p, %t), to_apply=%called_computation", "async-start(%p, %t), calls=%nested")
LAID_OUT = LAID_OUT.replace("call-done", "async-done").replace("ENTRY", """\
%nested (p.2: bf16[8,128], t.2: token[]) -> bf16[32,128] {
  ROOT %called.2 = bf16[32,128] call(%p.2, %t.2), to_apply=%called_computation
}, execution_thread="sparsecore"

ENTRY""")


@pytest.mark.parametrize("text", [SPARSE_CORE, NEWER, LAID_OUT], ids=["libtpu 0.0.42", "0.0.50", "laid out by 0.0.42"])
def test_a_gather_that_a_sparse_core_runs(text):
  """Work in front of its arrays' arrival does not count."""
  (found,) = collectives(text)
  assert (found.kind, found.bytes, found.starts, found.runs) == ("all-gather", 32 * 128 * 2 * 3 // 4, True, 1)
  early = text.replace(WORK, "").replace("\n  %s = ", f"\n{WORK}  %s = ")
  for other in (text.replace(WORK, ""), early, re.sub("(call|async)-(start|done)", "call", text)):
    (waited,) = collectives(other)
    assert (waited.bytes, waited.starts) == (found.bytes, False)


def test_traffic_by_kind():
  alone = f"%b = {ARRAY} all-reduce(%x), replica_groups={{{{0}},{{1}}}}, to_apply=%add"
  row = lambda *numbers: dict(zip(("count", "started", "bytes", "hidden", "more"), numbers))
  assert traffic(collectives("".join(map(until_done, LINES)) + f"  {alone}\n")) == {
    "all-gather": row(3, 2, 7680, 6144, 0), "all-reduce": row(2, 1, 6656, 3072, 0), "all-to-all": row(1, 0, 2048, 0, 0),
    "collective-permute": row(1, 1, 2048, 2048, 0), "ragged-all-to-all": row(2, 1, 2560, 1024, 0),
    "reduce-scatter": row(1, 0, 2048, 0, 0)}


def test_the_largest_gather_is_told_by_its_result():
  found = collectives("".join(map(until_done, LINES)))
  assert largest_gather(found) == 16 * 128  # the second result of the one that starts two
  assert largest_gather([one for one in found if not one.starts]) == 8 * 128
  assert largest_gather([one for one in found if one.kind != "all-gather"]) == 0


@functools.cache
def program():
  """The text of a compiled scan of 5 steps in one of 3, with a sum over devices in each, and of a loop of unknown length."""
  mesh = sharding.make_mesh(MeshConfig(data=2), jax.devices()[:2])
  total = lambda x: jax.lax.psum(jnp.sin(x), "data")

  def run(x, count):
    inner = lambda x, _: (total(x), None)
    x, _ = jax.lax.scan(lambda x, _: jax.lax.scan(inner, total(x), None, length=5), x, None, length=3)
    return jax.lax.fori_loop(0, count[0], lambda _, x: total(x), x)
  with jax.set_mesh(mesh):
    return jax.jit(sharding.per_shard(run, (("batch",), ()), ("batch",))).lower(
      jnp.ones(2 * 64), jnp.ones(1, jnp.int32)).compile().as_text()


def test_loops_are_multiplied_out():
  found = [one for one in collectives(program()) if one.arrays == (("f32", (64,)),)]
  assert sorted(one.runs for one in found if one.runs) == [3, 15] and [one.runs for one in found].count(None) == 1
  assert traffic(found) == {"all-reduce": {"count": 3, "started": 0, "bytes": 18 * 256, "hidden": 0, "more": 256}}
