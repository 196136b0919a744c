"""Learning from rewards in small (GRPO): the model of configs/tiny_chat.py thinks about sums, and right answers count.

Its weights are those of runs/chat, its problems those of the miniature of reasoning depth. Another reward is another
function (problem, message) -> number: --set 'reinforcement.rewards=("my_module.my_reward",)'.

command   python -m launch.train --config configs/tiny_rewards.py --workdir runs/rewards
hardware  2 CPU cores
duration  minutes, with compilation
result    reward, length of replies, KL and shares over the rounds: metrics.jsonl and reinforcement.png
"""

import dataclasses
from pathlib import Path

from deepseek_v4.config import OptimizerConfig, ReinforcementConfig, RunConfig, TrainingConfig, load


def get_config() -> RunConfig:
  chat = load(Path(__file__).with_name("tiny_chat.py"))
  return dataclasses.replace(
    chat,
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=2, weight_decay=0.0),
    data=dataclasses.replace(chat.data, path="runs/depth/task/problems.jsonl"),
    training=TrainingConfig(steps=60, init_from="runs/chat", log_every=1, eval_every=10, eval_batches=1,
                            checkpoint_every=20),
    reinforcement=ReinforcementConfig(
      reasoning_effort="high", problems=32, replies=8, minibatches=2, max_new_tokens=14, thinking_tokens=10,
      decode_batch=256, clip=0.2, kl_weight=0.01, reference_steps=20, length_penalty=0.1))
