"""The names that other people's scripts call exist, and importing the package costs nothing."""

import subprocess
import sys

import pytest

import deepseek_v4 as dsv4
import pallas_kernels.indexer
import pallas_kernels.sparse_attention


def test_names_exist():
  for name in ("ModelConfig", "DeepseekV4", "load_hf", "save_hf", "to_hf_names", "from_hf_names", "restack", "trace",
               "count", "init_cache", "cache_lengths", "cache_entries", "rewind", "generate"):
    assert callable(getattr(dsv4, name)), name
  for name in ("init_state", "make_train_step"):
    assert callable(getattr(dsv4.training, name)), name
  for name in ("newton_schulz", "muon", "build_optimizer", "assign", "matrix_axes", "decay_mask"):
    assert callable(getattr(dsv4.optim, name)), name
  for name in ("encode", "parse", "ChatTemplate"):
    assert callable(getattr(dsv4.chat, name)), name
  assert callable(dsv4.distillation.reverse_kl)
  assert callable(pallas_kernels.sparse_attention.attend) and callable(pallas_kernels.indexer.select)


def test_unknown_name_lists_what_there_is():
  with pytest.raises(AttributeError, match="DeepseekV4"):
    getattr(dsv4, "DeepseekV5")  # noqa: B009


def test_import_wakes_nothing():
  """Neither the package nor its config loads JAX: a launcher must be able to choose devices first."""
  modules = "deepseek_v4, deepseek_v4.config, deepseek_v4.config_hf, deepseek_v4.text.chat"
  code = f"import sys, {modules}; sys.exit('jax' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
