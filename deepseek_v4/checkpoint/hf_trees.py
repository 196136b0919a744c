"""Trees in memory (weights, gradients, moments) under foreign names and in foreign layouts, and back."""

from __future__ import annotations

from typing import Any, Mapping

import jax
import numpy as np

from deepseek_v4.checkpoint.hf_names import DRAFT, FORMS, I64, leaves, tensors
from deepseek_v4.checkpoint.hf_read import read_variables
from deepseek_v4.checkpoint.problems import Problems, refuse
from deepseek_v4.checkpoint.trees import flatten, restack
from deepseek_v4.config import ModelConfig


def _masked(value: Any) -> bool:
  """None, or what optax puts where a transform owns no leaf (MaskedNode, an empty tuple)."""
  return value is None or (isinstance(value, tuple) and not value)


def unscanned_leaves(tree: Mapping[str, Any], config: ModelConfig) -> dict[str, np.ndarray]:
  """{path: NumPy array} of a variables dictionary, dtypes kept, layers unscanned; leaves that are masked are left out.

  Raises:
    ValueError: in one message, every leaf that is missing, unknown or of the wrong shape.
  """
  flat = flatten(restack(jax.tree.map(np.asarray, dict(tree)), config, scan_layers=False))
  problems: Problems = {"missing": [], "unexpected": [], "wrong shape": []}
  found = {}
  for leaf in leaves(config):
    if leaf.row.collection not in tree:
      continue
    if leaf.path not in flat:
      problems["missing"].append(leaf.path)
      continue
    value = flat.pop(leaf.path)
    if not _masked(value) and value.shape != leaf.shape:
      problems["wrong shape"].append(f"{leaf.path} {value.shape}, expected {leaf.shape}")
    elif not _masked(value):
      found[leaf.path] = value
  known = {leaf.scales_path for leaf in leaves(config)} if "scales" in tree else set()
  found.update((path, flat.pop(path)) for path in list(flat) if path in known)
  problems["unexpected"] = list(flat)
  refuse("the tree does not fit the config", problems)
  return found


def to_hf_names(tree: Any, config: ModelConfig, form: str = "hf") -> dict[str, np.ndarray]:
  """The tensors of a tree under foreign names and in foreign layouts; dtypes stay, hash tables become int64.

  Args:
    tree: shaped like `params` (weights, gradients, moments; then no router tensors come out) or a variables dictionary
      {"params", "router"}; layers scanned or not. Leaves that are None or optax.MaskedNode() are left out, as are scales.
    config: the model.
    form: "hf" for transformers' state_dict names, which know no MTP block: `mtp/*` is dropped; "release" for the
      released names, one tensor per expert.

  Raises:
    ValueError: unknown form; or, in one message, every leaf that is missing, unknown or of the wrong shape.
  """
  if form not in FORMS:
    raise ValueError(f"form = {form!r}: expected one of {', '.join(map(repr, FORMS))}")
  arrays = unscanned_leaves(tree if "params" in tree else {"params": tree}, config)
  named: dict[str, np.ndarray] = {}
  for name, tensor in tensors(config, form).items():
    present = [leaf.path in arrays for leaf in tensor.leaves]
    if not any(present) or (form == "hf" and name.startswith(DRAFT)):
      continue
    if not all(present):
      raise ValueError(f"{name}: expected all or none of {', '.join(leaf.path for leaf in tensor.leaves)} to be masked")
    whole = tensor.join(arrays)
    # copies: the leaves may be donated later
    named[name] = np.array(whole, np.int64 if tensor.stored == I64 else whole.dtype, order="C")
  return named


def from_hf_names(mapping: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
  """The variables {"params", "router"} from tensors under transformers' or the released names (told from the names).

  Args:
    mapping: name -> numpy, JAX or torch array. bfloat16 and float16 are widened, quantised tensors decoded. With
      `num_nextn_predict_layers` 0, `mtp.*` tensors are left aside, as transformers does.
    config: the model; its `scan_layers` says how the layers are laid out.

  Returns:
    {"params": float32 arrays, "router": {bias float32, hash tables int32}}.

  Raises:
    ValueError: in one message, every tensor that is missing, unexpected, of the wrong shape or dtype, scales that are
      missing or belong to nothing, and every hash table that is all zero (transformers' default, all tokens to expert 0)
      or names experts out of range; or codes that are no number.
  """
  return read_variables(mapping, config, {})
