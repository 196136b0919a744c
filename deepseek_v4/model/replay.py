"""Choices handed to a pass instead of made by it: which experts, which compressed entries (report 4.2.3 and 5.1).

Anticipatory routing replays choices that older parameters made, reinforcement learning those of the sampler. Only choices
are given: features, gate weights and losses come from the current parameters, and no gradient passes a choice.

Axis letters: L layers   B batch   S sequence   E experts   k experts per token   K picks per query   T entries
"""

from __future__ import annotations

import dataclasses
from typing import Any, Mapping, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from deepseek_v4 import sharding
from deepseek_v4.config import CSA, LEARNED, ModelConfig
from deepseek_v4.config_checks import refuse
from deepseek_v4.model.context import Context, form, known_values
from pallas_kernels.selection import Selection


@flax.struct.dataclass
class Replay:
  """What `DeepseekV4` takes as `replay`; None = the pass chooses itself. The forms are those of `ModelOutput.routing`.

  Attributes:
    experts: int32 [L, B, S, k] of the layers, distinct along k. A hash layer reads its table whatever stands here. Where a
      place is no token, anything may stand.
    selection: one `Selection` for each CSA layer, in order, made on rows of the same documents. The indexer then selects
      nothing; its loss is that of the given entries.
    mtp_experts: int32 [B, S, k] of the multi-token-prediction block, in a pass that runs it.
  """

  experts: jax.Array | None = None
  selection: tuple[Selection, ...] | None = None
  mtp_experts: jax.Array | None = None

  @staticmethod
  def of(routing: Mapping[str, Any]) -> "Replay":
    """The choices of a pass, from its `ModelOutput.routing`."""
    return Replay(routing["experts"], routing.get("selection"), routing.get("mtp_experts"))


@flax.struct.dataclass
class Choice:
  """What is given to one layer: experts int32 [B, S, k], the entries of its queries; None = it chooses itself."""

  experts: jax.Array | None = None
  selection: Selection | None = None


def csa_layers(config: ModelConfig) -> list[int]:
  """Numbers of the layers that have an indexer."""
  return [i for i, kind in enumerate(config.layer_types) if kind == CSA]


def choices(replay: Replay | None, config: ModelConfig, context: Context, segment_ids: jax.Array | None,
            back: jax.Array | None, runs_mtp: bool) -> tuple[list[Choice], Choice]:
  """What is given to each layer and to the prediction block; see `DeepseekV4.__call__`.

  Args:
    context: of the pass.
    segment_ids: int32 [B, S], as the caller gave them.
    back: int32 [B, S], where the caller's places went, if `make_chunk_context` moved them.
    runs_mtp: whether the pass runs the prediction block.

  Raises:
    ValueError: choices that do not fit the model or the tokens. Ids are looked at where they have values, that is outside
      of jit; inside of it a token with an unknown expert becomes NaN, and unknown entries are seen by no query.
  """
  layers = [Choice()] * config.num_hidden_layers
  if replay is None:
    return layers, Choice()
  if not isinstance(replay, Replay):
    refuse("replay", type(replay).__name__, "None or a dsv4.Replay")
  shape = context.tokens.shape
  _check_experts("replay.experts", replay.experts, (config.num_hidden_layers, *shape), config, segment_ids)
  _check_experts("replay.mtp_experts", replay.mtp_experts, shape, config, segment_ids)
  if replay.mtp_experts is not None and not runs_mtp:
    refuse("replay.mtp_experts", form(replay.mtp_experts), "None in a pass without the prediction block")
  selections = _checked_selection(replay.selection, config, context)

  order = None if back is None else jnp.argsort(back, axis=1)

  def put(x, rows):
    """An array whose axes from `rows` on are batch and sequence, at the places of the context."""
    if order is not None:
      x = jnp.take_along_axis(x, jnp.expand_dims(order, (*range(rows), *range(rows + 2, x.ndim))), rows + 1)
    return sharding.constrain(x, (*(None,) * rows, "batch", "sequence", *(None,) * (x.ndim - rows - 2)))

  if replay.experts is not None:
    experts_LBSk = put(jnp.asarray(replay.experts, jnp.int32), 1)
    layers = [Choice(experts_LBSk[i]) for i in range(len(layers))]
  for i, selection in zip(csa_layers(config), selections):
    layers[i] = layers[i].replace(selection=jax.tree.map(lambda x: put(x, 0), selection))
  of_mtp = None if replay.mtp_experts is None else put(jnp.asarray(replay.mtp_experts, jnp.int32), 0)
  return layers, Choice(of_mtp)


