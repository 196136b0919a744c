"""What follows pre-training: conversations, rollouts, rewards, specialists by reinforcement, on-policy distillation.

It knows generation and training; neither knows it. Sampling lives in `generation/`, the optimizer step in `training/`.
"""
