"""Which form of the hyper-connections a TPU runs, from the static shape of the call alone: the kernel or plain XLA.

The figures are thousand cycles of one device by the compiler's schedule (`python -m launch.bench kernels`), Pro, bfloat16;
the kernel wins at all sizes and chips but one.
"""

from __future__ import annotations

# Tokens from which on the kernel is faster, where it is not always: before a kernel can start, the projection's float32
# numbers are cut into bfloat16 parts, which a few tokens do not pay for.
#
#     kernel / XLA              v5p          v6e          TPU7x
#     expand, 32 tokens         3.4 / 4.5    4.9 / 7.0    2.9 / 5.1
#     expand_collapse, 32       16 / 21      20 / 17      11 / 13
#     expand_collapse, 256      34 / 128     53 / 118     37 / 128
FEW_TOKENS = {("expand_collapse", "v6e"): 64}


def choose(op: str, tokens: int, chip: str) -> str:
  """"kernel" or "blockwise".

  Args:
    op: collapse, expand or expand_collapse.
    tokens: of all rows of the batch.
    chip: name of a `tpu.Chip`.
  """
  return "blockwise" if tokens < FEW_TOKENS.get((op, chip), 0) else "kernel"
