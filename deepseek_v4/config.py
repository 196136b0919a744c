"""Every setting of a model and of a run, as frozen dataclasses; no JAX here.

`ModelConfig` keeps the field names of the released config.json where they exist. A run is one Python file under
`configs/` with `get_config() -> RunConfig`; `load(path, overrides)` reads it and applies typed `key.path=value` overrides.
Reading and writing the dictionaries of released models lives in `config_hf.py` (`ModelConfig.from_hf` / `to_hf`).
"""

from __future__ import annotations

import ast
import dataclasses
import math
import runpy
import typing
from pathlib import Path
from typing import Any, Mapping, Sequence

from deepseek_v4.config_checks import at_least, fields_of, one_of, options_of, positive, refuse, typed

SLIDING = "sliding_attention"
CSA = "compressed_sparse_attention"
HCA = "heavily_compressed_attention"
ATTENTION_KINDS = (SLIDING, CSA, HCA)
HASH = "hash_moe"
LEARNED = "moe"
ROUTER_KINDS = (HASH, LEARNED)
REMAT_POLICIES = ("none", "mhc", "block", "offload", "full")


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

  def __post_init__(self):
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
  scan_layers: bool = True
  remat: str = "none"  # what is recomputed in the backward pass, one of REMAT_POLICIES; see `model/remat.py`
  loss_chunk_size: int = 1024  # tokens per device whose logits exist at a time in training

  def __post_init__(self):
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
    if self.inference_rounding:
      self.check_hadamard("inference_rounding = True")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
      value = getattr(self, name)
      if value is not None and not 0 <= value < self.vocab_size:
        refuse(name, value, f"None or an id below vocab_size = {self.vocab_size}")

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
    """The same model with only its first `num_hidden_layers` layers."""
    if not 1 <= num_hidden_layers <= self.num_hidden_layers:
      refuse("num_hidden_layers", num_hidden_layers, f"1 to {self.num_hidden_layers} (the lists name no further layers)")
    n = num_hidden_layers
    return dataclasses.replace(self, num_hidden_layers=n, layer_types=self.layer_types[:n],
                               mlp_layer_types=self.mlp_layer_types[:n])


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """Muon for matrices, AdamW for the rest, one schedule for both (SPEC: report 2.4, 4.2.2)."""

  learning_rate: float = 2.7e-4
  warmup_steps: int = 2000
  decay_steps: int = 0  # length of the cosine at the end of the run; 0 = constant to the end
  final_fraction: float = 0.1  # learning rate at the end, as a share of the peak
  clip_norm: float = 1.0
  weight_decay: float = 0.1
  momentum: float = 0.95
  update_rms: float = 0.18
  newton_schulz_dtype: str = "float32"  # of the matmuls inside Newton-Schulz: "float32" or "bfloat16"
  muon_split: str = "none"  # "head": query matrices are orthogonalised head by head
  position_bias_owner: str = "adamw"  # the compressors' position biases: "adamw" or "muon"
  adam_b1: float = 0.9
  adam_b2: float = 0.95
  adam_eps: float = 1e-20
  adam_v_floor: float = 0.0  # smallest second moment; above 0 it prevents 10x steps where v underflows

  def __post_init__(self):
    typed(self)
    positive(self, "learning_rate", "clip_norm", "update_rms")
    at_least(self, 0, "warmup_steps", "decay_steps", "weight_decay", "adam_eps", "adam_v_floor", "final_fraction")
    for name in ("momentum", "adam_b1", "adam_b2"):
      if not 0 <= getattr(self, name) < 1:
        refuse(name, getattr(self, name), "a number in [0, 1)")
    if self.final_fraction > 1:
      refuse("final_fraction", self.final_fraction, "a number in [0, 1]")
    one_of(self, "newton_schulz_dtype", ("float32", "bfloat16"))
    one_of(self, "muon_split", ("none", "head"))
    one_of(self, "position_bias_owner", ("adamw", "muon"))


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """Weights of the auxiliary losses beside the next-token loss."""

  mtp_weight: float = 0.3
  mtp_weight_final: float = 0.1  # from the start of the learning rate's decay
  balance_weight: float = 1e-4
  indexer_weight: float = 0.01
  bias_update_speed: float = 1e-3

  def __post_init__(self):
    typed(self)
    at_least(self, 0, "mtp_weight", "mtp_weight_final", "balance_weight", "indexer_weight", "bias_update_speed")


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Where the tokens come from and how rows are packed."""

  source: str = "stdlib"  # "stdlib", "text" (folder), "jsonl" (file or folder), "array_record" (files of token ids)
  path: str | None = None  # folder, file or glob; None for "stdlib"
  tokenizer: str | None = None  # a tokenizer.json; None = bytes
  text_field: str = "text"  # of JSON lines
  sequence_length: int = 512
  batch_size: int = 8  # rows per optimizer step over the whole mesh, all accumulation passes together
  accumulation: int = 1
  held_out_percent: int = 5  # share of files, chosen by a hash of their name, never trained on
  fim_rate: float = 0.0  # share of documents rearranged as prefix, suffix, middle
  seed: int = 0

  def __post_init__(self):
    typed(self)
    one_of(self, "source", ("stdlib", "text", "jsonl", "array_record"))
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


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices along each mesh axis; one of them may be -1 = all that are left."""

  data: int = -1
  fsdp: int = 1
  expert: int = 1
  context: int = 1
  tensor: int = 1
  emulated_devices: int = 0  # CPU devices that the launcher asks JAX for; 0 = what the machine has

  def __post_init__(self):
    typed(self)
    sizes = {name: getattr(self, name) for name in self.axis_names}
    for name, size in sizes.items():
      if size != -1 and size < 1:
        refuse(name, size, "at least 1, or -1 for all devices that are left")
    if list(sizes.values()).count(-1) > 1:
      refuse("mesh", sizes, "at most one axis with -1")
    at_least(self, 0, "emulated_devices")

  axis_names: typing.ClassVar[tuple[str, ...]] = ("data", "fsdp", "expert", "context", "tensor")


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
  """Length, rhythm and seeds of a run."""

  steps: int = 10_000
  seed: int = 0
  init_from: str | None = None  # folder of a converted release or of a run with the weights to start with; None = random
  kernels: str = "auto"  # implementation of the ops: auto, reference, blockwise, pallas, interpret
  attention_mode: str = "sparse"  # "dense": CSA layers attend to every visible entry
  log_every: int = 10
  eval_every: int = 200
  eval_batches: int = 8
  checkpoint_every: int = 200
  keep_checkpoints: int = 2

  def __post_init__(self):
    typed(self)
    if self.init_from == "":
      refuse("init_from", self.init_from, "a folder, or None")
    at_least(self, 1, "steps", "log_every", "eval_every", "eval_batches", "checkpoint_every", "keep_checkpoints")
    one_of(self, "kernels", ("auto", "reference", "blockwise", "pallas", "interpret"))
    one_of(self, "attention_mode", ("sparse", "dense"))


