"""A run that goes on on other devices: the same documents in the same order, and the same curve up to the order of sums."""

import jax
import numpy as np
import pytest

from deepseek_v4 import config as c
from deepseek_v4 import sharding
from deepseek_v4.training import loop, metrics
from deepseek_v4.training.data import make_dataset
from deepseek_v4.training.stopping import Stopped, Stopping

DATA = dict(source="text", sequence_length=48, batch_size=8, held_out_percent=20, fim_rate=0.5)
MODEL = c.ModelConfig(
  vocab_size=320, hidden_size=16, num_hidden_layers=2, layer_types=(c.SLIDING,) * 2, mlp_layer_types=(c.HASH, c.LEARNED),
  num_attention_heads=2, head_dim=8, qk_rope_head_dim=4, q_lora_rank=8, o_groups=1, o_lora_rank=8, sliding_window=8,
  n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, hc_mult=2, max_position_embeddings=64,
  num_nextn_predict_layers=0, init_std=0.1)
PLACES = ({"data": 2, "fsdp": 2, "expert": 2}, {"data": 1, "fsdp": 2}, {"data": 1, "expert": 4}, None)  # 8, 2, 4, 1 devices


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  folder, rng = tmp_path_factory.mktemp("text"), np.random.default_rng(0)
  for i in range(60):
    words = rng.choice("the quick brown fox jumps over a lazy dog".split(), rng.integers(1, 40))
    (folder / f"{i:02d}.txt").write_text(" ".join(words))
  return str(folder)


def mesh_of(sizes):
  if sizes is None:
    return None
  config = c.MeshConfig(**sizes)
  return sharding.make_mesh(config, jax.devices()[:np.prod(list(sizes.values()))])


class Watched:
  """The loop's training step, which notes the batches it computes and asks to stop after some of them."""

  def __init__(self, monkeypatch):
    self.batches, self.stop, self.stop_at = [], Stopping(), None
    make = loop.make_train_step

    def watched(run_config, mesh):
      step = make(run_config, mesh)

      class Lowered:
        def lower(_, *arguments):
          return self.compiled(step.lower(*arguments))
      return Lowered()
    monkeypatch.setattr(loop, "make_train_step", watched)

  def compiled(self, lowered):
    program = lowered.compile()

    def step(state, batch):
      self.batches.append({name: np.asarray(x) for name, x in batch.items()})
      if len(self.batches) == self.stop_at:
        self.stop.ask()
      return program(state, batch)

    class Compiled:
      def compile(_):
        return step
    return Compiled()


def curve(workdir):
  return [(line["step"], line["loss"]) for line in metrics.read_lines(workdir / metrics.LINES) if line["split"] == "train"]


@pytest.mark.long
def test_other_devices_see_the_same_documents_once(corpus, tmp_path, monkeypatch):
  """More than an epoch, stopped at steps that are no checkpoints, each time going on with another number of devices."""
  run = c.RunConfig(model=MODEL, optimizer=c.OptimizerConfig(learning_rate=1e-3, warmup_steps=2, adam_eps=1e-4),
                    data=c.DataConfig(path=corpus, **DATA),
                    training=c.TrainingConfig(steps=22, log_every=1, eval_every=100, checkpoint_every=10))
  whole = Watched(monkeypatch)
  loop.train(run, tmp_path / "whole", mesh_of(PLACES[0]))
  monkeypatch.undo()
  moving = Watched(monkeypatch)
  for stop_at, place in zip((3, 9, 14, 22), PLACES):
    moving.stop, moving.stop_at = Stopping(), stop_at
    if stop_at == 22:
      moving.stop_at = None
      loop.train(run, tmp_path / "moving", mesh_of(place), moving.stop)
    else:
      with pytest.raises(Stopped, match=f"stopped after step {stop_at}, which is saved"):
        loop.train(run, tmp_path / "moving", mesh_of(place), moving.stop)
  assert len(moving.batches) == len(whole.batches) == 22
  for batch, same in zip(moving.batches, whole.batches):
    for name in batch:
      np.testing.assert_array_equal(batch[name].reshape(8, -1), same[name].reshape(8, -1))
  # one epoch has every row once; 22 batches of 8 are more than that
  data = make_dataset(run.data, run.model.vocab_size)
  assert data.rows < 22 * 8
  rows = np.concatenate([batch["tokens"].reshape(8, -1) for batch in moving.batches])[:data.rows]
  assert len({row.tobytes() for row in rows}) == data.rows
  # float32 sums in another order; 22 small steps on smooth losses let it grow no further
  steps, losses = zip(*curve(tmp_path / "moving"))
  assert steps == tuple(range(1, 23))
  np.testing.assert_allclose(losses, [loss for _, loss in curve(tmp_path / "whole")], rtol=2e-4)
