"""A run that is small and still has everything: what the tests of the step, of meshes and of accumulation share.

Every layer kind and router kind, scanned, and the prediction block; packed documents of very different lengths, padding, and
places that are not counted. Random numbers make every term matter: sinks, biases, norms, mHC, all four losses.

Axes: A accumulation passes, B rows of a pass, S tokens of a row.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_v4 import config as c
from deepseek_v4 import sharding
from deepseek_v4.training.state import TrainState, abstract_state
from deepseek_v4.training.step import make_train_step

MODEL = c.ModelConfig(
  vocab_size=64, hidden_size=32, num_hidden_layers=4, layer_types=(c.CSA, c.HCA) * 2,
  mlp_layer_types=(c.HASH, c.LEARNED) * 2, csa_compress_rate=4, hca_compress_rate=8, num_attention_heads=8, head_dim=8,
  qk_rope_head_dim=4, q_lora_rank=16, o_groups=2, o_lora_rank=8, sliding_window=8, index_n_heads=8, index_head_dim=8,
  index_topk=2, n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=16, hc_mult=2, max_position_embeddings=64,
  rope_scaling=c.Yarn(factor=2.0, original_max_position_embeddings=16), loss_chunk_size=16)
RUN = c.RunConfig(
  model=MODEL,
  # With the report's eps of 1e-20 AdamW's first step is sign(g), and where g is rounding noise two orders of summation give
  # two signs. With 1e-4 it is g / (|g| + 1e-4), as smooth as a comparison needs.
  optimizer=c.OptimizerConfig(learning_rate=1e-2, warmup_steps=2, decay_steps=4, adam_eps=1e-4),
  loss=c.LossConfig(mtp_weight=0.3, mtp_weight_final=0.1, balance_weight=0.1, indexer_weight=0.5, bias_update_speed=1e-2),
  data=c.DataConfig(sequence_length=32, batch_size=8), training=c.TrainingConfig(steps=10))
LOSSES = ("next_token", "mtp", "balance", "indexer")

# Documents of each row; what is left of the 32 places is padding. As one pass, rows 2 and 3 have hardly a target.
LENGTHS = ((32,), (9, 1, 11, 5), (), (3,), (16, 16), (2, 2, 2, 25), (31,), (7, 12))


def random_batch(accumulation=1, lengths=LENGTHS, seed=0):
  """int32 [A, B, S] arrays of rows with documents of `lengths`; about one target in eight is masked out."""
  rng = np.random.default_rng(seed)
  shape = (len(lengths), RUN.data.sequence_length)
  batch = {name: np.zeros(shape, np.int32) for name in ("segment_ids", "positions", "loss_mask")}
  batch["tokens"] = rng.integers(0, MODEL.vocab_size, shape, dtype=np.int32)  # padding holds ids too
  for row, documents in enumerate(lengths):
    start = 0
    for segment, length in enumerate(documents, 1):
      batch["segment_ids"][row, start:start + length] = segment
      batch["positions"][row, start:start + length] = np.arange(length)
      batch["loss_mask"][row, start + 1:start + length] = rng.random(length - 1) < 0.875
      start += length
  return {name: x.reshape(accumulation, -1, shape[1]) for name, x in batch.items()}


def _random_leaf(path, leaf, rng, model):
  name = path[-1]
  if name == "hash_table":
    order = rng.random((*leaf.shape[:-1], model.n_routed_experts)).argsort(-1)
    return order[..., :leaf.shape[-1]].astype(np.int32)
  x = rng.normal(size=leaf.shape)
  if name == "scale":
    x = 1 + 0.2 * x
  elif path[-2:] == ("router", "bias"):
    x = 0.1 * x
  elif name not in ("sink", "base", "position_bias"):
    x = 0.2 * x
  return x.astype(np.float32)


@functools.cache
def random_state(run=RUN, seed=0):
  """A TrainState of numpy arrays: random parameters and router, moments zero as at the start. To be read only."""
  rng = np.random.default_rng(seed)
  shapes = abstract_state(run)

  def random(tree):
    return jax.tree_util.tree_map_with_path(
      lambda path, leaf: _random_leaf(sharding.path_names(path), leaf, rng, run.model), tree)

  moments = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes.opt_state)
  return TrainState(np.zeros((), np.int32), random(shapes.params), random(shapes.router), moments, jax.random.key(seed))


# ---- looking at trees --------------------------------------------------------------------------------------------------
def leaves(tree):
  """{path: leaf} of any tree."""
  return {"/".join(sharding.path_names(path)): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def on_host(tree):
  """Numpy copies by path; PRNG keys as their raw data."""
  def plain(x):
    return jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x
  return {name: np.array(plain(x)) for name, x in leaves(tree).items()}


def differing(a, b):
  """Paths of the leaves of two trees whose bits differ; NaNs of equal bits are equal."""
  xs, ys = on_host(a), on_host(b)
  assert xs.keys() == ys.keys()
  return [name for name in xs if xs[name].dtype != ys[name].dtype or xs[name].tobytes() != ys[name].tobytes()]


def gradients_of(state):
  """The clipped gradients of a first step, by parameter, from the moments it left: Muon's are G, AdamW's (1 - b1) G."""
  found = {}
  for name, x in leaves(state.opt_state).items():
    for moment, factor in (("/trace/", 1.0), ("/mu/", 1 / (1 - RUN.optimizer.adam_b1))):
      if moment in name:
        found[name.split(moment)[1]] = np.asarray(x) * np.float32(factor)
  return found


def with_leaf(tree, path, change):
  """The tree with one leaf replaced by `change(copy of the leaf)`; the path as `leaves` names it."""
  assert path in leaves(tree)
  return jax.tree_util.tree_map_with_path(
    lambda p, x: change(np.array(x)) if "/".join(sharding.path_names(p)) == path else x, tree)


def at(index, value):
  """A `change` for `with_leaf`: one element, or one slice, set."""
  def change(x):
    x[index] = value
    return x
  return change


# ---- compiled steps ----------------------------------------------------------------------------------------------------
class Step:
  """A compiled step for numpy states, which it leaves alone.

  Attributes:
    abstract: the state's shapes and shardings.
    compiled: (state, batch) -> (state, metrics), consumes its state.
  """

  def __init__(self, run=RUN, mesh=None):
    self.abstract = abstract_state(run, mesh)
    self._batch_place = None if mesh is None else sharding.batch_sharding(mesh)
    data = run.data
    shape = (data.accumulation, data.batch_size // data.accumulation, data.sequence_length)
    batch = {name: jax.ShapeDtypeStruct(shape, np.int32, sharding=self._batch_place) for name in random_batch()}
    self.compiled = make_train_step(run, mesh).lower(self.abstract, batch).compile()

  def put(self, state):
    """A copy of the state on its devices."""
    state = state.replace(key=jax.random.wrap_key_data(np.array(jax.random.key_data(state.key))))
    if self._batch_place is None:
      return jax.tree.map(lambda x: jnp.array(x, copy=True), state)
    return jax.device_put(state, jax.tree.map(lambda x: x.sharding, self.abstract))

  def __call__(self, state, batch):
    return self.compiled(self.put(state), jax.device_put(batch, self._batch_place))


@functools.cache
def single_step():
  """The step of RUN on one device without a mesh."""
  return Step()


@functools.cache
def reference():
  """(new state, metrics) of `single_step` on `random_state()` and `random_batch()`; to be read only."""
  return single_step()(random_state(), random_batch())


def with_model(run, **changes):
  """The run with other fields of its model."""
  return dataclasses.replace(run, model=dataclasses.replace(run.model, **changes))
