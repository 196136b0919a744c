"""DeepSeek-V4-Flash (284B parameters, 13B active): the first stage of its pre-training, 4K tokens with dense attention.

command   python -m launch.train --config configs/v4_flash.py --workdir FOLDER --set data.path=GLOB
hardware  TPU v5p, 128 chips or more by arithmetic (float32 weights, momentum and gradients);
          a compiled plan of the mesh comes with launch.plan
duration  32T tokens in steps of 75.5M (report 4.2.2, as all numbers here)
result    none: nobody has trained this file

Not given in the report, so chosen here: the start of the decay (the last 5% of the steps) and the clipping norm (V3's). The
report's batch ramp, its longer sequences (16K, 64K, 1M) and the switch to sparse attention at 64K are later stages.
"""

from deepseek_v4.config import (
  CSA,
  HASH,
  HCA,
  LEARNED,
  SLIDING,
  DataConfig,
  LossConfig,
  MeshConfig,
  ModelConfig,
  OptimizerConfig,
  RunConfig,
  TrainingConfig,
  Yarn,
)


def get_config() -> RunConfig:
  model = ModelConfig(
    vocab_size=129280,
    hidden_size=4096,
    num_hidden_layers=43,
    layer_types=(SLIDING,) * 2 + (CSA, HCA) * 20 + (CSA,),
    mlp_layer_types=(HASH,) * 3 + (LEARNED,) * 40,
    num_attention_heads=64,
    head_dim=512,
    qk_rope_head_dim=64,
    q_lora_rank=1024,
    o_groups=8,
    o_lora_rank=1024,
    sliding_window=128,
    index_n_heads=64,
    index_head_dim=128,
    index_topk=512,
    n_routed_experts=256,
    num_experts_per_tok=6,
    moe_intermediate_size=2048,
    routed_scaling_factor=1.5,
    hc_mult=4,
    rope_scaling=Yarn(factor=16.0, original_max_position_embeddings=65536),
    max_position_embeddings=1048576,
    compute_dtype="bfloat16",
    remat="block",
  )
  steps = 424_000  # 32T tokens
  return RunConfig(
    model=model,
    optimizer=OptimizerConfig(learning_rate=2.7e-4, warmup_steps=2000, decay_steps=steps // 20, final_fraction=0.1,
                              newton_schulz_dtype="bfloat16"),
    loss=LossConfig(mtp_weight=0.3, mtp_weight_final=0.1, balance_weight=1e-4, bias_update_speed=1e-3),
    data=DataConfig(source="array_record", path="tokens/*.array_record", sequence_length=4096,
                    batch_size=18432, accumulation=36),
    mesh=MeshConfig(data=-1, fsdp=8, expert=16),
    training=TrainingConfig(steps=steps, attention_mode="dense", log_every=10, eval_every=1000, checkpoint_every=500),
  )
