"""From meaning to mesh: the one table logical axis -> mesh axis, the mesh itself, and the one shard_map wrapper for ops.

Mesh axes: dcn_data (slices with a copy each), data (copies), fsdp (weights split, gathered where they are used), expert
(experts split; all other weights as by fsdp), context (contiguous parts of the sequence, see `model/sequence.py`; weights as
by fsdp), tensor (heads, expert width, vocabulary). Experts are split over fsdp and context, too, as far as their number
allows, and in pre-training the vocabulary over fsdp: tokens come to them, and what is split this way is not gathered. A
batch is split over the first four together: `tokens[B_(dcn_data,data,fsdp,expert), S_context]`. The ambient mesh is the one
of `jax.set_mesh`; without one everything here is the identity, so that modules need not ask. No gradient or activation of a
pass is exchanged between copies, so a pass may also run inside `per_copy`, where the first two axes are not there.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import math
from typing import Any, Callable, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from deepseek_v4.config import MeshConfig, ModelConfig, RunConfig

MESH_AXES = MeshConfig.axis_names
COPY_AXES = ("dcn_data", "data")
BATCH_AXES = (*COPY_AXES, "fsdp", "expert")
SLICE_AXES = MESH_AXES[1:]  # within a slice
MEMORY_AXES = ("fsdp", "expert", "context")  # over which weights are split, of whatever is split over them otherwise
BATCH_SPLIT = " x ".join(BATCH_AXES)  # in messages

# THE table, of what is computed with. A name that is not here is an error; None = never split.
RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": BATCH_AXES, "sequence": "context", "shards": (*BATCH_AXES, "context"),
    "heads": "tensor", "index_heads": "tensor", "groups": "tensor", "vocab": "tensor", "mlp": "tensor",
    "queries": ("context", "tensor"), "channels": "fsdp", "embed": None, "lora": None,
    "expert": MEMORY_AXES, "head_vocab": ("tensor", "fsdp"),
}
# Of those that a weight's size must allow, always this one, and of the others those that divide it most (`split_over`).
BY_SIZE = {"expert": "expert", "head_vocab": "tensor"}
# Along these weights are split for memory: over what no other axis of theirs has, and gathered where they are used.
STORED = ("embed", "lora", "channels")

# Logical axes of each parameter by its name inside a layer (or at the top); a scanned layer's leading axis is never split.
PARAMETER_AXES: dict[str, tuple[str | None, ...]] = {
    "embed/embedding": ("vocab", "channels"), "lm_head/kernel": ("embed", "head_vocab"),
    "hc_head/fn": ("embed", None), "hc_head/base": (None,), "hc_head/scale": (None,),
    "final_norm/scale": (None,), "embed_norm/scale": (None,), "hidden_norm/scale": (None,),
    "embed_proj": ("embed", None), "hidden_proj": ("embed", None),
    **{f"{hc}/{leaf}": axes for hc in ("attn_hc", "ffn_hc") for leaf, axes in (
        ("fn_pre", ("embed", None)), ("fn_post", ("embed", None)), ("fn_res", ("embed", None)), ("base", (None,)),
        ("scale", (None,)))},
    "attn_norm/scale": (None,), "ffn_norm/scale": (None,),
    "attention/q_a": ("embed", None), "attention/q_a_norm/scale": (None,), "attention/q_b": ("lora", "heads", None),
    "attention/kv": ("embed", None), "attention/kv_norm/scale": (None,), "attention/sink": ("heads",),
    "attention/o_a": ("groups", None, "lora"), "attention/o_b": ("groups", "embed"),
    **{f"attention/{part}/{leaf}": axes for part in ("compressor", "indexer/compressor") for leaf, axes in (
        ("kv", (None, "embed", None)), ("gate", (None, "embed", None)), ("position_bias", (None, None, None)),
        ("norm/scale", (None,)))},
    "attention/indexer/q_b": ("lora", "index_heads", None), "attention/indexer/head_weights": ("embed", "index_heads"),
    "moe/router/gate": ("embed", None), "moe/router/bias": (None,), "moe/router/hash_table": (None, None),
    "moe/experts/gate": ("expert", "embed", "mlp"), "moe/experts/up": ("expert", "embed", "mlp"),
    "moe/experts/down": ("expert", "mlp", "embed"),
    "moe/shared/gate": ("embed", "mlp"), "moe/shared/up": ("embed", "mlp"), "moe/shared/down": ("mlp", "embed"),
}


def leaf_name(path: Sequence[str]) -> str:
  """A parameter's name in tables: its path without the collection, `layers/<key>`, `mtp` and `mtp/block`."""
  path = list(path[1:] if path[0] in ("params", "router") else path)  # "router" is also a part of `moe`
  if path[0] == "layers":
    path = path[2:]
  elif path[0] == "mtp":
    path = path[2:] if path[1] == "block" else path[1:]
  return "/".join(path)


