"""The settings that shape a run beside its model; `config.py` hands them on and puts them together as a RunConfig."""

from __future__ import annotations

import dataclasses
import typing

from deepseek_v4.config_checks import at_least, one_of, positive, refuse, typed

ATTENTION_MODES = ("sparse", "dense")
TRAINABLE = ("all", "indexer", "all_but_indexer")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """Muon for matrices, AdamW for the rest, one schedule for both (report 2.4, 4.2.2)."""

  learning_rate: float = 2.7e-4
  first_step: int = 0  # of the run, with which the warm-up begins
  warmup_steps: int = 2000
  decay_steps: int = 0  # length of the cosine at the end of the run; 0 = constant to the end
  final_fraction: float = 0.1  # learning rate at the end, as a share of the peak
  clip_norm: float = 1.0
  weight_decay: float = 0.1
  momentum: float = 0.95
  momentum_dtype: str = "float32"  # in which Muon's momentum is kept: "float32" or "bfloat16"; its sums are float32
  update_rms: float = 0.18
  newton_schulz_dtype: str = "float32"  # of the matmuls inside Newton-Schulz: "float32" or "bfloat16"
  matrix_owner: str = "muon"  # who updates the matrices: "muon", or for comparison "adamw", which then has everything
  muon_split: str = "none"  # "head": query matrices are orthogonalised head by head
  position_bias_owner: str = "adamw"  # the compressors' position biases: "adamw" or "muon"
  adam_b1: float = 0.9
  adam_b2: float = 0.95
  adam_eps: float = 1e-20
  adam_v_floor: float = 0.0  # smallest second moment; above 0 it prevents 10x steps where v underflows

  def __post_init__(self) -> None:
    typed(self)
    positive(self, "learning_rate", "clip_norm", "update_rms")
    at_least(self, 0, "first_step", "warmup_steps", "decay_steps", "weight_decay", "adam_eps", "adam_v_floor",
             "final_fraction")
    for name in ("momentum", "adam_b1", "adam_b2"):
      if not 0 <= getattr(self, name) < 1:
        refuse(name, getattr(self, name), "a number in [0, 1)")
    if self.final_fraction > 1:
      refuse("final_fraction", self.final_fraction, "a number in [0, 1]")
    one_of(self, "momentum_dtype", ("float32", "bfloat16"))
    one_of(self, "newton_schulz_dtype", ("float32", "bfloat16"))
    one_of(self, "matrix_owner", ("muon", "adamw"))
    one_of(self, "muon_split", ("none", "head"))
    one_of(self, "position_bias_owner", ("adamw", "muon"))
    if self.matrix_owner == "adamw" and (self.muon_split, self.position_bias_owner) != ("none", "adamw"):
      refuse("matrix_owner", "adamw", "muon where muon_split or position_bias_owner say something about Muon")


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """Weights of the auxiliary losses beside the next-token loss."""

  mtp_weight: float = 0.3  # beside distillation or reinforcement, where the prediction block rests, neither can be set
  mtp_weight_final: float = 0.1  # from the start of the learning rate's decay
  balance_weight: float = 1e-4
  indexer_weight: float = 0.01
  bias_update_speed: float = 1e-3

  def __post_init__(self) -> None:
    typed(self)
    at_least(self, 0, "mtp_weight", "mtp_weight_final", "balance_weight", "indexer_weight", "bias_update_speed")


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Where the tokens come from and how rows are packed."""

  # "stdlib", "text" (folder), "jsonl" (file or folder), "chat" (JSON lines of conversations), "array_record" (token ids)
  source: str = "stdlib"
  path: str | None = None  # folder, file or glob; None for "stdlib"
  tokenizer: str | None = None  # a tokenizer.json; None = bytes
  text_field: str = "text"  # of JSON lines
  chat_template: str | None = None  # of conversations: folder of a release with its wording; None = our own
  sequence_length: int = 512
  batch_size: int = 8  # rows per optimizer step over the whole mesh, all accumulation passes together
  accumulation: int = 1
  held_out_percent: int = 5  # share of files, chosen by a hash of their name, never trained on
  fim_rate: float = 0.0  # share of documents rearranged as prefix, suffix, middle
  seed: int = 0

  def __post_init__(self) -> None:
    typed(self)
    one_of(self, "source", ("stdlib", "text", "jsonl", "chat", "array_record"))
    if (self.path is None) != (self.source == "stdlib"):
      expected = "None" if self.source == "stdlib" else "a folder, file or glob"
      refuse("path", self.path, f"{expected} for source {self.source!r}")
    at_least(self, 2, "sequence_length")
    at_least(self, 1, "batch_size", "accumulation")
    if self.batch_size % self.accumulation:
      refuse("batch_size", self.batch_size, f"a multiple of accumulation = {self.accumulation}")
    if not 0 <= self.held_out_percent < 100:
      refuse("held_out_percent", self.held_out_percent, "0 to 99")
    if not 0 <= self.fim_rate <= 1:
      refuse("fim_rate", self.fim_rate, "a number in [0, 1]")
    if self.source == "chat" and self.fim_rate:
      refuse("fim_rate", self.fim_rate, "0 for source 'chat'")
    if self.source != "chat" and self.chat_template is not None:
      refuse("chat_template", self.chat_template, f"None for source {self.source!r}")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices along each mesh axis; one of them may be -1 = all that are left."""

  dcn_data: int = 1  # slices, which only the data centre's network joins, each with a copy of all weights
  data: int = -1
  fsdp: int = 1  # weights split and gathered where they are used; of the vocabulary, in pre-training, each uses its part
  expert: int = 1  # experts split; all other weights as by fsdp
  context: int = 1  # parts of the sequence; weights as by fsdp. Experts are split over fsdp and context, too, if they divide
  tensor: int = 1  # heads, width of experts, vocabulary
  emulated_devices: int = 0  # CPU devices that the launcher asks JAX for, of all processes; 0 = what the machines have

  def __post_init__(self) -> None:
    typed(self)
    sizes = {name: getattr(self, name) for name in self.axis_names}
    for name, size in sizes.items():
      if size != -1 and size < 1:
        refuse(name, size, "at least 1, or -1 for all devices that are left")
    if list(sizes.values()).count(-1) > 1:
      refuse("mesh", sizes, "at most one axis with -1")
    at_least(self, 0, "emulated_devices")

  axis_names: typing.ClassVar[tuple[str, ...]] = ("dcn_data", "data", "fsdp", "expert", "context", "tensor")


