"""Students and teachers so small that compiling them takes seconds: two layers, packed rows, the prediction block."""

import dataclasses
import functools

import jax
import numpy as np

from deepseek_v4 import config as c
from deepseek_v4 import sharding
from deepseek_v4.checkpoint.store import CheckpointStore
from deepseek_v4.training.state import TrainState, abstract_state
from tests.training.small import _random_leaf

MODEL = c.ModelConfig(
  vocab_size=264, hidden_size=16, num_hidden_layers=2, layer_types=(c.SLIDING, c.CSA), mlp_layer_types=(c.HASH, c.LEARNED),
  csa_compress_rate=4, hca_compress_rate=8, num_attention_heads=2, head_dim=8, qk_rope_head_dim=4, q_lora_rank=8, o_groups=2,
  o_lora_rank=8, sliding_window=8, index_n_heads=2, index_head_dim=8, index_topk=2, n_routed_experts=4,
  num_experts_per_tok=2, moe_intermediate_size=8, hc_mult=2, max_position_embeddings=64, rope_scaling=None,
  loss_chunk_size=16, init_std=0.1)
# one layer, with picked entries and learned experts; no prediction block
SHALLOW = dataclasses.replace(MODEL, num_hidden_layers=1, layer_types=(c.CSA,), mlp_layer_types=(c.LEARNED,),
                              num_nextn_predict_layers=0)
STUDENT = dataclasses.replace(SHALLOW, num_nextn_predict_layers=1)
# another width, depth and vocabulary, and no prediction block
TEACHER = dataclasses.replace(MODEL, hidden_size=24, num_hidden_layers=1, layer_types=(c.HCA,), mlp_layer_types=(c.LEARNED,),
                              vocab_size=260, num_nextn_predict_layers=0)


def run_config(teachers, model=MODEL, **settings):
  """A run with teachers [(name, folder, folder of text)]; `settings` of its DistillationConfig, or of the run by section."""
  data = lambda path: c.DataConfig(source="text", path=str(path), held_out_percent=20)
  sections = {name: settings.pop(name) for name in ("training", "mesh", "optimizer", "data", "stages") if name in settings}
  distillation = dict(prompt_length=8, shortest_prompt=4, reply_length=24, steps_per_round=2, decode_batch=8,
                      hidden_dtype="float32") | settings
  base = dict(
    model=model, optimizer=c.OptimizerConfig(learning_rate=1e-2, warmup_steps=0, adam_eps=1e-4),
    loss=c.LossConfig(balance_weight=0.1, indexer_weight=0.5, bias_update_speed=1e-2),
    data=c.DataConfig(sequence_length=48, batch_size=4, accumulation=2),
    training=c.TrainingConfig(steps=4, log_every=1, eval_every=100, eval_batches=1, checkpoint_every=3))
  return c.RunConfig(**base | sections, distillation=c.DistillationConfig(teachers=tuple(
    c.TeacherConfig(name, str(folder), data(text), weight) for name, folder, text, weight in teachers), **distillation))


@functools.cache
def random_state(run, seed=0):
  """A TrainState of numpy arrays with random parameters; to be read only."""
  rng = np.random.default_rng(seed)
  shapes = abstract_state(run)
  random = lambda tree: jax.tree_util.tree_map_with_path(
    lambda path, leaf: _random_leaf(sharding.path_names(path), leaf, rng, run.model), tree)
  moments = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes.opt_state)
  return TrainState(np.zeros((), np.int32), random(shapes.params), random(shapes.router), moments, jax.random.key(seed))


def write_run(folder, model, seed=0):
  """The folder of a run that ended after one step, with random weights."""
  run = c.RunConfig(model=model, optimizer=c.OptimizerConfig(warmup_steps=0), data=c.DataConfig(sequence_length=16))
  state = random_state(run, seed)
  with CheckpointStore(folder / "checkpoints", keep=1, config_dict=c.to_dict(run)) as store:
    store.save(1, state.replace(key=jax.random.key(0)), {})
  return state


def random_rows(model, lengths, sequence_length=48, seed=0):
  """int32 [R, S] rows of documents of these (prompt, reply) lengths; places behind them hold ids too, but no token."""
  rng = np.random.default_rng(seed)
  shape = (len(lengths), sequence_length)
  rows = {name: np.zeros(shape, np.int32) for name in ("segment_ids", "positions", "loss_mask")}
  rows["tokens"] = rng.integers(0, model.vocab_size, shape, dtype=np.int32)
  for row, documents in enumerate(lengths):
    start = 0
    for segment, (asked, said) in enumerate(documents, 1):
      end = start + asked + said
      rows["segment_ids"][row, start:end] = segment
      rows["positions"][row, start:end] = np.arange(end - start)
      rows["loss_mask"][row, start + asked:end] = 1
      start = end
  return rows