def stacked(of_layers: Sequence[Choice]) -> Choice:
  """The choices of layers of one kind, for a scan over them."""
  return jax.tree.map(lambda *x: jnp.stack(x), *of_layers)


# ---- checks --------------------------------------------------------------------------------------------------------------
def _check_experts(name: str, experts: Any, rows: tuple[int, ...], config: ModelConfig,
                   segment_ids: Any) -> None:
  if experts is None:
    return
  wanted = (*rows, config.num_experts_per_tok)
  if np.shape(experts) != wanted or not jnp.issubdtype(getattr(experts, "dtype", object), jnp.integer):
    axes = "[layers, batch, sequence, experts per token]" if len(wanted) == 4 else "[batch, sequence, experts per token]"
    raise ValueError(f"{name} = {form(experts)}: expected integers {axes} = {wanted}")
  values, segments = known_values(experts), known_values(np.ones(wanted[-3:-1]) if segment_ids is None else segment_ids)
  if values is None or segments is None:
    return
  learned = [i for i, kind in enumerate(config.mlp_layer_types) if kind == LEARNED]
  values = (values[learned] if len(wanted) == 4 else values[None])[:, segments > 0]  # [layers, tokens, k]
  count = config.n_routed_experts
  if values.size and not (0 <= values.min() and values.max() < count):
    wrong = values[(values < 0) | (values >= count)][0]
    refuse(name, int(wrong), f"ids from 0 to {count - 1} (n_routed_experts = {count}) at every token")
  ordered = np.sort(values, -1)
  if (again := ordered[..., 1:] == ordered[..., :-1]).any():
    refuse(name, int(ordered[..., 1:][again][0]), "each expert of a token once, not twice")


def _checked_selection(selection: Any, config: ModelConfig, context: Context) -> Sequence[Selection]:
  if selection is None:
    return ()
  layers = csa_layers(config)
  if not isinstance(selection, (tuple, list)) or len(selection) != len(layers):
    found = f"{len(selection)} entries" if isinstance(selection, (tuple, list)) else type(selection).__name__
    raise ValueError(f"replay.selection = {found}: expected one Selection for each of the {len(layers)} CSA layers")
  if context.attention_mode == "dense":
    raise ValueError("replay.selection: expected None with attention_mode = 'dense', where every visible entry is read")
  count = context.places(CSA)[0].shape[1] if layers else 0
  for i, one in enumerate(selection):
    name = f"replay.selection[{i}]"
    if not isinstance(one, Selection):
      refuse(name, type(one).__name__, "a Selection")
    arrays = jax.tree.leaves(one)
    if any(x.shape[:2] != context.tokens.shape or not jnp.issubdtype(x.dtype, jnp.integer) for x in arrays):
      raise ValueError(f"{name} = {', '.join(map(form, arrays))}: expected integers [batch, sequence, ...] of the tokens' "
                       f"shape {context.tokens.shape}")
    if one.kind == "bits" and one.num_entries != count:
      refuse(f"{name}.num_entries", one.num_entries, f"{count}, the entries of these rows")
    values = known_values(one.picks)
    if values is not None and values.size and values.max() >= count:
      refuse(name, int(values.max()), f"entry numbers below {count}, or -1 = empty")
  return [dataclasses.replace(one, picks=jnp.where(one.picks < count, one.picks, -1)) for one in selection]
