"""A compiled program's instructions and the Pallas calls of a traced one: bytes, loops, windows, calls of the SparseCore."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from launch.benchmarks.kernels import program

HLO = """\
HloModule jit_f

%fused (p0: f32[64,8], p1: s32[]) -> f32[1,8] {
  %p0 = f32[64,8]{1,0:T(8,128)} parameter(0)
  %p1 = s32[]{:T(128)} parameter(1)
  ROOT %ds = f32[1,8]{1,0:T(8,128)} dynamic-slice(%p0, %p1, %p1), dynamic_slice_sizes={1,8}
}

%condition (t: (s32[], f32[64,8])) -> pred[] {
  %t.1 = (s32[]{:T(128)}, f32[64,8]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%t.1), index=0
  %n = s32[]{:T(128)} constant(5)
  ROOT %less = pred[]{:T(512)} compare(%i, %n), direction=LT
}

%loop (t: (s32[], f32[64,8])) -> (s32[], f32[64,8]) {
  %t = (s32[]{:T(128)}, f32[64,8]{1,0:T(8,128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%t), index=0
  %x = f32[64,8]{1,0:T(8,128)} get-tuple-element(%t), index=1
  %part = f32[1,8]{1,0:T(8,128)} fusion(%x, %i.1), kind=kLoop, calls=%fused
  %kernel.1 = bf16[16,128]{1,0:T(8,128)(2,1)} custom-call(%part), custom_call_target="tpu_custom_call", CONFIG
  ROOT %again = (s32[]{:T(128)}, f32[64,8]{1,0:T(8,128)}) tuple(%i.1, %x)
}

ENTRY %main (a: f32[64,8]) -> f32[64,8] {
  %a = f32[64,8]{1,0:T(8,128)} parameter(0)
  %near = f32[64,8]{1,0:T(8,128)S(1)} copy(%a)
  %zero = s32[]{:T(128)} constant(0)
  %start = (s32[]{:T(128)}, f32[64,8]{1,0:T(8,128)}) tuple(%zero, %a)
  %w = (s32[]{:T(128)}, f32[64,8]{1,0:T(8,128)}) while(%start), condition=%condition, body=%loop
  ROOT %r = f32[64,8]{1,0:T(8,128)} get-tuple-element(%w), index=1
}
"""
HLO = HLO.replace("CONFIG", """\
backend_config={"used_scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"4096"}]}""")


def test_a_program_is_its_instructions_times_their_loops():
  padded = 64 * 128 * 4  # eight lanes take a row of 128
  slice_ = 8 * 128 * 4
  assert program.parts(HLO) == [
      program.Part("near", False, 1, True, padded, 0),  # what is written to VMEM costs no HBM
      program.Part("part", False, 5, True, slice_ + slice_, 0),
      program.Part("kernel.1", True, 5, True, slice_ + 16 * 128 * 2, 4096)]


def test_parts_of_tuples_as_newer_compilers_name_them():
  """"%t#1" where older texts take the part out by an instruction; also of what a fusion with two results makes."""
  newer = re.sub(r"  %(i.1|x) = .*\n", "", HLO).replace("%i.1", "%t#0").replace("%x", "%t#1")
  assert newer.count("#") == 4 and program.parts(newer) == program.parts(HLO)
  text = """\
%pair (p0: f32[8,128]) -> (f32[8,128], f32[16,128]) {
  %p0 = f32[8,128]{1,0:T(8,128)} parameter(0)
  %longer = f32[16,128]{1,0:T(8,128)} broadcast(%p0)
  ROOT %both = (f32[8,128]{1,0:T(8,128)}, f32[16,128]{1,0:T(8,128)}) tuple(%p0, %longer)
}

%fused (p0: f32[8,128]) -> (f32[16,128]) {
  %p0 = f32[8,128]{1,0:T(8,128)} parameter(0)
  %inner = (f32[8,128]{1,0:T(8,128)}, /*index=1*/f32[16,128]{1,0:T(8,128)}) fusion(%p0), kind=kLoop, calls=%pair
  ROOT %one = (f32[16,128]{1,0:T(8,128)}) tuple(%inner#1)
}

ENTRY %main (a: f32[8,128]) -> (f32[16,128]) {
  %a = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %f = (f32[16,128]{1,0:T(8,128)}) fusion(%a), kind=kLoop, calls=%fused
}
"""
  (part,) = program.parts(text)
  assert part.hbm_bytes == (8 + 16) * 128 * 4


def test_a_kernels_operand_in_vmem_is_told():
  """By its number, and a result by its place from the end; the copy that brings it is a part by itself."""
  text = HLO.replace("custom-call(%part)", "custom-call(%part, %near.1)").replace("  %kernel.1 =", """\
  %near.1 = f32[64,8]{1,0:T(8,128)S(1)} copy(%x)
  %kernel.1 =""")
  copy, kernel = program.parts(text)[2:]
  assert (copy.hbm_bytes, copy.near) == (64 * 128 * 4, ())
  assert (kernel.hbm_bytes, kernel.near) == (8 * 128 * 4 + 16 * 128 * 2, (1,))
  text = text.replace("bf16[16,128]{1,0:T(8,128)(2,1)} custom", "(f32[8]{0}, s32[8]{0:S(1)}, bf16[8]{0}) custom")
  assert program.parts(text)[3].near == (1, -2)


def test_arrays_are_those_outside_of_fusions():
  """What only a fusion's inside has, %ds, is nowhere in memory."""
  assert program.arrays(HLO.replace("ROOT %ds = f32", "ROOT %ds = f64")) == ["bf16[16,128]", "f32[1,8]", "f32[64,8]"]


def test_an_array_updated_in_place_costs_its_update():
  fused = """
%fused.1 (p0: f32[64,8], p1: f32[1,8], p2: s32[]) -> f32[64,8] {
  %p0.1 = f32[64,8]{1,0:T(8,128)} parameter(0)
  %p1.1 = f32[1,8]{1,0:T(8,128)} parameter(1)
  %p2.1 = s32[]{:T(128)} parameter(2)
  %view = f32[64,8]{1,0:T(8,128)} bitcast(%p0.1)
  %write = f32[64,8]{1,0:T(8,128)} dynamic-update-slice(%view, %p1.1, %p2.1, %p2.1)
  ROOT %again.1 = f32[64,8]{1,0:T(8,128)} bitcast(%write)
}

%loop ("""
  update = """  %written = f32[64,8]{1,0:T(8,128)} fusion(%x, %part, %i.1), kind=kLoop, calls=%fused.1
  %kernel.1 ="""
  text = HLO.replace("\n%loop (", fused).replace("  %kernel.1 =", update)
  assert program.parts(text)[2] == program.Part("written", False, 5, True, 2 * 8 * 128 * 4, 0)


def test_an_array_that_a_fusion_calls_by_other_tiles_is_the_same_memory():
  """As libtpu writes the update of one layer's bytes in the stack of all: the update is read and written."""
  text = """\
%tiles (p: u8[20,64,128]) -> u8[20,64,128] {
  %p = u8[20,64,128]{2,1,0:T(32,128)(4,1)} parameter(0)
  ROOT %same = u8[20,64,128]{2,1,0:T(8,128)(4,1)} copy(%p)
}

%fused (p0: u8[20,64,128], p1: u8[1,64,128], p2: s32[]) -> u8[20,64,128] {
  %p0 = u8[20,64,128]{2,1,0:T(32,128)(4,1)} parameter(0)
  %p1 = u8[1,64,128]{2,1,0:T(32,128)(4,1)} parameter(1)
  %p2 = s32[]{:T(128)} parameter(2)
  %other = u8[20,64,128]{2,1,0:T(8,128)(4,1)} fusion(%p0), output_to_operand_aliasing={{}: (0, {})}, calls=%tiles
  ROOT %dus = u8[20,64,128]{2,1,0:T(32,128)(4,1)} dynamic-update-slice(%other, %p1, %p2, %p2, %p2)
}

ENTRY %main (a: u8[20,64,128], b: u8[1,64,128], i: s32[]) -> u8[20,64,128] {
  %a = u8[20,64,128]{2,1,0:T(32,128)(4,1)} parameter(0)
  %b = u8[1,64,128]{2,1,0:T(32,128)(4,1)} parameter(1)
  %i = s32[]{:T(128)} parameter(2)
  ROOT %f = u8[20,64,128]{2,1,0:T(32,128)(4,1)} fusion(%a, %b, %i), kind=kLoop, calls=%fused
}
"""
  (part,) = program.parts(text)
  assert part.hbm_bytes == 2 * 64 * 128


def test_an_array_that_is_only_laid_out_anew_is_read_and_written():
  text = HLO.replace("ROOT %ds = f32[1,8]{1,0:T(8,128)} dynamic-slice(%p0, %p1, %p1), dynamic_slice_sizes={1,8}",
                     "ROOT %ds = f32[64,8]{0,1:T(8,128)} copy(%p0)")
  text = text.replace("%part = f32[1,8]{1,0:T", "%part = f32[64,8]{0,1:T")
  assert program.parts(text)[1].hbm_bytes == 64 * 128 * 4 + 8 * 128 * 4


def test_a_loop_of_unknown_length_counts_once_and_says_so():
  parts = program.parts(HLO.replace("constant(5)", "parameter(1)"))
  assert [(part.times, part.certain) for part in parts] == [(1, True), (1, False), (1, False)]


def _kernel(ids, x, y, out):
  out[...] = x[...] + y[...]


def test_pallas_calls_say_what_their_pipeline_moves():
  def run(ids, x, y):
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1, grid=(4, 6),
        in_specs=[pl.BlockSpec((8, 128), lambda i, j, ids: (i, 0)),
                  pl.BlockSpec((8, 128), lambda i, j, ids: (ids[i * 6 + j], 0))],
        out_specs=pl.BlockSpec((8, 128), lambda i, j, ids: (i // 2, 0)))
    return pl.pallas_call(_kernel, grid_spec=grid, out_shape=jax.ShapeDtypeStruct((32, 128), jnp.float32), name="named",
                          compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")))(ids, x, y)

  array = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)
  traced = jax.make_jaxpr(jax.jit(run))(array(24, dtype=jnp.int32), array(32, 128), array(64, 128))
  [call] = program.calls(traced.jaxpr)
  block = 8 * 128 * 4
  assert (call.name, call.grid, call.parallel) == ("named", (4, 6), 4)
  window = lambda number, moves, listed=False: program.Window(block, moves, listed, number)
  assert call.windows == (window(0, 4), window(1, None, True), window(2, 2)) and call.numbers == 1
  assert program.window_bytes(call, 24, visits=10) == program.window_bytes(call, 24, visits=(10,)) == block * (4 + 10 + 2)
  assert program.window_bytes(call, 24, visits=1000) == block * (4 + 24 + 2)
  # Behind the prefetched numbers: x is operand 1, y operand 2, and the only result is the last one.
  assert [program.window_bytes(call, 24, 10, near=[number]) for number in (1, 2, -1)] == [
      block * 12, block * 6, block * 14]
  # Two cores: a block that stays the same for all steps goes to each of them.
  whole = dataclasses.replace(call, windows=(window(0, 1), *call.windows[1:]))
  assert [program.window_bytes(x, 24, 10, cores=2) for x in (call, whole)] == [block * 16, block * (2 + 10 + 2)]
  assert program.call_from_json(json.loads(json.dumps(dataclasses.asdict(call)))) == call


def test_cores_share_a_kernel_only_where_an_axis_is_long_enough():
  def grid(*sizes, semantics):
    run = pl.pallas_call(lambda out: None, grid=sizes, out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
                         compiler_params=pltpu.CompilerParams(dimension_semantics=semantics))
    [call] = program.calls(jax.make_jaxpr(lambda: run())().jaxpr)
    return call.parallel
  assert grid(1, 6, semantics=("parallel", "arbitrary")) == 1 == grid(4, 6, semantics=("arbitrary", "arbitrary"))
  assert grid(4, 6, semantics=("parallel", "arbitrary")) == 4 and grid(2, 3, semantics=("parallel", "parallel")) == 6


# ---- the SparseCore ---------------------------------------------------------------------------------------------------
BESIDE = """\
HloModule m

ENTRY %main (t: s32[64,256], n: s32[4096]) -> s32[4096,256] {
  %t = s32[64,256]{1,0:T(8,128)} parameter(0)
  %n = s32[4096]{0:T(1024)} parameter(1)
  %gather_rows.3 = ((s32[64,256]{1,0:T(8,128)}, s32[4096]{0}, token[]), s32[4096,256]{1,0:T(8,128)}) call-start(%t, %n)
  %attend.1 = f32[8,128]{1,0:T(8,128)} custom-call(%t), custom_call_target="tpu_custom_call"
  %done.3 = s32[4096,256]{1,0:T(8,128)} call-done(%gather_rows.3)
  %add_rows.4 = ((f32[64,512]{1,0:T(8,128)}, s32[4096]{0:T(1024)}), f32[64,512]{1,0:T(8,128)}) call-start(%s, %n)
  %done.4 = f32[64,512]{1,0:T(8,128)} call-done(%add_rows.4)
  %add_rows_and_gather.5 = (ARGUMENTS, s32[4096,256]{1,0}, f32[64,512]{1,0}) call-start(%t, %n, %s, %m, %r)
  ROOT %done.5 = (s32[4096,256]{1,0}, f32[64,512]{1,0}) call-done(%add_rows_and_gather.5)
}
""".replace("ARGUMENTS", "(s32[64,256]{1,0}, s32[4096]{0}, f32[64,512]{1,0}, s32[32]{0}, f32[32,512]{1,0})")


def test_calls_of_the_sparse_core_are_told_apart():
  """A gather reads the rows that it writes, not its table; a kernel between its start and its end runs beside it."""
  gather, attend, add, both = program.parts(BESIDE)
  assert (gather.sparse_core, gather.overlaps, gather.hbm_bytes) == (True, True, 2 * 4096 * 1024 + 4096 * 4)
  assert (attend.sparse_core, attend.kernel) == (False, True)
  assert (add.sparse_core, add.overlaps, add.hbm_bytes) == (True, False, 2 * 64 * 2048 + 4096 * 4)
  assert both.hbm_bytes == gather.hbm_bytes + 2 * 64 * 2048 + 32 * (4 + 2048)


def test_a_gather_of_single_numbers_reads_a_granule_for_each():
  """However little of the table a number is, the least that a copy reads comes with it."""
  text = BESIDE.replace("s32[4096,256]{1,0:T(8,128)}) call-start(%t, %n)", "s32[4096]{0:T(1024)}, u32[]) call-start(%t, %n)")
  gather = program.parts(text)[0]
  assert (gather.sparse_core, gather.hbm_bytes) == (True, 4096 * program.GRANULE + 2 * 4096 * 4)


def test_calls_that_a_newer_compiler_starts_empty():
  start = "%start.3 = ((), (), (s32[1]{0:T(128)S(2)})) call-start()\n  "
  text = BESIDE.replace("%gather_rows.3 = (", start + "%gather_rows.3 = (")
  text = text.replace("call-start(%t, %n)", "call-update(%start.3, %t, %n)")
  start, *others = program.parts(text)
  assert (start.sparse_core, start.hbm_bytes) == (False, 0)
  assert others == program.parts(BESIDE)




def test_a_gather_between_devices_is_no_lookup():
  """Of several arrays at once on a SparseCore, as older and as newer compilers start it: parts are read, all are written."""
  a, b, whole = "bf16[8,128]{1,0:T(8,128)(2,1)}", "bf16[16,128]{1,0:T(8,128)(2,1)}", "bf16[64,128]{1,0:T(8,128)(2,1)}"
  older = f"%all-gather.7.cloned.1.call-start = (({a}, {b}, token[]), ({whole}, {whole})) call-start(%p, %q, %t)"
  newer = ("%all-gather.7.cloned.1.call-start = ((), (), (s32[1]{0:T(128)S(2)})) call-start()\n"
           f"  %all-gather.7.cloned.1.call-update = (({a}, {b}), ({whole}, {whole})) call-update("
           "%all-gather.7.cloned.1.call-start, %p, %q)")
  for lines in (older, newer):
    text = f"ENTRY %main (p: bf16[8,128], q: bf16[16,128]) -> bf16[64,128] {{\n  %p = {a} parameter(0)\n" \
           f"  %q = {b} parameter(1)\n  {lines}\n}}\n"
    assert sum(p.hbm_bytes for p in program.parts(text)) == (8 + 16 + 64 + 64) * 128 * 2
