"""DeepSeek-V4-Pro (1.6T parameters, 49B active): its whole pre-training, from 4K dense tokens to 1M sparse ones.

command   python -m launch.train --config configs/v4_pro.py --workdir FOLDER --set data.path=GLOB
          longer rows are fewer, and want more shards of the sequence: at a border where the mesh does not fit the run
          stops, and the same command goes on with --set mesh.fsdp=F --set mesh.expert=E --set mesh.context=C, where F, E, C
          are 4, 32, 4 for dense_16k, 1, 32, 16 for both stages of 64K and 1, 2, 256 for sparse_1m
plan      python -m launch.plan --config configs/v4_pro.py --stage dense_4k --topology v5p:8x8x8
hardware  TPU v5p, 512 chips by arithmetic (float32 weights, momentum and gradients); more want a smaller accumulation;
          what the compiler said is in configs/pod_pro_*.py: 1,024 chips or more
duration  33T tokens in steps of 94.4M (report 4.2.2)
result    none: nobody has trained this file

From the report (4.2.2): lengths 4K, 16K, 64K, 1M; dense attention first, for longer than Flash's 1T tokens, sparse from 64K
on behind a short warm-up of the indexer alone; learning rate, its warm-up and end, 94.4M tokens a batch; the prediction
block's weight 0.3, and 0.1 from the start of the decay; balance loss and bias speed. Not in it, so chosen here: the tokens
of each length (2T dense), the start of the decay (the last 5% of the steps), the ramp of the batch (from one pass of 2.1M
tokens, along a line over 4,000 steps), and of the warm-up its learning rate and steps (V3.2's) and its batch. The clipping
norm is V3's.
"""

from deepseek_v4.config import (
  CSA,
  HASH,
  HCA,
  LEARNED,
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
    hidden_size=7168,
    num_hidden_layers=61,
    layer_types=(HCA,) + (HCA, CSA) * 30,
    mlp_layer_types=(HASH,) * 3 + (LEARNED,) * 58,
    num_attention_heads=128,
    head_dim=512,
    qk_rope_head_dim=64,
    q_lora_rank=1536,
    o_groups=16,
    o_lora_rank=1024,
    sliding_window=128,
    index_n_heads=64,
    index_head_dim=128,
    index_topk=1024,
    n_routed_experts=384,
    num_experts_per_tok=6,
    moe_intermediate_size=3072,
    routed_scaling_factor=2.5,
    hc_mult=4,
    rope_scaling=Yarn(factor=16.0, original_max_position_embeddings=65536),
    max_position_embeddings=1048576,
    compute_dtype="bfloat16",
    remat="block",
  )
  stages = (
    StageConfig("dense_4k", tokens=1000 * 10**9, sequence_length=4096, batch_size=23040, accumulation=45, ramp_from=512,
                ramp_steps=4000, attention_mode="dense", trainable="all_but_indexer"),
    StageConfig("dense_16k", tokens=1000 * 10**9, sequence_length=16384, batch_size=5760, accumulation=45,
                attention_mode="dense", trainable="all_but_indexer"),
    StageConfig("indexer_warm_up", steps=1000, sequence_length=65536, batch_size=32, accumulation=1,
                attention_mode="dense", trainable="indexer", learning_rate=1e-3),
    StageConfig("sparse_64k", tokens=30_500 * 10**9, sequence_length=65536, batch_size=1440, accumulation=45),
    StageConfig("sparse_1m", tokens=500 * 10**9, sequence_length=1048576, batch_size=90, accumulation=45),
  )
  return RunConfig(
    model=model,
    optimizer=OptimizerConfig(learning_rate=2.0e-4, warmup_steps=2000, decay_steps=17_500, final_fraction=0.1,
                              newton_schulz_dtype="bfloat16"),
    loss=LossConfig(mtp_weight=0.3, mtp_weight_final=0.1, balance_weight=1e-4, bias_update_speed=1e-3),
    data=DataConfig(source="array_record", path="tokens/*.array_record"),
    mesh=MeshConfig(data=-1, fsdp=16, expert=32),
    training=TrainingConfig(attention_mode="sparse", log_every=10, eval_every=1000, checkpoint_every=500),
    stages=stages,
  )
