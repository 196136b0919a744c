"""A run for tests of several processes: every sum is over more than one device, and compiling takes seconds.

Losses are smooth: with the report's eps of 1e-20 AdamW's first step is the sign of a gradient, also of one that is rounding
noise, and another order of summation would give another run.
"""

from deepseek_v4 import config as c


def get_config() -> c.RunConfig:
  model = c.ModelConfig(
    vocab_size=320, hidden_size=16, num_hidden_layers=1, layer_types=(c.SLIDING,), mlp_layer_types=(c.LEARNED,),
    num_attention_heads=2, head_dim=8, qk_rope_head_dim=4, q_lora_rank=8, o_groups=2, o_lora_rank=8, sliding_window=8,
    index_n_heads=2, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, hc_mult=2,
    max_position_embeddings=64, num_nextn_predict_layers=0, init_std=0.1)
  return c.RunConfig(
    model=model, optimizer=c.OptimizerConfig(learning_rate=1e-3, warmup_steps=2, decay_steps=2, adam_eps=1e-4),
    data=c.DataConfig(source="text", path=".", sequence_length=48, batch_size=8, held_out_percent=20, fim_rate=0.5),
    mesh=c.MeshConfig(data=-1),
    training=c.TrainingConfig(steps=6, log_every=1, eval_every=100, checkpoint_every=3))
