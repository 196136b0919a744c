"""V4's way of training in small: dense rows that grow, the indexer's warm-up, then sparse attention, on longer rows yet.

command   python -m launch.train --config configs/tiny_stages.py --workdir runs/tiny_stages
          python -m launch.miniature stages --workdir runs/stages     trains it and measures what the stages did
hardware  2 CPU cores
duration  10 to 16 minutes with five compilations
result    1.7 to 1.8 held-out bits per byte of Python's standard library (zlib 1.85 to 2.13, as the library is); before
          attention becomes sparse the indexer's 64 picks of up to 128 entries hold 0.85 and 0.87 of its mass (at random
          0.69), and leaving the rest out costs no loss: 1.305 nats per token with all entries, 1.305 with the picks

The indexer does not train with the rest while attention is dense: the warm-up finds it as it was born.
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
  StageConfig,
  TrainingConfig,
  Yarn,
)


def get_config() -> RunConfig:
  model = ModelConfig(
    vocab_size=320,  # 256 bytes, the special ids, and what makes it a multiple of 64
    hidden_size=96,
    num_hidden_layers=4,
    layer_types=(SLIDING, CSA, HCA, CSA),
    mlp_layer_types=(HASH,) + (LEARNED,) * 3,
    csa_compress_rate=4,
    hca_compress_rate=32,
    num_attention_heads=4,
    head_dim=64,
    qk_rope_head_dim=16,
    q_lora_rank=48,
    o_groups=2,
    o_lora_rank=48,
    sliding_window=16,
    index_n_heads=4,
    index_head_dim=32,
    index_topk=64,
    n_routed_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=64,
    hc_mult=2,
    rope_scaling=Yarn(factor=4.0, original_max_position_embeddings=512),
    max_position_embeddings=2048,
    pad_token_id=2,
    init_std=0.02,
  )
  stages = (
    StageConfig("dense", steps=240, sequence_length=256, batch_size=16, accumulation=2, ramp_from=8, ramp_steps=40,
                attention_mode="dense", trainable="all_but_indexer"),
    StageConfig("dense_long", steps=160, sequence_length=512, batch_size=8, attention_mode="dense",
                trainable="all_but_indexer"),
    StageConfig("indexer_warm_up", steps=100, sequence_length=512, batch_size=8, attention_mode="dense",
                trainable="indexer", learning_rate=4e-3, warmup_steps=5, decay_steps=60),
    StageConfig("sparse", steps=100, sequence_length=1024, batch_size=4),
  )
  return RunConfig(
    model=model,
    optimizer=OptimizerConfig(learning_rate=4e-3, warmup_steps=15, decay_steps=70),
    data=DataConfig(source="stdlib", held_out_percent=1),
    mesh=MeshConfig(data=-1),
    training=TrainingConfig(log_every=10, eval_every=50, eval_batches=4, checkpoint_every=100),
    stages=stages,
  )
