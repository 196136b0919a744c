"""Folders of safetensors: one file or shards, bfloat16, and what is wrong with them, all in one message."""

import dataclasses
import json
import struct

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from deepseek_v4.checkpoint.hf_read import load_hf
from deepseek_v4.checkpoint.hf_trees import to_hf_names
from deepseek_v4.checkpoint.safetensors_files import INDEX_NAME, read_header


def write(path, tensors):
  """A safetensors file by the format's description; the library's numpy writer knows no bfloat16."""
  codes = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "int64": "I64", "uint8": "U8"}
  header, data = {"__metadata__": {"format": "pt"}}, b""
  for name, x in tensors.items():
    end = len(data) + x.nbytes
    header[name] = {"dtype": codes[str(x.dtype)], "shape": list(x.shape), "data_offsets": [len(data), end]}
    data += np.ascontiguousarray(x).tobytes()
  text = json.dumps(header).encode()
  path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def write_shards(folder, tensors, count=3):
  """`count` shards with an index; returns the index."""
  files = {n: f"model-{i % count:05d}.safetensors" for i, n in enumerate(tensors)}
  for file in set(files.values()):
    write(folder / file, {n: x for n, x in tensors.items() if files[n] == file})
  index = {"metadata": {}, "weight_map": files}
  (folder / INDEX_NAME).write_text(json.dumps(index))
  return index


@pytest.mark.parametrize("form", ["hf", "release"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_folder_gives_the_weights_as_stored(tiny, equal, tmp_path, form, dtype):
  config = dataclasses.replace(tiny.config, num_nextn_predict_layers=int(form == "release"))
  named = to_hf_names(tiny.variables(config), config, form)
  named = {n: x.astype(dtype) if x.dtype == np.float32 else x for n, x in named.items()}
  (write_shards if form == "release" else lambda f, t: write(f / "model.safetensors", t))(tmp_path, named)
  loaded = load_hf(tmp_path, config)
  expected = to_hf_names(loaded, config, form)
  assert all(np.array_equal(expected[n], named[n].astype(expected[n].dtype)) for n in named)
  assert equal(loaded, load_hf(named, config))
  half = load_hf(str(tmp_path), config, dtype=jnp.bfloat16)
  assert half["params"]["layers"]["layer_00"]["attention"]["q_a"].dtype == jnp.bfloat16
  assert half["router"]["layers"]["layer_00"]["moe"]["router"]["hash_table"].dtype == jnp.int32
  assert half["router"]["layers"]["unit_0"]["moe"]["router"]["bias"].dtype == jnp.float32


def test_everything_wrong_with_a_folder_in_one_error(tiny, tmp_path):
  config = tiny.config
  named = to_hf_names(tiny.variables(config), config, "release")
  named["norm.weight"] = np.zeros(9, np.float32)
  index = write_shards(tmp_path, named)
  lost, cut, kept = sorted(set(index["weight_map"].values()))
  (tmp_path / lost).unlink()
  data = (tmp_path / cut).read_bytes()
  (tmp_path / cut).write_bytes(data[:len(data) // 2])
  inside = [n for n, file in index["weight_map"].items() if file == kept]
  del index["weight_map"][inside[0]]
  index["weight_map"]["layers.7.nothing"] = kept
  (tmp_path / INDEX_NAME).write_text(json.dumps(index))
  with pytest.raises(ValueError) as error:
    load_hf(tmp_path, config)
  text = str(error.value)
  assert f"shard listed but absent (1): {lost}" in text
  assert f"unreadable shard (1): {cut} (cut short" in text
  assert f"in the index but not in its shard (1): layers.7.nothing ({kept})" in text
  assert f"in a shard but not in the index (1): {inside[0]} ({kept})" in text
  gone = [n for n, file in index["weight_map"].items() if file in (lost, cut)]
  missing = next(line for line in text.splitlines() if line.strip().startswith("missing"))
  assert all(n in missing for n in gone if n != "norm.weight")
  if "norm.weight" not in gone:
    assert "norm.weight (9,), expected (8,)" in text


def test_no_folder_no_files_no_header(tiny, tmp_path):
  with pytest.raises(FileNotFoundError, match="expected a folder"):
    load_hf(tmp_path / "absent", tiny.config)
  with pytest.raises(FileNotFoundError, match="expected model.safetensors"):
    load_hf(tmp_path, tiny.config)
  (tmp_path / "a.safetensors").write_bytes(b"\x10\x00")
  with pytest.raises(ValueError, match="cut short"):
    read_header(tmp_path / "a.safetensors")


def test_the_header_agrees_with_the_library(tiny, tmp_path):
  write(tmp_path / "model.safetensors", to_hf_names(tiny.variables(tiny.config), tiny.config))
  theirs, ours = load_file(tmp_path / "model.safetensors"), read_header(tmp_path / "model.safetensors")
  assert set(theirs) == set(ours)
  assert all(np.array_equal(theirs[n], x.numpy()) and theirs[n].dtype == x.dtype for n, x in ours.items())
