"""transformers saves a random model and we compute with it; we save it and transformers computes with it."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from transformers.models.deepseek_v4 import DeepseekV4Config, DeepseekV4ForCausalLM

import deepseek_v4 as dsv4
from deepseek_v4.checkpoint import convert
from deepseek_v4.checkpoint.store import restore_variables
from deepseek_v4.config import CSA, HASH, HCA, LEARNED, SLIDING, ModelConfig
from tests.checkpoint.releases import decoded, make_release, read_folder

CONFIG = ModelConfig(
  vocab_size=97, hidden_size=32, num_hidden_layers=4, layer_types=(SLIDING, CSA, HCA, CSA),
  mlp_layer_types=(HASH, LEARNED, LEARNED, LEARNED), csa_compress_rate=4, hca_compress_rate=8, num_attention_heads=4,
  head_dim=16, qk_rope_head_dim=8, q_lora_rank=16, o_groups=2, o_lora_rank=8, sliding_window=8, index_n_heads=8,
  index_head_dim=8, index_topk=3, n_routed_experts=6, num_experts_per_tok=2, moe_intermediate_size=16, rope_scaling=None,
  max_position_embeddings=512, num_nextn_predict_layers=0)
TOKENS = np.random.default_rng(0).integers(1, CONFIG.vocab_size, (2, 41))


def theirs(folder):
  """transformers' logits of a folder, computed in float32."""
  model, report = DeepseekV4ForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True,
                                                        attn_implementation="eager")
  assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
  with torch.no_grad():
    return model.eval()(torch.tensor(TOKENS), use_cache=False).logits.numpy()


def ours(variables, config):
  with jax.default_matmul_precision("highest"):
    return np.asarray(jax.jit(dsv4.DeepseekV4(config).apply)(variables, TOKENS).logits)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A folder that transformers wrote, weights large enough that every term matters."""
  # Like the releases' and transformers' default, the config speaks of a prediction block, which transformers never builds.
  described = dataclasses.replace(CONFIG, num_nextn_predict_layers=1)
  model = DeepseekV4ForCausalLM(DeepseekV4Config(**described.to_hf())).float()
  rng = np.random.default_rng(1)
  with torch.no_grad():
    for name, x in model.state_dict().items():
      noise = rng.normal(size=tuple(x.shape))
      if name.endswith("tid2eid"):
        noise = rng.integers(0, CONFIG.n_routed_experts, tuple(x.shape))
      elif "norm" in name:
        noise = 1 + 0.2 * noise
      elif not name.endswith(("sinks", "position_bias", "base")):
        noise = 0.2 * noise
      x.copy_(torch.tensor(noise))
  folder = tmp_path_factory.mktemp("saved")
  model.save_pretrained(folder, save_original_format=False)
  return folder


def test_they_save_and_we_compute_then_we_save_and_they_compute(saved, tmp_path):
  with pytest.raises(ValueError, match="no multi-token-prediction block.*drop_draft"):
    convert.to_checkpoint(saved, tmp_path / "ours")
  config = convert.to_checkpoint(saved, tmp_path / "ours", drop_draft=True)
  assert config == CONFIG
  variables, _, _ = restore_variables(tmp_path / "ours" / "checkpoints")
  logits = theirs(saved)
  assert 0.5 < logits.std() < 5
  np.testing.assert_allclose(ours(variables, config), logits, atol=2e-4)
  convert.to_release(tmp_path / "ours", tmp_path / "back", dtype="float32")
  np.testing.assert_allclose(theirs(tmp_path / "back"), logits, atol=2e-4)


def test_a_quantised_release_decoded_for_transformers(tmp_path):
  """FP8 and FP4 in, BF16 out without loss: transformers then holds the values of the bytes."""
  config = make_release(tmp_path / "release", CONFIG)
  variables = dsv4.load_hf(tmp_path / "release", config)
  dsv4.save_hf(variables, config, tmp_path / "plain", None, tmp_path / "release")
  model = DeepseekV4ForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
  tensors, _ = read_folder(tmp_path / "release")
  state = model.state_dict()
  for name, here in (("layers.1.attn.wq_b.weight", "model.layers.1.self_attn.q_b_proj.weight"),
                     ("layers.2.attn.wo_a.weight", "model.layers.2.self_attn.o_a_proj.weight"),
                     ("layers.3.attn.indexer.wq_b.weight", "model.layers.3.self_attn.compressor.indexer.q_b_proj.weight"),
                     ("layers.3.ffn.shared_experts.w2.weight", "model.layers.3.mlp.shared_experts.down_proj.weight")):
    assert np.array_equal(state[here].numpy(), decoded(tensors, name)), name
  packed = state["model.layers.2.mlp.experts.gate_up_proj"].numpy()
  assert np.array_equal(packed[4], np.concatenate([decoded(tensors, f"layers.2.ffn.experts.4.w{n}.weight") for n in (1, 3)]))
