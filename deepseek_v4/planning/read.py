"""What a compiled step says of itself: its memory and its kernels."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from deepseek_v4.planning import hlo

# Behind the name a number, and of newer compilers ".refs_0_" where operands lie in references.
_KERNEL = re.compile(r'%([\w\-]+)(?:\.\w+)* = .*custom_call_target="tpu_custom_call"')

_TRANSFORMED = re.compile(r"^(?:(?:transpose|jvp|vmap|checkpoint)_)+(.*?)_*$")

# Of the memory that the compiler lets a program use, what a plan may take: the rest is for what is not in the program, such
# as the next batch and what the runtime needs.
SHARE = 0.9


def memory(compiled: Any) -> dict[str, int]:
  """Bytes of one device: "arguments", "outputs", "aliased" (outputs in the arguments' place), "temporaries", "code"; "all" =
  what must fit its memory together; "peak" = the most that lives at one time, arguments and on-chip memory included, where
  the compiler says it (else 0).

  The compiler only refuses what is beyond the memory at one time. Of a step with loops "temporaries" can be a third more:
  buffers that never live together do not all share their places (a scan of 16 layers: 4,352 MiB beside 258 of arguments,
  peak 4,482). So a step that it accepts may still not fit by "all", which is the careful figure.
  """
  found = compiled.memory_analysis()
  sizes = {"arguments": found.argument_size_in_bytes, "outputs": found.output_size_in_bytes,
           "aliased": found.alias_size_in_bytes, "temporaries": found.temp_size_in_bytes,
           "code": found.generated_code_size_in_bytes}
  peak = getattr(found, "peak_memory_in_bytes", 0)
  return sizes | {"all": sum(sizes.values()) - 2 * sizes["aliased"], "peak": peak}


def fits(memory: dict[str, int], hbm_bytes: int) -> bool:
  """Whether a program leaves a tenth of the memory that the compiler lets it use."""
  return memory["all"] <= SHARE * hbm_bytes


def kernels(compiled: Any) -> dict[str, int]:
  """How many calls of each Pallas kernel the program holds, by the name of its call; one inside a loop counts once."""
  return dict(sorted(Counter(_KERNEL.findall(compiled.as_text())).items()))


def executed(text: str) -> dict[str, int]:
  """How often each kernel runs in a step, loops multiplied out, those of unknown length left out; by the name that its
  author gave it, without what JAX's transformations put around."""
  parts = hlo.computations(text)
  runs, found = hlo.runs(parts), Counter()
  for name, lines in parts.items():
    for kernel in _KERNEL.findall("\n".join(lines)):
      found[_TRANSFORMED.sub(r"\1", kernel)] += runs.get(name, 0) or 0
  return dict(sorted(found.items()))
