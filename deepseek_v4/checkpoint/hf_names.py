"""One table between our leaves and the tensors of transformers and of the released checkpoints, read both ways.

Every leaf of the model has one row: its axes here, its axes there, its name in transformers' state_dict ("hf") and in the
release ("release"). Leaves that share a foreign name are joined along one axis, in the order of the table; a foreign name
with `{e}` stands for one tensor per expert. The multi-token-prediction block (`mtp.0.*`) exists in the release only.
Layouts: SPEC of the release, table of tensors; transformers 5.24 `modeling_deepseek_v4.py`.

Axis letters: V vocabulary, D hidden size, Z hidden size (output side), Q query rank, H heads, d head size, G output groups,
P = H*d/G inputs of a group, R rank of a group, O = G*R, J index heads, i index head size, C series (2 for CSA and the
indexer, 1 for HCA), m tokens per compressed entry, N streams, X = N*D, M = N*N, B = (2+N)*N, E experts, F expert width,
K experts a token.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_v4.checkpoint.trees import flatten, restack, unflatten
from deepseek_v4.config import CSA, HASH, HCA, LEARNED, LayerSpec, ModelConfig

FORMS = ("hf", "release")
Problems = dict[str, list[str]]  # kind of problem -> names


@dataclasses.dataclass(frozen=True)
class Row:
  """One leaf: `axes` here, `theirs` there (parentheses merge axes), joined with its namesakes along axis `join` there."""

  ours: str
  axes: str
  theirs: str
  hf: str
  release: str
  join: int = 0
  only: tuple[str, ...] = ()  # attention or router kinds that have this leaf; () = every layer
  collection: str = "params"


_HEAD = (
  Row("hc_head/fn", "X N", "N X", "model.hc_head.hc_fn", "hc_head_fn"),
  Row("hc_head/base", "N", "N", "model.hc_head.hc_base", "hc_head_base"),
  Row("hc_head/scale", "1", "1", "model.hc_head.hc_scale", "hc_head_scale"),
  Row("final_norm/scale", "D", "D", "model.norm.weight", "norm.weight"),
)
_TOP = (
  Row("embed/embedding", "V D", "V D", "model.embed_tokens.weight", "embed.weight"),
  *_HEAD,
  Row("lm_head/kernel", "D V", "V D", "lm_head.weight", "head.weight"),
)
_MTP = (
  Row("embed_norm/scale", "D", "D", "", "enorm.weight"),
  Row("hidden_norm/scale", "D", "D", "", "hnorm.weight"),
  Row("embed_proj", "D Z", "Z D", "", "e_proj.weight"),
  Row("hidden_proj", "D Z", "Z D", "", "h_proj.weight"),
  *_HEAD,
)
_COMPRESSED = (CSA, HCA)
_LAYER = (
  Row("attn_hc/fn_pre", "X N", "N X", "attn_hc.fn", "hc_attn_fn"),
  Row("attn_hc/fn_post", "X N", "N X", "attn_hc.fn", "hc_attn_fn"),
  Row("attn_hc/fn_res", "X M", "M X", "attn_hc.fn", "hc_attn_fn"),
  Row("attn_hc/base", "B", "B", "attn_hc.base", "hc_attn_base"),
  Row("attn_hc/scale", "3", "3", "attn_hc.scale", "hc_attn_scale"),
  Row("ffn_hc/fn_pre", "X N", "N X", "ffn_hc.fn", "hc_ffn_fn"),
  Row("ffn_hc/fn_post", "X N", "N X", "ffn_hc.fn", "hc_ffn_fn"),
  Row("ffn_hc/fn_res", "X M", "M X", "ffn_hc.fn", "hc_ffn_fn"),
  Row("ffn_hc/base", "B", "B", "ffn_hc.base", "hc_ffn_base"),
  Row("ffn_hc/scale", "3", "3", "ffn_hc.scale", "hc_ffn_scale"),
  Row("attn_norm/scale", "D", "D", "input_layernorm.weight", "attn_norm.weight"),
  Row("ffn_norm/scale", "D", "D", "post_attention_layernorm.weight", "ffn_norm.weight"),
  Row("attention/q_a", "D Q", "Q D", "self_attn.q_a_proj.weight", "attn.wq_a.weight"),
  Row("attention/q_a_norm/scale", "Q", "Q", "self_attn.q_a_norm.weight", "attn.q_norm.weight"),
  Row("attention/q_b", "Q H d", "(H d) Q", "self_attn.q_b_proj.weight", "attn.wq_b.weight"),
  Row("attention/kv", "D d", "d D", "self_attn.kv_proj.weight", "attn.wkv.weight"),
  Row("attention/kv_norm/scale", "d", "d", "self_attn.kv_norm.weight", "attn.kv_norm.weight"),
  Row("attention/sink", "H", "H", "self_attn.sinks", "attn.attn_sink"),
  Row("attention/o_a", "G P R", "(G R) P", "self_attn.o_a_proj.weight", "attn.wo_a.weight"),
  Row("attention/o_b", "O D", "D O", "self_attn.o_b_proj.weight", "attn.wo_b.weight"),
  # The first half of the foreign output channels is series 0, the one of the previous window.
  Row("attention/compressor/kv", "C D d", "(C d) D", "self_attn.compressor.kv_proj.weight",
      "attn.compressor.wkv.weight", only=_COMPRESSED),
  Row("attention/compressor/gate", "C D d", "(C d) D", "self_attn.compressor.gate_proj.weight",
      "attn.compressor.wgate.weight", only=_COMPRESSED),
  Row("attention/compressor/position_bias", "C m d", "m (C d)", "self_attn.compressor.position_bias",
      "attn.compressor.ape", only=_COMPRESSED),
  Row("attention/compressor/norm/scale", "d", "d", "self_attn.compressor.kv_norm.weight",
      "attn.compressor.norm.weight", only=_COMPRESSED),
  Row("attention/indexer/q_b", "Q J i", "(J i) Q", "self_attn.compressor.indexer.q_b_proj.weight",
      "attn.indexer.wq_b.weight", only=(CSA,)),
  Row("attention/indexer/head_weights", "D J", "J D", "self_attn.compressor.indexer.scorer.weights_proj.weight",
      "attn.indexer.weights_proj.weight", only=(CSA,)),
  Row("attention/indexer/compressor/kv", "C D i", "(C i) D", "self_attn.compressor.indexer.kv_proj.weight",
      "attn.indexer.compressor.wkv.weight", only=(CSA,)),
  Row("attention/indexer/compressor/gate", "C D i", "(C i) D", "self_attn.compressor.indexer.gate_proj.weight",
      "attn.indexer.compressor.wgate.weight", only=(CSA,)),
  Row("attention/indexer/compressor/position_bias", "C m i", "m (C i)", "self_attn.compressor.indexer.position_bias",
      "attn.indexer.compressor.ape", only=(CSA,)),
  Row("attention/indexer/compressor/norm/scale", "i", "i", "self_attn.compressor.indexer.kv_norm.weight",
      "attn.indexer.compressor.norm.weight", only=(CSA,)),
  Row("moe/router/gate", "D E", "E D", "mlp.gate.weight", "ffn.gate.weight"),
  Row("moe/router/bias", "E", "E", "mlp.gate.e_score_correction_bias", "ffn.gate.bias", only=(LEARNED,),
      collection="router"),
  Row("moe/router/hash_table", "V K", "V K", "mlp.gate.tid2eid", "ffn.gate.tid2eid", only=(HASH,), collection="router"),
  Row("moe/experts/gate", "E D F", "E F D", "mlp.experts.gate_up_proj", "ffn.experts.{e}.w1.weight", join=1),
  Row("moe/experts/up", "E D F", "E F D", "mlp.experts.gate_up_proj", "ffn.experts.{e}.w3.weight", join=1),
  Row("moe/experts/down", "E F D", "E D F", "mlp.experts.down_proj", "ffn.experts.{e}.w2.weight"),
  Row("moe/shared/gate", "D F", "F D", "mlp.shared_experts.gate_proj.weight", "ffn.shared_experts.w1.weight"),
  Row("moe/shared/up", "D F", "F D", "mlp.shared_experts.up_proj.weight", "ffn.shared_experts.w3.weight"),
  Row("moe/shared/down", "F D", "D F", "mlp.shared_experts.down_proj.weight", "ffn.shared_experts.w2.weight"),
)


def _sizes(config: ModelConfig, spec: LayerSpec | None) -> dict[str, int]:
  """Length of every axis letter, for a layer of this spec (None: outside the layers)."""
  c = config
  sizes = {"V": c.vocab_size, "D": c.hidden_size, "Z": c.hidden_size, "Q": c.q_lora_rank, "H": c.num_attention_heads,
           "d": c.head_dim, "G": c.o_groups, "P": c.num_attention_heads * c.head_dim // c.o_groups, "R": c.o_lora_rank,
           "O": c.o_groups * c.o_lora_rank, "J": c.index_n_heads, "i": c.index_head_dim, "N": c.hc_mult,
           "X": c.hc_mult * c.hidden_size, "M": c.hc_mult ** 2, "B": (2 + c.hc_mult) * c.hc_mult, "E": c.n_routed_experts,
           "F": c.moe_intermediate_size, "K": c.num_experts_per_tok, "1": 1, "3": 3}
  if spec is not None:
    sizes.update(C=2 if spec.attention == CSA else 1, m=config.compress_rate(spec.attention))
  return sizes


@dataclasses.dataclass(frozen=True)
class Leaf:
  """One leaf of one model: its path with unscanned layers, its row, its axis lengths and its two foreign names."""

  path: str
  row: Row
  sizes: Mapping[str, int]
  hf: str
  release: str

  @property
  def shape(self) -> tuple[int, ...]:
    return tuple(self.sizes[a] for a in self.row.axes.split())

  @property
  def _their_axes(self) -> list[list[str]]:
    return [(merged or single).split() for merged, single in re.findall(r"\(([^)]*)\)|(\S+)", self.row.theirs)]

  @property
  def their_shape(self) -> tuple[int, ...]:
    return tuple(math.prod(self.sizes[a] for a in group) for group in self._their_axes)

  def to_theirs(self, x: np.ndarray) -> np.ndarray:
    """From our layout to theirs: axes permuted, then merged."""
    ours = self.row.axes.split()
    return x.transpose([ours.index(a) for group in self._their_axes for a in group]).reshape(self.their_shape)

  def from_theirs(self, x: np.ndarray) -> np.ndarray:
    """The inverse of `to_theirs`."""
    flat = [a for group in self._their_axes for a in group]
    return x.reshape([self.sizes[a] for a in flat]).transpose([flat.index(a) for a in self.row.axes.split()])


def leaves(config: ModelConfig) -> Iterator[Leaf]:
  """Every leaf of `params` and `router` of this model, layers unscanned."""
  scopes: list[tuple[str, str, str, tuple[Row, ...], LayerSpec | None]] = [("", "", "", _TOP, None)]
  scopes += [(f"layers/layer_{n:02d}/", f"model.layers.{n}.", f"layers.{n}.", _LAYER, spec)
             for n, spec in enumerate(config.layer_specs)]
  if config.num_nextn_predict_layers:
    scopes += [("mtp/", "", "mtp.0.", _MTP, None), ("mtp/block/", "", "mtp.0.", _LAYER, config.mtp_spec)]
  for ours, hf, release, rows, spec in scopes:
    sizes = _sizes(config, spec)
    for row in rows:
      if not row.only or (spec is not None and (spec.attention in row.only or spec.router in row.only)):
        release_name = release + row.release
        # transformers has no MTP block: beside its names, those tensors can only stand under the released ones.
        hf_name = release_name if ours.startswith("mtp/") else hf + row.hf
        yield Leaf(f"{row.collection}/{ours}{row.ours}", row, sizes, hf_name, release_name)


def _masked(value: Any) -> bool:
  """None, or what optax puts where a transform owns no leaf (MaskedNode, an empty tuple)."""
  return value is None or (isinstance(value, tuple) and not value)


def refuse(what: str, problems: Problems) -> None:
  """Raises one ValueError that lists every problem by kind, if there is any."""
  lines = [f"  {kind} ({len(names)}): {', '.join(names)}" for kind, names in problems.items() if names]
  if lines:
    raise ValueError("\n".join([what, *lines]))


# ---- ours -> theirs --------------------------------------------------------------------------------------------------
def to_hf_names(tree: Any, config: ModelConfig, form: str = "hf") -> dict[str, np.ndarray]:
  """The tensors of a tree under foreign names and in foreign layouts; dtypes stay, hash tables become int64.

  Args:
    tree: shaped like `params` (weights, gradients, moments; then no router tensors come out) or a variables dictionary
      {"params", "router"}; layers scanned or not. Leaves that are None or optax.MaskedNode() are left out.
    config: the model.
    form: "hf" for transformers' state_dict names, which know no MTP block: `mtp/*` is dropped; "release" for the
      released names, one tensor per expert.

  Raises:
    ValueError: unknown form; or, in one message, every leaf that is missing, unknown or of the wrong shape.
  """
  if form not in FORMS:
    raise ValueError(f"form = {form!r}: expected one of {', '.join(map(repr, FORMS))}")
  variables = tree if "params" in tree else {"params": tree}
  flat = flatten(restack(jax.tree.map(np.asarray, variables), config, scan_layers=False))
  problems: Problems = {"missing": [], "unexpected": [], "wrong shape": []}
  parts: dict[str, list[tuple[Leaf, np.ndarray | None]]] = {}
  for leaf in leaves(config):
    if leaf.row.collection not in variables:
      continue
    if leaf.path not in flat:
      problems["missing"].append(leaf.path)
      continue
    value = flat.pop(leaf.path)
    if _masked(value):
      parts.setdefault(getattr(leaf, form), []).append((leaf, None))
    elif value.shape != leaf.shape:
      problems["wrong shape"].append(f"{leaf.path} {value.shape}, expected {leaf.shape}")
    else:
      parts.setdefault(getattr(leaf, form), []).append((leaf, leaf.to_theirs(value)))
  problems["unexpected"] = list(flat)
  refuse("the tree does not fit the config", problems)
  named: dict[str, np.ndarray] = {}
  for name, members in parts.items():
    arrays = [x for _, x in members if x is not None]
    if not arrays or (form == "hf" and members[0][0].path.split("/")[1] == "mtp"):
      continue
    if len(arrays) < len(members):
      raise ValueError(f"{name}: expected all or none of {', '.join(leaf.path for leaf, _ in members)} to be masked")
    whole = np.concatenate(arrays, axis=members[0][0].row.join) if len(arrays) > 1 else arrays[0]
    whole = whole.astype(np.int64) if name.endswith("tid2eid") else whole
    experts = [(name.format(e=e), whole[e]) for e in range(len(whole))] if "{e}" in name else [(name, whole)]
    named.update((n, np.array(x, order="C")) for n, x in experts)  # copies: the leaves may be donated later
  return named


# ---- theirs -> ours --------------------------------------------------------------------------------------------------
def as_numpy(value: Any) -> np.ndarray:
  """A host array from a numpy, JAX or torch array (torch is never imported) or anything with `.numpy()`."""
  if hasattr(value, "detach"):
    value = value.detach().cpu()
    value = value.float() if "bfloat16" in str(value.dtype) else value  # numpy() refuses torch's bfloat16
  return np.asarray(value.numpy() if hasattr(value, "numpy") else value)


def _refuse_quantised(mapping: Mapping[str, Any], known: set[str], config: ModelConfig) -> None:
  """Packed weights and their scales need their own reader; without it, say so instead of listing wrong shapes."""
  packed = ("float8", "float4", "int8", "uint8", "f8", "f4", "i8", "u8")
  names = [n for n, x in mapping.items()
           if str(getattr(x, "dtype", "")).lower().removeprefix("torch.").startswith(packed)
           or (n.endswith((".scale", "_scale_inv")) and n not in known)]
  if names:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    said = f" (config.quantization = {config.quantization!r})" if config.quantization else ""
    raise ValueError(f"quantised checkpoints are not read yet{said}: expected bfloat16, float16 or float32 tensors, found "
                     f"{', '.join(names[:5])}{more}")


@dataclasses.dataclass
class _Tensor:
  """A foreign tensor: the leaves it holds, joined in this order; for one expert's tensor, which expert."""

  leaves: list[Leaf]
  expert: int | None = None

  @property
  def shape(self) -> tuple[int, ...]:
    shapes = [list(leaf.their_shape) for leaf in self.leaves]
    if self.expert is not None:
      return tuple(shapes[0][1:])
    join = self.leaves[0].row.join
    shapes[0][join] = sum(s[join] for s in shapes)
    return tuple(shapes[0])

  def spread(self, x: np.ndarray, into: dict[str, np.ndarray], dtype: Any) -> None:
    """Copies this tensor's part of each leaf, still in their layout, to `into`[path of the leaf]."""
    if self.expert is not None:
      leaf = self.leaves[0]
      into.setdefault(leaf.path, np.empty(leaf.their_shape, dtype))[self.expert] = x
      return
    join = self.leaves[0].row.join
    ends = np.cumsum([leaf.their_shape[join] for leaf in self.leaves])[:-1] if len(self.leaves) > 1 else np.zeros(0, int)
    into.update((leaf.path, np.array(part, dtype)) for leaf, part in zip(self.leaves, np.split(x, ends, join), strict=True))


