"""README's tables from the JSON files of benches: kernels of each released model; forward, train, decode."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Iterable, Sequence

from launch.benchmarks import cases
from launch.benchmarks.kernels import cases as kernel_cases
from launch.benchmarks.kernels.chips import CHIPS

Row = dict[str, Any]

# What an op of the kernels is called where people read.
OPS = {"attention": "CSA attention", "attention_sparse": "CSA attention, picks alone", "attention_heavy": "HCA attention",
       "attention_window": "window attention", "select": "selection", "kl_loss": "indexer's loss",
       "collapse": "collapse", "expand": "expand", "expand_collapse": "expand + collapse", "experts": "experts"}
MODELS = {"pro": "V4-Pro", "flash": "V4-Flash"}
SIDES = {kernel_cases.BLOCKWISE: "plain XLA", kernel_cases.SPLASH: "splash, dense mask",
         kernel_cases.SPLASH_RULE: "splash, rule", kernel_cases.RAGGED: "`ragged_dot`"}


def read(paths: Sequence[str]) -> list[dict[str, Any]]:
  """What benches wrote with --json; later files replace the rows of earlier ones.

  Raises:
    ValueError: no such file, or not a bench's.
  """
  found = []
  for path in paths:
    try:
      content = json.loads(Path(path).read_text(encoding="utf-8"))
      content["rows"][0]["case"], content["versions"], content["date"]
    except (OSError, ValueError, LookupError, TypeError) as error:
      raise ValueError(f"tables: {path}: expected a file that a bench wrote with --json ({error})") from error
    found.append(content)
  return found


def markdown(files: Sequence[dict[str, Any]]) -> str:
  """All tables that the files have rows for, each behind a line with machine, versions and date."""
  kernels = [file for file in files if "chip" in file["rows"][0]]
  model = [file for file in files if file["rows"][0].get("kind") in (*cases.KINDS, cases.PREFILL)]
  if len(kernels) + len(model) < len(files):
    raise ValueError("tables: a file of another bench than kernels, forward, train and decode: expected those only")
  parts = [f"V4-Pro and V4-Flash, {origin(kernels)}"] if kernels else []
  rows = {(row["case"], row["side"], row["chip"]): row for file in kernels for row in file["rows"]}.values()
  parts += [kernel_table(rows, name) for name in MODELS if any(row["model"] == name for row in rows)]
  for file in model:
    parts += [origin([file], machine=True), model_table(file["rows"])]
  return "\n\n".join(parts)


def origin(files: Sequence[dict[str, Any]], machine: bool = False) -> str:
  """Where figures come from: versions, days, and the machine if it was the one that ran."""
  told = ("jax", "torch", "transformers") if machine else ("jax", "libtpu")
  versions = {f"{name} {file['versions'][name]}": 0 for file in files for name in told if name in file["versions"]}
  days = sorted({file["date"][:10] for file in files})
  where = f"{files[0]['machine']['processor']}, {files[0]['machine']['cores']} cores, " if machine else ""
  return where + ", ".join([*versions, " to ".join(dict.fromkeys((days[0], days[-1])))])


# ---- kernels ----------------------------------------------------------------------------------------------------------
def kernel_table(rows: Iterable[Row], model: str) -> str:
  """One model's: how many times longer each other side takes than ours on each chip; what ours does in a second."""
  rows = [row for row in rows if row["model"] == model]
  chips = [chip.name for chip in CHIPS if any(row["chip"] == chip.name for row in rows)]
  sides = [side for side in SIDES if any(row["side"] == side for row in rows)]
  order = list(OPS)
  head = [f"{MODELS[model]}: {' / '.join(chips)}", *(SIDES[side] for side in sides), "ours, tokens/s/chip"]
  keys = {(row["op"], row["length"], row["direction"]) for row in rows}
  lines = []
  for op, length, direction in sorted(keys, key=lambda key: (order.index(key[0]), key[1] or 2**40, key[2])):
    cells = {(row["side"], row["chip"]): row for row in rows
             if (row["op"], row["length"], row["direction"]) == (op, length, direction)}
    way = "forward" if direction == kernel_cases.FORWARD else "forward + backward"
    name = f"{OPS[op]}, {length:,}, {way}" if length else f"{OPS[op]}, decoding"
    joined = [" / ".join(_ratio(cells.get((side, chip)), cells.get((kernel_cases.OURS, chip))) for chip in chips)
              if any((side, chip) in cells for chip in chips) else "" for side in sides]
    speeds = " / ".join(_speed(cells.get((kernel_cases.OURS, chip))) for chip in chips)
    lines.append([name, *joined, speeds])
  return _table(head, lines)


def _ratio(other: Row | None, ours: Row | None) -> str:
  """Times longer; bold where the other one wins; a dash where one of them was not measured or does not compile."""
  if not other or not ours or "failed" in other or "failed" in ours:
    return "-"
  ratio = other["time_cycles"] / ours["time_cycles"]
  text = f"{ratio:.2f}" if ratio < 10 else f"{ratio:,.0f}"
  return f"**{text}**" if ratio < 1 else text


def _speed(row: Row | None) -> str:
  return "-" if row is None or "failed" in row else f"{row['tokens_per_second_per_chip']:,.0f}"


# ---- the model --------------------------------------------------------------------------------------------------------
def model_table(rows: Sequence[Row]) -> str:
  """Tokens a second of each side at each length; the ratio is that of the bench."""
  sides = list(dict.fromkeys(row["side"] for row in rows))
  head = ["", *(f"{side}, tokens/s" for side in sides), "ratio", "share of the matmul rate"]
  lines = []
  for name in dict.fromkeys(row["case"] for row in rows):
    own = {row["side"]: row for row in rows if row["case"] == name}
    ours = next((row for row in own.values() if row["ours"]), {})
    speeds = [f"{own[side]['tokens_per_second']:,.0f}" if "tokens_per_second" in own.get(side, {}) else "" for side in sides]
    ratio, share = ours.get("ratio"), ours.get("matmul_share")
    lines.append([name, *speeds, "" if ratio is None else f"{ratio:.2f}", "" if share is None else f"{share:.0%}"])
  return _table(head, lines)


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
  return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *lines))
