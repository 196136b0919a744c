"""Every setting of a model and of a run, as frozen dataclasses; no JAX here.

Everybody imports them from here; they are written down in `config_model.py` (the architecture), `config_training.py` (what
shapes a training run), `config_stages.py` (its stages), `config_distillation.py` (students and teachers) and
`config_reinforcement.py` (learning from rewards).

A run is one Python file under `configs/` with `get_config() -> RunConfig`; `load(path, overrides)` reads it and applies
typed `key.path=value` overrides. Reading and writing the dictionaries of released models lives in `config_hf.py`
(`ModelConfig.from_hf` / `to_hf`).
"""

from __future__ import annotations

import ast
import dataclasses
import math
import runpy
import typing
from pathlib import Path
from typing import Any, Mapping, Sequence

from deepseek_v4 import config_distillation, config_reinforcement, config_stages
from deepseek_v4.config_checks import fields_of, options_of, refuse, typed
from deepseek_v4.config_distillation import STUDENT, TEXT, DistillationConfig, TeacherConfig
from deepseek_v4.config_model import (
  ATTENTION_KINDS,
  CSA,
  HASH,
  HCA,
  LEARNED,
  REMAT_POLICIES,
  ROUTER_KINDS,
  SLIDING,
  LayerSpec,
  ModelConfig,
  Yarn,
)
from deepseek_v4.config_reinforcement import ReinforcementConfig
from deepseek_v4.config_stages import StageConfig
from deepseek_v4.config_training import (
  AnomalyConfig,
  DataConfig,
  LossConfig,
  MeshConfig,
  OptimizerConfig,
  TrainingConfig,
  can_run_alone,
)

__all__ = ["ATTENTION_KINDS", "CSA", "HASH", "HCA", "LEARNED", "REMAT_POLICIES", "ROUTER_KINDS", "SLIDING", "STUDENT",
           "TEXT", "AnomalyConfig", "DataConfig", "DistillationConfig", "LayerSpec", "LossConfig", "MeshConfig",
           "ModelConfig", "OptimizerConfig", "ReinforcementConfig", "RunConfig", "StageConfig", "TeacherConfig",
           "TrainingConfig", "Yarn", "from_dict", "load", "override", "to_dict"]


