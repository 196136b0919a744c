"""A model of quantisation-aware training leaves as it computes: its experts' FP4 numbers, whatever holds them."""

import dataclasses

import jax
import numpy as np
import pytest

import deepseek_v4 as dsv4
from tests.checkpoint.releases import CONFIG
from tests.model import numpy_model
from tests.model.small import random_variables

QAT = dataclasses.replace(CONFIG, qat="fp4", scan_layers=False)


def experts_of(tree):
  """{path: array} of routed experts' weights."""
  flat = {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}
  return {name: x for name, x in flat.items() if "['experts']" in name}


@pytest.mark.parametrize("quantization, dtype", [("fp8+fp4", "bfloat16"), ("fp8", "bfloat16"), (None, "bfloat16")])
def test_experts_leave_in_fp4_numbers(quantization, dtype, tmp_path, recwarn):
  variables = random_variables(QAT)
  dsv4.save_hf(variables, QAT, tmp_path / "out", quantization, dtype=dtype)
  read = dsv4.ModelConfig.from_hf(tmp_path / "out")
  assert (read.qat, read.quantization) == (None, quantization)
  found = experts_of(dsv4.load_hf(tmp_path / "out", dataclasses.replace(read, scan_layers=False)))
  for name, x in experts_of(variables).items():
    want = np.swapaxes(numpy_model.rounded(np.swapaxes(x, 1, 2), "index"), 1, 2)
    np.testing.assert_array_equal(found[name], want)
    assert np.abs(want - x).max() > 0.01
  assert not recwarn.list


def test_scales_too_far_apart_for_fp8_are_named(tmp_path):
  """One tile 2^-12 times the others: FP4 has its values, FP8 would have coarser ones; the tensor is named."""
  variables = random_variables(QAT)
  gate = variables["params"]["layers"]["layer_02"]["moe"]["experts"]["gate"]  # [E, D, F]
  gate[1, 32:64, 7] *= 2.0**-13
  named = r"1 experts' matrices .* more than 2\^11 apart.*layers\.2\.ffn\.experts\.1\.w1\.weight"
  with pytest.warns(UserWarning, match=named):
    dsv4.save_hf(variables, QAT, tmp_path / "out", "fp8+fp4")
  read = experts_of(dsv4.load_hf(tmp_path / "out", QAT))["['params']['layers']['layer_02']['moe']['experts']['gate']"]
  np.testing.assert_array_equal(read[1].T, numpy_model.rounded(gate[1].T, "index"))


def test_what_has_no_fp4_number_is_named(tmp_path):
  variables = random_variables(QAT)
  variables["params"]["layers"]["layer_02"]["moe"]["experts"]["gate"][1, 3, 7] = np.nan
  for quantization in (None, "fp8+fp4"):
    with pytest.raises(ValueError, match=r"layers\.2\.ffn\.experts\.1\.w1\.weight: values that are not finite"):
      dsv4.save_hf(variables, QAT, tmp_path / "out", quantization)
