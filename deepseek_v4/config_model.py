"""The settings of the architecture: `ModelConfig`, which `config.py` hands on to everybody else.

The field names are those of the released config.json where they exist; `config_hf.py` reads and writes it.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Mapping

from deepseek_v4.config_checks import at_least, one_of, positive, refuse, typed

SLIDING = "sliding_attention"
CSA = "compressed_sparse_attention"
HCA = "heavily_compressed_attention"
ATTENTION_KINDS = (SLIDING, CSA, HCA)
HASH = "hash_moe"
LEARNED = "moe"
ROUTER_KINDS = (HASH, LEARNED)
REMAT_POLICIES = ("none", "mhc", "block", "offload", "full")
EXCHANGES = ("auto", "gather", "all_to_all")


@dataclasses.dataclass(frozen=True)
class LayerSpec:
  """What one decoder layer is made of: its attention kind and its router kind."""

  attention: str
  router: str


@dataclasses.dataclass(frozen=True)
class Yarn:
  """YaRN stretch of the rotary frequencies of compressed layers (no change of the amplitude: V4 uses mscale 1)."""

  factor: float = 16.0
  original_max_position_embeddings: int = 65536
  beta_fast: float = 32.0
  beta_slow: float = 1.0

  def __post_init__(self) -> None:
    typed(self)
    at_least(self, 1, "factor", "original_max_position_embeddings")
    positive(self, "beta_fast", "beta_slow")
    if self.beta_slow > self.beta_fast:
      refuse("beta_slow", self.beta_slow, f"at most beta_fast = {self.beta_fast}")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The architecture. Defaults are V4-Flash's widths; `layer_types` and `mlp_layer_types` have one entry per layer."""

  vocab_size: int = 129280
  hidden_size: int = 4096
  num_hidden_layers: int = 43
  layer_types: tuple[str, ...] = (SLIDING,) * 2 + (CSA, HCA) * 20 + (CSA,)
  mlp_layer_types: tuple[str, ...] = (HASH,) * 3 + (LEARNED,) * 40
  csa_compress_rate: int = 4
  hca_compress_rate: int = 128
  num_attention_heads: int = 64
  head_dim: int = 512
  qk_rope_head_dim: int = 64
  q_lora_rank: int = 1024
  o_groups: int = 8
  o_lora_rank: int = 1024
  sliding_window: int = 128
  index_n_heads: int = 64
  index_head_dim: int = 128
  index_topk: int = 512
  n_routed_experts: int = 256
  num_experts_per_tok: int = 6
  moe_intermediate_size: int = 2048
  scoring_func: str = "sqrtsoftplus"
  routed_scaling_factor: float = 1.5
  swiglu_limit: float = 10.0
  hc_mult: int = 4
  hc_sinkhorn_iters: int = 20
  hc_eps: float = 1e-6
  rms_norm_eps: float = 1e-6
  rope_theta: float = 10000.0
  compress_rope_theta: float = 160000.0
  rope_scaling: Yarn | None = Yarn()
  max_position_embeddings: int = 1048576
  num_nextn_predict_layers: int = 1
  bos_token_id: int | None = 0
  eos_token_id: int | None = 1
  pad_token_id: int | None = None
  quantization: str | None = None  # how the weights of the source folder are stored: None, "fp8", "fp8+fp4"
  init_std: float = 0.006  # standard deviation of every matrix at initialisation (V3's value)
  mhc_init: str = "identity"  # "identity": streams start unmixed; "zero": fully mixed
  compute_dtype: str = "float32"
  inference_rounding: bool = False  # as DeepSeek's own inference: keys, index queries, inputs of linear layers
  qat: str | None = None  # quantisation-aware training: "fp4" = experts' weights and the indexer's queries and keys in FP4
  scan_layers: bool = True
  remat: str = "none"  # what is recomputed in the backward pass, one of REMAT_POLICIES; see `model/remat.py`
  expert_exchange: str = "auto"  # how tokens meet experts of other devices, one of EXCHANGES; see `model/experts.py`
  # Tokens whose logits exist on a device at a time in training: its own; of pre-training those of all devices of mesh.fsdp,
  # for its part of the vocabulary.
  loss_chunk_size: int = 1024

  def __post_init__(self) -> None:
    typed(self)
    object.__setattr__(self, "layer_types", tuple(self.layer_types))
    object.__setattr__(self, "mlp_layer_types", tuple(self.mlp_layer_types))
    at_least(self, 1, "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim", "q_lora_rank",
              "o_groups", "o_lora_rank", "sliding_window", "index_n_heads", "index_head_dim", "index_topk",
              "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "hc_mult", "hc_sinkhorn_iters",
              "max_position_embeddings", "loss_chunk_size")
    at_least(self, 2, "csa_compress_rate", "hca_compress_rate", "qk_rope_head_dim")
    positive(self, "routed_scaling_factor", "swiglu_limit", "hc_eps", "rms_norm_eps", "rope_theta",
              "compress_rope_theta", "init_std")
    for field, kinds in (("layer_types", ATTENTION_KINDS), ("mlp_layer_types", ROUTER_KINDS)):
      values = getattr(self, field)
      if len(values) != self.num_hidden_layers:
        refuse(field, f"{len(values)} entries", f"num_hidden_layers = {self.num_hidden_layers} entries")
      for i, value in enumerate(values):
        if value not in kinds:
          refuse(f"{field}[{i}]", value, f"one of {', '.join(kinds)}")
    if self.num_attention_heads % self.o_groups:
      refuse("o_groups", self.o_groups, f"a divisor of num_attention_heads = {self.num_attention_heads}")
    if self.qk_rope_head_dim % 2:
      refuse("qk_rope_head_dim", self.qk_rope_head_dim, "an even number (rotary channels come in pairs)")
    for other in ("head_dim", "index_head_dim"):
      if self.qk_rope_head_dim > getattr(self, other):
        refuse("qk_rope_head_dim", self.qk_rope_head_dim, f"at most {other} = {getattr(self, other)}")
    if self.num_experts_per_tok > self.n_routed_experts:
      refuse("num_experts_per_tok", self.num_experts_per_tok, f"at most n_routed_experts = {self.n_routed_experts}")
    one_of(self, "scoring_func", ("sqrtsoftplus", "sigmoid"))
    one_of(self, "num_nextn_predict_layers", (0, 1))
    one_of(self, "quantization", (None, "fp8", "fp8+fp4"))
    one_of(self, "mhc_init", ("identity", "zero"))
    one_of(self, "compute_dtype", ("float32", "bfloat16", "float64"))
    one_of(self, "remat", REMAT_POLICIES)
    one_of(self, "expert_exchange", EXCHANGES)
    if self.inference_rounding and self.expert_exchange == "all_to_all":
      refuse("expert_exchange", self.expert_exchange, "'auto' or 'gather' with inference_rounding = True")
    if self.inference_rounding:
      self.check_hadamard("inference_rounding = True")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
      value = getattr(self, name)
      if value is not None and not 0 <= value < self.vocab_size:
        refuse(name, value, f"None or an id below vocab_size = {self.vocab_size}")
    one_of(self, "qat", (None, "fp4"))
    if self.qat is not None:
      self.check_hadamard(f"qat = {self.qat!r}")

  @property
  def layer_specs(self) -> tuple[LayerSpec, ...]:
    """(attention kind, router kind) of each of the `num_hidden_layers` layers."""
    return tuple(LayerSpec(a, r) for a, r in zip(self.layer_types, self.mlp_layer_types, strict=True))

  @property
  def mtp_spec(self) -> LayerSpec:
    """The multi-token-prediction block is a sliding-window layer with a learned router."""
    return LayerSpec(SLIDING, LEARNED)

  def compress_rate(self, attention: str) -> int:
    """Tokens per compressed entry of a layer of this attention kind; 0 for a sliding layer."""
    return {SLIDING: 0, CSA: self.csa_compress_rate, HCA: self.hca_compress_rate}[attention]

  def lookback(self, attention: str) -> int:
    """Tokens before a token that the entry which closes with it can be made of; CSA's windows overlap."""
    return {SLIDING: 0, CSA: 2 * self.csa_compress_rate - 1, HCA: self.hca_compress_rate - 1}[attention]

  @property
  def rounds_index(self) -> bool:
    """Whether the indexer's queries and keys are rounded to FP4, behind a Hadamard matrix."""
    return self.inference_rounding or self.qat is not None

  @property
  def local_reach(self) -> int:
    """Tokens before a token that some layer reads as they are: of the sliding window, and of an entry's windows."""
    return max(1, self.sliding_window - 1, *map(self.lookback, self.layer_types))

  def check_hadamard(self, reason: str) -> None:
    """Refuses an index width for which there is no Hadamard matrix of Sylvester's, if any layer has an indexer."""
    if CSA in self.layer_types and self.index_head_dim.bit_count() != 1:
      refuse("index_head_dim", self.index_head_dim, f"a power of two with {reason}")

  @staticmethod
  def from_hf(source: Mapping[str, Any] | str | Path) -> "ModelConfig":
    """Reads a released or a transformers-normalised config: a dictionary, a config.json, or the folder that holds one."""
    from deepseek_v4 import config_hf
    return config_hf.from_hf(source)

  def to_hf(self) -> dict[str, Any]:
    """The dictionary that transformers' DeepseekV4Config accepts as keyword arguments."""
    from deepseek_v4 import config_hf
    return config_hf.to_hf(self)

  def cut_layers(self, num_hidden_layers: int) -> "ModelConfig":
    """The same model with only its first `num_hidden_layers` layers.

    Raises:
      ValueError: more layers than there are, or none.
    """
    if not 1 <= num_hidden_layers <= self.num_hidden_layers:
      refuse("num_hidden_layers", num_hidden_layers, f"1 to {self.num_hidden_layers} (the lists name no further layers)")
    n = num_hidden_layers
    return dataclasses.replace(self, num_hidden_layers=n, layer_types=self.layer_types[:n],
                               mlp_layer_types=self.mlp_layer_types[:n])
