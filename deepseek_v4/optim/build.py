"""The whole optimizer of a run: clipping (V3 4.2), Muon and AdamW by the table, decay, one learning rate (report 2.4 and
4.2.2)."""

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
  return chain_of(optimizer_config, params, steps=steps, shardings=shardings)


def choices_of(optimizer_config: OptimizerConfig) -> dict[str, str]:
  """What a run's settings choose of the table, as `assign` takes it."""
  config = optimizer_config
  return {"muon_split": config.muon_split, "position_bias_owner": config.position_bias_owner,
          "matrix_owner": config.matrix_owner}


def chain_of(optimizer_config: OptimizerConfig, params: Any, *, steps: int | None = None, shardings: Any = None,
             norm: jax.Array | None = None,
             orthogonal: optax.GradientTransformation | None = None) -> optax.GradientTransformation:
  """`build_optimizer` for a tree that may be a part of what is optimized; the state is named as that of the whole.

  Args:
    norm: The gradient's norm over all parts, a float32 scalar; None: that of the gradients that are given.
    orthogonal: In the place of `orthogonalize`; None: that.
  """
  config, choices = optimizer_config, choices_of(optimizer_config)
  owners = assign(params, **choices)
  muon = scale_by_muon(momentum=config.momentum, update_rms=config.update_rms, axes=matrix_axes(params, **choices),
                       shardings=shardings, dtype=config.newton_schulz_dtype, momentum_dtype=config.momentum_dtype,
                       orthogonal=orthogonal)
  adam = scale_by_adam(config.adam_b1, config.adam_b2, config.adam_eps, config.adam_v_floor)
  clip = optax.clip_by_global_norm(config.clip_norm) if norm is None else _clip(norm, config.clip_norm)
  return optax.chain(
      optax.masked(clip, jax.tree.map(lambda owner: owner != FROZEN, owners)),
      optax.partition({MUON: muon, ADAMW: adam, FROZEN: optax.set_to_zero()}, owners),
      optax.add_decayed_weights(config.weight_decay, decay_mask(params, **choices)),
      optax.scale_by_learning_rate(make_schedule(config, steps)),
  )


def _clip(norm: jax.Array, largest: float) -> optax.GradientTransformation:
  """`optax.clip_by_global_norm`, bit for bit, for a norm that is known."""
  def clip(x: jax.Array) -> jax.Array:
    return jax.lax.select(norm < largest, x, (x / norm.astype(x.dtype)) * largest)
  return optax.stateless(lambda updates, _: jax.tree.map(clip, updates))
