"""DeepSeek-V4-Flash (284B parameters, 13B active): its whole pre-training, from 4K dense tokens to 1M sparse ones.

command   python -m launch.train --config configs/v4_flash.py --workdir FOLDER --set data.path=GLOB
          the last stage has 72 rows a batch, so it wants fewer shards of rows and more of the sequence: the run stops at
          its border, and the same command goes on with --set mesh.fsdp=1 --set mesh.expert=8 --set mesh.context=16
plan      python -m launch.plan --config configs/v4_flash.py --stage sparse_64k --topology v5p:4x4x8
hardware  TPU v5p, 128 chips by arithmetic (float32 weights, momentum and gradients); more want a smaller accumulation;
          plans that were compiled are in configs/pod_flash_*.py (4K fits 128)
duration  32T tokens in steps of 75.5M (report 4.2.2)
result    none: nobody has trained this file

From the report (4.2.2): lengths 4K, 16K, 64K, 1M; dense attention for the first 1T tokens, sparse from 64K on behind a
short warm-up of the indexer alone; learning rate, its warm-up and end, 75.5M tokens a batch; the prediction block's weight
0.3, and 0.1 from the start of the decay; balance loss and bias speed. Not in it, so chosen here: where 4K, 64K and 1M end,
the start of the decay (the last 5% of the steps), the ramp of the batch (from one pass of 2.1M tokens, along a line over
4,000 steps), and of the warm-up its learning rate and steps (V3.2's) and its batch. The clipping norm is V3's.
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
  StageConfig,
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
  stages = (
    StageConfig("dense_4k", tokens=500 * 10**9, sequence_length=4096, batch_size=18432, accumulation=36, ramp_from=512,
                ramp_steps=4000, attention_mode="dense", trainable="all_but_indexer"),
    StageConfig("dense_16k", tokens=500 * 10**9, sequence_length=16384, batch_size=4608, accumulation=36,
                attention_mode="dense", trainable="all_but_indexer"),
    StageConfig("indexer_warm_up", steps=1000, sequence_length=65536, batch_size=128, accumulation=1,
                attention_mode="dense", trainable="indexer", learning_rate=1e-3),
    StageConfig("sparse_64k", tokens=30_500 * 10**9, sequence_length=65536, batch_size=1152, accumulation=9),
    StageConfig("sparse_1m", tokens=500 * 10**9, sequence_length=1048576, batch_size=72, accumulation=9),
  )
  return RunConfig(
    model=model,
    optimizer=OptimizerConfig(learning_rate=2.7e-4, warmup_steps=2000, decay_steps=21_200, final_fraction=0.1,
                              newton_schulz_dtype="bfloat16"),
    loss=LossConfig(mtp_weight=0.3, mtp_weight_final=0.1, balance_weight=1e-4, bias_update_speed=1e-3),
    data=DataConfig(source="array_record", path="tokens/*.array_record"),
    mesh=MeshConfig(data=-1, fsdp=8, expert=16),
    training=TrainingConfig(attention_mode="sparse", log_every=10, eval_every=1000, checkpoint_every=500),
    stages=stages,
  )
