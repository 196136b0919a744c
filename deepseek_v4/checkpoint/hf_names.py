"""One table between our leaves and the tensors of transformers and of the released checkpoints, read both ways.

Every leaf of the model has one row: its axes here, its axes there, its name in transformers' state_dict ("hf") and in the
release ("release"), and how the release stores it. Leaves that share a foreign name are joined along one axis, in the order
of the table; a foreign name with `{e}` stands for one tensor per expert. The multi-token-prediction block (`mtp.0.*`) exists
in the release only. A quantised tensor NAME.weight has its scales in NAME.scale.
Layouts: the release's table of tensors; transformers 5.24 `modeling_deepseek_v4.py`.

Axis letters: V vocabulary, D hidden size, Z hidden size (output side), Q query rank, H heads, d head size, G output groups,
P = H*d/G inputs of a group, R rank of a group, O = G*R, J index heads, i index head size, C series (2 for CSA and the
indexer, 1 for HCA), m tokens per compressed entry, N streams, X = N*D, M = N*N, B = (2+N)*N, E experts, F expert width,
K experts a token.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from typing import Iterable, Iterator, Mapping

import numpy as np

from deepseek_v4.config import CSA, HASH, HCA, LEARNED, LayerSpec, ModelConfig

FORMS = ("hf", "release")
# How a release stores a tensor; EXPERTS in FP8 or FP4, whichever the release chose.
BF16, F32, I64, FP8, EXPERTS = "bf16", "f32", "i64", "fp8", "experts"
DRAFT = "mtp."  # begins the names of the multi-token-prediction block, and of the draft stages of later releases


@dataclasses.dataclass(frozen=True)
class Row:
  """One leaf: `axes` here, `theirs` there (parentheses merge axes), joined with its namesakes along axis `join` there."""

  ours: str
  axes: str
  theirs: str
  hf: str
  release: str
  stored: str = BF16
  join: int = 0
  only: tuple[str, ...] = ()  # attention or router kinds that have this leaf; () = every layer
  collection: str = "params"


_HEAD = (
  Row("hc_head/fn", "X N", "N X", "model.hc_head.hc_fn", "hc_head_fn", F32),
  Row("hc_head/base", "N", "N", "model.hc_head.hc_base", "hc_head_base", F32),
  Row("hc_head/scale", "1", "1", "model.hc_head.hc_scale", "hc_head_scale", F32),
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
  Row("embed_proj", "D Z", "Z D", "", "e_proj.weight", FP8),
  Row("hidden_proj", "D Z", "Z D", "", "h_proj.weight", FP8),
  *_HEAD,
)
_COMPRESSED = (CSA, HCA)
_LAYER = (
  Row("attn_hc/fn_pre", "X N", "N X", "attn_hc.fn", "hc_attn_fn", F32),
  Row("attn_hc/fn_post", "X N", "N X", "attn_hc.fn", "hc_attn_fn", F32),
  Row("attn_hc/fn_res", "X M", "M X", "attn_hc.fn", "hc_attn_fn", F32),
  Row("attn_hc/base", "B", "B", "attn_hc.base", "hc_attn_base", F32),
  Row("attn_hc/scale", "3", "3", "attn_hc.scale", "hc_attn_scale", F32),
  Row("ffn_hc/fn_pre", "X N", "N X", "ffn_hc.fn", "hc_ffn_fn", F32),
  Row("ffn_hc/fn_post", "X N", "N X", "ffn_hc.fn", "hc_ffn_fn", F32),
  Row("ffn_hc/fn_res", "X M", "M X", "ffn_hc.fn", "hc_ffn_fn", F32),
  Row("ffn_hc/base", "B", "B", "ffn_hc.base", "hc_ffn_base", F32),
  Row("ffn_hc/scale", "3", "3", "ffn_hc.scale", "hc_ffn_scale", F32),
  Row("attn_norm/scale", "D", "D", "input_layernorm.weight", "attn_norm.weight"),
  Row("ffn_norm/scale", "D", "D", "post_attention_layernorm.weight", "ffn_norm.weight"),
  Row("attention/q_a", "D Q", "Q D", "self_attn.q_a_proj.weight", "attn.wq_a.weight", FP8),
  Row("attention/q_a_norm/scale", "Q", "Q", "self_attn.q_a_norm.weight", "attn.q_norm.weight"),
  Row("attention/q_b", "Q H d", "(H d) Q", "self_attn.q_b_proj.weight", "attn.wq_b.weight", FP8),
  Row("attention/kv", "D d", "d D", "self_attn.kv_proj.weight", "attn.wkv.weight", FP8),
  Row("attention/kv_norm/scale", "d", "d", "self_attn.kv_norm.weight", "attn.kv_norm.weight"),
  Row("attention/sink", "H", "H", "self_attn.sinks", "attn.attn_sink", F32),
  Row("attention/o_a", "G P R", "(G R) P", "self_attn.o_a_proj.weight", "attn.wo_a.weight", FP8),
  Row("attention/o_b", "O D", "D O", "self_attn.o_b_proj.weight", "attn.wo_b.weight", FP8),
  # The first half of the foreign output channels is series 0, the one of the previous window.
  Row("attention/compressor/kv", "C D d", "(C d) D", "self_attn.compressor.kv_proj.weight",
      "attn.compressor.wkv.weight", only=_COMPRESSED),
  Row("attention/compressor/gate", "C D d", "(C d) D", "self_attn.compressor.gate_proj.weight",
      "attn.compressor.wgate.weight", only=_COMPRESSED),
  Row("attention/compressor/position_bias", "C m d", "m (C d)", "self_attn.compressor.position_bias",
      "attn.compressor.ape", F32, only=_COMPRESSED),
  Row("attention/compressor/norm/scale", "d", "d", "self_attn.compressor.kv_norm.weight",
      "attn.compressor.norm.weight", only=_COMPRESSED),
  Row("attention/indexer/q_b", "Q J i", "(J i) Q", "self_attn.compressor.indexer.q_b_proj.weight",
      "attn.indexer.wq_b.weight", FP8, only=(CSA,)),
  Row("attention/indexer/head_weights", "D J", "J D", "self_attn.compressor.indexer.scorer.weights_proj.weight",
      "attn.indexer.weights_proj.weight", only=(CSA,)),
  Row("attention/indexer/compressor/kv", "C D i", "(C i) D", "self_attn.compressor.indexer.kv_proj.weight",
      "attn.indexer.compressor.wkv.weight", only=(CSA,)),
  Row("attention/indexer/compressor/gate", "C D i", "(C i) D", "self_attn.compressor.indexer.gate_proj.weight",
      "attn.indexer.compressor.wgate.weight", only=(CSA,)),
  Row("attention/indexer/compressor/position_bias", "C m i", "m (C i)", "self_attn.compressor.indexer.position_bias",
      "attn.indexer.compressor.ape", F32, only=(CSA,)),
  Row("attention/indexer/compressor/norm/scale", "i", "i", "self_attn.compressor.indexer.kv_norm.weight",
      "attn.indexer.compressor.norm.weight", only=(CSA,)),
  Row("moe/router/gate", "D E", "E D", "mlp.gate.weight", "ffn.gate.weight"),
  Row("moe/router/bias", "E", "E", "mlp.gate.e_score_correction_bias", "ffn.gate.bias", F32, only=(LEARNED,),
      collection="router"),
  Row("moe/router/hash_table", "V K", "V K", "mlp.gate.tid2eid", "ffn.gate.tid2eid", I64, only=(HASH,),
      collection="router"),
  Row("moe/experts/gate", "E D F", "E F D", "mlp.experts.gate_up_proj", "ffn.experts.{e}.w1.weight", EXPERTS, join=1),
  Row("moe/experts/up", "E D F", "E F D", "mlp.experts.gate_up_proj", "ffn.experts.{e}.w3.weight", EXPERTS, join=1),
  Row("moe/experts/down", "E F D", "E D F", "mlp.experts.down_proj", "ffn.experts.{e}.w2.weight", EXPERTS),
  Row("moe/shared/gate", "D F", "F D", "mlp.shared_experts.gate_proj.weight", "ffn.shared_experts.w1.weight", FP8),
  Row("moe/shared/up", "D F", "F D", "mlp.shared_experts.up_proj.weight", "ffn.shared_experts.w3.weight", FP8),
  Row("moe/shared/down", "F D", "D F", "mlp.shared_experts.down_proj.weight", "ffn.shared_experts.w2.weight", FP8),
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
    """Of our leaf."""
    return tuple(self.sizes[a] for a in self.row.axes.split())

  @property
  def scales_path(self) -> str:
    """Where the block scales that this leaf was imported with are kept."""
    return "scales" + self.path.removeprefix(self.row.collection)

  @functools.cached_property
  def one_expert(self) -> "Leaf":
    """The same leaf of a model with a single expert."""
    return dataclasses.replace(self, sizes={**self.sizes, "E": 1})

  @property
  def _their_axes(self) -> list[list[str]]:
    return [(merged or single).split() for merged, single in re.findall(r"\(([^)]*)\)|(\S+)", self.row.theirs)]

  @property
  def their_shape(self) -> tuple[int, ...]:
    """Of the same numbers under their name."""
    return tuple(math.prod(self.sizes[a] for a in group) for group in self._their_axes)

  def to_theirs(self, x: np.ndarray) -> np.ndarray:
    """From our layout to theirs: axes permuted, then merged; any dtype, shape as `their_shape`."""
    ours = self.row.axes.split()
    return x.transpose([ours.index(a) for group in self._their_axes for a in group]).reshape(self.their_shape)

  def from_theirs(self, x: np.ndarray) -> np.ndarray:
    """The inverse of `to_theirs`, dtype kept."""
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


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A foreign tensor: the leaves it holds, joined in this order; for one expert's tensor, which expert."""

  name: str
  leaves: tuple[Leaf, ...]
  expert: int | None = None

  @property
  def stored(self) -> str:
    """What becomes of it in a quantised release; see `Row`."""
    return self.leaves[0].row.stored

  @property
  def shape(self) -> tuple[int, ...]:
    """Under their name."""
    shapes = [list(leaf.their_shape) for leaf in self.leaves]
    if self.expert is not None:
      return tuple(shapes[0][1:])
    join = self.leaves[0].row.join
    shapes[0][join] = sum(s[join] for s in shapes)
    return tuple(shapes[0])

  def part(self, leaf: Leaf, x: np.ndarray) -> np.ndarray:
    """One leaf's part of this tensor, in their layout; any dtype, shape as the leaf's `their_shape`."""
    if len(self.leaves) == 1:
      return x
    join = leaf.row.join
    start = sum(other.their_shape[join] for other in self.leaves[:self.leaves.index(leaf)])
    return x[(slice(None),) * join + (slice(start, start + leaf.their_shape[join]),)]

  def join(self, leaf_arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """This tensor in their layout, of shape `shape`, from its leaves, unscanned, by path; any dtype."""
    if self.expert is not None:
      leaf = self.leaves[0]
      return leaf.one_expert.to_theirs(leaf_arrays[leaf.path][self.expert][None])[0]
    arrays = [leaf.to_theirs(leaf_arrays[leaf.path]) for leaf in self.leaves]
    return np.concatenate(arrays, axis=self.leaves[0].row.join) if len(arrays) > 1 else arrays[0]


def tensors(config: ModelConfig, form: str) -> dict[str, Tensor]:
  """Every tensor of this model by its name in a form."""
  named: dict[str, list[Leaf]] = {}
  for leaf in leaves(config):
    named.setdefault(getattr(leaf, form), []).append(leaf)
  found: dict[str, Tensor] = {}
  for name, members in named.items():
    if "{e}" in name:
      found.update((name.format(e=e), Tensor(name.format(e=e), tuple(members), e)) for e in range(config.n_routed_experts))
    else:
      found[name] = Tensor(name, tuple(members))
  return found


def scale_name(name: str) -> str:
  """Name of the scales of a quantised tensor."""
  return name.removesuffix("weight") + "scale"


def weight_name(scale: str) -> str:
  """Name of the tensor whose scales have this name; of any other name, one that no tensor has."""
  return scale.removesuffix("scale") + "weight" if scale.endswith(".scale") else ""


def form_of(names: Iterable[str]) -> str:
  """In which form tensors are named."""
  return "hf" if any(n.startswith("model.") for n in names) else "release"


def mixed_names(names: Iterable[str]) -> bool:
  """Whether these are the half-renamed tensors that transformers' save_pretrained writes in its original format."""
  return any(re.match(r"model\.layers\.\d+\.(attn|ffn)\.", n) for n in names)