@dataclasses.dataclass(frozen=True)
class RunConfig:
  """One run: the model and everything that shapes its training."""

  model: ModelConfig = ModelConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  loss: LossConfig = LossConfig()
  data: DataConfig = DataConfig()
  mesh: MeshConfig = MeshConfig()
  training: TrainingConfig = TrainingConfig()

  def __post_init__(self):
    typed(self)
    if self.model.inference_rounding:
      refuse("model.inference_rounding", True, "False in a run: rounding has no gradient to train with")
    if self.data.sequence_length > self.model.max_position_embeddings:
      refuse("data.sequence_length", self.data.sequence_length,
              f"at most model.max_position_embeddings = {self.model.max_position_embeddings}")
    if self.optimizer.warmup_steps + self.optimizer.decay_steps > self.training.steps:
      refuse("optimizer.warmup_steps + optimizer.decay_steps", self.optimizer.warmup_steps + self.optimizer.decay_steps,
              f"at most training.steps = {self.training.steps}")


# ---- reading run files and overrides ----------------------------------------------------------------------------------
def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
  """Runs the config file at `path` and applies `key.path=value` overrides together.

  Raises:
    FileNotFoundError: no such file.
    ValueError: the file has no get_config(), an override names an unknown field, or a value has the wrong type.
  """
  path = Path(path)
  if not path.is_file():
    raise FileNotFoundError(f"--config = {str(path)!r}: expected a Python file with get_config()")
  namespace = runpy.run_path(str(path))
  if "get_config" not in namespace:
    refuse("--config", str(path), "a Python file that defines get_config()")
  config = namespace["get_config"]()
  if not isinstance(config, RunConfig):
    refuse("--config", str(path), f"a get_config() that returns a RunConfig, not {type(config).__name__}")
  return override(config, overrides)


