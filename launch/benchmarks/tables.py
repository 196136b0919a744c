"""README's tables from the JSON files of benches: kernels of each released model; forward, train, decode, remat; plans."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Iterable, Sequence

from launch.benchmarks import cases
from launch.benchmarks.cases import DECODE, PREFILL, REMAT
from launch.benchmarks.kernels import cases as kernel_cases
from launch.benchmarks.kernels.chips import CHIPS, chip_of
from launch.benchmarks.missing import measured

Row = dict[str, Any]

# What an op of the kernels is called where people read.
OPS = {"attention": "CSA attention", "attention_sparse": "CSA attention, picks alone", "attention_heavy": "HCA attention",
       "attention_window": "window attention", "select": "selection", "kl_loss": "indexer's loss",
       "collapse": "collapse", "expand": "expand", "expand_collapse": "expand + collapse", "experts": "experts"}
MODELS = {"pro": "V4-Pro", "flash": "V4-Flash"}
SIDES = {kernel_cases.BLOCKWISE: "plain XLA", kernel_cases.SPLASH: "splash, dense mask",
         kernel_cases.SPLASH_RULE: "splash, rule", kernel_cases.RAGGED: "`ragged_dot`"}

KEPT = {"none": "everything", "mhc": "sublayers' outputs and what is expensive in them",
        "block": "streams in front of each layer", "offload": "the same, in the host's memory",
        "full": "streams in front of groups of layers"}


def read(paths: Sequence[str]) -> list[dict[str, Any]]:
  """What benches and launch.plan wrote with --json, and what of a file of `launch.bench all` README has tables for; later
  files replace the rows of earlier ones.

  Raises:
    ValueError: no such file, or not a bench's.
  """
  found = []
  for path in paths:
    try:
      content = json.loads(Path(path).read_text(encoding="utf-8"))
      files = [part for part in content["parts"].values() if _kind(part)] if "parts" in content else [content]
      for file in files:
        file["versions"], file["date"], file["bounds"] if "fits" in file else file["rows"][0]["case"]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
      raise ValueError(f"tables: {path}: expected a file that a bench wrote with --json ({error})") from error
    found += files
  return found


def _kind(file: dict[str, Any]) -> str:
  """Which tables a file has figures for; "" = none."""
  first = {**(file.get("rows") or [{}])[0]}
  kind = DECODE if first.get("kind") == PREFILL else first.get("kind", "")
  return "plan" if "fits" in file else "kernels" if "chip" in first else kind if kind in cases.KINDS else ""


def markdown(files: Sequence[dict[str, Any]]) -> str:
  """All tables that the files have rows for, each behind a line with machine, versions and date."""
  of = {kind: [file for file in files if _kind(file) == kind] for kind in ("kernels", "plan", *cases.KINDS, "")}
  if of[""] or not files:
    raise ValueError("tables: a file of another bench than kernels, forward, train, decode, remat and plan: expected "
                     "those only")
  kernels = of["kernels"]
  parts = [f"V4-Pro and V4-Flash, {origin(kernels)}"] if kernels else []
  rows = {(row["case"], row["side"], row["chip"]): row for file in kernels for row in file["rows"]}.values()
  parts += [kernel_table(rows, name) for name in MODELS if any(row["model"] == name for row in rows)]
  make = {"forward": forward_table, "train": train_table, DECODE: decode_table, REMAT: remat_table}
  for kind in cases.KINDS:
    for file in of[kind]:
      parts += [origin([file], machine=True), make[kind](file["rows"])]
  parts += [origin(of["plan"]), plan_table(of["plan"])] if of["plan"] else []
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
  if not other or not ours or not measured(other) or not measured(ours):
    return "-"
  ratio = other["time_cycles"] / ours["time_cycles"]
  text = f"{ratio:.2f}" if ratio < 10 else f"{ratio:,.0f}"
  return f"**{text}**" if ratio < 1 else text


def _speed(row: Row | None) -> str:
  return "-" if row is None or not measured(row) else f"{row['tokens_per_second_per_chip']:,.0f}"


# ---- the model --------------------------------------------------------------------------------------------------------
def _by_length(rows: Sequence[Row]) -> dict[int, dict[tuple[bool, str], Row]]:
  """{length: {(ours, variant): its row}}; what was not measured has none."""
  return {length: {(row["ours"], row["variant"]): row for row in rows if row["length"] == length and measured(row)}
          for length in dict.fromkeys(row["length"] for row in rows)}


def _text(row: Row, figure: str, form: str = ",.0f", factor: float = 1) -> str:
  return "" if row.get(figure) is None else format(row[figure] * factor, form)


def _kib(*rows: Row) -> str:
  return ", ".join(filter(None, (_text(row, "activation_bytes_per_token", factor=2**-10) for row in rows)))


def _times(row: Row) -> str:
  """The other side's time over ours; bold where the other one wins."""
  return f"**{row['ratio']:.2f}**" if row.get("ratio", 1) < 1 else _text(row, "ratio", ".1f")


