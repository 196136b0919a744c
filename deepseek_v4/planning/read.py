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
  their sum, the careful figure; "peak" = what the program holds, on-chip memory included, where the compiler says it (else
  0).

  The peak is arguments, outputs that are not in their place, and one region in which the compiler lays out all else; by
  that it refuses a step. The "temporaries" that it reports are that region and, once more, what of it is not alive by a
  count that seems to forget what a loop has carried as soon as the loop ends. Seen in the compiler's own buffer assignments
  (xla_dump_to, libtpu 0.0.42): a scan that keeps 1,024 MiB has a region of 1,216 MiB without a gap and 1,344 MiB of
  temporaries; without loops that keep something the two agree; of steps of whole models they are 1.4 to 1.6 times the
  region. So a step may be accepted whose temporaries alone are beyond the memory.
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
  runs, found = hlo.runs(parts), Counter[str]()
  for name, lines in parts.items():
    for kernel in _KERNEL.findall("\n".join(lines)):
      found[_TRANSFORMED.sub(r"\1", kernel)] += runs.get(name, 0) or 0
  return dict(sorted(found.items()))
