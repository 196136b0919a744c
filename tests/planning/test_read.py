"""What is read from a compiled program's text."""

from types import SimpleNamespace

from deepseek_v4.planning import read

TEXT = """
  %attend.1 = bf16[8]{0} custom-call(%x), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/pallas_call"}
  %attend.2.refs_0_ = bf16[8]{0} custom-call(%x), custom_call_target="tpu_custom_call", metadata={op_name="f/pallas_call"}
  ROOT %b_2 = (bf16[8]{0}, s32[]) custom-call(%y), custom_call_target="tpu_custom_call", metadata={op_name="b"}
  %attend.3 = bf16[8]{0} custom-call(%y), custom_call_target="Sharding", metadata={op_name="jit(f)/attend"}
"""


def test_kernels_are_counted_by_name():
  assert read.kernels(SimpleNamespace(as_text=lambda: TEXT)) == {"attend": 2, "b_2": 1}


def test_memory_has_the_compilers_numbers():
  analysis = SimpleNamespace(argument_size_in_bytes=1, output_size_in_bytes=3, alias_size_in_bytes=2, temp_size_in_bytes=4,
                             generated_code_size_in_bytes=5, peak_memory_in_bytes=9)
  assert read.memory(SimpleNamespace(memory_analysis=lambda: analysis)) == {
    "arguments": 1, "outputs": 3, "aliased": 2, "temporaries": 4, "code": 5, "all": 1 + 3 - 2 + 4 + 5, "peak": 9}


def test_what_fits_leaves_a_tenth():
  assert read.fits({"all": 90}, 100) and not read.fits({"all": 91}, 100)


LOOP = """
%body.1 (p.1: (s32[], bf16[8])) -> (s32[], bf16[8]) {
  %jvp_attend_.4 = bf16[8]{0} custom-call(%x), custom_call_target="tpu_custom_call", metadata={op_name="a"}
}

%cond.1 (p.2: (s32[], bf16[8])) -> pred[] {
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (x: bf16[8]) -> bf16[8] {
  %attend.1 = bf16[8]{0} custom-call(%x), custom_call_target="tpu_custom_call", metadata={op_name="a"}
  %transpose_jvp_attend_backward__.2 = bf16[8]{0} custom-call(%x), custom_call_target="tpu_custom_call", metadata={}
  %w = (s32[], bf16[8]) while(%t), condition=%cond.1, body=%body.1, backend_config={"known_trip_count":{"n":"5"}}
  %v = (s32[], bf16[8]) while(%t), condition=%cond.1, body=%other.1
}

%other.1 (p.1: (s32[], bf16[8])) -> (s32[], bf16[8]) {
  %sum.7 = bf16[8]{0} custom-call(%x), custom_call_target="tpu_custom_call", metadata={op_name="a"}
}
"""


def test_kernels_run_as_often_as_their_loops():
  assert read.executed(LOOP) == {"attend": 6, "attend_backward": 1, "sum": 0}
