"""Supervised fine-tuning in small: conversations of three reasoning efforts, loss on what the assistant wrote.

The conversations are those of the miniature of reasoning depth, which writes them when it starts:
  python -m launch.miniature depth --workdir runs/depth
Any folder of JSON lines {"messages": [...], "reasoning_effort": ...} does as well: --set data.path=FOLDER, and with
--set data.tokenizer=None on bytes.

command   python -m launch.train --config configs/tiny_chat.py --workdir runs/chat
hardware  2 CPU cores
duration  minutes, with compilation
result    held-out bits per token of the assistant's replies; then python -m launch.generate --checkpoint runs/chat --chat
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
)


def get_config() -> RunConfig:
  model = ModelConfig(
    vocab_size=264,
    hidden_size=64,
    num_hidden_layers=4,
    layer_types=(SLIDING, CSA, HCA, CSA),
    mlp_layer_types=(HASH,) + (LEARNED,) * 3,
    csa_compress_rate=4,
    hca_compress_rate=16,
    num_attention_heads=4,
    head_dim=64,
    qk_rope_head_dim=32,
    q_lora_rank=48,
    o_groups=2,
    o_lora_rank=48,
    sliding_window=48,
    index_n_heads=2,
    index_head_dim=32,
    index_topk=8,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=96,
    hc_mult=2,
    rope_theta=100.0,  # texts are short
    compress_rope_theta=100.0,
    rope_scaling=None,
    max_position_embeddings=256,
    num_nextn_predict_layers=0,
    bos_token_id=256,
    eos_token_id=257,
    init_std=0.02,
  )
  return RunConfig(
    model=model,
    optimizer=OptimizerConfig(learning_rate=6e-3, warmup_steps=20, decay_steps=130),
    data=DataConfig(source="chat", path="runs/depth/task/talks", tokenizer="runs/depth/task/tokenizer.json",
                    sequence_length=128, batch_size=32, held_out_percent=4),
    mesh=MeshConfig(data=1),
    training=TrainingConfig(steps=400, log_every=20, eval_every=100, eval_batches=2, checkpoint_every=100),
  )