def can_run_alone(sizes: typing.Mapping[str, int]) -> bool:
  """Whether copies of the weights can run their passes alone on a mesh of these sizes (`training/copies.py`).

  With the axis context, or with tensor beside one that splits experts, XLA's partitioner aborts the process where some axes
  are taken out of its hands (jaxlib 0.10.2).
  """
  return sizes["context"] == 1 and (sizes["tensor"] == 1 or sizes["expert"] == sizes["fsdp"] == 1)


@dataclasses.dataclass(frozen=True)
class AnomalyConfig:
  """What counts as a step that went wrong, and what is done about it (`training/anomalies.py`).

  A policy other than "stop" goes back to the last sound state: after a step that was not finite that is the state it was
  given, after a spike that of the newest checkpoint, from which the steps in between are computed again. Then
    skip        leaves the batch out for good
    repeat      computes it again; a spike that comes again counts, what is not finite again ends the run
    anticipate  (from the newest checkpoint in either case) computes it again, with experts that older parameters choose; a
                spike that comes again counts, a batch that is not finite again is left out
    log         (does not go back) writes it down and goes on; a step that was not finite changes nothing
    stop        ends the run
  """

  policy: str = "skip"
  window: int = 128  # steps whose losses say what is normal; fewer say nothing about spikes
  deviations: float = 6.0  # a spike is a loss above their mean + this many standard deviations
  limit: int = 8  # more anomalies than this within the window end the run
  # Steps between the choice of experts and the step that they are for; 0 = the plain step. Less than checkpoint_every.
  anticipation_delay: int = 8
  anticipation_steps: int = 200  # how long that lasts from the step on that went wrong; the report gives neither number

  def __post_init__(self) -> None:
    typed(self)
    one_of(self, "policy", ("skip", "repeat", "anticipate", "log", "stop"))
    at_least(self, 2, "window")
    positive(self, "deviations")
    at_least(self, 1, "limit", "anticipation_steps")
    at_least(self, 0, "anticipation_delay")


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
  """Length, rhythm and seeds of a run."""

  steps: int = 10_000  # of a run with stages: theirs together, whatever is said here
  seed: int = 0
  init_from: str | None = None  # folder of a converted release or of a run with the weights to start with; None = random
  kernels: str = "auto"  # implementation of the ops: auto, reference, blockwise, pallas, interpret
  attention_mode: str = "sparse"  # "dense": CSA layers attend to every visible entry
  # How copies of the weights (mesh.dcn_data x mesh.data of them) add up their gradients, once a step: "float32", or
  # "bfloat16": stochastically rounded to it for each of two exchanges, with float32 sums between them. A single copy sends
  # nothing.
  gradient_reduction: str = "float32"
  trainable: str = "all"  # "indexer": only the indexers, by their own loss alone; "all_but_indexer": all else, without it
  watch_gradients: bool = False  # norm of each group of parameters; one that is 0 for log_every steps ends the run
  log_every: int = 10
  eval_every: int = 200
  eval_batches: int = 8
  checkpoint_every: int = 200
  keep_checkpoints: int = 2
  grace_seconds: float = 25.0  # within which the process ends after SIGTERM; Kubernetes kills after 30

  def __post_init__(self) -> None:
    typed(self)
    if self.init_from == "":
      refuse("init_from", self.init_from, "a folder, or None")
    at_least(self, 1, "steps", "log_every", "eval_every", "eval_batches", "checkpoint_every", "keep_checkpoints")
    positive(self, "grace_seconds")
    one_of(self, "kernels", ("auto", "reference", "blockwise", "pallas", "interpret"))
    one_of(self, "attention_mode", ATTENTION_MODES)
    one_of(self, "gradient_reduction", ("float32", "bfloat16"))
    one_of(self, "trainable", TRAINABLE)
