"""transformers' own state_dict and gradients: every name known, equal bit for bit there and back."""

import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers.models.deepseek_v4 import DeepseekV4Config, DeepseekV4ForCausalLM

from deepseek_v4.checkpoint.hf_read import load_hf
from deepseek_v4.checkpoint.hf_trees import from_hf_names, to_hf_names
from deepseek_v4.config import CSA, HASH, HCA, LEARNED, SLIDING, ModelConfig

CONFIG = ModelConfig(
  vocab_size=97, hidden_size=32, num_hidden_layers=4, layer_types=(SLIDING, CSA, HCA, CSA),
  mlp_layer_types=(HASH, LEARNED, HASH, LEARNED), csa_compress_rate=4, hca_compress_rate=8, num_attention_heads=4,
  head_dim=16, qk_rope_head_dim=8, q_lora_rank=12, o_groups=2, o_lora_rank=8, sliding_window=8, index_n_heads=2,
  index_head_dim=8, index_topk=2, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, rope_scaling=None,
  max_position_embeddings=64, num_nextn_predict_layers=0)


@pytest.fixture(scope="module")
def model():
  torch.manual_seed(0)
  c = CONFIG
  model = DeepseekV4ForCausalLM(DeepseekV4Config(
    vocab_size=c.vocab_size, hidden_size=c.hidden_size, num_hidden_layers=c.num_hidden_layers, num_attention_heads=4,
    num_key_value_heads=1, head_dim=16, q_lora_rank=12, o_groups=2, o_lora_rank=8, sliding_window=8, index_n_heads=2,
    index_head_dim=8, index_topk=2, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, hc_mult=4,
    partial_rotary_factor=0.5, layer_types=list(c.layer_types), mlp_layer_types=list(c.mlp_layer_types),
    compress_rates={CSA: 4, HCA: 8}, max_position_embeddings=64))
  with torch.no_grad():
    for name, x in model.state_dict().items():
      x.copy_(torch.randint(0, 4, x.shape) if name.endswith("tid2eid") else torch.randn(x.shape))
  return model


def test_state_dict_there_and_back(model):
  state = model.state_dict()
  variables = from_hf_names(state, CONFIG)
  back = to_hf_names(variables, CONFIG)
  assert set(back) == set(state)
  for name, x in state.items():
    assert np.array_equal(back[name], x.numpy()) and back[name].dtype == x.numpy().dtype, name
  released = to_hf_names(variables, CONFIG, "release")
  again = to_hf_names(from_hf_names(released, CONFIG), CONFIG)
  assert all(np.array_equal(again[name], back[name]) for name in back)


def test_transformers_reads_our_released_names(model, tmp_path):
  variables = from_hf_names(model.state_dict(), CONFIG)
  released = to_hf_names(variables, CONFIG, "release")
  save_file({n: torch.from_numpy(x) for n, x in released.items()}, tmp_path / "model.safetensors", metadata={"format": "pt"})
  model.config.save_pretrained(tmp_path)
  theirs, report = DeepseekV4ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
  assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
  state = model.state_dict()
  assert all(torch.equal(x, state[n]) for n, x in theirs.state_dict().items())


def test_loaded_variables_do_not_share_torch_memory(model):
  variables = from_hf_names(model.state_dict(), CONFIG)
  before = np.array(variables["params"]["final_norm"]["scale"])
  with torch.no_grad():
    model.model.norm.weight.add_(1)
  assert np.array_equal(before, variables["params"]["final_norm"]["scale"])


def test_bfloat16_state_dict(model):
  half = {n: x.to(torch.bfloat16) if x.is_floating_point() else x for n, x in model.state_dict().items()}
  variables = load_hf(half, CONFIG)
  q_b = half["model.layers.1.self_attn.q_b_proj.weight"].float().numpy()
  assert np.array_equal(to_hf_names(variables, CONFIG)["model.layers.1.self_attn.q_b_proj.weight"], q_b)


@pytest.mark.parametrize("dtype, shards", [(torch.float32, "1GB"), (torch.bfloat16, "60KB")])
def test_folders_written_by_transformers(model, tmp_path, dtype, shards):
  half = {n: x.to(dtype) if x.is_floating_point() else x for n, x in model.state_dict().items()}
  model.save_pretrained(tmp_path, state_dict=dict(half), save_original_format=False, max_shard_size=shards)
  assert (tmp_path / "model.safetensors.index.json").exists() == (shards == "60KB")
  back = to_hf_names(load_hf(tmp_path, CONFIG), CONFIG)
  assert set(back) == set(half) and all(np.array_equal(back[n], half[n].to(torch.float32).numpy()) for n in half)
  assert ModelConfig.from_hf(tmp_path).layer_types == CONFIG.layer_types
  with pytest.raises(ValueError, match="num_nextn_predict_layers=0"):
    load_hf(tmp_path, dataclasses.replace(CONFIG, num_nextn_predict_layers=1))


def test_the_mixed_original_format_is_recognised(model, tmp_path):
  model.save_pretrained(tmp_path)
  with pytest.raises(ValueError, match="save_original_format=False"):
    load_hf(tmp_path, CONFIG)
