"""What is read from a compiled program's text."""

from types import SimpleNamespace

from deepseek_v4.planning import read

TEXT = """
  %attend.1 = bf16[8]{0} custom-call(%x), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/pallas_call"}
  %attend.2.1 = bf16[8]{0} custom-call(%x), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/pallas_call"}
  ROOT %b_2 = (bf16[8]{0}, s32[]) custom-call(%y), custom_call_target="tpu_custom_call", metadata={op_name="b"}
  %attend.3 = bf16[8]{0} custom-call(%y), custom_call_target="Sharding", metadata={op_name="jit(f)/attend"}
"""


def test_kernels_are_counted_by_name():
  assert read.kernels(SimpleNamespace(as_text=lambda: TEXT)) == {"attend": 2, "b_2": 1}


def test_memory_has_the_compilers_numbers():
  analysis = SimpleNamespace(argument_size_in_bytes=1, output_size_in_bytes=3, alias_size_in_bytes=2, temp_size_in_bytes=4,
                             generated_code_size_in_bytes=5)
  assert read.memory(SimpleNamespace(memory_analysis=lambda: analysis)) == {
    "arguments": 1, "outputs": 3, "aliased": 2, "temporaries": 4, "code": 5, "all": 1 + 3 - 2 + 4 + 5}
