"""How much of its selection a query shares with its neighbours, in the indexer layers of a trained run.

A sparse attention that gathers the union of g neighbouring queries' entries once reads union / g entries per query instead
of k: that pays where the union is small. Only groups of queries of one document that all see at least twice as many entries
as they select count, since below that everything overlaps by itself.

Axis letters: B batch   S queries   T entries   K = k, picks of a query   G groups   g queries of a group
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Callable, Sequence

import jax
import numpy as np

from deepseek_v4.analysis.trace import trace
from deepseek_v4.checkpoint.store import restore_variables
from deepseek_v4.config import CSA, RunConfig, from_dict
from deepseek_v4.model.transformer import DeepseekV4
from deepseek_v4.training.data import make_dataset

GROUPS = (2, 4, 8, 16)
LENGTHS = (512, 2048)  # tokens of a row
TOKENS = 16384  # of held-out text, about

Row = dict[str, Any]


def shared(selected_BSK: np.ndarray, visible_BS: np.ndarray, segment_ids_BS: np.ndarray, group: int) -> Row:
  """Means over all groups of `group` neighbouring queries that start at a multiple of it.

  Args:
    selected_BSK: entry numbers, -1 = empty. visible_BS: entries that a query sees. segment_ids_BS: 0 = not a token.

  Returns:
    `union`: entries that any of a group selects, in units of k; `chance`: the same if every query drew its k entries blindly
    from those it sees; `overlap`: share of a query's entries that the next one of the group selects too; `groups`: how many.
  """
  picks = selected_BSK.shape[2]
  whole = selected_BSK.shape[1] // group * group
  cut = lambda x: x[:, :whole].reshape(-1, group, *x.shape[2:])
  selected_GgK, visible_Gg, segment_Gg = map(cut, (selected_BSK, visible_BS, segment_ids_BS))
  counts = (segment_Gg == segment_Gg[:, :1]).all(1) & (segment_Gg[:, 0] > 0) & (visible_Gg >= 2 * picks).all(1)
  selected_GgK, visible_Gg = selected_GgK[counts], visible_Gg[counts]
  if not len(selected_GgK):
    return {"groups": 0, "union": None, "chance": None, "overlap": None}
  unions, overlaps = [], []
  for queries in selected_GgK:
    chosen = [set(entries.tolist()) - {-1} for entries in queries]
    unions.append(len(set.union(*chosen)) / picks)
    overlaps += [len(a & b) / picks for a, b in zip(chosen, chosen[1:])]
  left_out = (1 - picks / visible_Gg).prod(1)
  chance = visible_Gg.mean(1) * (1 - left_out) / picks
  return {"groups": len(unions), "union": float(np.mean(unions)), "chance": float(chance.mean()),
          "overlap": float(np.mean(overlaps))}


def measure(folder: str | None, lengths: Sequence[int], say: Callable[[str], None]) -> list[Row]:
  """A row per indexer layer, length and group size, of the newest checkpoint in a folder, on held-out text of its run.

  Raises:
    ValueError: no folder, or a model without an indexer. FileNotFoundError: no usable checkpoint.
  """
  if folder is None or not Path(folder).is_dir():
    raise ValueError(f"--checkpoint = {folder!r}: expected the checkpoints of a run, such as runs/tiny/checkpoints")
  variables, settings, step = restore_variables(folder)
  config = from_dict(RunConfig, settings)
  layers = [number for number, spec in enumerate(config.model.layer_specs) if spec.attention == CSA]
  if not layers:
    raise ValueError(f"--checkpoint = {folder!r}: its model has no layer with an indexer")
  return [row for length in lengths for row in _rows_of(config, variables, layers, length, step, say)]


def _rows_of(config: RunConfig, variables: Any, layers: Sequence[int], length: int, step: int,
             say: Callable[[str], None]) -> list[Row]:
  """The rows of all `layers` at one length."""
  model, picks = DeepseekV4(config.model), config.model.index_topk
  look = jax.jit(lambda *arguments: {name: x for name, x in trace(model, *arguments, layers=layers).items()
                                     if "/indexer/" in name})
  data = dataclasses.replace(config.data, sequence_length=length, batch_size=1, accumulation=1)
  batches = iter(make_dataset(data, config.model.vocab_size, split="held_out"))
  found, segments = [], []
  for _ in range(max(TOKENS // length, 1)):
    batch = {name: x[0] for name, x in next(batches).items()}  # of the one accumulation step
    found.append(jax.device_get(look(variables, batch["tokens"], batch["positions"], batch["segment_ids"])))
    segments.append(batch["segment_ids"])
  batches.close()
  entries = length // config.model.csa_compress_rate
  say(f"step {step}: {len(found)} rows of {length:,} tokens, {entries:,} entries, k = {picks}")
  joined = {name: np.concatenate([each[name] for each in found]) for name in found[0]}
  rows = []
  for layer in layers:
    visible = np.isfinite(joined[f"layers/{layer:02d}/indexer/scores"]).sum(-1)
    rows += [{"layer": layer, "length": length, "picks": picks, "group": group,
              **shared(joined[f"layers/{layer:02d}/indexer/selected"], visible, np.concatenate(segments), group)}
             for group in GROUPS]
  return rows


def table(rows: Sequence[Row]) -> str:
  """A line per layer and length: overlap of neighbours, and the unions beside those of blind draws."""
  lines = [["layer", "tokens", "overlap", *(f"union of {group} (by chance)" for group in GROUPS)]]
  for layer, length in dict.fromkeys((row["layer"], row["length"]) for row in rows):
    own = {row["group"]: row for row in rows if (row["layer"], row["length"]) == (layer, length)}
    cell = lambda row: "-" if row["union"] is None else f"{row['union']:.2f} ({row['chance']:.2f})"
    overlap = own[GROUPS[0]]["overlap"]
    lines.append([str(layer), f"{length:,}", "-" if overlap is None else f"{overlap:.2f}", *(cell(own[g]) for g in GROUPS)])
  widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
  return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)
