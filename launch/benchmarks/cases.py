"""What is measured, and with which settings each side runs. No JAX, no torch: the parent process imports this."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Sequence

import numpy as np

from deepseek_v4.config import REMAT_POLICIES, ModelConfig

DECODE, PREFILL = "decode", "prefill"  # the passes of a "decode" case give rows of both kinds
REMAT = "remat"
KINDS = ("forward", "train", DECODE, REMAT)
OURS, TRANSFORMERS = "ours", "transformers"
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
DECODE_LENGTHS = (512, 4096, 16384)
REMAT_LENGTHS = (2048,)
NEW_TOKENS, CHUNK = 32, 512  # decoded after each prompt; tokens of a prompt that either side is fed at a time
LONGEST_AGAINST = 4096  # transformers' attention holds [heads, S, S + S / 4]: beyond this it does not fit
LONGEST_WITHOUT_REMAT = 4096
SHORTEST_WITH_REMAT = 2048  # measured both ways from here on, so that short and long compare like with like
THREADS = 2
MEMORY_LIMIT = 16 * 2**30  # a side that needs more is stopped
SHORT_PROMPT = 1024
LOGITS_ROWS, LOGITS_LENGTH, LOGITS_TOLERANCE = 4, 512, 2e-4
LOGITS_CHUNK, LOGITS_SINGLE = 96, 64  # of the comparison through caches: tokens of a chunk, last tokens that come one by one
CONFIG, WEIGHTS = Path(__file__).with_name("bench_config.json"), "weights.npz"
ADAMW = {"learning_rate": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}

# Both sides get huge pages for their temporaries, and neither is slowed by looking for anything on a network.
ENVIRONMENT = {
    OURS: {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "JAX_PLATFORMS": "cpu", "NPROC": str(THREADS),
           "JAX_ENABLE_COMPILATION_CACHE": "false"},
    TRANSFORMERS: {"THP_MEM_ALLOC_ENABLE": "1", "OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1",
                   "TRANSFORMERS_VERBOSITY": "error"},
}
_LABELS = {"": "", "remat": ", remat", "muon": ", full step with Muon", "checkpointing": ", checkpointing",
           "loop": ", loop over experts", **{policy: f", {policy}" for policy in REMAT_POLICIES}}


@dataclasses.dataclass(frozen=True)
class Case:
  """One side of one measurement.

  Attributes:
    kind: "forward", "train", "decode" or "remat"; "weights", "logits" and "cached_logits" prepare and check.
    side: OURS or TRANSFORMERS.
    length: tokens of the one row; of decode: of its prompt.
    variant: of train. Ours: "" keeps all activations, "remat" recomputes layers, "muon" is the step that launch.train
      runs, with Muon and all losses. Theirs: "" or "checkpointing". Of decode, theirs: "" or "loop", one expert after
      another in place of grouped matmuls. Of remat: the policy.
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
  rows = LOGITS_ROWS if case.kind in ("logits", "cached_logits") else 1
  return np.random.default_rng(case.length).integers(0, model_config().vocab_size, (rows, case.length), np.int32)


def cases_of(kind: str, lengths: Sequence[int], against: str | None) -> list[list[Case]]:
  """The cases of each length that take turns, ours first."""
  if kind == REMAT:
    return [[Case(kind, OURS, length, policy) for policy in REMAT_POLICIES] for length in lengths]
  groups = []
  for length in lengths:
    variants = [""]
    if kind == "train":
      variants = [""] * (length <= LONGEST_WITHOUT_REMAT) + ["remat"] * (length >= SHORTEST_WITH_REMAT)
    group = [Case(kind, OURS, length, variant) for variant in variants]
    if kind == DECODE:
      groups.append(group + [Case(kind, against, length, variant) for variant in ("", "loop") if against])
      continue
    if against and length <= LONGEST_AGAINST:
      group += [Case(kind, against, length, variant) for variant in ("", "checkpointing")[:1 + (kind == "train")]]
    if kind == "train" and length <= LONGEST_WITHOUT_REMAT:
      group.append(Case(kind, OURS, length, "muon"))
    groups.append(group)
  return groups


