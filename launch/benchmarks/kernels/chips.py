"""What is known of each TPU, per JAX device: the bounds that a schedule is held against."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
  """One TPU generation as JAX shows it: a v5p or v6e device is a chip, a TPU7x device is half of one.

  Matrix rates are jax's `tpu_info` (459e12, 920e12 and 1,155e12 bfloat16 FLOP/s); divided by what a cycle can do they give
  the clocks: 1.75 GHz for v5p and v6e, 2.2 GHz for TPU7x, the latter on the assumption that its cycle does as much as
  v6e's. HBM rates are the Cloud documentation's for v5p (2,765 GB/s) and v6e (1,638 GB/s) and half of TPU7x's 7,380 GB/s; so
  are the bidirectional rates of the interconnect, 1,200, 800 and half of 1,200 GB/s.
  The HBM size is what the compiler lets a program use, from its own out-of-memory message.

  Attributes:
    name: as `pallas_kernels.tpu` calls it, the key of the kernels' tables of tile sizes.
    topology: the smallest one that the compiler offers as a slice of whole chips.
    clock: Hz.
    flops_per_cycle: bfloat16 operations of the matrix units in a cycle.
    hbm_rate: bytes per second.
    hbm_bytes: of one device.
    vmem_bytes: of one TensorCore.
    cores: TensorCores that share a device's grid; each runs the schedule for its own part.
    devices_per_chip: JAX devices that make a chip.
    link_rate: bytes per second that a device sends and receives, both together, over the interconnect of a slice.
  """

  name: str
  topology: str
  clock: float
  flops_per_cycle: int
  hbm_rate: float
  hbm_bytes: int
  vmem_bytes: int
  cores: int
  devices_per_chip: int
  link_rate: float

  @property
  def bytes_per_cycle(self) -> float:
    """HBM bytes in a cycle."""
    return self.hbm_rate / self.clock


CHIPS = (
    Chip("v5p", "v5p:2x2x1", 1.75e9, 262_144, 2.765e12, int(95.74 * 2**30), 64 * 2**20, 2, 1, 1.2e12),
    Chip("v6e", "v6e:2x2", 1.75e9, 524_288, 1.638e12, int(31.25 * 2**30), 128 * 2**20, 1, 1, 0.8e12),
    Chip("tpu7x", "TPU7x:2x2x1", 2.2e9, 524_288, 3.69e12, int(94.75 * 2**30), 64 * 2**20, 1, 2, 0.6e12),
)


def chip_of(topology: str) -> Chip:
  """The chip of a topology's name, e.g. of "v5p:2x2x1".

  Raises:
    ValueError: no such chip, or no shape behind its name.
  """
  name, _, shape = topology.partition(":")
  found = [chip for chip in CHIPS if chip.name == name.lower()]
  sizes = shape.split("x")
  if not found or not all(size.isdecimal() and int(size) > 0 for size in sizes):
    examples = ", ".join(chip.topology for chip in CHIPS)
    raise ValueError(f"--topology = {topology!r}: expected a chip and the shape of a slice, such as {examples}")
  return found[0]
