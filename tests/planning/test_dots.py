"""FLOPs of matmuls in a compiled program by hand: of the CPU's compiler, and of lines as the TPU's writes them."""

import jax
import jax.numpy as jnp
import pytest

from deepseek_v4.planning import dots


def flops(function, *shapes):
  operands = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
  return dots.flops(jax.jit(function).lower(*operands).compile().as_text())


def test_a_matmul_is_counted_as_often_as_its_loops_run():
  def run(x, weights):
    inner = lambda x, w: (x @ w, None)
    x, _ = jax.lax.scan(lambda x, _: jax.lax.scan(inner, x, weights), x, None, length=3)
    return x @ weights[0]
  assert flops(run, (32, 64), (5, 64, 64)) == {"dots": (3 * 5 + 1) * 2 * 32 * 64 * 64, "more": 0}


def test_a_loop_of_unknown_length_is_told_apart():
  def run(x, count):
    return jax.lax.fori_loop(0, count[0].astype(jnp.int32), lambda _, x: x @ x, x @ x)
  assert flops(run, (64, 64), (1,)) == {"dots": 2 * 64**3, "more": 2 * 64**3}


def test_batch_axes_are_multiplied_out():
  assert flops(lambda x, y: jnp.einsum("bij,bjk->bik", x, y), (7, 32, 48), (7, 48, 40))["dots"] == 2 * 7 * 32 * 48 * 40


IN_A_LOOP = """HloModule step

%body (p: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %p = (s32[], f32[8,8]{1,0}) parameter(0)
  %x = f32[8,8]{1,0} get-tuple-element(%p), index=1
  %k = f32[8,8]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", kernel_metadata={
"block_q": 128
}, metadata={op_name="kernel"}
  %y = f32[8,8]{1,0} dot(%k, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %out = (s32[], f32[8,8]{1,0}) tuple(%i, %y)
}

%condition (p: (s32[], f32[8,8])) -> pred[] {
  %p = (s32[], f32[8,8]{1,0}) parameter(0)
  %end = s32[]{:T(128)} constant(20)
  ROOT %less = pred[] compare(%p#0, %end), direction=LT
}

ENTRY %main (p: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %p = (s32[], f32[8,8]{1,0}) parameter(0)
  ROOT %loop = (s32[], f32[8,8]{1,0}) while(%p), condition=%condition, body=%body
}
"""


def test_a_kernel_whose_attributes_have_lines_of_their_own_ends_no_loop():
  """As libtpu 0.0.52 writes kernels with metadata: what stands behind one still runs 20 times."""
  assert dots.flops(IN_A_LOOP) == {"dots": 20 * 2 * 8**3, "more": 0}


HEAD = ["  %p.1 = bf16[{left}]{{1,0:T(8,128)(2,1)}} parameter(0)", "  %p.2 = bf16[{right}]{{1,0}} parameter(1)"]


@pytest.mark.parametrize("left, right, line, wanted", [
  ("512,256", "256,128", "%c = f32[512,128]{1,0:T(8,128)} convolution(%p.1, %p.2), dim_labels=bf_io->bf, metadata={}",
   2 * 512 * 256 * 128),
  # Eight pairs of matrices: a spatial axis that leaves one place of the kernel to each output.
  ("8,512,256", "8,256,128", "ROOT %c = f32[8,512,128]{2,1,0} convolution(%p.1, %p.2), "
   "window={size=8 stride=7 lhs_dilate=8}, dim_labels=0bf_0io->0bf", 2 * 8 * 512 * 256 * 128),
  # A contracted axis of the output as the kernel's window: all 16 places of the input, once.
  ("16,512,4", "16,4,128", "%c = f32[1,512,128]{2,1,0} convolution(%p.1, %p.2), window={size=16}, dim_labels=0bf_0io->0bf",
   2 * 16 * 512 * 4 * 128),
  # One axis of each operand in the output: the kernel, reversed, slides over a padded input of one.
  ("1,512,4", "16,4,128", "%c = f32[16,512,128]{2,1,0} convolution(%p.1, %p.2), "
   "window={size=16 pad=15_15 rhs_reversal=1}, dim_labels=0bf_0io->0bf", 2 * 16 * 512 * 4 * 128),
  ("64,256", "128,256", "%c = f32[64,128]{1,0} dot(%p.1, %p.2), lhs_contracting_dims={1}, rhs_contracting_dims={1}",
   2 * 64 * 128 * 256),
], ids=["matrices", "batch", "window", "outer", "dot"])
def test_one_instruction(left, right, line, wanted):
  lines = [text.format(left=left, right=right) for text in HEAD] + ["  " + line]
  assert dots.of_lines(lines) == wanted


@pytest.mark.parametrize("inputs, kernel, outputs, low, stride, dilation, kernel_dilation", [
  (5, 3, 3, 0, 1, 1, 1), (5, 3, 5, 1, 1, 1, 1), (4, 3, 9, 2, 1, 2, 1), (9, 2, 3, -1, 2, 1, 3), (8, 8, 8, 0, 7, 8, 1)])
def test_positions_by_trying_each(inputs, kernel, outputs, low, stride, dilation, kernel_dilation):
  wanted = sum((at := o * stride + k * kernel_dilation - low) >= 0 and at % dilation == 0 and at // dilation < inputs
               for o in range(outputs) for k in range(kernel))
  assert dots.valid_positions(inputs, kernel, outputs, low, stride, dilation, kernel_dilation) == wanted