def parameter_axes(path: Sequence[str], ndim: int) -> tuple[str | None, ...]:
  """Logical axes of the leaf at `path` with `ndim` axes.

  Raises:
    ValueError: a leaf that the table does not know, or with a number of axes that does not fit.
  """
  name = leaf_name(path)
  if name not in PARAMETER_AXES:
    raise ValueError(f"parameter {'/'.join(path)}: not in the table of logical axes")
  axes = PARAMETER_AXES[name]
  if ndim - len(axes) not in (0, 1):
    raise ValueError(f"parameter {'/'.join(path)}: {ndim} axes, expected {len(axes)}, or one more for scanned layers")
  return (None,) * (ndim - len(axes)) + axes


class MeshAxes(tuple[str, ...]):
  """Mesh axes that stand for themselves among logical ones."""


def spec(axes: Sequence[str | MeshAxes | None]) -> PartitionSpec:
  """Logical axis names -> PartitionSpec.

  Raises:
    ValueError: an unknown name, or two axes that want the same mesh axis.
  """
  mapped, used = [], []
  for name in axes:
    if isinstance(name, str) and name not in RULES:
      raise ValueError(f"logical axis {name!r}: expected one of {', '.join(RULES)}")
    target = RULES[name] if isinstance(name, str) else name
    mapped.append(target)
    used += [target] if isinstance(target, str) else list(target or ())
  if len(used) != len(set(used)):
    raise ValueError(f"logical axes {tuple(axes)}: two of them lie on one mesh axis {used}")
  return PartitionSpec(*mapped)


