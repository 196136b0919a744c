"""What a compiled step says of itself: its memory and its kernels."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

_KERNEL = re.compile(r'%([\w\-]+?)(?:\.\d+)* = .*custom_call_target="tpu_custom_call"')


def memory(compiled: Any) -> dict[str, int]:
  """Bytes of one device: "arguments", "outputs", "aliased" (outputs in the arguments' place), "temporaries", "code"; "all" =
  what must fit its memory together. The compiler itself only refuses temporaries that alone do not fit."""
  found = compiled.memory_analysis()
  sizes = {"arguments": found.argument_size_in_bytes, "outputs": found.output_size_in_bytes,
           "aliased": found.alias_size_in_bytes, "temporaries": found.temp_size_in_bytes,
           "code": found.generated_code_size_in_bytes}
  return sizes | {"all": sum(sizes.values()) - 2 * sizes["aliased"]}


def kernels(compiled: Any) -> dict[str, int]:
  """How many calls of each Pallas kernel the program holds, by the name of its call; one inside a loop counts once."""
  return dict(sorted(Counter(_KERNEL.findall(compiled.as_text())).items()))
