"""Which form of the indexer's loss a TPU runs, from the static shape of the call alone: the kernels or plain XLA."""

from __future__ import annotations

from pallas_kernels import tpu

_BESIDES = 8 * 2**20  # bytes of VMEM that the backward kernel takes beside the keys' gradients, rounded up


def choose_loss(entries: int, width: int, chip: tpu.Chip) -> str:
  """"kernel" or "blockwise".

  The backward kernel keeps the gradient of all index keys in VMEM in float32: up to 110,592 entries of width 128 on v5p and
  TPU7x (442K tokens), 241,664 on v6e (967K). By the schedule plain XLA is slower at every length that was compared.

  Args:
    entries: of one row of the batch.
    width: of an index key.
  """
  sums = entries * tpu.round_up(width, tpu.LANES) * 4
  return "kernel" if sums + _BESIDES <= chip.vmem * 2**20 else "blockwise"