def forward_table(rows: Sequence[Row]) -> str:
  """Speed and memory of both sides at each length."""
  head = ["forward", "ours, tokens/s", "transformers", "ratio", "ours, KiB/token", "transformers",
          "share of the matmul rate"]
  lines = []
  for length, row in _by_length(rows).items():
    ours, theirs = row.get((True, ""), {}), row.get((False, ""), {})
    lines.append([f"{length:,}", _text(ours, "tokens_per_second"), _text(theirs, "tokens_per_second"), _times(ours),
                  _kib(ours), _kib(theirs), _text(ours, "matmul_share", ".0%")])
  return _table(head, lines)


def train_table(rows: Sequence[Row]) -> str:
  """The same of a step, with both ways of either side: all activations kept, and recomputed."""
  head = ["forward + backward + AdamW", "ours, tokens/s", "ours, layers recomputed", "transformers", "its checkpointing",
          "ratio", "ours, KiB/token, both ways", "transformers, both ways", "with Muon, all losses"]
  lines = []
  for length, row in _by_length(rows).items():
    ways = [row.get(key, {}) for key in ((True, ""), (True, "remat"), (False, ""), (False, "checkpointing"))]
    compared = next((one for one in ways[:2] if "ratio" in one), {})
    lines.append([f"{length:,}", *(_text(one, "tokens_per_second") for one in ways), _times(compared), _kib(*ways[:2]),
                  _kib(*ways[2:]), _text(row.get((True, "muon"), {}), "tokens_per_second")])
  return _table(head, lines)


def remat_table(rows: Sequence[Row]) -> str:
  """What each policy costs: time, the fastest pass, over that of the one that keeps everything; and memory."""
  lines = []
  for length, row in _by_length(rows).items():
    fastest = row.get((True, "none"), {}).get("seconds_min")
    for policy, kept in KEPT.items():
      one = row.get((True, policy), {})
      time = f"{one['seconds_min'] / fastest:.2f}" if fastest and one else ""
      lines.append([f"`{policy}`" + f", {length:,}" * (length not in cases.REMAT_LENGTHS), kept, time, _kib(one)])
  return _table(["`remat`", "kept", "time", "KiB/token"], lines)


def decode_table(rows: Sequence[Row]) -> str:
  """Tokens a second of each side in prefill and decoding at each length; the ratio is that of the bench."""
  sides = list(dict.fromkeys(row["side"] for row in rows))
  head = ["", *(f"{side}, tokens/s" for side in sides), "ratio", "share of the matmul rate"]
  lines = []
  for name in dict.fromkeys(row["case"] for row in rows):
    own = {row["side"]: row for row in rows if row["case"] == name}
    ours = next((row for row in own.values() if row["ours"]), {})
    lines.append([name, *(_text(own.get(side, {}), "tokens_per_second") for side in sides), _text(ours, "ratio", ".2f"),
                  _text(ours, "matmul_share", ".0%")])
  return _table(head, lines)


# ---- plans ------------------------------------------------------------------------------------------------------------
def plan_table(files: Sequence[dict[str, Any]]) -> str:
  """Memory of a chip (GiB; of all its devices), least time and utilisation of each step that was compiled."""
  lines = []
  for file in files:
    chip = chip_of(file["topology"])
    gib = chip.devices_per_chip / 2**30
    taken = f"{file['memory']['all'] * gib:.1f} of {file['hbm_bytes'] * gib:.1f}"
    verdict = f"{taken}, fits" if file["fits"] else f"**{taken}, does not fit**"
    slices = file.get("mesh", {}).get("dcn_data", 1)
    run = f"`{Path(file['config']).stem}`, {file['sequence_length']:,}, " + f"{slices} slices of " * (slices > 1)
    run += file["topology"] + f", {file['step']}" * (file["step"] != "train")
    lines.append([run, f"{file['devices'] // chip.devices_per_chip:,}", f"{file['memory']['peak'] * gib:.1f}", verdict,
                  f"{file['bounds']['step']:.3g} s", f"{file['utilization']:.0%}"])
  return _table(["run", "chips", "held at one time", "arguments, temporaries, code", "least step", "utilisation allowed"],
                lines)


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
  return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *lines))
