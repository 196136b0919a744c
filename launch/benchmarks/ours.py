"""What a worker of our side prepares: one device, the compiler option of the training step."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

import deepseek_v4 as dsv4
from deepseek_v4.config import DataConfig, ModelConfig, OptimizerConfig, RunConfig, TrainingConfig
from deepseek_v4.model.losses import next_token_targets
from deepseek_v4.training.state import TrainState, fresh_variables, optimizer_of
from deepseek_v4.training.step import compiler_options, make_train_step
from launch.benchmarks.cases import (
  ADAMW,
  CHUNK,
  DECODE,
  LOGITS_CHUNK,
  LOGITS_SINGLE,
  NEW_TOKENS,
  REMAT,
  WEIGHTS,
  Case,
  check_config,
  model_config,
  tokens_of,
)


def prepare(case: Case, folder: Path) -> tuple[Callable[[], Any], Callable[[int], Any], float] | None:
  """(pass that waits and returns its loss or None, matmul of `worker.matmul_rate`, seconds of compilation)."""
  if case.kind == "weights":
    write_weights(model_config(init_std=0.02, mhc_init="zero"), folder)
    return None
  config_of = check_config if case.kind in ("logits", "cached_logits") else model_config
  # Layers that are not scanned update their caches in place; so does launch.generate.
  policy = case.variant if case.kind == REMAT else "block" if case.variant == "remat" else "none"
  config = config_of(remat=policy,
                     scan_layers=case.kind not in (DECODE, "cached_logits"))
  with np.load(folder / WEIGHTS) as weights:
    variables = dsv4.from_hf_names(dict(weights), config)
  tokens = jnp.asarray(tokens_of(case))
  make = {"forward": _forward, "logits": _forward, "train": _full_step if case.variant == "muon" else _adamw,
          REMAT: _adamw, DECODE: _decode, "cached_logits": _cached_logits}[case.kind]
  run, compile_seconds = make(config, variables, tokens)
  if case.kind in ("logits", "cached_logits"):
    np.save(folder / f"logits {case.side}.npy", np.asarray(run(keep=True)))
    return None
  multiply = {n: _multiply(n) for n in (512, 2048)}
  return run, lambda n: multiply[n](), compile_seconds


def random_variables(config: ModelConfig) -> dict[str, Any]:
  """Random weights that make every term matter: what starts at zero is drawn, too. Hash tables from the model's own hash."""
  variables = fresh_variables(config, jax.random.key(0))
  rng = np.random.default_rng(0)

  def disturbed(path, x):
    small = path[-1].key in ("scale", "base", "sink", "position_bias")
    return x + 0.2 * rng.standard_normal(x.shape, np.float32) if small else x

  return variables | {"params": jax.tree_util.tree_map_with_path(disturbed, variables["params"])}


def write_weights(config: ModelConfig, folder: Path) -> None:
  """`random_variables` under transformers' names."""
  np.savez(folder / WEIGHTS, **dsv4.to_hf_names(random_variables(config), config))


def _compile(step: Callable, *arguments, **options) -> tuple[Any, float]:
  start = time.perf_counter()
  compiled = jax.jit(step, compiler_options=compiler_options(None), **options).lower(*arguments).compile()
  return compiled, time.perf_counter() - start


def _multiply(n: int) -> Callable[[], Any]:
  a, b = (jnp.asarray(np.random.default_rng(n).standard_normal(shape, np.float32)) for shape in ((2048, n), (n, n)))
  compiled, _ = _compile(jnp.matmul, a, b)
  return lambda: compiled(a, b).block_until_ready()


def _forward(config: ModelConfig, variables, tokens):
  """Logits of all places."""
  model = dsv4.DeepseekV4(config)
  compiled, compile_seconds = _compile(lambda variables, tokens: model.apply(variables, tokens).logits, variables, tokens)

  def run(keep: bool = False):
    logits = compiled(variables, tokens).block_until_ready()
    return logits if keep else None

  return run, compile_seconds


