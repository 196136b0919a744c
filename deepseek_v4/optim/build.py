"""The whole optimizer of a run: clipping, Muon and AdamW by the table, decay, one learning rate."""

from __future__ import annotations

from typing import Any

import jax
import optax

from deepseek_v4.config import OptimizerConfig
from deepseek_v4.optim.assign import ADAMW, FROZEN, MUON, assign, decay_mask, matrix_axes
from deepseek_v4.optim.muon import scale_by_adam, scale_by_muon
from deepseek_v4.optim.schedule import make_schedule


def build_optimizer(optimizer_config: OptimizerConfig, params: Any, *, steps: int | None = None,
                    shardings: Any = None) -> optax.GradientTransformation:
  """Builds W <- W (1 - lr decay) - lr O for every leaf, O by the leaf's owner (`assign.py`), the same lr for all.

  The gradient's global norm is clipped first, over all leaves that are not frozen. A frozen leaf (the router's bias and hash
  table, where the given tree holds them) gets an update of exactly zero, does not decay, has no state and does not count in
  the norm. `update` needs params.

  The state is a pytree of arrays: int32 counters, and moments at the paths of their parameters with masked nodes (no leaves)
  elsewhere: the momentum `.../trace/<path>` for Muon's leaves only, `.../mu/<path>` and `.../nu/<path>` for AdamW's only.

  Args:
    optimizer_config: All numbers.
    params: The tree that is optimized; arrays or ShapeDtypeStructs, only names and shapes are used.
    steps: Updates in the run (`training.steps`); may be None where the schedule has no cosine.
    shardings: Tree of NamedShardings or PartitionSpecs of params, for the step on a mesh; see `muon.orthogonalize`.

  Raises:
    ValueError: a leaf that the table does not know, or a schedule that does not fit into `steps`.
  """
  config = optimizer_config
  choices = {"muon_split": config.muon_split, "position_bias_owner": config.position_bias_owner,
             "matrix_owner": config.matrix_owner}
  owners = assign(params, **choices)
  muon = scale_by_muon(momentum=config.momentum, update_rms=config.update_rms, axes=matrix_axes(params, **choices),
                       shardings=shardings, dtype=config.newton_schulz_dtype, momentum_dtype=config.momentum_dtype)
  adam = scale_by_adam(config.adam_b1, config.adam_b2, config.adam_eps, config.adam_v_floor)
  return optax.chain(
      optax.masked(optax.clip_by_global_norm(config.clip_norm), jax.tree.map(lambda owner: owner != FROZEN, owners)),
      optax.partition({MUON: muon, ADAMW: adam, FROZEN: optax.set_to_zero()}, owners),
      optax.add_decayed_weights(config.weight_decay, decay_mask(params, **choices)),
      optax.scale_by_learning_rate(make_schedule(config, steps)),
  )