def override(config: Any, overrides: Sequence[str]) -> Any:
  """Returns `config` with each `key.path=value` applied; all fields are checked once, after the last one."""
  tree: dict[str, Any] = {}
  for item in overrides:
    key, sign, text = item.partition("=")
    if not sign:
      refuse("--set", item, "KEY=VALUE")
    *parents, leaf = key.strip().split(".")
    node: Any = tree
    for name in parents:
      node = node.setdefault(name, {})
      if not isinstance(node, dict):
        refuse("--set", item, f"a setting of {name!r} or of its fields, not both")
    if isinstance(node.get(leaf), dict):
      refuse("--set", item, f"a setting of {leaf!r} or of its fields, not both")
    node[leaf] = text.strip()
  return _replace(config, tree, "")


def _replace(config: Any, changes: Mapping[str, Any], prefix: str) -> Any:
  hints = typing.get_type_hints(type(config))
  names = fields_of(config)
  new = {}
  for name, value in changes.items():
    if name not in names:
      raise ValueError(f"{type(config).__name__} has no field {prefix + name!r}; it has {', '.join(names)}")
    old = getattr(config, name)
    if isinstance(value, Mapping):
      if not dataclasses.is_dataclass(old):
        refuse(prefix + name, value, "a field with fields of its own")
      new[name] = _replace(old, value, f"{prefix}{name}.")
    else:
      new[name] = _parse(prefix + name, value, hints[name])
  if isinstance(config, ModelConfig) and "num_hidden_layers" in new and not {"layer_types", "mlp_layer_types"} & set(new):
    config = config.cut_layers(new["num_hidden_layers"])
  return dataclasses.replace(config, **new)


def _parse(name: str, text: str, kind: Any) -> Any:
  """`text` as a value of the annotated type, or an error that names the field."""
  options = options_of(kind)
  if type(None) in options and text in ("None", "none", ""):
    return None
  for option in options:
    if option is str:
      return text.strip("'\"")
    try:
      value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
      value = {"true": True, "false": False}.get(text.lower())
    if typing.get_origin(option) is tuple and isinstance(value, (tuple, list)) and all(isinstance(v, str) for v in value):
      return tuple(value)
    if option is float and type(value) in (int, float) and math.isfinite(value):
      return float(value)
    if option in (int, bool) and type(value) is option:
      return value
  refuse(name, text, getattr(kind, "__name__", str(kind)))


def to_dict(config: Any) -> dict[str, Any]:
  """Plain nested dictionary of a config, for manifests; `from_dict` reads it back."""
  return dataclasses.asdict(config)


def from_dict(kind: type, values: Mapping[str, Any]) -> Any:
  """The dataclass `kind` from a dictionary that `to_dict` (through JSON or not) made; unknown names are an error."""
  hints = typing.get_type_hints(kind)
  names = fields_of(kind)
  fields = {}
  for name, value in values.items():
    if name not in names:
      raise ValueError(f"{kind.__name__} has no field {name!r}; it has {', '.join(names)}")
    nested = [t for t in (typing.get_args(hints[name]) or (hints[name],)) if dataclasses.is_dataclass(t)]
    fields[name] = from_dict(nested[0], value) if nested and value is not None else value
  return kind(**fields)
