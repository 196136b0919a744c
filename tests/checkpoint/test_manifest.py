"""Checksums that do not depend on how a leaf is cut, and notice what happens to files; manifests that notice themselves."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from deepseek_v4.checkpoint import manifest


def checksum(x):
  return manifest.checksums({"x": x})["x"]


def by_definition(x):
  """The sum element by element, in Python integers."""
  width = max(x.dtype.itemsize // 4, 1)
  words = np.frombuffer(x.tobytes(), f"u{min(x.dtype.itemsize, 4)}")
  total = 0
  for place, word in enumerate(words):
    h = place * 0x9E3779B97F4A7C15 % 2**64
    h ^= h >> 32
    h = (h * 0xD6E8FEB86659FD93 % 2**64) | 1
    total += h * int(word)
  assert len(words) == x.size * width
  return f"{total % 2**64:016x}"


@pytest.mark.parametrize("x", [
  np.arange(60, dtype=np.float32).reshape(3, 4, 5), np.arange(7, dtype=ml_dtypes.bfloat16), np.array([True, False, True]),
  np.float64([[1.5, -0.0], [np.nan, 2]]), np.int32(5).reshape(()), np.zeros((0, 3), np.float32),
  np.arange(6, dtype=np.int64)])
def test_the_sum_is_what_its_description_says(x):
  assert checksum(x) == by_definition(x)


@pytest.mark.parametrize("spec", [(), ("a",), (None, "b"), ("b", "a"), (("a", "b"),), (None, None, "a")])
def test_the_cut_over_devices_changes_nothing(spec):
  x = np.random.default_rng(0).normal(size=(8, 4, 6)).astype(np.float32)
  mesh = jax.make_mesh((2, 4), ("a", "b"))
  assert checksum(jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))) == by_definition(x)


def test_changes_are_noticed(monkeypatch):
  x = np.random.default_rng(0).normal(size=(40, 30)).astype(np.float32)
  right = checksum(x)
  monkeypatch.setattr(manifest, "_CHUNK", 64)  # many chunks
  assert checksum(x) == right
  for place in (0, 17, 1199):
    for bit in (0, 13, 31):
      y = x.copy()
      y.reshape(-1).view(np.uint32)[place] ^= np.uint32(1 << bit)
      assert checksum(y) != right
  assert checksum(x[::-1]) != right and checksum(x.T) != right
  simple = np.zeros(4096, np.float32)
  simple[3] = 1  # few bits set, places far apart: an exchange must still show
  assert len({checksum(np.roll(simple, 256 * i)) for i in range(16)}) == 16
  assert checksum(np.float32([0.0])) != checksum(np.float32([-0.0]))


def test_a_manifest_notices_its_own_damage():
  built = manifest.build({"model": {"rates": (4, 128)}}, {"data": {"file": 3}}, {"a": np.ones(3, np.float32)}, {})
  text = json.dumps(built)
  assert manifest.parse(text.encode())["config"] == {"model": {"rates": [4, 128]}}
  with pytest.raises(manifest.DamagedError, match="altered"):
    manifest.parse(text.replace('"file": 3', '"file": 7').encode())
  with pytest.raises(manifest.DamagedError, match="unreadable"):
    manifest.parse(text[:len(text) // 2].encode())
  with pytest.raises(manifest.DamagedError, match="b is missing, a is .*saved as"):
    manifest.verify({"leaves": {"a": built["leaves"]["a"], "b": built["leaves"]["a"]}},
                    {"b": 0, "a": jnp.ones((3, 1), jnp.float32)})


def test_only_fields_that_change_the_model_matter():
  rope = {"factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32.0, "beta_slow": 1.0}
  one = {"model": {"hidden_size": 8, "scan_layers": True, "rope_scaling": rope}, "training": {"steps": 3}}
  # Laid out, computed, bounded in another way; and what is left out has its default, as a field that did not exist yet.
  free = {"scan_layers": False, "loss_chunk_size": 5, "max_position_embeddings": 128, "eos_token_id": 7, "hc_eps": 1e-6}
  manifest.refuse_other_model(one, {"model": {**one["model"], **free}, "training": {}}, "x")
  with pytest.raises(ValueError, match=r"model.hidden_size = 16, there 8; model.hc_eps = 1.0, there 1e-06"):
    manifest.refuse_other_model(one, {"model": {**one["model"], "hidden_size": 16, "hc_eps": 1.0}}, "x")
