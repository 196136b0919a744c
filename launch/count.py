"""Counts the parameters, operations, cache bytes and training memory of a model; nothing is allocated, JAX is not loaded.

python -m launch.count --config configs/v4_flash.py [--set model.num_hidden_layers=4]... [--context 1048576] [--json FILE]

`--config` is a run's Python file, or a released config.json or the folder that holds one.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, Mapping

from absl import app, flags

from deepseek_v4 import config as config_lib
from deepseek_v4.analysis.count import PRECISION, Count, count, v32_cost
from deepseek_v4.config import ModelConfig


def define_flags() -> None:
  flags.DEFINE_string("config", None, "Run file, released config.json, or its folder.", required=True)
  flags.DEFINE_multi_string("set", [], "KEY=VALUE replaces a setting of a run file; repeatable.")
  flags.DEFINE_integer("context", 1_048_576, "Tokens seen by the token whose cost is counted.")
  flags.DEFINE_integer("rewind", 0, "Tokens that the cache can be taken back by.")
  flags.DEFINE_integer("drafts", 0, "Tokens that speculation guesses at a time: the prediction block's cache counts, too.")
  flags.DEFINE_string("json", None, "Also write the numbers here.")


def load_model(path: str, overrides: list[str]) -> ModelConfig:
  """The model of a run file or of a released config.

  Raises:
    FileNotFoundError, ValueError: no such file, or one that says something else.
  """
  if path.endswith(".py"):
    return config_lib.load(path, overrides).model
  if overrides:
    raise ValueError(f"--set = {overrides!r}: expected a run file (.py) as --config beside it, not {path!r}")
  return ModelConfig.from_hf(path)


def to_json(result: Count) -> dict[str, Any]:
  """Everything that `count` found, sums included, as JSON can hold it."""
  found = dataclasses.asdict(result)
  p = result.parameters
  found["parameters"] |= {"total": p.total, "total_active": p.total_active, "total_mtp": p.total_mtp}
  found |= {"equivalent_flops": result.equivalent_flops, "kept_bytes": result.kept_bytes}
  return found


def _table(title: str, columns: Mapping[str, Mapping[str, int]], unit: float) -> list[str]:
  """Rows of numbers, one per part that is anywhere above zero, and their sum."""
  parts = [part for part in dict.fromkeys(name for column in columns.values() for name in column)
           if any(column.get(part) for column in columns.values())]
  lines = [title.ljust(26) + "".join(name.rjust(16) for name in columns)]
  for part in parts:
    lines.append(part.ljust(26) + "".join(f"{column.get(part, 0) / unit:16,.2f}" for column in columns.values()))
  return [*lines, "sum".ljust(26) + "".join(f"{sum(column.values()) / unit:16,.2f}" for column in columns.values()), ""]


def report(result: Count) -> str:
  """The numbers as text."""
  p, n = result.parameters, f"{result.context:,}"
  lines = _table("parameters, millions", {"main": p.main, "active": p.active, "mtp": p.mtp}, 1e6)
  v32 = v32_cost(result.context)
  named = lambda flops: {f"{part} ({PRECISION[part]})": found for part, found in flops.items()}
  lines += _table(f"decoding at {n}", {"GFLOP a token": named(result.flops_per_token), "V3.2": named(v32.flops)}, 1e9)[:-1]
  lines += [f"  of it {name}".ljust(26) + f"{found / 1e9:16,.2f}" for name, found in result.flops_by_precision.items()]
  lines += [f"in FP8 equivalents        {result.equivalent_flops / 1e9:16,.2f}{v32.equivalent_flops / 1e9:16,.2f}"
            "   (V3.2's index scores are FP8)", ""]
  lines += _table(f"cache at {n}, MiB", result.cache_bytes, 2**20)
  lines[-1:] = [f"kept beside V3.2's {v32.bytes / 2**20:,.2f}: {result.kept_bytes / 2**20:,.2f}", ""]
  lines += _table("training, GiB", {"all devices": result.training_bytes}, 2**30)
  lines += [f"parameters {p.total:,}, prediction block {p.total_mtp:,}, active for a token {p.total_active:,}",
            f"against V3.2 at {n}: {100 * result.ratio_to_v32['flops']:.1f}% of its FP8-equivalent operations, "
            f"{100 * result.ratio_to_v32['cache']:.1f}% of its cache (mixed storage without scales)"]
  for what, rules in result.by_other_rules.items():
    lines += [f"  {what} by other rules: " + ", ".join(f"{100 * ratio:.1f}% {rule}" for rule, ratio in rules.items())]
  return "\n".join(lines)


def main(argv: list[str]) -> None:
  if argv[1:]:
    raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
  values, path = flags.FLAGS, flags.FLAGS["json"].value
  try:
    if path is not None and (Path(path).is_dir() or not Path(path).absolute().parent.is_dir()):
      raise ValueError(f"--json = {path!r}: expected a file in a folder that exists")
    result = count(load_model(values["config"].value, values["set"].value), values["context"].value,
                   rewind=values["rewind"].value, drafts=values["drafts"].value)
  except (ValueError, FileNotFoundError) as error:
    sys.exit(f"error: {error}")
  print(report(result))
  if path is not None:
    Path(path).write_text(json.dumps(to_json(result), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
  define_flags()
  app.run(main)