def _tensors(config: ModelConfig, form: str) -> dict[str, _Tensor]:
  named: dict[str, _Tensor] = {}
  for leaf in leaves(config):
    name = getattr(leaf, form)
    if "{e}" in name:
      named.update((name.format(e=e), _Tensor([leaf], e)) for e in range(config.n_routed_experts))
    else:
      named.setdefault(name, _Tensor([])).leaves.append(leaf)
  return named


def from_hf_names(mapping: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
  """The variables {"params", "router"} from tensors under transformers' or the released names (told from the names).

  Args:
    mapping: name -> numpy, JAX or torch array. bfloat16 and float16 are widened. With `num_nextn_predict_layers` 0,
      `mtp.*` tensors are left aside, as transformers does.
    config: the model; its `scan_layers` says how the layers are laid out.

  Returns:
    {"params": float32 arrays, "router": {bias float32, hash tables int32}}.

  Raises:
    ValueError: quantised tensors; or, in one message, every tensor that is missing, unexpected or of the wrong shape and
      every hash table that is all zero (transformers' default, all tokens to expert 0) or names experts out of range.
  """
  return read_variables(mapping, config, {})


def read_variables(mapping: Mapping[str, Any], config: ModelConfig, problems: Problems, dtype: Any = None) -> dict[str, Any]:
  """`from_hf_names` that also reports `problems` found before and gives floating parameters the dtype (None: float32)."""
  form = "hf" if any(n.startswith("model.") for n in mapping) else "release"
  tensors = _tensors(config, form)
  if config.num_nextn_predict_layers == 0:
    mapping = {n: mapping[n] for n in mapping if not n.startswith("mtp.")}
  _refuse_quantised(mapping, set(tensors), config)
  problems = {**problems, "missing": [], "unexpected": [n for n in mapping if n not in tensors], "wrong shape": []}
  if config.num_nextn_predict_layers and not any(n.startswith("mtp.") for n in mapping):
    problems["no multi-token-prediction block"] = [
      "num_nextn_predict_layers = 1, but no tensor is named mtp.* (transformers' state_dicts never hold the block); "
      "use dataclasses.replace(config, num_nextn_predict_layers=0)"]
    tensors = {n: t for n, t in tensors.items() if not n.startswith("mtp.")}
  if any(re.match(r"model\.layers\.\d+\.(attn|ffn)\.", n) for n in mapping):
    problems["mixed names"] = [
      "written by save_pretrained in its original format; use save_original_format=False, or state_dict()"]
  flat: dict[str, np.ndarray] = {}
  for name, tensor in tensors.items():
    if name not in mapping:
      problems["missing"].append(name)
    elif tuple(mapping[name].shape) != tensor.shape:
      problems["wrong shape"].append(f"{name} {tuple(mapping[name].shape)}, expected {tensor.shape}")
    elif name.endswith("tid2eid"):
      table = as_numpy(mapping[name])
      problems.setdefault("hash table", []).extend(_table_problems(name, table, config))
      tensor.spread(table, flat, np.int32)
  refuse("the tensors do not fit the config", problems)
  for name, tensor in tensors.items():
    if not name.endswith("tid2eid"):
      cast = np.float32 if dtype is None or tensor.leaves[0].row.collection == "router" else dtype
      tensor.spread(as_numpy(mapping[name]), flat, cast)
  variables = unflatten({leaf.path: np.ascontiguousarray(leaf.from_theirs(flat[leaf.path])) for leaf in leaves(config)})
  return jax.tree.map(jnp.asarray, restack(variables, config, config.scan_layers))


def _table_problems(name: str, table: np.ndarray, config: ModelConfig) -> list[str]:
  experts = config.n_routed_experts
  if table.dtype.kind not in "iu":
    return [f"{name} has dtype {table.dtype}, expected integers"]
  if table.min() < 0 or table.max() >= experts:
    return [f"{name} holds ids from {table.min()} to {table.max()}, expected 0 to n_routed_experts - 1 = {experts - 1}"]
  if experts > 1 and not table.any():
    return [f"{name} is all zeros: every token would go to expert 0"]
  return []
