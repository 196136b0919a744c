"""Converts a released model to a checkpoint of ours, or a checkpoint (also of a training run) to a released folder.

python -m launch.convert --source RELEASE --target DIR --to orbax [--dtype bfloat16] [--drop_draft]
python -m launch.convert --source DIR --target RELEASE --to hf [--quantization none]

An interrupted conversion goes on, or starts clean, when the same command is given again.
"""

from __future__ import annotations

import sys
from typing import Any

from absl import app, flags, logging
from tqdm import tqdm


def define_flags() -> None:
  flags.DEFINE_string("source", None, "Folder that is read.", required=True)
  flags.DEFINE_string("target", None, "Folder that is made.", required=True)
  flags.DEFINE_enum("to", None, ["orbax", "hf"], "orbax: a checkpoint of ours; hf: a released folder.", required=True)
  flags.DEFINE_enum("quantization", None, ["none", "fp8", "fp8+fp4"],
                    "With --to hf: how matrices are stored; default as in the release that they came from.")
  flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"],
                    "Of weights that are not quantised; default float32 with --to orbax, bfloat16 with --to hf.")
  flags.DEFINE_bool("drop_draft", False, "With --to orbax: leave out mtp.* (prediction block, draft stages).")


def convert(source: str, target: str, to: str, quantization: str | None, dtype: str | None, drop_draft: bool) -> None:
  """Runs one conversion with a progress bar.

  Raises:
    ValueError, FileNotFoundError: options that do not belong to this direction, or what the conversion refuses.
  """
  from deepseek_v4.checkpoint.convert import to_checkpoint, to_release
  if to == "orbax" and quantization is not None:
    raise ValueError(f"--quantization = {quantization!r}: expected --to hf beside it; our checkpoints hold decoded weights")
  if to == "hf" and drop_draft:
    raise ValueError("--drop_draft: expected --to orbax beside it")
  options: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
  if quantization is not None:
    options["quantization"] = None if quantization == "none" else quantization
  with tqdm(unit="B", unit_scale=True, unit_divisor=1024) as bar:

    def progress(done: int, total: int) -> None:
      bar.total = total
      bar.update(done - bar.n)

    if to == "orbax":
      config = to_checkpoint(source, target, drop_draft=drop_draft, progress=progress, **options)
    else:
      config = to_release(source, target, progress=progress, **options)
  print(f"{config.num_hidden_layers} layers, {config.n_routed_experts} experts: {target} is complete")


def main(argv: list[str]) -> None:
  if argv[1:]:
    raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)  # Orbax tells at INFO level how it saves
  value = {name: flags.FLAGS[name].value for name in ("source", "target", "to", "quantization", "dtype", "drop_draft")}
  try:
    convert(**value)
  except (ValueError, FileNotFoundError) as error:
    if logging.get_verbosity() >= logging.DEBUG:
      raise
    sys.exit(f"error: {error}")


if __name__ == "__main__":
  define_flags()
  app.run(main)
