"""Names of what an op's gradient reads and is expensive to make again, for `jax.checkpoint_policies`.

A name counts inside `jax.checkpoint` only, and there only with a policy that mentions it. It must be given where the
gradient takes the array from: in a written gradient's forward rule, since a name given to the op's result is that of a copy.
"""

from __future__ import annotations

import jax
from jax.ad_checkpoint import checkpoint_name

ATTENTION = "attention"  # output and log-sum-exp
INDEX_LOSS = "index_loss"  # two numbers per query
EXPERTS = "experts"  # of each routed row


def named(name: str, *arrays: jax.Array) -> tuple[jax.Array, ...]:
  """The same arrays, of any shape and dtype, named."""
  return tuple(checkpoint_name(x, name) for x in arrays)
