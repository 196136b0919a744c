"""Folders in the released format with random bytes, and their decoding by a few lines of NumPy."""

import dataclasses
import json

import ml_dtypes
import numpy as np

from deepseek_v4.checkpoint.hf_companions import write_config
from deepseek_v4.checkpoint.hf_write import release_plan
from deepseek_v4.checkpoint.safetensors_files import read_folder, write_folder
from deepseek_v4.config import CSA, HASH, HCA, LEARNED, SLIDING, ModelConfig

# Widths with more than one block of 128 and of 32 in some matrices, blocks that are cut at the edges, scanned layers.
CONFIG = ModelConfig(
  vocab_size=29, hidden_size=136, num_hidden_layers=5, layer_types=(SLIDING, CSA, HCA, CSA, HCA),
  mlp_layer_types=(HASH,) + (LEARNED,) * 4, csa_compress_rate=2, hca_compress_rate=3, num_attention_heads=4, head_dim=40,
  qk_rope_head_dim=8, q_lora_rank=24, o_groups=2, o_lora_rank=12, sliding_window=4, index_n_heads=2, index_head_dim=16,
  index_topk=2, n_routed_experts=3, num_experts_per_tok=2, moe_intermediate_size=48, hc_mult=2, rope_scaling=None,
  max_position_embeddings=64)


def random_tensor(rng, planned, name, config):
  """Any bytes that mean something: all finite codes, zeros of both signs, scales that are far from the smallest."""
  shape = planned.shape
  if planned.dtype == "I64":
    return rng.integers(0, config.n_routed_experts, shape)
  if planned.dtype == "F8_E8M0":
    return rng.integers(100, 150, shape).astype(np.uint8)
  if planned.dtype == "F8_E4M3":
    codes = rng.integers(0, 256, shape).astype(np.uint8)
    codes[(codes & 127) == 127] = 0x80
    codes[:128, :128] = rng.choice([0, 0x80], codes[:128, :128].shape) if "wq_b" in name else codes[:128, :128]
    return codes
  if planned.dtype == "I8":
    codes = rng.integers(0, 256, shape).astype(np.uint8)
    codes[0, :16] = rng.choice([0x00, 0x08, 0x80, 0x88], codes[0, :16].shape)
    return codes
  values = rng.normal(size=shape).astype(np.float32)
  return values if planned.dtype == "F32" else values.astype(ml_dtypes.bfloat16)


def make_release(folder, config=CONFIG, quantization="fp8+fp4", seed=0, max_file_bytes=200_000, **raw_config):
  """A released folder with tokenizer and encoder; returns the model's config with how it is stored."""
  folder.mkdir()
  plan = release_plan(config, quantization)
  rng = np.random.default_rng(seed)
  write_folder(folder, plan, ((n, random_tensor(rng, p, n, config)) for n, p in plan.items()), max_file_bytes)
  write_config(folder, config, quantization, "bfloat16", None)
  if raw_config:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | raw_config))
  (folder / "tokenizer.json").write_text("{}")
  (folder / "encoding").mkdir()
  (folder / "encoding" / "encoding_dsv4.py").write_text("A = 1\n")
  return dataclasses.replace(config, quantization=quantization)


def stored_bytes(folder):
  """{name: (dtype, shape, bytes)} of all tensors of a folder."""
  tensors, problems = read_folder(folder)
  assert not any(problems.values()), problems
  return {name: (str(t.dtype), t.shape, t.numpy().tobytes()) for name, t in tensors.items()}


def decoded(tensors, name):
  """A tensor's values, float32: codes from tables, scales spread with np.kron."""
  x = tensors[name].numpy()
  scale = name.removesuffix("weight") + "scale"
  if scale not in tensors:
    return x.astype(np.float32)
  factor = 2.0 ** (tensors[scale].numpy().view(np.uint8).astype(np.float64) - 127)
  if x.dtype == np.int8:
    table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    codes = np.empty((x.shape[0], 2 * x.shape[1]), np.uint8)
    codes[:, ::2], codes[:, 1::2] = x.view(np.uint8) & 15, x.view(np.uint8) >> 4
    values, block = np.copysign(table[codes & 7], np.where(codes >> 3, -1, 1)), (1, 32)
  else:
    values, block = x.astype(np.float64), (128, 128)
  spread = np.kron(factor, np.ones(block))[:values.shape[0], :values.shape[1]]
  return (values * spread).astype(np.float32)
