"""Foreign tensors to our leaves: what is found is matched with the table first, all of it, and read leaf by leaf then."""

from __future__ import annotations

import concurrent.futures
import dataclasses
from pathlib import Path
from typing import Any, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_v4.checkpoint import hf_format
from deepseek_v4.checkpoint.hf_format import Format
from deepseek_v4.checkpoint.hf_names import (
  DRAFT,
  EXPERTS,
  FP8,
  I64,
  Leaf,
  Tensor,
  form_of,
  leaves,
  mixed_names,
  scale_name,
  tensors,
  weight_name,
)
from deepseek_v4.checkpoint.problems import Problems, refuse
from deepseek_v4.checkpoint.safetensors_files import read_folder
from deepseek_v4.checkpoint.trees import restack, unflatten
from deepseek_v4.config import ModelConfig

_PLAIN = ("float32", "bfloat16", "float16", "float64")


def as_numpy(value: Any) -> np.ndarray:
  """A host array from a numpy, JAX or torch array (torch is never imported) or anything with `.numpy()`,
  of the same shape and dtype; torch's bfloat16 as float32."""
  if hasattr(value, "detach"):
    value = value.detach().cpu()
    value = value.float() if "bfloat16" in str(value.dtype) else value  # numpy() refuses torch's bfloat16
  return np.asarray(value.numpy() if hasattr(value, "numpy") else value)


def format_of(tensor: Tensor, quantization: str | None) -> Format | None:
  """In which quantised format a release of this kind holds a tensor; None = a plain one."""
  if quantization is None or tensor.stored not in (FP8, EXPERTS):
    return None
  return hf_format.FP4 if tensor.stored == EXPERTS and quantization == "fp8+fp4" else hf_format.FP8


@dataclasses.dataclass(frozen=True)
class Source:
  """A foreign tensor that was found: its values, for a quantised one its scales and format."""

  tensor: Tensor
  value: Any
  scales: Any = None
  format: Format | None = None

  @property
  def is_narrow(self) -> bool:
    """Whether it is stored in BF16, FP8 or FP4, and not in anything that bfloat16 rounds."""
    return self.format is not None or _dtype(self.value) == "bfloat16"

  def read(self, dtype: Any) -> np.ndarray:
    """The values in their layout and shape, in this dtype.

    Raises:
      ValueError: codes or scales that are no number, or a decoded value that the dtype cannot hold exactly.
    """
    if self.format is None:
      return as_numpy(self.value).astype(dtype, copy=False)
    try:
      exact = hf_format.decode(as_numpy(self.value), as_numpy(self.scales), self.format)
    except ValueError as error:
      raise ValueError(f"{self.tensor.name}: {error}") from error
    cast = exact.astype(dtype, copy=False)
    if cast is not exact and not np.array_equal(cast.astype(np.float32), exact):
      raise ValueError(f"{self.tensor.name}: values that {np.dtype(dtype)} cannot hold; expected float32 for this release")
    return cast


