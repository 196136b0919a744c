"""Files and folders that are not there, in the way, cut or of another kind."""

import json
import struct

import numpy as np
import pytest

import deepseek_v4 as dsv4
from deepseek_v4 import config as c
from deepseek_v4.checkpoint.convert import to_checkpoint
from deepseek_v4.checkpoint.hf_companions import copy_companions
from deepseek_v4.checkpoint.hf_write import refuse_occupied, save_hf
from deepseek_v4.checkpoint.safetensors_files import read_folder
from deepseek_v4.training import data, metrics
from deepseek_v4.training.workdir import check_workdir, refuse_lost_checkpoints
from tests.bad_input.table import check, table
from tests.model.small import T0


def written(use, **files):
  """Writes files (a double underscore is a dot), then uses their folder."""
  def call(folder):
    for name, content in files.items():
      (folder / name.replace("__", ".")).write_bytes(content if isinstance(content, bytes) else content.encode())
    use(folder)
  return call


def tensors(dtype="F32", shape=(2,), end=8, body=8):
  """A safetensors file with one tensor."""
  header = json.dumps({"w": {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}}).encode()
  return struct.pack("<Q", len(header)) + header + bytes(body)


load = lambda folder: dsv4.load_hf(folder, T0)
config_of = lambda folder: dsv4.ModelConfig.from_hf(folder)
lost = lambda folder: refuse_lost_checkpoints(folder, {"training": {"checkpoint_every": 2}})
INDEX = "model.safetensors.index.json"
WRONG = table(
  ("--config", "none.py'", "a Python file with get_config()", lambda p: c.load(p / "none.py")),
  ("--config", "run.py'", "defines get_config()", written(lambda p: c.load(p / "run.py"), run__py="x = 1")),
  ("--config", "run.py'", "returns a RunConfig, not dict", written(
    lambda p: c.load(p / "run.py"), run__py="def get_config():\n  return {}")),
  ("config.json", "nowhere", "a config.json or a folder", lambda p: config_of(p / "nowhere")),
  ("config.json", "config.json", "a folder that holds one", config_of),
  ("config.json", "line 1", "a JSON object", written(config_of, config__json="{")),
  ("config.json", "list", "a JSON object", written(config_of, config__json="[]")),
  ("num_hidden_layers", "None", "a value in the config", written(config_of, config__json="{}")),
  ("model_type", "'llama'", "'deepseek_v4'", written(config_of, config__json='{"model_type": "llama"}')),
  ("source", "nowhere", "a folder with safetensors files", lambda p: load(p / "nowhere")),
  ("source", "'", "model.safetensors or " + INDEX, load),
  ("a.safetensors", "4 bytes", "the header alone says", written(load, a__safetensors=b"1234")),
  ("a.safetensors", "bytes 0 to 8 of 4", "cut short", written(load, a__safetensors=tensors(body=4))),
  ("w", "F4", "one of", written(load, a__safetensors=tensors("F4"))),
  ("w", "(3,)", "cut short", written(load, a__safetensors=tensors(shape=(3,)))),
  ("unreadable shard", "a.safetensors", "cut short", written(load, a__safetensors=b"")),
  (INDEX, "KeyError", "a JSON object with a weight_map", written(
    read_folder, **{INDEX.replace(".", "__"): "{}", "a__safetensors": tensors()})),
  (INDEX, "JSONDecodeError", "a JSON object with a weight_map", written(
    read_folder, **{INDEX.replace(".", "__"): "", "a__safetensors": tensors()})),
  ("shard listed but absent", "b.safetensors", "the tensors do not fit the config", written(
    load, **{INDEX.replace(".", "__"): '{"weight_map": {"w": "b.safetensors"}}'})),
  ("in a shard but not in the index", "w (a.safetensors)", "the tensors do not fit the config", written(
    load, **{INDEX.replace(".", "__"): '{"weight_map": {"v": "a.safetensors"}}', "a__safetensors": tensors()})),
  ("unexpected", "w", "the tensors do not fit the config", written(load, a__safetensors=tensors())),
  ("wrong shape", "embed.weight (2,)", "expected", lambda _: dsv4.load_hf({"embed.weight": np.ones(2, np.float32)}, T0)),
  ("target", "'", "a folder that is empty or does not exist yet", written(refuse_occupied, a="x")),
  ("variables", "[]", "a dictionary with params and router", lambda p: save_hf({}, T0, p / "new")),
  ("copy_files_from", "nowhere", "a folder", lambda p: copy_companions(p / "nowhere", p)),
  ("config.json", "nowhere", "a folder that holds one", lambda p: to_checkpoint(p / "nowhere", p / "new")),
  ("workdir", "a'", "a folder", written(lambda p: check_workdir(p / "a", {}), a="x")),
  ("workdir", "holds notes.txt", "a new or an empty folder", written(lambda p: check_workdir(p, {}), notes__txt="x")),
  ("checkpoints", "a run of 9 steps", "expected it back, or another folder", written(
    lost, metrics__jsonl='{"step": 9, "loss": 1.0}\n')),
  ("metrics.jsonl", "line 1", "one JSON object", written(
    lambda p: metrics.read_lines(p / "metrics.jsonl"), metrics__jsonl='{"step"\n{"step": 2}\n')),
  ("data.path", "nowhere", "a file, a glob or a folder", lambda p: data.make_dataset(
    c.DataConfig(source="text", path=str(p / "nowhere")), 320)),
  ("data.path", "gone.txt", "No such file", lambda p: (
    (p / "gone.txt").symlink_to(p / "nowhere"),
    data.make_dataset(c.DataConfig(source="text", path=str(p), held_out_percent=0), 320))),
)


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_refused(wrong, tmp_path, compiled):
  check(wrong, tmp_path, compiled)