def expected_seconds(case: Case) -> tuple[float, float]:
  """Rough seconds to get ready and of one pass, for the estimate of the time left; only their proportions matter."""
  if case.kind == DECODE:
    ours = case.side == OURS
    return 20.0 if ours else 6.0, case.length * (0.5e-3 if ours else 0.7e-3 + 5e-8 * case.length) + (0.2 if ours else 1.0)
  work = case.length * (3 if case.kind in ("train", REMAT) else 1)
  if case.side == OURS:
    return {"forward": 8.0, "train": 30.0, REMAT: 40.0}.get(case.kind, 8.0), 0.8e-3 * work
  return 6.0, (1e-3 + 0.9e-6 * case.length) * work


def longest_seconds(case: Case) -> float:
  """What no single answer of a worker takes on any machine that one would measure on: then it hangs."""
  return 600 + 10 * math.fsum(expected_seconds(case))


def turn_seconds(case: Case, group: Sequence[Case]) -> float:
  """Expected seconds of a turn: one pass, and where `warms_up` one before it that does not count."""
  return expected_seconds(case)[1] * (1 + warms_up(group))


def warms_up(group: Sequence[Case]) -> bool:
  """Whether a turn begins with a pass that does not count: where others take turns, too. Not for long prompts, whose pass
  works in the same little memory again and again."""
  return len(group) > 1 and (group[0].kind != DECODE or group[0].length <= SHORT_PROMPT)


def turns_of(group: Sequence[Case], repeats: int) -> int:
  """Timed passes of each side: more of them where one takes a third of a second, or the median is chance."""
  return repeats * (3 if group[0].kind == DECODE and group[0].length <= SHORT_PROMPT else 1)


def seconds_of(groups: Sequence[Sequence[Case]], repeats: int) -> float:
  """Expected seconds of these groups in all."""
  return math.fsum(sum(expected_seconds(case)) + turns_of(group, repeats) * turn_seconds(case, group)
                   for group in groups for case in group)


# ---- what should be reached -------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Target:
  """A bound on a row's figure at a length, or on its growth from a short length to a long one.

  Attributes:
    text: what is asked.
    bound: at least this much, or at most this growth.
    length: where it is measured.
    figure: the row's figure; "ratio" is against the other side.
    base_length: of a growth; 0 = none.
    kind: of the rows; "" = that of the whole measurement.
  """

  text: str
  bound: float
  length: int
  figure: str = "ratio"
  base_length: int = 0
  kind: str = ""


def targets_of(kind: str) -> list[Target]:
  """The bounds on one kind of measurement."""
  if kind == DECODE:
    return _decode_targets()
  if kind == REMAT:
    return []
  ratios = {"forward": {2048: 2.0, 4096: 4.0}, "train": {2048: 2.0, 4096: 3.0}}[kind]
  found = [Target(f"times the speed of transformers at {length}, at least {bound:g}", bound, length)
           for length, bound in ratios.items()]
  for figure, text in (("seconds_per_token", "seconds"), ("activation_bytes_per_token", "activation memory")):
    found.append(Target(f"{text} per token at 16384 over 2048, at most 1.3", 1.3, 16384, figure, 2048))
  return found


def _decode_targets() -> list[Target]:
  faster = [Target(f"{kind}, times the speed of transformers at {length}, at least {bound:g}", bound, length, kind=kind)
            for kind, bounds in ((DECODE, (5.0, 5.0, 5.0)), (PREFILL, (1.1, 1.4, 1.8)))
            for length, bound in zip(DECODE_LENGTHS, bounds)]
  shares = [Target(f"share of the matmul rate in prefill at {length}, at least 0.5", 0.5, length, "matmul_share", 0, PREFILL)
            for length in DECODE_LENGTHS]
  short, *longer = DECODE_LENGTHS
  growth = [Target(f"seconds per token over entries read per token, {length} over {short}, at most 1", 1.0, length,
                   "seconds_per_entry", short) for length in longer]
  return faster + shares + growth


def lengths_from(texts: Sequence[str], room: int = 0) -> tuple[int, ...]:
  """Lengths as given on the command line.

  Raises:
    ValueError: one of them is no whole number from 1 to the model's max_position_embeddings, less `room`.
  """
  longest = model_config().max_position_embeddings - room
  for text in texts:
    if not text.strip().isdecimal() or not 1 <= int(text) <= longest:
      raise ValueError(f"--lengths = {text!r}: expected whole numbers from 1 to {longest}, with commas between them")
  return tuple(sorted({int(text) for text in texts}))
