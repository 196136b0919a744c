"""What the backward pass finds in memory and what it makes again: `ModelConfig.remat`, by name.

    none      everything that a gradient reads is kept
    mhc       the sublayers' results and what their gradients read and is expensive: outputs, attention with its log-sum-exp,
              selections, products with as long a sum as D, routed rows. Made again: coefficients, collapsed inputs and
              streams, from the first streams of a unit (mHC 4.3; report 3.4.2), beside norms, rotations and the expansions
              of the latents (the queries would be a third more to keep, for sums of q_lora_rank numbers only)
    block     the streams in front of each layer; the layer is made again
    offload   as block, but these streams wait in the host's memory
    full      the streams in front of each group of layers, about as many as a group has (`two_levels.py`); a group's
              streams are made again, and then each of its layers

Arrays are named with `checkpoint_name` where they are made, those inside kernels' gradients by `pallas_kernels/names.py`;
outside `jax.checkpoint` a name does nothing. Where experts are split over devices, their rows have room for more than a
device's own picks, gathered many times more and sent a quarter more: there mhc makes the routed rows again.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

from deepseek_v4 import sharding
from deepseek_v4.config import ModelConfig
from pallas_kernels import names

SUBLAYER = "sublayer"
STREAMS = "streams"


def keep(tree: Any, name: str = SUBLAYER) -> Any:
  """The same arrays, named for the policies."""
  return jax.tree.map(functools.partial(checkpoint_name, name=name), tree)


def _kept(config: ModelConfig) -> list[str]:
  """The names of what `mhc` keeps, on the ambient mesh."""
  rows = [] if sharding.weight_axes("expert", config.n_routed_experts) else [names.EXPERTS]
  return [SUBLAYER, names.ATTENTION, names.INDEX_LOSS, *rows]


def recomputed(module: type[nn.Module], config: ModelConfig) -> type[nn.Module]:
  """A module, of one layer or of the scan's unit, as the policy wants it in the backward pass.

  A layer is made again when the gradient of what comes out of it is there (`prevent_cse`), also in a scan's body, which
  needs nothing else to keep XLA from merging it with the forward pass: layers of a unit would be made again at once.
  """
  if config.remat == "none":
    return module
  policies = jax.checkpoint_policies
  policy = None
  if config.remat == "mhc":
    policy = policies.save_only_these_names(*_kept(config))
  elif config.remat == "offload":
    policy = policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=[STREAMS], offload_src="device", offload_dst="pinned_host")
  return nn.remat(module, policy=policy)
