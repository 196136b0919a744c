"""What is compiled beside MaxText, and how each side is told.

Both sides: V4-Flash without the prediction block (MaxText has none), dropless experts, float32 weights and optimizer state,
bfloat16 compute, everything recomputed in the backward pass, losses of language, indexer and balance, one pass a step.
MaxText's mesh and its attention's blocks are those of its own test of this model; of its two forms of Muon the one that
spreads its work is the one to beat; its default is compiled for its side alone.
"""

from __future__ import annotations

import dataclasses

PACKAGE = "maxtext[tpu]==0.2.5"
OURS, THEIRS = "ours", "MaxText"
CONFIG = "configs/pod_flash_4k.py"
ADAMW, MUON, DEFAULT_MUON = "adamw", "muon", "muon, as it comes"
HIDDEN, PICKS = 4096, 6  # of Flash: channels of a row that travels, rows of a token

_BLOCKS = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
_THEIR_COMMON = (
  "model_name=deepseek4-284b", "override_model_config=True", "run_name=aot", "enable_checkpointing=False",
  "dataset_type=synthetic", "compile_topology_num_slices=1", "dtype=bfloat16", "indexer_sparse_training=True",
  "indexer_loss_scaling_factor=1.0", "remat_policy=full", "attention=flash", "use_tokamax_splash=True",
  "per_device_batch_size=1", "ici_expert_parallelism=8", *(f"sa_block_{name}=128" for name in _BLOCKS))
_THEIR_OPTIMIZER = {ADAMW: ("opt_type=adamw",), DEFAULT_MUON: ("opt_type=muon",),
                    MUON: ("opt_type=muon", "muon_type=maxtext_muon", "muon_use_all_to_all=True")}
_OUR_COMMON = ("model.num_nextn_predict_layers=0", "model.remat=full", "data.accumulation=1", "training.kernels=pallas")


@dataclasses.dataclass(frozen=True)
class Case:
  """One step of both sides.

  Attributes:
    chips: of the slice.
    topology: the slice as libtpu calls it.
    tokens: of a chip, one row or a part of one.
    optimizer: one of those above.
  """

  chips: int
  topology: str
  tokens: int
  optimizer: str

  @property
  def name(self) -> str:
    return f"{self.topology} {self.tokens} {self.optimizer}"

  @property
  def theirs(self) -> tuple[str, ...]:
    """Arguments of MaxText's compilation behind its base configuration."""
    cores = 2 * self.chips  # the name of a v5p slice counts them
    return (*_THEIR_COMMON, f"compile_topology=v5p-{cores}", f"ici_fsdp_parallelism={self.chips // 8}",
            f"max_target_length={self.tokens}", *_THEIR_OPTIMIZER[self.optimizer])

  @property
  def ours(self) -> tuple[str, ...]:
    """Settings of our configuration."""
    owner = ADAMW if self.optimizer == ADAMW else MUON
    return (*_OUR_COMMON, f"data.sequence_length={self.tokens}", f"data.batch_size={self.chips}", "mesh.expert=64",
            f"mesh.fsdp={self.chips // 64}", f"optimizer.matrix_owner={owner}")


CASES = (Case(128, "v5p:4x4x8", 4096, ADAMW), Case(128, "v5p:4x4x8", 4096, MUON),
         Case(128, "v5p:4x4x8", 4096, DEFAULT_MUON), Case(256, "v5p:4x8x8", 16384, ADAMW))

# To reach, GiB of temporaries and GB that travel by case; at 16,384 it is to fit.
TEMPORARIES = 26
TRAVELS = {ADAMW: 300, MUON: 400}
NEWTON_SCHULZ = 1.5 * 226  # TFLOP of a chip


def of_optimizers(names: list[str]) -> tuple[Case, ...]:
  """The cases with these optimizers; no name = all.

  Raises:
    ValueError: there is none of that name.
  """
  known = tuple(dict.fromkeys(case.optimizer for case in CASES))
  for name in names:
    if name not in known:
      raise ValueError(f"--optimizers = {name!r}: expected some of {known}")
  return tuple(case for case in CASES if case.optimizer in (names or known))
