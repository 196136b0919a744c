"""What a worker of the other side prepares: transformers with what makes it fast on a CPU.

Experts by grouped matmuls (its default; the loop over experts takes about as long, batched_mm thirty times as long), fused
AdamW (ten times as fast as the loop over parameters), no cache, huge pages by `cases.ENVIRONMENT`. Its attention has the
eager form only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable

import numpy as np
import torch
from transformers.models.deepseek_v4 import DeepseekV4Config, DeepseekV4ForCausalLM

from launch.benchmarks.cases import ADAMW, THREADS, WEIGHTS, Case, check_config, model_config, tokens_of


def prepare(case: Case, folder: Path) -> tuple[Callable[[], Any], Callable[[int], Any], float] | None:
  """See `ours.prepare`; nothing is compiled."""
  torch.set_num_threads(THREADS)
  config = check_config() if case.kind == "logits" else model_config()
  settings = DeepseekV4Config(**config.to_hf())
  settings._attn_implementation, settings._experts_implementation = "eager", "grouped_mm"
  model = DeepseekV4ForCausalLM(settings).float()
  with np.load(folder / WEIGHTS) as weights, torch.no_grad():
    model.load_state_dict({name: torch.from_numpy(x) for name, x in weights.items()})
  tokens = torch.from_numpy(tokens_of(case)).long()
  run = _train(model, tokens, case.variant == "checkpointing") if case.kind == "train" else _forward(model.eval(), tokens)
  if case.kind == "logits":
    np.save(folder / f"logits {case.side}.npy", run(keep=True).numpy())
    return None
  factors = {n: (torch.randn(2048, n), torch.randn(n, n)) for n in (512, 2048)}
  return run, lambda n: torch.matmul(*factors[n]), 0.0


def _forward(model, tokens):
  def run(keep: bool = False):
    with torch.no_grad():
      logits = model(tokens, use_cache=False).logits
    return logits if keep else None

  return run


def _train(model, tokens, checkpointing: bool):
  model.train()
  if checkpointing:
    model.activation_checkpointing_enable()
  optimizer = _adamw(model)

  def run():
    loss = model(tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()

  return run


def _adamw(model) -> torch.optim.Optimizer:
  """AdamW before its first step, with its moments in memory: they are no activations."""
  optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=ADAMW["betas"], weight_decay=ADAMW["weight_decay"],
                                fused=True)
  for parameter in model.parameters():
    parameter.grad = torch.zeros_like(parameter)
  optimizer.step()
  optimizer.zero_grad(set_to_none=True)
  for moments in optimizer.state.values():
    moments["step"].zero_()
  for group in optimizer.param_groups:
    group["lr"] = ADAMW["learning_rate"]
  return optimizer
