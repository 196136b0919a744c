"""What a compiled step says of itself: its memory and its kernels."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

_KERNEL = re.compile(r'custom_call_target="tpu_custom_call".*?op_name="([^"]*)"')


def memory(compiled: Any) -> dict[str, int]:
  """Bytes of one device: "arguments", "outputs", "aliased" (outputs in the arguments' place), "temporaries", "code"."""
  found = compiled.memory_analysis()
  return {"arguments": found.argument_size_in_bytes, "outputs": found.output_size_in_bytes,
          "aliased": found.alias_size_in_bytes, "temporaries": found.temp_size_in_bytes,
          "code": found.generated_code_size_in_bytes}


def kernels(compiled: Any) -> dict[str, int]:
  """How many calls of each Pallas kernel the program holds, by the kernel's name; a call inside a loop counts once."""
  names = (path.rsplit("/", 1)[-1] for path in _KERNEL.findall(compiled.as_text()))
  return dict(sorted(Counter(names).items()))