def find_sources(mapping: Mapping[str, Any], config: ModelConfig, problems: Problems, *,
                 drop_draft: bool | None = None, as_configured: bool = False) -> dict[str, list[Source]]:
  """The tensors of every leaf by its path, in the order of its experts.

  Args:
    mapping: name -> anything with shape and dtype; nothing is read but hash tables.
    config: the model.
    problems: found before, by kind; reported with what is found here.
    drop_draft: whether `mtp.*` tensors that the model has no place for are left out; None: silently, as transformers does.
    as_configured: whether tensors must be in the formats of `config.quantization`. Otherwise only FP8 where that says FP4,
      or the reverse, is wrong: weights may be quantised or not, whatever the config says.

  Raises:
    ValueError: see `from_hf_names`; `mtp.*` tensors without a place if drop_draft is False.
  """
  form = form_of(mapping)
  expected = tensors(config, form)
  problems = {**problems, "missing": [], "unexpected": [], "wrong shape": [], "wrong dtype": [], "missing scale": [],
              "extra scale": []}
  names = list(mapping)
  if config.num_nextn_predict_layers == 0:
    draft = [n for n in names if n.startswith(DRAFT)]
    names = [n for n in names if not n.startswith(DRAFT)]
    if drop_draft is False:
      problems["draft tensors, which this model has no place for; drop_draft leaves them out"] = draft
  elif not any(n.startswith(DRAFT) for n in names):
    problems["no multi-token-prediction block"] = [
      "num_nextn_predict_layers = 1, but no tensor is named mtp.* (transformers' state_dicts never hold the block); "
      "use dataclasses.replace(config, num_nextn_predict_layers=0), or drop_draft when converting"]
    expected = {n: t for n, t in expected.items() if not n.startswith(DRAFT)}
  if mixed_names(names):
    problems["mixed names"] = [
      "written by save_pretrained in its original format; use save_original_format=False, or state_dict()"]
  found: dict[str, list[Source]] = {}
  used = set()
  for name, tensor in expected.items():
    if name not in mapping:
      problems["missing"].append(name)
      continue
    source = _match(name, tensor, mapping, form, problems)
    if form == "release":
      _check_format(source, config.quantization, as_configured, problems)
    used |= {name} | ({scale_name(name)} if source.format else set())
    for leaf in tensor.leaves:
      found.setdefault(leaf.path, []).append(source)
    if tensor.stored == I64:
      problems.setdefault("hash table", []).extend(_table_problems(name, as_numpy(mapping[name]), config))
  for name in names:
    if name not in used:
      problems["extra scale" if weight_name(name) in expected else "unexpected"].append(name)
  for sources in found.values():
    formats = {source.format for source in sources}
    if len(formats) > 1:
      stored = [f"{s.tensor.name} {_dtype(s.value)}" for s in sources if s.format is not sources[0].format]
      problems["wrong dtype"] += [f"{s}, expected {_dtype(sources[0].value)} as the other experts" for s in stored]
  refuse("the tensors do not fit the config", problems)
  return found


def _dtype(value: Any) -> str:
  return str(value.dtype).removeprefix("torch.")


def _match(name: str, tensor: Tensor, mapping: Mapping[str, Any], form: str, problems: Problems) -> Source:
  """The tensor as it is stored; whatever is wrong with it goes to `problems`."""
  value, dtype = mapping[name], _dtype(mapping[name])
  quantisable = form == "release" and tensor.stored in (FP8, EXPERTS)
  formats = {"float8_e4m3fn": hf_format.FP8} if quantisable else {}
  if quantisable and tensor.stored == EXPERTS:
    formats |= {"int8": hf_format.FP4, "uint8": hf_format.FP4}
  format = formats.get(dtype)
  plain = ("int64", "int32") if tensor.stored == I64 else _PLAIN
  shape = tuple(tensor.shape) if format is None else format.stored_shape(tensor.shape)
  if format is None and dtype not in plain:
    problems["wrong dtype"].append(f"{name} {dtype}, expected {' or '.join((*plain, *formats))}")
  elif tuple(value.shape) != shape:
    problems["wrong shape"].append(f"{name} {tuple(value.shape)}, expected {shape}")
  if format is None:
    return Source(tensor, value)
  scale = scale_name(name)
  if scale not in mapping:
    problems["missing scale"].append(scale)
    return Source(tensor, value, None, format)
  if _dtype(mapping[scale]) not in ("float8_e8m0fnu", "uint8"):
    problems["wrong dtype"].append(f"{scale} {_dtype(mapping[scale])}, expected float8_e8m0fnu or uint8")
  elif tuple(mapping[scale].shape) != format.grid(tensor.shape):
    problems["wrong shape"].append(f"{scale} {tuple(mapping[scale].shape)}, expected {format.grid(tensor.shape)}")
  return Source(tensor, value, mapping[scale], format)


def _check_format(source: Source, quantization: str | None, strict: bool, problems: Problems) -> None:
  """Lists a tensor that is stored in another format than the config says."""
  wanted = format_of(source.tensor, quantization)
  other = source.format is not wanted and (strict or (source.format is not None and wanted is not None))
  if other and (source.format is not None or _dtype(source.value) in _PLAIN):  # anything else is listed already
    names = {None: "float32 or bfloat16", hf_format.FP8: "float8_e4m3fn", hf_format.FP4: "int8 or uint8 (FP4)"}
    problems["wrong dtype"].append(f"{source.tensor.name} {_dtype(source.value)}, expected {names[wanted]} as the config "
                                   f"says (quantization {quantization!r})")


def _table_problems(name: str, table: np.ndarray, config: ModelConfig) -> list[str]:
  experts = config.n_routed_experts
  if table.dtype.kind not in "iu" or not table.size:
    return []  # already listed
  if table.min() < 0 or table.max() >= experts:
    return [f"{name} holds ids from {table.min()} to {table.max()}, expected 0 to n_routed_experts - 1 = {experts - 1}"]
  if experts > 1 and not table.any():
    return [f"{name} is all zeros: every token would go to expert 0"]
  return []


