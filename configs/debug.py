"""Base of the debug runs and the plainest of them: two sliding layers, learned router, two streams, ten steps.

command   python -m launch.train --config configs/debug.py --workdir runs/debug
hardware  any, 1 to 8 devices
duration  ten steps in seconds, after compilation
result    a finite loss, about ln 320 = 5.8 nats at the first step and lower at the tenth

Each debug_*.py switches one feature on.
"""

from deepseek_v4.config import (
  LEARNED,
  SLIDING,
  DataConfig,
  MeshConfig,
  ModelConfig,
  OptimizerConfig,
  RunConfig,
  TrainingConfig,
)


def get_config() -> RunConfig:
  model = ModelConfig(
    vocab_size=320,
    hidden_size=32,
    num_hidden_layers=2,
    layer_types=(SLIDING,) * 2,
    mlp_layer_types=(LEARNED,) * 2,
    csa_compress_rate=4,
    hca_compress_rate=8,
    num_attention_heads=4,
    head_dim=16,
    qk_rope_head_dim=8,
    q_lora_rank=16,
    o_groups=2,
    o_lora_rank=8,
    sliding_window=16,
    index_n_heads=2,
    index_head_dim=8,
    index_topk=8,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    hc_mult=2,
    rope_scaling=None,
    max_position_embeddings=1024,
    num_nextn_predict_layers=0,
    pad_token_id=2,
    init_std=0.02,
  )
  return RunConfig(
    model=model,
    optimizer=OptimizerConfig(learning_rate=4e-3, warmup_steps=2),
    data=DataConfig(source="stdlib", sequence_length=128, batch_size=8, held_out_percent=1),
    mesh=MeshConfig(data=-1),
    training=TrainingConfig(steps=10, log_every=1, eval_every=5, eval_batches=1, checkpoint_every=5),
  )
