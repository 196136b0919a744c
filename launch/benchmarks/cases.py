"""What is measured, and with which settings each side runs. No JAX, no torch: the parent process imports this."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Sequence

import numpy as np

from deepseek_v4.config import ModelConfig

KINDS = ("forward", "train")
OURS, TRANSFORMERS = "ours", "transformers"
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
LONGEST_AGAINST = 4096  # transformers' attention holds [heads, S, S + S / 4]: beyond this it does not fit
LONGEST_WITHOUT_REMAT = 4096
SHORTEST_WITH_REMAT = 2048  # measured both ways from here on, so that short and long compare like with like
THREADS = 2
MEMORY_LIMIT = 16 * 2**30  # a side that needs more is stopped
LOGITS_ROWS, LOGITS_LENGTH, LOGITS_TOLERANCE = 4, 512, 2e-4
CONFIG, WEIGHTS = Path(__file__).with_name("bench_config.json"), "weights.npz"
ADAMW = {"learning_rate": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}

# Both sides get huge pages for their temporaries, and neither is slowed by looking for anything on a network.
ENVIRONMENT = {
    OURS: {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "JAX_PLATFORMS": "cpu", "NPROC": str(THREADS),
           "JAX_ENABLE_COMPILATION_CACHE": "false"},
    TRANSFORMERS: {"THP_MEM_ALLOC_ENABLE": "1", "OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1",
                   "TRANSFORMERS_VERBOSITY": "error"},
}
_LABELS = {"": "", "remat": ", remat", "muon": ", full step with Muon", "checkpointing": ", checkpointing"}


@dataclasses.dataclass(frozen=True)
class Case:
  """One side of one measurement.

  Attributes:
    kind: "forward" or "train"; "weights" and "logits" prepare and check.
    side: OURS or TRANSFORMERS.
    length: tokens of the one row.
    variant: of train. Ours: "" keeps all activations, "remat" recomputes layers, "muon" is the step that launch.train
      runs, with Muon and all losses. Theirs: "" or "checkpointing".
  """

  kind: str
  side: str
  length: int
  variant: str = ""

  @property
  def name(self) -> str:
    return f"{self.kind} {self.length}"

  @property
  def label(self) -> str:
    return self.side + _LABELS[self.variant]


def model_config(**changes) -> ModelConfig:
  """The model of all benches: `bench_config.json` without a prediction block, which transformers does not have."""
  raw = json.loads(CONFIG.read_text(encoding="utf-8"))
  return dataclasses.replace(ModelConfig.from_hf(raw), num_nextn_predict_layers=0, **changes)


def check_config(**changes) -> ModelConfig:
  """The model of the comparison of logits: every entry is picked.

  With random weights a sixteenth of the index scores is exactly zero (ReLU of four heads), and which of equal entries is
  picked is each side's own affair, but changes the logits.
  """
  return model_config(index_topk=LOGITS_LENGTH, **changes)


def tokens_of(case: Case) -> np.ndarray:
  """Random token ids int32 [1, length], the same on both sides; several rows for the comparison of logits."""
  rows = LOGITS_ROWS if case.kind == "logits" else 1
  return np.random.default_rng(case.length).integers(0, model_config().vocab_size, (rows, case.length), np.int32)


def cases_of(kind: str, lengths: Sequence[int], against: str | None) -> list[list[Case]]:
  """The cases of each length that take turns, ours first."""
  groups = []
  for length in lengths:
    variants = [""]
    if kind == "train":
      variants = [""] * (length <= LONGEST_WITHOUT_REMAT) + ["remat"] * (length >= SHORTEST_WITH_REMAT)
    group = [Case(kind, OURS, length, variant) for variant in variants]
    if against and length <= LONGEST_AGAINST:
      group += [Case(kind, against, length, variant) for variant in ("", "checkpointing")[:1 + (kind == "train")]]
    if kind == "train" and length <= LONGEST_WITHOUT_REMAT:
      group.append(Case(kind, OURS, length, "muon"))
    groups.append(group)
  return groups


def expected_seconds(case: Case) -> tuple[float, float]:
  """Rough seconds to get ready and of one pass, for the estimate of the time left; only their proportions matter."""
  work = case.length * (3 if case.kind == "train" else 1)
  if case.side == OURS:
    return {"forward": 8.0, "train": 30.0}.get(case.kind, 8.0), 0.8e-3 * work
  return 6.0, (1e-3 + 0.9e-6 * case.length) * work


def turn_seconds(case: Case, group: Sequence[Case]) -> float:
  """Expected seconds of a turn: one pass, and one before it that does not count where others take turns, too."""
  return expected_seconds(case)[1] * (1 + (len(group) > 1))


def seconds_of(groups: Sequence[Sequence[Case]], repeats: int) -> float:
  """Expected seconds of these groups in all."""
  return math.fsum(sum(expected_seconds(case)) + repeats * turn_seconds(case, group) for group in groups for case in group)


# ---- what should be reached -------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Target:
  """A bound on a figure: `ratio` at a length against the other side, or `figure` at a long length over a short one.

  Attributes:
    text: what is asked.
    bound: at least this ratio, or at most this growth.
    length: where it is measured.
    figure: "ratio", or a row's figure whose growth from `base_length` is meant.
    base_length: of a growth.
  """

  text: str
  bound: float
  length: int
  figure: str = "ratio"
  base_length: int = 0


def targets_of(kind: str) -> list[Target]:
  """The bounds on one kind of measurement."""
  ratios = {"forward": {2048: 2.0, 4096: 4.0}, "train": {2048: 2.0, 4096: 3.0}}[kind]
  found = [Target(f"times the speed of transformers at {length}, at least {bound:g}", bound, length)
           for length, bound in ratios.items()]
  for figure, text in (("seconds_per_token", "seconds"), ("activation_bytes_per_token", "activation memory")):
    found.append(Target(f"{text} per token at 16384 over 2048, at most 1.3", 1.3, 16384, figure, 2048))
  return found


def lengths_from(texts: Sequence[str]) -> tuple[int, ...]:
  """Lengths as given on the command line.

  Raises:
    ValueError: one of them is no whole number from 1 to the model's max_position_embeddings.
  """
  longest = model_config().max_position_embeddings
  for text in texts:
    if not text.strip().isdecimal() or not 1 <= int(text) <= longest:
      raise ValueError(f"--lengths = {text!r}: expected whole numbers from 1 to {longest}, with commas between them")
  return tuple(sorted({int(text) for text in texts}))
