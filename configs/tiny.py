"""The whole V4 in small: every kind of layer and router, MTP, YaRN, four residual streams, Muon, on real text.

command   python -m launch.train --config configs/tiny.py --workdir runs/tiny
hardware  2 CPU cores; eight emulated devices, so that the run is sharded as on a pod
duration  about 5 minutes with compilation
result    2.63 held-out bits per byte of Python's standard library (bigram model 3.48, zlib 1.85); see the README
"""

from deepseek_v4.config import (
  CSA,
  HASH,
  HCA,
  LEARNED,
  SLIDING,
  DataConfig,
  MeshConfig,
  ModelConfig,
  OptimizerConfig,
  RunConfig,
  TrainingConfig,
  Yarn,
)


def get_config() -> RunConfig:
  model = ModelConfig(
    vocab_size=320,  # 256 bytes, the special ids, and what makes it a multiple of 64
    hidden_size=192,
    num_hidden_layers=5,
    layer_types=(SLIDING,) + (CSA, HCA) * 2,  # four bodies to compile: this one, the repeated pair, the MTP block
    mlp_layer_types=(HASH,) + (LEARNED,) * 4,
    csa_compress_rate=4,
    hca_compress_rate=32,
    num_attention_heads=8,
    head_dim=32,
    qk_rope_head_dim=16,
    q_lora_rank=64,
    o_groups=2,
    o_lora_rank=64,
    sliding_window=64,
    index_n_heads=4,
    index_head_dim=32,
    index_topk=32,
    n_routed_experts=16,
    num_experts_per_tok=4,
    moe_intermediate_size=64,
    routed_scaling_factor=1.5,
    hc_mult=4,
    rope_scaling=Yarn(factor=4.0, original_max_position_embeddings=1024),
    max_position_embeddings=4096,
    pad_token_id=2,
    init_std=0.02,
  )
  return RunConfig(
    model=model,
    optimizer=OptimizerConfig(learning_rate=4e-3, warmup_steps=15, decay_steps=70),
    data=DataConfig(source="stdlib", sequence_length=512, batch_size=8, held_out_percent=1),
    mesh=MeshConfig(data=2, fsdp=2, expert=2, emulated_devices=8),
    training=TrainingConfig(steps=120, log_every=10, eval_every=40, eval_batches=4, checkpoint_every=60),
  )
