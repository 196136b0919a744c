"""FLOPs of the matmuls in a compiled program's text, loops multiplied out: what a device really executes outside kernels.

On a TPU a matmul is a convolution, batch axes of its operands are spatial ones with dilations that leave one position of the
kernel for each; so positions outside the input, or between its elements, must not be counted (XLA's own cost analysis does
the same, but counts a loop's body once).
"""

from __future__ import annotations

import functools
import math
import re
from typing import Mapping, Sequence

import numpy as np

from deepseek_v4.planning import hlo

_NAMED = re.compile(r"^\s+(?:ROOT )?%?([\w.\-<>]+) = \(*\w+\[([\d,]*)\]")
_MATMUL = re.compile(r" (dot|convolution)\((.*?)\)(.*)")
_OPERAND = re.compile(r"%([\w.\-<>]+)")
_WINDOW = re.compile(r"window=\{([^}]*)\}")
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
_Shapes = Mapping[str, tuple[int, ...]]


def flops(text: str) -> dict[str, int]:
  """FLOPs of one run of a compiled program on one device: "dots", and "more": those of one run of loops and branches of
  which the text does not say how often they run."""
  parts = hlo.computations(text)
  times, total = hlo.runs(parts), {"dots": 0, "more": 0}
  for name, lines in parts.items():
    own = of_lines(lines)
    known = times.get(name, 0)
    total["more" if known is None else "dots"] += own * (1 if known is None else known)
  return total


def of_lines(lines: Sequence[str]) -> int:
  """FLOPs of one run of a computation's own instructions."""
  shapes = {found[1]: _sizes(found[2]) for line in lines if (found := _NAMED.match(line))}
  return sum(_one(line, shapes) for line in lines)


def _sizes(text: str) -> tuple[int, ...]:
  return tuple(map(int, filter(None, text.split(","))))


def _one(line: str, shapes: _Shapes) -> int:
  found = _MATMUL.search(line)
  if not found or not (named := _NAMED.match(line)):
    return 0
  left, right = (shapes[name] for name in _OPERAND.findall(found[2])[:2])
  if found[1] == "dot":
    return 2 * math.prod(_sizes(named[2])) * math.prod(left[axis] for axis in _sizes(_CONTRACTED.search(found[3])[1]))
  return _convolution(left, right, _sizes(named[2]), found[3])


def _convolution(left: tuple[int, ...], right: tuple[int, ...], out: tuple[int, ...], attributes: str) -> int:
  of_left, of_right, of_out = _LABELS.search(attributes).groups()
  size = lambda shape, labels, label: shape[labels.index(label)]
  spatial = [label for label in of_right if label.isdigit()]
  window = dict(pair.split("=") for pair in found[1].split()) if (found := _WINDOW.search(attributes)) else {}
  number = lambda name, axis, default: window[name].split("x")[axis] if name in window else default
  positions = 1
  for axis, label in enumerate(spatial):
    low = int(number("pad", axis, "0_0").split("_")[0])
    steps = tuple(int(number(name, axis, "1")) for name in ("stride", "lhs_dilate", "rhs_dilate"))
    positions *= valid_positions(size(left, of_left, label), size(right, of_right, label), size(out, of_out, label), low,
                                 *steps)
  return 2 * positions * size(out, of_out, "b") * size(right, of_right, "i") * size(right, of_right, "o")


@functools.lru_cache(maxsize=4096)
def valid_positions(inputs: int, kernel: int, outputs: int, low: int, stride: int, dilation: int,
                    kernel_dilation: int) -> int:
  """Pairs of an output and a place of the kernel that meet an input, along one axis of a convolution.

  Args:
    low: padding in front of the inputs, which may be negative.
    dilation: distance of inputs. kernel_dilation: of places of the kernel.
  """
  shift = np.arange(kernel, dtype=np.int64) * kernel_dilation - low  # output o reads place o * stride + shift
  if stride == dilation == 1:  # of each place of the kernel the outputs from -shift to inputs - shift
    return int(np.maximum(np.minimum(outputs, inputs - shift) - np.maximum(0, -shift), 0).sum())
  place = np.arange(outputs, dtype=np.int64) * stride
  return sum(int(((at % dilation == 0) & (at >= 0) & (at < inputs * dilation)).sum()) for at in (place + s for s in shift))