def _decode(config: ModelConfig, variables, tokens):
  """A greedy reply to a prompt, as a user asks for it."""
  model = dsv4.DeepseekV4(config)
  prompt, keys = np.asarray(tokens)[0].tolist(), jax.random.split(jax.random.key(0), 1)

  def run() -> dict[str, Any]:
    found = dsv4.generate(model, variables, [prompt], keys=keys, max_new_tokens=NEW_TOKENS + 1, temperature=0.0,
                          chunk_size=CHUNK)
    return {"prefill_seconds": found.prefill_seconds, "decode_seconds": found.decode_seconds, "tokens": found.tokens[0]}

  first, second = (parts["prefill_seconds"] + parts["decode_seconds"] for parts in (run(), run()))
  return run, max(0.0, first - second)


def _cached_logits(config: ModelConfig, variables, tokens):
  """Logits of all places through a cache: most tokens in chunks, the last ones one by one; each row alone, as it is timed:
  several rows have experts enough to be computed another way."""
  model = dsv4.DeepseekV4(config)
  step = jax.jit(lambda variables, tokens, cache: model.apply(variables, tokens, None, None, cache))

  def logits_of(row):
    cache, found = dsv4.init_cache(config, *row.shape), []
    single = row.shape[1] - LOGITS_SINGLE
    for part in np.split(row, [*range(LOGITS_CHUNK, single, LOGITS_CHUNK), *range(single, row.shape[1])], 1):
      out = step(variables, part, cache)
      cache = out.cache
      found.append(np.asarray(out.logits))
    return np.concatenate(found, 1)

  def run(keep: bool = False):
    logits = np.concatenate([logits_of(row) for row in np.split(tokens, len(tokens))])
    return logits if keep else None

  return run, 0.0


def _adamw(config: ModelConfig, variables, tokens):
  """Next-token loss over all places, its gradient and AdamW, in one donated step: what the other side does, too."""
  model = dsv4.DeepseekV4(config)
  optimizer = optax.adamw(ADAMW["learning_rate"], *ADAMW["betas"], weight_decay=ADAMW["weight_decay"])

  def loss(params, router, tokens):
    ones = jnp.ones_like(tokens)
    out = model.apply({"params": params, "router": router}, tokens, targets=next_token_targets(tokens, ones, ones))
    total, count = out.losses["next_token"]
    return total / count

  def step(state, inputs):
    params, moments = state
    value, gradients = jax.value_and_grad(loss)(params, *inputs)
    updates, moments = optimizer.update(gradients, moments, params)
    return (optax.apply_updates(params, updates), moments), value

  params = variables.pop("params")
  state, inputs = (params, jax.jit(optimizer.init)(params)), (variables["router"], tokens)
  return _stepping(state, inputs, *_compile(step, state, inputs, donate_argnums=0))


def _full_step(config: ModelConfig, variables, tokens):
  """The step of launch.train: documents, all losses, clipping, Muon, the router's bias, the check for finite values."""
  optimizer = OptimizerConfig(warmup_steps=0, learning_rate=ADAMW["learning_rate"])
  run_config = RunConfig(model=config, optimizer=optimizer,
                         data=DataConfig(sequence_length=tokens.shape[1], batch_size=1), training=TrainingConfig(steps=1000))
  params = variables.pop("params")
  opt_state = jax.jit(optimizer_of(run_config, params, None).init)(params)
  state = TrainState(jnp.zeros((), jnp.int32), params, variables.pop("router"), opt_state, jax.random.key(0))
  ones = jnp.ones_like(tokens)[None]
  batch = {"tokens": tokens[None], "segment_ids": ones, "loss_mask": ones,
           "positions": jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, None]}
  start = time.perf_counter()
  compiled = make_train_step(run_config).lower(state, batch).compile()
  compile_seconds = time.perf_counter() - start
  return _stepping(state, batch, lambda *a: _next_token(compiled(*a)), compile_seconds)


def _next_token(result):
  state, metrics = result
  return state, metrics["next_token"]


def _stepping(state, batch, compiled, compile_seconds):
  """A pass that trains on from the state it left."""
  held = [state]
  del state

  def run():
    state, loss = compiled(held.pop(), batch)
    held.append(jax.block_until_ready(state))
    return float(loss)

  return run, compile_seconds