# ---- meshes -----------------------------------------------------------------------------------------------------------
def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """The mesh of a run over all devices; every axis exists, most have size 1.

  Devices keep their order; those of several slices lie along dcn_data slice by slice. (An order by `mesh_utils` makes
  libtpu 0.0.42 wait for gathers over a whole slice that run beside other work in this one.)

  Raises:
    ValueError: sizes that do not multiply to the number of devices, or slices that are not those of dcn_data.
  """
  devices = list(jax.devices() if devices is None else devices)
  sizes = {name: getattr(config, name) for name in MESH_AXES}
  fixed = math.prod(size for size in sizes.values() if size != -1)
  if -1 in sizes.values():
    if len(devices) % fixed:
      raise ValueError(f"mesh = {sizes}: {len(devices)} devices are not a multiple of {fixed}")
    sizes = {name: len(devices) // fixed if size == -1 else size for name, size in sizes.items()}
  if math.prod(sizes.values()) != len(devices):
    raise ValueError(f"mesh = {sizes}: the product must be the number of devices, {len(devices)}")
  placed = np.array(_slice_by_slice(sizes, devices)).reshape(tuple(sizes.values()))
  return Mesh(placed, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def platform_of(mesh: Mesh | None) -> str:
  """What the mesh's devices (None: the default one) are, such as "cpu": compilers of platforms take options of their own."""
  return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def _slice_by_slice(sizes: dict[str, int], devices: Sequence[jax.Device]) -> list[jax.Device]:
  """The devices in the order of their slices, within each as they came."""
  slice_of = lambda device: getattr(device, "slice_index", 0)
  lengths = collections.Counter(map(slice_of, devices))
  if len(lengths) > 1 and sizes["dcn_data"] != len(lengths):
    raise ValueError(f"mesh.dcn_data = {sizes['dcn_data']}: expected {len(lengths)}, the number of slices of the devices")
  if len(set(lengths.values())) > 1:
    raise ValueError(f"mesh = {sizes}: expected slices of equal size, not of {sorted(lengths.values())} devices")
  return sorted(devices, key=slice_of)


def check_divides(config: RunConfig, mesh: Mesh) -> None:
  """Refuses a run whose sizes its mesh does not divide.

  Raises:
    ValueError: names the field, its value and the mesh axis.
  """
  check_model_divides(config.model, mesh)
  rows, shards = config.data.batch_size // config.data.accumulation, math.prod(mesh.shape[a] for a in BATCH_AXES)
  if rows % shards:
    raise ValueError(f"data.batch_size / data.accumulation = {rows}: expected a multiple of {BATCH_SPLIT} = "
                     f"{shards}")
  check_parts(config.model, "data.sequence_length", config.data.sequence_length, mesh.shape["context"])


def check_parts(model: ModelConfig, name: str, length: int, parts: int) -> None:
  """Refuses a sequence that `parts` devices of the axis `context` cannot share.

  Args:
    name, length: what the number of tokens is called, and the number.

  Raises:
    ValueError: the parts are not equal, or shorter than what a place may read of its neighbour.
  """
  if parts == 1:
    return
  if length % parts:
    raise ValueError(f"{name} = {length}: expected a multiple of mesh.context = {parts}")
  if length // parts < model.local_reach:
    raise ValueError(f"{name} / mesh.context = {length // parts}: expected at least {model.local_reach}, the tokens before "
                     "a part that its sliding window and compressor windows read")


def check_model_divides(model: ModelConfig, mesh: Mesh) -> None:
  """The part of `check_divides` that concerns the model alone.

  Raises:
    ValueError: names the field, its value and the mesh axis.
  """
  wanted = {"tensor": ("num_attention_heads", "o_groups", "index_n_heads", "vocab_size", "moe_intermediate_size"),
            "fsdp": ("hidden_size", "q_lora_rank", "o_lora_rank"), "expert": ("n_routed_experts",)}
  for axis, fields in wanted.items():
    for field in fields:
      if getattr(model, field) % mesh.shape[axis]:
        raise ValueError(f"model.{field} = {getattr(model, field)}: expected a multiple of mesh.{axis} = {mesh.shape[axis]}")


def path_names(path: Sequence[Any]) -> tuple[str, ...]:
  """The names along a key path of jax.tree_util: dictionary keys, attributes, indices."""
  return tuple(str(getattr(p, "key", getattr(p, "name", getattr(p, "idx", p)))) for p in path)


def _most_parts(size: int, axes: Sequence[str], sizes: Mapping[str, int]) -> tuple[str, ...]:
  """Those of the mesh axes that split `size` into the most equal parts, of equals as many of them as possible; () where none
  does."""
  parts = lambda some: math.prod(sizes[axis] for axis in some)
  some = [some for n in range(len(axes), 0, -1) for some in itertools.combinations(axes, n) if size % parts(some) == 0]
  return max(some, key=parts, default=())


def split_over(name: str, size: int, sizes: Mapping[str, int]) -> tuple[str, ...]:
  """The mesh axes, in the table's order and without those of size 1, over which a weight's axis `name` of `BY_SIZE` is
  split: the one named there, and of the others those with which its parts are equal and the most."""
  always, allowed = BY_SIZE[name], [axis for axis in RULES[name] or () if sizes[axis] > 1]
  others = [axis for axis in allowed if axis != always]
  more = _most_parts(size // sizes[always], others, sizes) if size % sizes[always] == 0 else ()
  return tuple(axis for axis in allowed if axis == always or axis in more)


def parameter_spec(axes: Sequence[str | None], shape: Sequence[int], sizes: Mapping[str, int]) -> PartitionSpec:
  """How a parameter with these logical axes and this shape lies on a mesh of these sizes.

  An axis of `STORED` that not all the mesh axes left for it divide is split over those that divide it into the most parts.
  """
  found: dict[int, tuple[str, ...]] = {}
  for i, (name, size) in sorted(enumerate(zip(axes, shape)), key=lambda item: item[1][0] in STORED):
    if name in STORED:
      left = [axis for axis in MEMORY_AXES if not any(axis in other for other in found.values())]
      # Where none of them divides, the first one, which whoever lays an array out then refuses.
      found[i] = _most_parts(size, left, sizes) or tuple(left[:1])
    elif name in BY_SIZE:
      found[i] = split_over(name, size, sizes)
    elif name is not None:
      found[i] = tuple(spec((name,)))
  as_entry = lambda some: some if len(some) > 1 else some[0] if some else None
  return PartitionSpec(*(as_entry(found.get(i, ())) for i in range(len(axes))))


def parameter_shardings(tree: Any, mesh: Mesh) -> Any:
  """NamedSharding of every leaf of a `params` or `router` tree (arrays or shapes)."""
  def one(path: Any, leaf: Any) -> NamedSharding:
    axes = parameter_axes(path_names(path), len(leaf.shape))
    return NamedSharding(mesh, parameter_spec(axes, leaf.shape, mesh.shape))
  return jax.tree_util.tree_map_with_path(one, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Sharding of the arrays [A, B, S] of a batch: rows over `BATCH_AXES`, the sequence over context."""
  return NamedSharding(mesh, spec((None, "batch", "sequence")))


def local_rows(mesh: Mesh, rows: int) -> list[int]:
  """Which of the `rows` of a batch [A, rows, S] the devices of this process hold, in order."""
  places: Any = batch_sharding(mesh).addressable_devices_indices_map((1, rows, mesh.size))
  return sorted({row for _, held, _ in places.values() for row in range(*held.indices(rows))})


# ---- inside a traced function -----------------------------------------------------------------------------------------
def _ambient() -> Any:
  mesh = jax.sharding.get_abstract_mesh()
  return None if mesh.empty else mesh


def _free_axes() -> tuple[str, ...]:
  """Axes of the ambient mesh that are not inside a wrapper such as `per_copy` already."""
  mesh = jax.sharding.get_abstract_mesh()
  return tuple(name for name, kind in zip(mesh.axis_names, mesh.axis_types) if kind != AxisType.Manual)


def _free_spec(axes: Sequence[str | MeshAxes | None]) -> PartitionSpec:
  """`spec` without the mesh axes that are not free."""
  free = _free_axes()
  keep = lambda names: tuple(name for name in names if name in free)
  return PartitionSpec(*((keep((names,) if isinstance(names, str) else names or ()) or None) for names in spec(axes)))


def batch_shards() -> int:
  """Into how many parts the ambient mesh splits the rows of a batch; 1 without a mesh."""
  mesh = _ambient()
  return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in BATCH_AXES if axis in _free_axes())


def sequence_parts() -> int:
  """Into how many parts the ambient mesh splits a sequence; 1 without a mesh."""
  mesh = _ambient()
  return 1 if mesh is None else mesh.shape[RULES["sequence"]]


def constrain(x: jax.Array, axes: Sequence[str | MeshAxes | None]) -> jax.Array:
  """`x` (any shape and dtype) with its layout pinned to logical axes, one for each of its own; the identity without an
  ambient mesh."""
  return x if _ambient() is None else jax.lax.with_sharding_constraint(x, _free_spec(axes))


def gathered(weight: jax.Array, path: Sequence[str]) -> jax.Array:
  """A parameter, shape and dtype kept, as it is computed with: whole along `STORED` but for an embedding's channels, split
  still along all others."""
  if _ambient() is None:
    return weight
  names = parameter_axes(path, weight.ndim)
  return constrain(weight, [weight_axes(name, size) if name in BY_SIZE else name for name, size in zip(names, weight.shape)])


def weight_axes(name: str, size: int) -> MeshAxes:
  """The axes of the ambient mesh over which a weight's axis of `BY_SIZE` is split, see `split_over`; () = it is whole."""
  mesh = _ambient()
  return MeshAxes() if mesh is None else MeshAxes(split_over(name, size, mesh.shape))


def query_axis(length: int) -> str:
  """Logical axis of the queries of an op that needs all heads at once: "queries", split over context and tensor, where
  `length` splits evenly; else "sequence", and the tensor axis repeats the work."""
  mesh = _ambient()
  shards = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in RULES["queries"] or ())
  return "sequence" if length % shards else "queries"


def axis_name(logical: str) -> str | None:
  """Mesh axis to sum over inside `per_shard` for a logical axis that is split there; None where it is whole.

  Raises:
    ValueError: an axis that may lie on several.
  """
  return _lone(logical) if axis_size(logical) > 1 else None


def axis_size(logical: str) -> int:
  """Into how many parts the ambient mesh splits a logical axis that lies on one mesh axis; 1 without a mesh.

  Raises:
    ValueError: an axis that may lie on several.
  """
  mesh, axis = _ambient(), _lone(logical)
  return 1 if mesh is None else mesh.shape[axis]


def _lone(logical: str) -> str:
  axis = RULES[logical]
  if not isinstance(axis, str):
    raise ValueError(f"logical axis {logical!r}: expected one that lies on one mesh axis, not on {axis}")
  return axis


def per_shard(fn: Callable, in_axes: Sequence[Any], out_axes: Any) -> Callable:
  """The one shard_map wrapper for ops: `fn` sees each device's part of its arguments.

  Args:
    fn: function of arrays or pytrees of arrays.
    in_axes: for each argument the logical axes of its leading axes (one tuple for all leaves of a pytree).
    out_axes: the same for the result (a tuple of tuples for several results).

  Gradients of arguments that are whole along a mesh axis are summed over it.
  """
  if _ambient() is None:
    return fn
  is_axes = lambda x: isinstance(x, tuple) and all(a is None or isinstance(a, (str, MeshAxes)) for a in x)
  to_spec = lambda tree: jax.tree.map(_free_spec, tree, is_leaf=is_axes)
  return jax.shard_map(fn, in_specs=tuple(to_spec(a) for a in in_axes), out_specs=to_spec(out_axes),
                       axis_names=set(_free_axes()), check_vma=False)


def splits_weights() -> bool:
  """Whether the ambient mesh splits weights for memory, so that they are gathered where they are used."""
  return any(mesh_axis_size(axis) > 1 for axis in MEMORY_AXES)


def mesh_axis_size(axis: str) -> int:
  """Devices of the ambient mesh along one of its axes; 1 without a mesh."""
  mesh = _ambient()
  return 1 if mesh is None else mesh.shape[axis]


def copies() -> tuple[str, ...]:
  """The axes of the ambient mesh along which there are several copies of the weights."""
  mesh = _ambient()
  return () if mesh is None else tuple(axis for axis in COPY_AXES if mesh.shape[axis] > 1)


def per_copy(fn: Callable) -> Callable:
  """(whole, rows) -> `fn` of a pytree that all copies have and of a copy's own part of arrays [A, B, ...]; its results get a
  leading axis, one entry of each copy. `fn` itself may use everything here that is for traced functions.

  Only where there are `copies`.
  """
  axes = copies()

  def stacked(whole: Any, rows: Any) -> Any:
    return jax.tree.map(lambda x: x[None], fn(whole, rows))
  return jax.shard_map(stacked, in_specs=(PartitionSpec(), PartitionSpec(None, axes)), out_specs=PartitionSpec(axes),
                       axis_names=set(axes), check_vma=False)


@dataclasses.dataclass(frozen=True)
class OnMesh:
  """A jitted function that is called, and lowered, with its mesh as the ambient one (None: no mesh, one device).

  Attributes:
    jitted, mesh: both of them.
    check: called with the same arguments before, to refuse what is only known outside of jit; None = nothing is.
  """

  jitted: Any
  mesh: Mesh | None
  check: Callable[..., None] | None = None

  def _checked(self, args: Any) -> None:
    if self.check is not None:
      self.check(*args)

  def _ambient(self) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

  def __call__(self, *args: Any) -> Any:
    """Calls the jitted function."""
    self._checked(args)
    with self._ambient():
      return self.jitted(*args)

  def lower(self, *args: Any) -> jax.stages.Lowered:
    """Lowers for arrays or ShapeDtypeStructs; `.compile()` follows as with any jitted function."""
    self._checked(args)
    with self._ambient():
      return self.jitted.lower(*args)