@dataclasses.dataclass(frozen=True)
class RunConfig:
  """One run: the model and everything that shapes its training.

  With `stages` the run is one after the other, and `training.steps` is what they take together. None of them: the run is one
  piece, as the other settings say.
  """

  model: ModelConfig = ModelConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  loss: LossConfig = LossConfig()
  data: DataConfig = DataConfig()
  mesh: MeshConfig = MeshConfig()
  training: TrainingConfig = TrainingConfig()
  anomalies: AnomalyConfig = AnomalyConfig()
  stages: tuple[StageConfig, ...] = ()
  distillation: DistillationConfig | None = None  # a run of launch.distill
  reinforcement: ReinforcementConfig | None = None  # learning from rewards instead of from text

  def __post_init__(self) -> None:
    typed(self)
    if self.model.inference_rounding:
      refuse("model.inference_rounding", True, "False in a run: rounding has no gradient to train with")
    if not self.stages and self.data.sequence_length > self.model.max_position_embeddings:
      refuse("data.sequence_length", self.data.sequence_length,
              f"at most model.max_position_embeddings = {self.model.max_position_embeddings}")
    config_stages.refuse_without_indexer(self.model, "training.trainable", self.training.trainable)
    object.__setattr__(self, "stages", tuple(self.stages))
    if self.stages:
      object.__setattr__(self, "training", dataclasses.replace(self.training, steps=config_stages.check(self)))
    first, steps = self.optimizer.first_step, self.training.steps
    if self.optimizer.warmup_steps + self.optimizer.decay_steps > steps - first:
      refuse("optimizer.warmup_steps + optimizer.decay_steps", self.optimizer.warmup_steps + self.optimizer.decay_steps,
             f"at most training.steps = {steps}{f' - optimizer.first_step = {first}' if first else ''}")
    self._check_rounded_sums()
    self._check_anticipation()
    self._check_post_training()
    if self.distillation is not None:
      config_distillation.check(self)
    if self.reinforcement is not None:
      config_reinforcement.check(self)

  def _check_rounded_sums(self) -> None:
    """Refuses meshes on which copies of the weights cannot run their passes alone (see `training/copies.py`)."""
    mesh, how = self.mesh, self.training.gradient_reduction
    if how != "float32" and not can_run_alone(dataclasses.asdict(mesh)):
      refuse("training.gradient_reduction", how,
             f"'float32' with mesh.context = {mesh.context}, mesh.fsdp = {mesh.fsdp}, mesh.expert = {mesh.expert}, "
             f"mesh.tensor = {mesh.tensor}: other sums need context 1, and tensor 1 or both fsdp and expert 1")

  def _check_anticipation(self) -> None:
    """Refuses a delay that no step reaches: choices are made anew at each checkpoint (see `training/anticipation.py`)."""
    delay, every = self.anomalies.anticipation_delay, self.training.checkpoint_every
    if self.anomalies.policy == "anticipate" and 0 < every <= delay:
      refuse("anomalies.anticipation_delay", delay, f"less than training.checkpoint_every = {every}, as choices of experts "
             f"begin anew at each checkpoint")

  def _check_post_training(self) -> None:
    """Refuses settings of pre-training that post-training has no use for."""
    kinds = [name for name in ("distillation", "reinforcement") if getattr(self, name) is not None]
    if len(kinds) > 1:
      refuse("reinforcement", "given", "None beside distillation: one of them is a run")
    for name in kinds:
      if self.stages:
        refuse("stages", [stage.name for stage in self.stages], f"none beside {name}")
      for field, only in (("trainable", "all"), ("attention_mode", "sparse"), ("watch_gradients", False),
                          ("gradient_reduction", "float32")):
        if getattr(self.training, field) != only:
          refuse(f"training.{field}", getattr(self.training, field), f"{only!r} beside {name}")
      for field in ("mtp_weight", "mtp_weight_final"):
        default = getattr(LossConfig(), field)
        if getattr(self.loss, field) != default:
          refuse(f"loss.{field}", getattr(self.loss, field), f"{default}, the default, beside {name}, where the prediction "
                 f"block rests")
      if self.anomalies != AnomalyConfig():
        refuse("anomalies", self.anomalies, f"the defaults beside {name}, where a step that is not finite ends the run")


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
  """Returns `config` with each `key.path=value` applied; all fields are checked once, after the last one.

  Raises:
    ValueError: an unknown field, a value of another type, or a setting that is refused.
  """
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
  new: dict[str, Any] = {}
  for name, value in changes.items():
    if name not in names:
      raise ValueError(f"{type(config).__name__} has no field {prefix + name!r}; it has {', '.join(names)}")
    old = getattr(config, name)
    if isinstance(value, Mapping):
      if isinstance(old, tuple):
        new[name] = _replace_in(old, value, prefix + name)
        continue
      if not dataclasses.is_dataclass(old):
        refuse(prefix + name, value, "a field with fields of its own")
      new[name] = _replace(old, value, f"{prefix}{name}.")
    else:
      new[name] = _parse(prefix + name, value, hints[name])
  if isinstance(config, RunConfig) and new.get("stages", config.stages) and "steps" in changes.get("training", ()):
    refuse("training.steps", changes["training"]["steps"],
           f"no such setting beside stages, which take {config.training.steps} steps: set stages.NAME.steps")
  if isinstance(config, ModelConfig) and "num_hidden_layers" in new and not {"layer_types", "mlp_layer_types"} & set(new):
    config = config.cut_layers(new["num_hidden_layers"])
  return dataclasses.replace(config, **new)


def _replace_in(parts: tuple[StageConfig, ...], changes: Mapping[str, Any], name: str) -> tuple[StageConfig, ...]:
  """Stages, of which some are changed, each called by its name or by its place from 0."""
  places = {**{str(i): i for i in range(len(parts))}, **{part.name: i for i, part in enumerate(parts)}}
  new = list(parts)
  for key, value in changes.items():
    if key not in places:
      there = ", ".join(part.name for part in parts)
      raise ValueError(f"no stage {name}.{key}; there is {f'{there} (or 0 to {len(parts) - 1})' if parts else 'none'}")
    if not isinstance(value, Mapping):
      refuse(f"{name}.{key}", value, "a setting of one of its fields")
    new[places[key]] = _replace(new[places[key]], value, f"{name}.{key}.")
  return tuple(new)


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


def from_dict(kind: Any, values: Mapping[str, Any]) -> Any:
  """The dataclass `kind` from a dictionary that `to_dict` (through JSON or not) made; unknown names are an error.

  Raises:
    ValueError: an unknown field, or a value that is refused.
  """
  hints = typing.get_type_hints(kind)
  names = fields_of(kind)
  fields = {}
  for name, value in values.items():
    if name not in names:
      raise ValueError(f"{kind.__name__} has no field {name!r}; it has {', '.join(names)}")
    nested = [t for t in (typing.get_args(hints[name]) or (hints[name],)) if dataclasses.is_dataclass(t)]
    if nested and isinstance(value, (list, tuple)):
      value = tuple(from_dict(nested[0], item) for item in value)
    elif nested and value is not None:
      value = from_dict(nested[0], value)
    fields[name] = value
  return kind(**fields)
