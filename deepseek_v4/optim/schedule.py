"""The learning rate: linear warm-up, constant, cosine at the end of the run (report 4.2.2)."""

from __future__ import annotations

from typing import Callable

import jax
import jax.numpy as jnp

from deepseek_v4.config import OptimizerConfig


def decay_start(config: OptimizerConfig, steps: int) -> int:
  """The first of `steps` updates (from 0) whose learning rate is on the cosine; `steps` itself where there is no cosine.

  From this update on the MTP loss has its final weight.

  Raises:
    ValueError: warm-up and cosine do not fit between `config.first_step` and `steps`.
  """
  if config.warmup_steps + config.decay_steps > steps - config.first_step:
    after = f" - optimizer.first_step = {config.first_step}" if config.first_step else ""
    raise ValueError(f"optimizer.warmup_steps + optimizer.decay_steps = {config.warmup_steps + config.decay_steps}: "
                     f"expected at most the run's steps = {steps}{after}")
  return steps - config.decay_steps


def make_schedule(config: OptimizerConfig, steps: int | None = None) -> Callable[[jax.typing.ArrayLike], jax.Array]:
  """Learning rate of update number `count`, an integer from 0, as a float32 scalar.

  Counted from `first_step`, update w - 1 is the first at the peak (w = warmup_steps), update 0 already moves by peak / w;
  the last update of the run has final_fraction * peak, and so has any later one.

  Args:
    config: Peak, lengths of warm-up and cosine, final fraction.
    steps: Updates in the run; None = unknown, which a schedule without cosine can be.

  Raises:
    ValueError: a cosine without `steps`, or warm-up and cosine do not fit into `steps`.
  """
  if steps is None and config.decay_steps:
    raise ValueError(f"steps = None: expected the length of the run, where optimizer.decay_steps = {config.decay_steps}")
  start = 0 if steps is None else decay_start(config, steps)

  def schedule(count: jax.typing.ArrayLike) -> jax.Array:
    done = jnp.asarray(count, jnp.float32) + 1  # exact to 16 million updates
    warm = jnp.maximum(done - config.first_step, 0.0) if config.first_step else done
    factor = jnp.minimum(warm / config.warmup_steps, 1.0) if config.warmup_steps else 1.0
    if config.decay_steps:
      progress = jnp.clip((done - start) / config.decay_steps, 0.0, 1.0)
      cosine = 0.5 * (1 + jnp.cos(jnp.pi * progress))
      factor *= config.final_fraction + (1 - config.final_fraction) * cosine
    return jnp.asarray(config.learning_rate * factor, jnp.float32)

  return schedule