# ---- reading leaf by leaf ----------------------------------------------------------------------------------------------
def read_leaf(leaf: Leaf, sources: Sequence[Source], dtype: Any) -> np.ndarray:
  """One leaf in our layout, of shape `leaf.shape`, in this dtype; experts are decoded by several threads, each into its
  place."""
  first = sources[0]
  if first.tensor.expert is None:
    return np.array(leaf.from_theirs(first.tensor.part(leaf, first.read(dtype))), dtype, order="C")
  whole = np.empty(leaf.shape, dtype)

  def fill(source: Source) -> None:
    whole[source.tensor.expert] = leaf.one_expert.from_theirs(source.read(dtype)[None])[0]

  with concurrent.futures.ThreadPoolExecutor() as pool:
    list(pool.map(fill, sources))
  return whole


def read_scales(sources: Sequence[Source]) -> np.ndarray:
  """The block scales of one quantised leaf, uint8 [rows, columns] of their grid; of experts [E, rows, columns]."""
  grids = [np.array(as_numpy(source.scales).view(np.uint8)) for source in sources]
  return grids[0] if sources[0].tensor.expert is None else np.stack(grids)


def leaf_dtype(leaf: Leaf, dtype: Any) -> Any:
  """Dtype of a leaf in memory: hash tables int32, router biases float32, the rest as asked for (None: float32)."""
  if leaf.row.stored == I64:
    return np.int32
  return np.float32 if dtype is None or leaf.row.collection == "router" else dtype


def read_variables(mapping: Mapping[str, Any], config: ModelConfig, problems: Problems, dtype: Any = None,
                   keep_scales: bool = False) -> dict[str, Any]:
  """`from_hf_names` that also reports `problems` found before; see `load_hf` for the other arguments.

  Raises:
    ValueError: tensors that do not fit the config, or of which some are quantised and others not, with keep_scales.
  """
  sources = find_sources(mapping, config, problems)
  quantised = {path: found[0].format is not None for path, found in sources.items()
               if found[0].tensor.stored in (FP8, EXPERTS)}
  keep_scales = keep_scales and any(quantised.values())
  if keep_scales and not all(quantised.values()):
    refuse("keep_scales = True: expected every matrix that releases quantise to be quantised, or none of them",
           {"not quantised": [path for path, is_so in quantised.items() if not is_so]})
  flat: dict[str, np.ndarray] = {}
  for leaf in leaves(config):
    flat[leaf.path] = read_leaf(leaf, sources[leaf.path], leaf_dtype(leaf, dtype))
    if keep_scales and leaf.path in quantised:
      flat[leaf.scales_path] = read_scales(sources[leaf.path])
  return jax.tree.map(jnp.asarray, restack(unflatten(flat), config, config.scan_layers))


def load_hf(source: str | Path | Mapping[str, Any], config: ModelConfig, dtype: Any = None,
            keep_scales: bool = False) -> dict[str, Any]:
  """The variables of a model in transformers' or the released names and layouts.

  Args:
    source: a folder with safetensors (one file, or shards with an index), or a mapping name -> array.
    config: the model, for example `ModelConfig.from_hf(folder)`; its `scan_layers` says how layers are laid out.
    dtype: of the floating parameters; None = float32. Router biases stay float32, hash tables int32. Quantised tensors
      (FP8, packed FP4; in the released form) are decoded without loss; what is stored wider than `dtype` is rounded.
    keep_scales: also return the block scales of quantised tensors, with which `save_hf` gives the same bytes back.

  Returns:
    {"params", "router"} and perhaps {"scales"}, ready for `model.apply`.

  Raises:
    FileNotFoundError: no such folder or nothing in it.
    ValueError: in one message, everything that does not fit, by kind (see `from_hf_names`), shards that are absent or cut
      short and tensors where index and shards disagree; or codes that are no number.
  """
  if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
    raise ValueError(f"dtype = {dtype!r}: expected a floating type, such as float32 or bfloat16")
  if isinstance(source, Mapping):
    return read_variables(source, config, {}, dtype, keep_scales)
  stored, problems = read_folder(Path(source))
  return read_variables(stored, config, problems, dtype, keep_scales)
