"""Fakes for tests of the loop: a step of one weight, numbered batches, a store of pickles, and a diary of what happened."""

import dataclasses
import math
import pickle
from types import SimpleNamespace

import jax
import numpy as np

from deepseek_v4.config import DataConfig, ModelConfig, OptimizerConfig, RunConfig, TrainingConfig
from deepseek_v4.training import loop, metrics, scoring, start
from deepseek_v4.training.step import ARRAYS

RUN = RunConfig(
  model=ModelConfig(vocab_size=320, num_hidden_layers=1, layer_types=("sliding_attention",), mlp_layer_types=("moe",)),
  optimizer=OptimizerConfig(warmup_steps=0),
  data=DataConfig(sequence_length=4, batch_size=4, accumulation=2),
  training=TrainingConfig(steps=10, log_every=1, eval_every=4, eval_batches=2, checkpoint_every=3),
)
HELD_OUT_BATCHES = 5


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  step: int
  params: dict


class Scalar:
  """A number that notes when it is fetched."""

  def __init__(self, value, note):
    self.value, self.note = value, note

  def __array__(self, dtype=None, copy=None):
    self.note()
    return np.asarray(self.value, dtype)


class FakeData:
  """Batch i holds the number i everywhere, so that a batch tells its place in the data."""

  text_bytes, tokens_per_byte = 100, 1.25
  describe = staticmethod(lambda: "data: a few numbers")

  def __init__(self, length=None, world=None, sequence_length=None):
    self.length, self.world, self.sequence_length = length, world, sequence_length

  def reshaped(self, config, rows):
    return FakeData(self.length, self.world, config.sequence_length)

  def __iter__(self):
    return FakeIterator(self.length, self.world, self.sequence_length)


class FakeIterator:
  def __init__(self, length, world, sequence_length):
    self.place, self.length, self.world = 0, length, world
    self.shape = {} if sequence_length is None else {"sequence_length": sequence_length}

  def __iter__(self):
    return self

  def __next__(self):
    if self.place == self.length:
      raise StopIteration
    self.place += 1
    if self.world is not None:
      self.world.reading(self.place)
      self.place += self.place in self.world.without
    return {name: np.full((2, 2, 4), self.place, np.int32) for name in ARRAYS}

  def get_state(self):
    return {"row": self.place, **self.shape}

  def set_state(self, state):
    self.place = state["row"]
    self.shape = {name: x for name, x in state.items() if name != "row"}

  def close(self):
    pass


class FakeStore:
  def __init__(self, directory, *, keep, config_dict):
    self.directory = directory
    assert keep == RUN.training.keep_checkpoints and config_dict["model"]["vocab_size"] == 320
    directory.mkdir(parents=True, exist_ok=True)

  def __enter__(self):
    return self

  def __exit__(self, *exception):
    pass

  def save(self, step, tree, extra):
    if not (self.directory / f"{step:04d}").exists():
      (self.directory / f"{step:04d}").write_bytes(pickle.dumps((step, tree, extra)))

  def wait(self):
    pass

  def steps(self):
    return sorted(int(file.name) for file in self.directory.iterdir())

  def restore_latest(self, abstract_tree):
    assert abstract_tree == "abstract"
    files = sorted(self.directory.iterdir())
    return pickle.loads(files[-1].read_bytes()) if files else None

  def check_errors(self):
    pass


class World:
  """The fakes, and a diary of what the loop did with them."""

  def __init__(self, monkeypatch):
    self.diary, self.not_finite_at, self.killed_at = [], None, None
    self.not_finite_on = set()  # batches
    self.searched = None
    self.without = ()  # batches that the data do not have
    self.spikes_on = {}  # batch -> what it adds to the loss, and to the weights
    self.reading = lambda place: None
    self.scoring = lambda: None
    replace = lambda name, value, module=loop: monkeypatch.setattr(module, name, value)
    lengths = {"train": None, "held_out": HELD_OUT_BATCHES}
    replace("dataset", lambda run_config, split, mesh: FakeData(
      lengths[split], self if split == "train" else None, run_config.data.sequence_length if run_config.stages else None),
      start)
    replace("CheckpointStore", FakeStore)
    replace("baselines", SimpleNamespace(measure=lambda config: {"bigram": 3.5, "zlib": 1.5}))
    # test_metrics.py looks at the picture itself
    replace("plots", SimpleNamespace(loss_curves=lambda lines, path, baselines: path.write_text(f"{len(lines)} lines")),
            scoring)
    replace("abstract_state", lambda run_config, mesh: "abstract", start)
    replace("init_state", lambda run_config, key, mesh: State(0, {"w": np.float64(1.0)}), start)
    replace("make_train_step", lambda run_config, mesh: self)
    replace("make_eval_step", lambda run_config, mesh: SimpleNamespace(
      lower=lambda state, batch: SimpleNamespace(compile=lambda: self.eval_step)))
    replace("find_non_finite", lambda run_config, mesh: self.find_non_finite)

  def lower(self, state, batch):
    assert {x.shape[:2] for x in batch.values()} == {(2, 2)}
    return SimpleNamespace(compile=lambda: self.step)

  def step(self, state, batch):
    n, place = state.step + 1, int(batch["tokens"][0, 0, 0])
    if n == self.killed_at:
      raise KeyboardInterrupt
    self.diary.append(f"step {n} on batch {place}")
    finite = n != self.not_finite_at and place not in self.not_finite_on
    if finite:
      state = State(n, {"w": 0.5 * state.params["w"] + place + self.spikes_on.get(place, 0.0)})
    values = {"loss": state.params["w"], "next_token": state.params["w"], "grad_norm": float(n), "tokens": 16}
    note = lambda: self.diary.append(f"fetch {n}")
    return state, values | {"finite": Scalar(finite, note)}

  def eval_step(self, state, batch):
    self.diary.append(f"evaluate after {state.step}")
    self.scoring()
    return {"next_token_sum": 8 * math.log(2), "next_token_count": 4}

  def find_non_finite(self, state, batch):
    self.searched = (state, int(batch["tokens"][0, 0, 0]))
    return "gradient of layers/03/attention/q_b"


def lines(workdir):
  return metrics.read_lines(workdir / metrics.LINES)


def without_times(found):
  return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in found]


def saved(workdir):
  return [int(path.name) for path in sorted((workdir / loop.CHECKPOINTS).iterdir())]
