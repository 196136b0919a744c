"""What a worker of the other side prepares: transformers with what makes it fast on a CPU.

Experts by grouped matmuls (its default; the loop over experts takes about as long and is measured, too, where it decodes;
batched_mm takes thirty times as long), fused AdamW (ten times as fast as the loop over parameters), huge pages by
`cases.ENVIRONMENT`. Its attention has the eager form only: it refuses sdpa, flash and flex attention, which know no sinks.
It decodes through its DynamicCache; it has no static one.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Callable

import numpy as np
import torch
from transformers import DynamicCache
from transformers.models.deepseek_v4 import DeepseekV4Config, DeepseekV4ForCausalLM

from launch.benchmarks.cases import (
  ADAMW,
  CHUNK,
  DECODE,
  LOGITS_CHUNK,
  LOGITS_SINGLE,
  NEW_TOKENS,
  THREADS,
  WEIGHTS,
  Case,
  check_config,
  model_config,
  tokens_of,
)


def prepare(case: Case, folder: Path) -> tuple[Callable[[], Any], Callable[[int], Any], float] | None:
  """See `ours.prepare`; nothing is compiled."""
  torch.set_num_threads(THREADS)
  config = check_config() if case.kind in ("logits", "cached_logits") else model_config()
  settings = DeepseekV4Config(**config.to_hf())
  settings._attn_implementation = "eager"
  settings._experts_implementation = "eager" if case.variant == "loop" else "grouped_mm"
  model = DeepseekV4ForCausalLM(settings).float()
  with np.load(folder / WEIGHTS) as weights, torch.no_grad():
    model.load_state_dict({name: torch.from_numpy(x) for name, x in weights.items()})
  tokens = torch.from_numpy(tokens_of(case)).long()
  if case.kind == "train":
    run = _train(model, tokens, case.variant == "checkpointing")
  else:
    run = {DECODE: _decode, "cached_logits": _cached_logits}.get(case.kind, _forward)(model.eval(), tokens)
  if case.kind in ("logits", "cached_logits"):
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


def _decode(model, tokens):
  """A greedy reply to a prompt; logits of the last place only."""
  def run() -> dict[str, float]:
    cache, start = DynamicCache(config=model.config), time.perf_counter()
    with torch.inference_mode():
      for chunk in tokens.split(CHUNK, 1):
        logits = model(chunk, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
      prefilled = time.perf_counter()
      for _ in range(NEW_TOKENS):
        token = logits[:, -1:].argmax(-1)
        logits = model(token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
      logits[:, -1].argmax(-1).tolist()
    return {"prefill_seconds": prefilled - start, "decode_seconds": time.perf_counter() - prefilled}

  return run


def _cached_logits(model, tokens):
  """Logits of all places through the cache: most tokens in chunks, the last ones one by one."""
  def run(keep: bool = False):
    cache, single = DynamicCache(config=model.config), tokens.shape[1] - LOGITS_SINGLE
    parts = (*tokens[:, :single].split(LOGITS_CHUNK, 1), *tokens[:, single:].split(1, 1))
    with torch.no_grad():
      found = [model(part, past_key_values=cache, use_cache=True).logits for part in parts]
    return torch.cat(found, 1) if keep else None

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
